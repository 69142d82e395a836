"""One training session of one process: join the group, build or restore the state, train, leave the artefact.

A session is described by plain data so that a launched process can read it from the run folder.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ridgeline.config import JobConfig, parse_config
from ridgeline.errors import JobError
from ridgeline.hardware import Ceilings
from ridgeline.parallel.collectives import Collectives
from ridgeline.parallel.mesh import Layout, joined
from ridgeline.plan import compare
from ridgeline.runs import Run, write_atomic
from ridgeline.train import checkpoint, loop
from ridgeline.train.export import export
from ridgeline.train.interrupt import StopRequest
from ridgeline.train.limits import limits
from ridgeline.train.optimizer import set_applied_steps
from ridgeline.train.record import Recorder
from ridgeline.train.source import Batches
from ridgeline.train.state import TrainState, build_state, model_config

if TYPE_CHECKING:
    from ridgeline.compiler.blocks import CompileWatch

SESSION_FILE = "session.json"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Session:
    """What every process of the job must know. ``source`` is the run folder whose checkpoint is loaded, if any.

    ``profile`` holds the fields of a ProfileSpec. A ``profile_only`` session takes the profiled steps and leaves
    neither checkpoint nor model.
    """

    job: dict[str, Any]
    run: str
    dataset: str
    source: str | None = None
    profile: dict[str, Any] | None = None
    profile_only: bool = False

    @property
    def config(self) -> JobConfig:
        """The validated configuration."""
        return parse_config(self.job, where="session")

    def write(self, folder: Path) -> Path:
        """Save as JSON for launched processes."""
        file = folder / SESSION_FILE
        write_atomic(file, json.dumps(asdict(self), indent=1))
        return file

    @classmethod
    def read(cls, file: str | Path) -> Session:
        """The inverse of :meth:`write`."""
        return cls(**json.loads(Path(file).read_text(encoding="utf-8")))


def run_session(session: Session, say: Callable[[str], None]) -> None:
    """Train in this process, alone or as one rank. Rank 0 writes the run and closes it as done or interrupted."""
    job, run = session.config, Run.open(session.run)
    with StopRequest() as stop, _watched(job) as watch, _quiet(), joined(device_type()) as layout:
        say = say if layout.is_main else _silent
        trainer = _prepare(session, job, run, layout, stop, watch, say)
        try:
            status = _train(session, trainer, say)
        finally:
            if trainer.recorder is not None:
                trainer.recorder.close()
        if layout.is_main:
            run.finish(status)


def device_type() -> str:
    """The kind of device this machine trains on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _prepare(
    session: Session,
    job: JobConfig,
    run: Run,
    layout: Layout,
    stop: StopRequest,
    watch: CompileWatch | None,
    say: Callable[[str], None],
) -> loop.Trainer:
    batches = Batches.open(session.dataset, job.train)
    config = model_config(job, batches.dataset.vocab_size)
    state = build_state(job, config, layout)
    if session.source is not None:
        _restore(state, Path(session.source), batches, say)
    ceilings = Ceilings.from_dict(run.load_json("ceilings.json") or {})
    return loop.Trainer(
        job=job,
        layout=layout,
        world=Collectives(layout.mesh.get_group()),
        state=state,
        batches=batches,
        limits=limits(job, config, ceilings, layout.world_size, layout.nodes),
        run=run,
        stop=stop,
        watch=watch,
        recorder=Recorder(run, state.step) if layout.is_main else None,
    )


def _train(session: Session, trainer: loop.Trainer, say: Callable[[str], None]) -> str:
    started = time.perf_counter()
    root = trainer.run.path / CHECKPOINTS
    with _profiler(session, trainer) as profiler:
        if session.profile_only:
            status = loop.run_steps(trainer, trainer.state.step + profiler.spec.total_steps, profiler, say)
        else:
            status = loop.run_steps(trainer, trainer.job.train.steps, profiler, say, root)
    if status == "done" and not session.profile_only:
        loop.validate(trainer)
        export(trainer.state, trainer.batches.dataset, trainer.run.artifact("model"), trainer.layout)
    if trainer.recorder is not None:
        trainer.run.summarize(**loop.summary(trainer, time.perf_counter() - started))
        _compare_with_plan(trainer.run)
    return status


def _compare_with_plan(run: Run) -> None:
    """Keep what was predicted beside what was measured."""
    prediction = run.load_json("prediction.json")
    if prediction is not None:
        run.save_json("comparison.json", compare(prediction, run.summary))


def _restore(state: TrainState, source: Path, batches: Batches, say: Callable[[str], None]) -> None:
    """Load the newest good checkpoint of the run folder ``source``.

    Raises:
        JobError: all checkpoints are damaged, or they were written for another dataset.
    """
    found = checkpoint.find_agreed(source / CHECKPOINTS)
    if found is None:
        say(f"run {source.name} has no checkpoint yet: starting from its first step")
        return
    for line in found.damaged:
        say(f"checkpoint {line}: using {found.path.name} instead")
    saved = found.manifest["dataset"]
    if saved != batches.dataset.fingerprint:
        raise JobError(
            f"checkpoint {found.path} was trained on dataset {saved}, {batches.dataset.fingerprint} is there now"
        )
    checkpoint.load(state.tensors(), found)
    state.step, state.applied = found.step, int(found.manifest["applied"])
    set_applied_steps(state.optimizer, state.applied)
    say(f"resuming from {found.path.name}")


@contextmanager
def _watched(job: JobConfig) -> Iterator[CompileWatch | None]:
    """A watch on the compiler when it is used; without it dynamo is not even imported."""
    if not job.train.compile:
        yield None
        return
    from ridgeline.compiler.blocks import CompileWatch

    with CompileWatch() as watch:
        yield watch


@contextmanager
def _quiet() -> Iterator[None]:
    """FSDP2 warns of views that an in-place op could break; nothing here works in place on a module's output."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
        yield


@contextmanager
def _profiler(session: Session, trainer: loop.Trainer) -> Iterator[Any]:
    if session.profile is None:
        yield None
        return
    from ridgeline.profiling import ProfileSpec, StepProfiler

    folder = trainer.run.artifact("traces")
    layout = trainer.layout
    spec = ProfileSpec(**session.profile)
    with StepProfiler(
        spec, folder, layout.rank, world=layout.world_size, fingerprint=fingerprint(session.job)
    ) as profiler:
        yield profiler


def fingerprint(job: dict[str, Any]) -> str:
    """Short hash of a resolved configuration."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]


def _silent(message: str) -> None:
    pass
