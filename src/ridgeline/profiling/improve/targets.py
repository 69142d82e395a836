"""What `improve` is pointed at: a configuration, a run left here, a served model, or a command.

::

    job.toml [section.key=value ...]          the configuration
    RUN_ID [section.key=value ...]            a run of train or profile: its resolved configuration, from its first step
    RUN_ID                                    a run of serve: its model and settings, under a load like the one it answered;
                                              a run of improve: its target again
    Served(...)                               a model to serve, under the load that is given
    python train.py ...                       anything else: a command
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ridgeline.errors import UserError
from ridgeline.profiling.improve.serving import Load, Served, ServeJob, from_run
from ridgeline.profiling.improve.trial import Job, OwnJob, Plan, UserJob
from ridgeline.runs import Run

_RUN_ID = re.compile(r"\d{8}-\d{6}(-|$)")


@dataclass(frozen=True)
class Target:
    """``words`` as given, a run by its id; with ``config`` tables, ``words[1:]`` are overrides of them. ``label`` names it
    where the words do not."""

    words: tuple[str, ...]
    config: Mapping[str, Any] | None = None
    served: Served | None = None
    load: Load | None = None
    parents: tuple[str, ...] = ()
    label: str = ""

    @property
    def own(self) -> bool:
        """Whether it is a configuration of ours."""
        return self.served is None and (
            self.config is not None or (bool(self.words) and self.words[0].endswith(".toml"))
        )

    @property
    def name(self) -> str:
        """For the run's name."""
        if self.label:
            return self.label
        if self.served is not None:
            return Path(self.served.model).name
        files = (Path(one).stem for one in self.words if one.endswith((".py", ".toml")))
        return next(files, Path(self.words[0]).name if self.words else "")

    def job(self, folder: Path, plan: Plan) -> Job:
        """The job whose runs go below ``folder``."""
        if self.served is not None:
            return ServeJob(self.served, self.load or Load(), folder, plan)
        if self.config is not None:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / "job.toml"
            file.write_text(to_toml(self.config), encoding="utf-8")
            return OwnJob(str(file), self.words[1:], folder, plan)
        return OwnJob(self.words[0], self.words[1:], folder, plan) if self.own else UserJob(self.words, folder, plan)

    def settings(self) -> dict[str, Any]:
        """For the run's configuration, from which :func:`resolve` makes the same target again."""
        served = {"served": asdict(self.served), "load": asdict(self.load or Load())} if self.served else {}
        return {"target": list(self.words), **served}


def resolve(target: Sequence[str] | Served, load: Load | None = None, runs_root: str | Path | None = None) -> Target:
    """Find out what ``target`` is.

    Raises:
        UserError: a run of a kind that cannot be improved, a load for something that does not serve.
    """
    if isinstance(target, Served):
        return Target(("serve", target.model), served=target, load=load)
    words = tuple(target)
    run = _run(words, runs_root)
    found = _of_run(run, words, runs_root) if run is not None else Target(words)
    if load is not None:
        if found.served is None:
            raise UserError("--load is for a served model: a run of serve, or -- ridgeline serve MODEL")
        found = replace(found, load=load)
    return found


def _run(words: tuple[str, ...], runs_root: str | Path | None) -> Run | None:
    """The run that the first word names, when it is no program and no file."""
    first = words[0] if words else ""
    named = bool(_RUN_ID.match(first)) or first.partition(":")[0] == "latest"
    if (Path(first) / "run.json").is_file() or (named and not Path(first).is_file() and not shutil.which(first)):
        return Run.open(first, runs_root)
    return None


def _of_run(run: Run, words: tuple[str, ...], runs_root: str | Path | None) -> Target:
    parents, label = (run.id,), str(run.info["name"])
    words = (run.id, *words[1:])  # what "latest" means changes
    if run.kind == "serve":
        if len(words) > 1:
            raise UserError(
                f"{words[1]}: a run of serve takes no overrides; give -- ridgeline serve MODEL with options"
            )
        served, load = from_run(run)
        return Target(words, served=served, load=load, parents=parents, label=label)
    config = run.config
    if run.kind in ("train", "profile") and "train" in config:
        return Target(words, config=config, parents=parents, label=label)
    if run.kind == "improve":
        if "served" in config:
            served, load = Served(**config["served"]), Load(**config["load"])
            return Target(words, served=served, load=load, parents=parents, label=label)
        again = resolve([*config["target"], *words[1:]], runs_root=runs_root)
        return replace(again, parents=parents)
    raise UserError(f"run {run.id} is of kind {run.kind}: improve takes a run of train, profile, serve or improve")


def to_toml(tables: Mapping[str, Any]) -> str:
    """A resolved configuration as TOML; keys without a value are left out, which means the default None."""
    lines: list[str] = []
    for section, table in tables.items():
        if isinstance(table, Mapping):
            lines += [f"[{section}]", *(line for key, value in table.items() for line in _lines(_key(key), value))]
    return "\n".join(lines) + "\n"


def _lines(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [line for key, inner in value.items() for line in _lines(f"{name}.{_key(key)}", inner)]
    return [f"{name} = {json.dumps(value, ensure_ascii=False)}"]


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
