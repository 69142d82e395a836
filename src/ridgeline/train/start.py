"""``train``: everything before the first process starts (data, ceilings, prediction, run folder), and after the last."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ridgeline.config import JobConfig, parse_config
from ridgeline.errors import JobError, UserError
from ridgeline.parallel.mesh import outer_world
from ridgeline.plan import calibration
from ridgeline.runs import Run
from ridgeline.train.checkpoint import PREFIX, folder_of, verify
from ridgeline.train.hold import hold
from ridgeline.train.launch import launch
from ridgeline.train.session import CHECKPOINTS, Session
from ridgeline.train.source import ensure_dataset
from ridgeline.train.worker import say_on_stderr

if TYPE_CHECKING:
    from ridgeline.profiling import ProfileSpec

Say = Callable[[str], None]
CALIBRATION_STEPS = 10  # steady steps a run needs before the planner learns from it

# What a checkpoint depends on: another value is another run, not a continuation.
FROZEN = ("model", "train.seed", "train.seq_len", "train.global_batch_size", "data.split", "data.tokenizer")


def train(
    job: JobConfig,
    *,
    run: Run | None = None,
    resume: str | None = None,
    profile: ProfileSpec | None = None,
    runs_root: str | Path | None = None,
    say: Say = say_on_stderr,
    progress: Any = None,
) -> Run:
    """Train ``job`` on ``job.parallel.procs`` processes of this machine and return its run.

    Args:
        run: write here; default a new run of kind ``train``. A run of kind ``profile`` takes only the profiled steps.
        resume: continue the run this names (id, prefix, folder, ``latest``) from its last good checkpoint, in place.
            With ``profile`` and no ``run``, the named run is left as it is and the profiled steps go to a new run of
            kind ``profile``.
        profile: record these steps.
        say: told one line at a time what people should know.
        progress: passed to the data room when the dataset has to be built first.

    Raises:
        UserError: the job does not fit its data, the resumed run, or this machine.
        JobError: the job failed. The run is closed as failed and can be resumed from its last checkpoint.
    """
    world = outer_world()
    if world is not None and world[1] > 1:
        return _train_as_rank(_with_procs(job, world[1]), run, resume, profile, runs_root, say, progress)
    with ExitStack() as held:
        session = _prepare(job, held, run, resume, profile, runs_root, say, progress)
        run = Run.open(session.run)
        with _closing(run):
            if job.parallel.procs > 1:
                launch(session.write(run.path), job.parallel.procs)
            else:
                from ridgeline.train.session import run_session

                run_session(session, say)
        return _finished(run)


def continued_config(run: Run, overrides: list[str]) -> JobConfig:
    """The configuration of a run to resume, with ``overrides``.

    Raises:
        UserError: the run is not a training run or holds no configuration, or an override is not valid.
    """
    _require_training_run(run)
    if not run.config:
        raise UserError(f"run {run.id} has no configuration: it can not be resumed")
    return parse_config(run.config, overrides, where=f"run {run.id}")


def _require_training_run(run: Run) -> None:
    if run.kind != "train":
        raise UserError(f"resume {run.id}: is a run of kind {run.kind}, not train")


def check_continues(run: Run, job: JobConfig) -> None:
    """Raise :class:`UserError` when ``job`` differs from ``run`` in something a checkpoint depends on."""
    before, now = run.config, job.model_dump(mode="json")
    for name in FROZEN:
        old, new = _get(before, name), _get(now, name)
        if old != new:
            raise UserError(f"resume {run.id}: {_difference(name, old, new)}; start a new run for that")


def check_unfinished(run: Run, job: JobConfig) -> None:
    """Raise :class:`UserError` when ``run`` already holds as many steps as ``job`` asks for."""
    root, asked = run.path / CHECKPOINTS, job.train.steps
    steps = [folder.name.removeprefix(PREFIX) for folder in root.glob(f"{PREFIX}*")]
    taken = max((int(step) for step in steps if step.isdigit()), default=0)
    # A run that stopped at its last step without ending may lack its export, and a damaged checkpoint is taken again.
    ended = run.info["status"] == "done" and verify(folder_of(root, taken)) is None
    if taken > asked or (taken == asked and ended):
        more = f"train.steps=N with N above {taken} goes on"
        raise UserError(f"resume {run.id}: is at step {taken} and train.steps is {asked}: nothing to do; {more}")


def _run_for(job: JobConfig, held: ExitStack, source: Run | None, only_profile: bool, root: str | Path | None) -> Run:
    config = job.model_dump(mode="json")
    if source is None:
        run = Run.create("train", job.data.name, config=config, root=root)
        held.enter_context(hold(run.path))
        return run
    if only_profile:
        return Run.create("profile", source.info["name"], config=config, parents=[source.id], root=root)
    _require_training_run(source)
    check_unfinished(source, job)
    held.enter_context(hold(source.path))
    source.reopen()
    source.save_json("config.json", config)
    return source


def _prepare(
    job: JobConfig,
    held: ExitStack,
    run: Run | None,
    resume: str | None,
    profile: ProfileSpec | None,
    runs_root: str | Path | None,
    say: Say,
    progress: Any,
) -> Session:
    """Check, make the run, build the data if needed, and store limits and prediction, before any process starts.

    The run is entered into ``held``: no other process can train it until that closes.
    """
    source = Run.open(resume, runs_root) if resume is not None else None
    if source is not None:
        check_continues(source, job)
    only_profile = profile is not None and (source is not None if run is None else run.kind == "profile")
    run = run or _run_for(job, held, source, only_profile, runs_root)
    with _closing(run):
        folder = ensure_dataset(job.data, say, progress)
        _store_limits(job, run, folder)
    return Session(
        job=job.model_dump(mode="json"),
        run=str(run.path.resolve()),
        dataset=str(folder.resolve()),
        source=str(source.path.resolve()) if source is not None else None,
        profile=dataclasses.asdict(profile) if profile is not None else None,
        profile_only=only_profile,
    )


def _train_as_rank(job: JobConfig, *preparation: Any) -> Run:
    """One rank of a world that torchrun made: rank 0 prepares, the others receive the session."""
    import torch.distributed as dist

    from ridgeline.parallel.mesh import joined
    from ridgeline.train.session import device_type, run_session

    say = preparation[-2]
    with joined(device_type()) as layout, ExitStack() as held:
        box: list[Session | Exception | None] = [None]
        if layout.is_main:
            try:
                box = [_prepare(job, held, *preparation)]
            except (UserError, JobError) as error:
                box = [error]
        dist.broadcast_object_list(box, src=0)
        if not isinstance(box[0], Session):
            raise box[0] or JobError("rank 0 sent no session")
        session = box[0]
        with _closing(Run.open(session.run)) if layout.is_main else nullcontext():
            run_session(session, say)
    return _finished(Run.open(session.run)) if layout.is_main else Run.open(session.run)


@contextmanager
def _closing(run: Run) -> Iterator[None]:
    """Close the run as failed or interrupted when the block does not end well."""
    try:
        yield
    except KeyboardInterrupt:
        Run.open(run.path).finish("interrupted")
        raise
    except OSError as error:
        reason = "disk full" if error.errno == errno.ENOSPC else str(error)
        _fail(run, reason)
        raise JobError(f"training stopped: {reason}") from error
    except Exception as error:
        _fail(run, str(error))
        raise


def _with_procs(job: JobConfig, procs: int) -> JobConfig:
    raw = job.model_dump(mode="json")
    return parse_config(
        {**raw, "parallel": {**raw["parallel"], "procs": procs}}, where=f"torchrun with {procs} processes"
    )


def _store_limits(job: JobConfig, run: Run, folder: Path) -> None:
    """Write the device's ceilings and the planner's prediction into the run before anything is measured."""
    from ridgeline.data import Dataset
    from ridgeline.hardware import ceilings
    from ridgeline.train.limits import prediction
    from ridgeline.train.state import model_config

    config = model_config(job, Dataset.open(folder).vocab_size)
    limits = ceilings()
    run.save_json("ceilings.json", limits.to_dict())
    run.save_json("prediction.json", prediction(job, config, limits))


def _finished(run: Run) -> Run:
    """The run as its rank 0 left it. Workers that were stopped before they could close it leave it interrupted."""
    run = Run.open(run.path)
    if run.info["status"] == "running":
        run.finish("interrupted")
    if run.kind == "train" and run.info["status"] == "done" and run.summary["steady_steps"] >= CALIBRATION_STEPS:
        calibration.record(run)
    return run


def _fail(run: Run, message: str) -> None:
    fresh = Run.open(run.path)
    fresh.finish("failed", (message.splitlines() or ["failed"])[0][:500])


def _get(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _difference(name: str, old: Any, new: Any) -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        key = next(key for key in new if old.get(key) != new.get(key))
        return _difference(f"{name}.{key}", old.get(key), new.get(key))
    return f"{name} was {old!r} and is now {new!r}"
