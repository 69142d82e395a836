"""What is said of an observation: the verdict in a sentence, advice per finding, the JSON document, the budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ridgeline.compiler.doctor.model import Finding, Observation, Trial

LEAST_SHARE = 0.01
"""Losses below this share of the run are said to be small."""
BUDGETED = ("breaks", "recompiles", "fallbacks")


def verdict(observation: Observation) -> str:
    """One or two sentences: does compiling pay, and what is lost where."""
    return " ".join(filter(None, (_speed(observation), _losses(observation))))


def _speed(observation: Observation) -> str:
    timing = observation.timing
    if timing is None:
        return ""
    if abs(timing.gain_seconds) <= timing.floor_seconds:
        return "A compiled step takes as long as an eager one, within the noise."
    ratio = timing.eager_seconds / timing.compiled_seconds
    if ratio < 1:
        return f"A compiled step is slower than an eager one: {1 / ratio:.2f} times as long."
    pays = f"compiling pays from step {timing.break_even_step} on" if timing.break_even_step else "compiling never pays"
    return f"A compiled step is {ratio:.2f} times as fast as an eager one; {pays}."


def _losses(observation: Observation) -> str:
    if not observation.findings:
        return "Nothing to fix: no graph breaks, no recompilations, nothing silent."
    counted = [
        _plural(observation.breaks, "graph break"),
        _plural(observation.recompiles, "recompilation"),
        _plural(observation.fallbacks, "silent event"),
    ]
    told = [one for one in counted if one] or [_plural(len(observation.findings), "finding")]
    worst = observation.findings[0]
    only = len(told) == 1 and told[0].startswith("1 ")
    text = f"{_and(told)} {'loses' if only else 'lose'} up to {_seconds(sum(one.lost_seconds for one in observation.findings))}"
    if worst.lost_seconds < LEAST_SHARE * observation.wall_seconds:
        return f"{text} of {_seconds(observation.wall_seconds)}: little."
    where = f" at {Path(worst.file).name}:{worst.line}" if worst.file else ""
    return f"{text} of {_seconds(observation.wall_seconds)}, most by {NAMES[worst.kind]}{where}."


NAMES = {
    "graph_break": "a graph break",
    "recompile": "recompiling",
    "recompile_limit": "running in eager after the recompile limit",
    "backend_fallback": "a backend that fell back",
    "precision_lowered": "lowered precision",
    "cudagraphs_skipped": "CUDA graphs that were skipped",
    "guard_cost": "guards",
    "compile_failed": "a compilation that failed",
    "cache_miss": "a cache that missed",
    "slower_than_eager": "compiled code slower than eager",
    "not_paid_back": "compiling itself",
    "rank_divergence": "a rank that the others wait for",
}


def _plural(count: int, name: str) -> str:
    return "" if not count else f"{count} {name}{'s' if count > 1 else ''}"


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def advice(finding: Finding) -> str:
    """What to try, one line; "" when only a person can know."""
    detail = finding.detail
    if finding.kind == "graph_break":
        return _break_advice(finding)
    if finding.kind in ("recompile", "recompile_limit"):
        return _recompile_advice(str(detail.get("what", "")), str(detail.get("source", "")))
    texts = {
        "backend_fallback": "unset torch._dynamo.config.suppress_errors, or ask the backend why it refused the graph",
        "precision_lowered": "ask the backend for fp32, or check that the result is still good enough",
        "cudagraphs_skipped": "drop mode='reduce-overhead', or remove what the reason names",
        "guard_cost": "compile a larger region, or torch.compiler.skip_guard_on_all_nn_modules_unsafe for frozen models",
        "slower_than_eager": "compile a larger or another region; too little is computed per call",
        "not_paid_back": "keep the cache between runs (TORCHINDUCTOR_CACHE_DIR), or compile one block (--compile)",
        "cache_miss": "name the reason with TORCH_LOGS=+torch._inductor.codecache",
        "rank_divergence": "give every rank the same shapes, or torch._dynamo.config.enable_guard_collectives",
    }
    return texts.get(finding.kind, "")


def _break_advice(finding: Finding) -> str:
    by_code = {
        "GB0170": "replace the branch by torch.where or torch.cond, or move the decision out of the compiled function",
        "GB0025": "remove the call of torch._dynamo.graph_break()",
        "GB0124": "torch._dynamo.config.capture_scalar_outputs = True, or keep the value a tensor",
        "GB0036": "torch._dynamo.config.capture_dynamic_output_shape_ops = True, or a mask of fixed size",
    }
    if "print" in finding.code:
        return "move the print out, or add it to torch._dynamo.config.reorderable_logging_functions"
    if finding.detail.get("gb") in by_code:
        return by_code[str(finding.detail["gb"])]
    hints = [one for one in finding.detail.get("hints", ()) if "may be possible to write" not in one]
    return str(hints[0])[:200] if hints else ""


def _recompile_advice(what: str, source: str) -> str:
    if what in ("size", "stride"):
        base = source.split(".size()")[0].split(".stride()")[0]
        return f"torch._dynamo.mark_dynamic({base}, dim), dynamic=True, or pad to one size"
    if what == "value" and "." in source:
        return "torch._dynamo.config.allow_unspec_int_on_nn_module = True, or keep the counter in a tensor"
    if what == "global state":
        return "call it under one state: one compiled function for training, another for inference"
    if what in ("type", "identity", "backend"):
        return "make the object once, outside of the loop"
    return "make it a tensor, or call with the same value"


def document(
    observation: Observation, trials: Iterable[Trial] = (), after: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What ``--json`` prints. Fields of a fix are null when none was tried; of several trials the kept one counts."""
    by_key: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        by_key.setdefault(trial.finding.key, []).append(trial)
    return {
        "verdict": verdict(observation),
        "findings": [_finding(one, by_key.get(one.key, [])) for one in observation.findings],
        "before": observation.summary(),
        "after": dict(after) if after is not None else None,
        "frames": [one.to_dict() for one in observation.frames],
        "entries": observation.entries,
        "notes": observation.notes,
    }


def _finding(finding: Finding, trials: list[Trial]) -> dict[str, Any]:
    best = max(trials, key=lambda one: (one.kept, one.gain_seconds or 0.0), default=None)
    own: dict[str, Any] = {**finding.to_dict(), "advice": advice(finding)}
    fields = {"fix": "fix", "kept": "kept", "why": "why", "error": "error", "gain": "gain_seconds"}
    own.update({name: getattr(best, attribute) if best else None for name, attribute in fields.items()})
    if best is not None and not best.fix:  # a reason why there is no fix
        own.update(fix=None, kept=None)
    own["trials"] = [{name: value for name, value in one.to_dict().items() if name != "finding"} for one in trials]
    return own


def over_budget(observation: Observation, budget: Mapping[str, int]) -> list[str]:
    """A line for each of ``breaks``, ``recompiles`` and ``fallbacks`` that exceeds its budget."""
    counts = {name: int(getattr(observation, name)) for name in BUDGETED}
    return [f"{counts[name]} {name}, {most} allowed" for name, most in budget.items() if counts[name] > most]
