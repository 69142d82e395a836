"""The folder of an unfinished build, and the description that decides whether two builds are the same.

``DATASET/.build/`` holds ``plan.json`` (the description), one ``read-NNNNN.shard`` and one ``tokens-NNNNN.npz`` per
shard, ``read.json`` once every source has been read, and the tokenizer. Each of them appears whole or not at all,
so that it is its own completion marker; the folder is removed when ``manifest.json`` stands beside it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from ridgeline.config import DataSection
from ridgeline.data.disk import REBUILD, make_folder, write_bytes, writing
from ridgeline.data.sources import SourceFile
from ridgeline.errors import JobError, UserError

FORMAT = 1
# Settings that no byte of the finished dataset depends on ...
FREE = ("path", "workers", "on_bad_record")
# ... and those that matter only while shards of a build are still to come.
WORK = ("shard_documents",)
# The table of fates that a build leaves here when it ends with no document left.
ENDED = "provenance.parquet"


@dataclass(frozen=True)
class Description:
    """Everything the bytes of a dataset depend on."""

    config: dict[str, Any]
    sources: list[dict[str, Any]]
    versions: dict[str, str]

    @classmethod
    def of(cls, section: DataSection, files: Sequence[SourceFile], tokenizer_digest: str | None) -> Description:
        """Describe a build of ``section`` over ``files``."""
        config = {key: value for key, value in section.model_dump(mode="json").items() if key not in FREE}
        config["tokenizer"]["digest"] = tokenizer_digest
        listed = [{"name": file.name, "bytes": file.bytes, "digest": file.digest} for file in files]
        versions = {"format": str(FORMAT), "tokenizers": version("tokenizers"), "unicode": unicodedata.unidata_version}
        return cls(config, listed, versions)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Description:
        """The inverse of :meth:`to_dict`."""
        return cls(dict(value["config"]), list(value["sources"]), dict(value["versions"]))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"config": self.config, "sources": self.sources, "versions": self.versions}

    @property
    def fingerprint(self) -> str:
        """160 bits over what decides the content of a dataset: configuration, sources, format."""
        config = {key: value for key, value in self.config.items() if key not in (*WORK, "name")}
        text = json.dumps([config, self.sources, self.versions], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()

    def difference(self, new: Description, finished: bool) -> str | None:
        """The first thing in which ``new`` differs, as a sentence; None when work can be shared."""
        skip = {"name", *WORK} if finished else {"name"}
        before, after = (_flat({k: v for k, v in d.config.items() if k not in skip}) for d in (self, new))
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                return f"data.{key} was {before.get(key)!r} and is now {after.get(key)!r}"
        changed = _changed_file(self.sources, new.sources)
        if changed is None:
            for key in sorted({*self.versions, *new.versions}):
                if self.versions.get(key) != new.versions.get(key):
                    return f"the version of {key} was {self.versions.get(key)} and is now {new.versions.get(key)}"
        return changed


class Workspace:
    """The ``.build`` folder of a dataset, held by one process at a time."""

    def __init__(self, dataset: Path) -> None:
        self.dataset = dataset
        self.path = dataset / ".build"
        self._lock: IO[bytes] | None = None

    def acquire(self) -> None:
        """Make the folder and hold it until :meth:`release` or the end of the process, however it ends.

        Raises:
            JobError: another process builds here.
        """
        import fcntl

        make_folder(self.path)
        with writing(self.path / "lock"):
            lock = open(self.path / "lock", "ab")  # noqa: SIM115 - held for the length of the build
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise JobError(f"another process is building {self.dataset}") from None
        self._lock = lock

    def release(self) -> None:
        """Let others build here; a folder that holds no work goes."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self.path.is_dir() and {p.name for p in self.path.iterdir()} <= {"lock"}:
            self.remove()

    def remove(self) -> None:
        """Delete all unfinished work."""
        shutil.rmtree(self.path, ignore_errors=True)

    def clear(self) -> None:
        """Delete all unfinished work, but keep holding the folder."""
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def shard(self, kind: str, number: int) -> Path:
        """Where shard ``number`` of ``"read"`` or ``"tokens"`` lies."""
        return self.path / f"{kind}-{number:05d}.{'shard' if kind == 'read' else 'npz'}"

    def load(self, name: str) -> Any | None:
        """A JSON file of the folder, or None.

        Raises:
            JobError: it is damaged.
        """
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise JobError(f"{file}: damaged; {REBUILD} starts anew") from None

    def save(self, name: str, value: Any) -> None:
        """Write a JSON file of the folder atomically."""
        write_bytes(self.path / name, json.dumps(value, indent=1, sort_keys=True).encode())

    def agree(self, new: Description) -> bool:
        """True when there is unfinished work for ``new``, False when there is none.

        Raises:
            UserError: there is unfinished work for something else; it names the changed field.
        """
        plan = self.load("plan.json")
        ended = (self.path / ENDED).is_file()
        if plan is None or ended or not any(self.path.glob("read-*.shard")):
            self.clear()  # no plan, no shard yet, or a build that ended with no document left
            return False
        refuse(Description.from_dict(plan).difference(new, finished=False), f"{self.dataset} holds an unfinished build")
        return True


def refuse(difference: str | None, where: str) -> None:
    """Raise :class:`UserError` when there is a difference."""
    if difference:
        raise UserError(f"{where} of another configuration: {difference}; use {REBUILD}, or another data.path")


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            out.update(_flat(item, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = item
    return out


def _changed_file(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> str | None:
    old, new = ({file["name"]: file["digest"] for file in files} for files in (before, after))
    for name in [*old, *new]:
        if name not in new:
            return f"source {name} is gone"
        if name not in old:
            return f"source {name} is new"
        if old[name] != new[name]:
            return f"source {name} has changed"
    if list(old) != list(new):
        return "the order of the sources has changed"
    return None
