"""Runs a target under the doctor, in processes of its own, and puts together what they wrote.

::

    1. observed   an empty cache: what a first start pays, every event with its reason
    2. timed      the cache of 1: what a second start pays; eager and compiled steps alternate; no tracing

A program that does something else on its second run (it resumes from a checkpoint) is timed on what that run does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ridgeline.compiler.doctor.breaks import code_line
from ridgeline.compiler.doctor.model import Finding, Observation, Target, Timing, ranked
from ridgeline.compiler.doctor.ranks import compare_ranks
from ridgeline.compiler.doctor.timing import break_even
from ridgeline.errors import JobError, UserError, nearest
from ridgeline.profiling.improve import process

INJECTION = Path(__file__).parent / "injection"
SPEC_VARIABLE = "RIDGELINE_DOCTOR_SPEC"
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
REFUSED = "ridgeline-doctor-refused: "
KNOWN_FAILURES = {
    r"InvalidCxxCompiler|No working C\+\+ compiler": "no C++ compiler: Inductor needs g++ or clang++ on PATH, or CXX",
    r"Python\.h: No such file": "no Python headers: Inductor needs Python.h (python3-dev)",
    r"No space left on device": "the disk is full",
}
"""What Inductor's errors mean, by pattern of the log."""


@dataclass(frozen=True)
class Plan:
    """How a target is run. ``timeout`` is in seconds, for each run. ``cache`` is Inductor's folder, a fresh one when
    None. ``hooks`` are ``module:function`` called in the program with the specification, ``data`` goes with it.
    ``backend`` compiles what ``--compile`` names."""

    trace: bool = True
    measure: bool = False
    timeout: float = 1800.0
    cache: Path | None = None
    hooks: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    backend: str = "inductor"


@dataclass
class Outcome:
    """One run: an observation per rank, in order of ranks; ``guards`` by rank and compile id."""

    observations: list[Observation]
    guards: list[dict[str, list[str]]]
    seconds: float
    log: Path


def observe_target(target: Target, folder: Path, plan: Plan | None = None) -> Outcome:
    """Run ``target`` once under the doctor; its output goes to ``folder/log.txt``.

    Raises:
        UserError: torch is not supported, nothing is ever compiled, a path to compile is not there.
        JobError: the program failed, was killed, or took too long.
    """
    plan = plan or Plan()
    folder = folder.resolve()
    folder.mkdir(parents=True)
    cache = plan.cache or folder / "cache"
    began = time.monotonic()
    try:
        code = process.run(target.command, _environment(folder, cache, target, plan), folder / "log.txt", plan.timeout)
    finally:
        if plan.cache is None:
            shutil.rmtree(cache, ignore_errors=True)
    seconds = time.monotonic() - began
    documents = _documents(folder)
    _refuse(folder, target, documents, code)
    compiled = [one for one in documents if one["observation"]["entries"]]
    _check_compiled(target, documents, compiled)
    observations = [Observation.from_dict(one["observation"]) for one in compiled]
    return Outcome(observations, [one["guards"] for one in compiled], seconds, folder / "log.txt")


def _environment(folder: Path, cache: Path, target: Target, plan: Plan) -> dict[str, str]:
    spec = {
        "folder": str(folder),
        "trace": plan.trace,
        "measure": plan.measure,
        "hooks": list(plan.hooks),
        "compile_paths": list(target.compile_paths),
        "backend": plan.backend,
        "deadline": time.time() + plan.timeout + 30,
        **plan.data,
    }
    (folder / "spec.json").write_text(json.dumps(spec, default=str), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(INJECTION), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, SPEC_VARIABLE: str(folder / "spec.json"), CACHE_VARIABLE: str(cache)}
    return {**os.environ, **own}


def _documents(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("rank*.json")]
    return sorted(found, key=lambda one: (one["observation"]["rank"], -one["observation"]["wall_seconds"]))


def _refuse(folder: Path, target: Target, documents: list[dict[str, Any]], code: int) -> None:
    """Everything that is the program's end and not its result, one line each."""
    refused = next(folder.glob("refused-*"), None)
    if refused is not None:
        raise UserError(refused.read_text(encoding="utf-8"))
    text = _tail(folder / "log.txt")
    if code == 2 and REFUSED in text:
        raise UserError(text.rpartition(REFUSED)[2].splitlines()[0])
    if code != 0:
        raise JobError(_why(folder, target, documents, code))
    broken = next(folder.glob("broken-*"), None)
    if broken is not None:
        raise JobError(f"the doctor failed in {target.name}: {broken.read_text(encoding='utf-8')}")
    if not any(folder.glob("loaded-*")):
        raise UserError(f"{target.name} never imported torch, or runs a Python that ignores its environment (-I, -E)")
    if not documents:
        raise JobError(f"{target.name} ended without a word: exit code 0, but nothing was written at its exit")


def _why(folder: Path, target: Target, documents: list[dict[str, Any]], code: int) -> str:
    """Why a program failed, with the place when it was the compiler."""
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        name = signal.Signals(number).name if number in list(signal.Signals) else "unknown"
        return f"{target.name} was killed by signal {number} ({name})"
    text = _tail(folder / "log.txt")
    for pattern, meaning in KNOWN_FAILURES.items():
        if re.search(pattern, text):
            return f"{target.name} failed: {meaning}"
    for one in documents:
        for finding in one["observation"]["findings"]:
            if finding["kind"] == "compile_failed":
                place = f" at {finding['file']}:{finding['line']}" if finding["file"] else ""
                return f"{target.name} failed while compiling{place}: {finding['reason']}"
    return f"{target.name} ended with exit code {code}: {process.last_words(folder / 'log.txt')}"


def _tail(log: Path, most: int = 1 << 20) -> str:
    """The end of a log, which may be of any size."""
    with open(log, "rb") as file:
        file.seek(max(log.stat().st_size - most, 0))
        return file.read().decode("utf-8", errors="replace")


def _check_compiled(target: Target, documents: list[dict[str, Any]], compiled: list[dict[str, Any]]) -> None:
    missing = {path for one in documents for path in one.get("unresolved", ())}
    missing -= {path for one in compiled for path in target.compile_paths if path not in one.get("unresolved", ())}
    if missing:
        names = {name for one in documents for name in one["seen_names"]}
        path = sorted(missing)[0]
        hint = nearest(path.split(".")[0], names) if names else " (no module was ever called)"
        raise UserError(f"--compile {path}: not found in {target.name}{hint}")
    if compiled:
        return
    if any(one["compiled"] for one in documents):
        raise UserError(f"{target.name} calls torch.compile, but never what it returned: nothing was compiled")
    raise UserError(f"{target.name} never calls torch.compile: name what to compile, such as --compile model")


def diagnose(
    target: Target, folder: Path, plan: Plan | None = None, *, timing: bool = True, say: Callable[[str], None] = print
) -> Observation:
    """Both runs, and the ranks compared. The observation is rank 0's, with what other ranks make it wait for.

    Without ``timing`` only the observed run is made.

    Raises:
        UserError, JobError: as :func:`observe_target`; a timed run that fails is said, and leaves the timing out.
    """
    plan = plan or Plan()
    check_cache_folder()
    cache = plan.cache or folder.resolve() / "cache"
    say(f"{target.name}: first run, with an empty cache, observed")
    try:
        first = observe_target(target, folder / "observed", replace(plan, cache=cache, trace=True, measure=False))
        observation = first.observations[0]
        observation.findings = ranked([*observation.findings, *compare_ranks(first.observations, first.guards)])
        if timing:
            say(f"{target.name}: second run, from the cache, eager and compiled steps in turn")
            timed = replace(plan, cache=cache, trace=False, measure=True, timeout=plan.timeout)
            try:
                second = observe_target(target, folder / "timed", timed).observations[0]
            except (UserError, JobError) as error:
                observation.notes.append(f"not timed: the second run differs: {error}")
            else:
                _add_timing(observation, second)
    finally:
        if plan.cache is None:
            shutil.rmtree(cache, ignore_errors=True)
    return observation


def _add_timing(first: Observation, second: Observation) -> None:
    """What the second run showed, in the first one's observation."""
    first.warm_caches = second.caches
    first.findings = ranked([*first.findings, *_cache_misses(second)])
    timing = second.timing
    if timing is None:
        first.notes.append("not timed: too few steps without compiling (15 or so are needed)")
        return
    timing.cold_seconds, timing.warm_seconds = first.start_seconds, second.start_seconds
    timing.break_even_step = break_even(timing.cold_seconds, timing)
    timing.break_even_warm_step = break_even(timing.warm_seconds, timing)
    first.timing = timing
    first.findings = ranked([*first.findings, *_not_worth_it(first, timing)])


def _not_worth_it(first: Observation, timing: Timing) -> list[Finding]:
    """Compiled steps that are slower, or too few of them to pay for compiling. Nothing between the floors."""
    entry, gain = first.entries[0], timing.gain_seconds
    lost = first.start_seconds - max(gain, 0.0) * first.steps
    if gain < -timing.floor_seconds:
        kind, lost = "slower_than_eager", -gain * first.steps
        reason = f"a step takes {timing.compiled_seconds / timing.eager_seconds:.2f} times as long as in eager"
    elif timing.break_even_step is None:
        kind, reason = "not_paid_back", "compiling never pays: a step is not faster than in eager beyond the noise"
    else:
        kind = "not_paid_back"
        reason = f"compiling pays from step {timing.break_even_step} on, this run has {first.steps}"
    if lost <= 0:
        return []
    code = code_line(entry["file"], entry["line"])
    return [Finding(kind, entry["file"], entry["line"], code, reason, entry["name"], 1, first.steps, lost)]


def _cache_misses(second: Observation) -> list[Finding]:
    """What the second start compiled again although the first had left its cache."""
    found = []
    for frame in second.frames:
        misses = frame.cache.get("graph_misses", 0)
        if misses and not frame.cache.get("graph_hits"):
            lost = frame.phases.get("inductor", 0.0) + frame.phases.get("codegen", 0.0)
            what = "backward" if not frame.forward else "forward"
            reason = f"{what}, compile id {frame.compile_id}: not found in the cache by the next start"
            found.append(
                Finding("cache_miss", frame.file, frame.line, "", reason, frame.function, misses, 0, lost, frame.cache)
            )
    return found


def check_cache_folder() -> None:
    """The folder that Inductor will use outside of the doctor too.

    Raises:
        UserError: it cannot be written.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if not named:
        return
    folder = Path(named)
    existing = next((one for one in (folder, *folder.parents) if one.exists()), folder)
    if not existing.is_dir():
        raise UserError(f"{CACHE_VARIABLE}={named}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{CACHE_VARIABLE}={named}: the folder cannot be written, so every start compiles anew")
