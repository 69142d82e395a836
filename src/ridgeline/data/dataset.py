"""A finished dataset: its manifest and its splits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ridgeline.data.disk import REBUILD, digest
from ridgeline.data.ledger import SPLITS
from ridgeline.data.megatron import TokenFile, read_tokens
from ridgeline.errors import UserError, nearest

MANIFEST = "manifest.json"
FORMAT = "ridgeline-dataset"


@dataclass(frozen=True)
class Dataset:
    """A folder written by :func:`ridgeline.data.build`. Get one with :meth:`open`."""

    path: Path
    manifest: Mapping[str, Any]
    _opened: dict[str, TokenFile] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """Read the manifest of ``folder`` and see that every file is there in full size.

        Raises:
            UserError: no dataset there, an unfinished one, or a damaged one; the message says which.
        """
        path = Path(folder)
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if (path / ".build").is_dir():
                raise UserError(
                    f"dataset {path}: its build is not finished; `ridgeline data build` continues it"
                ) from None
            raise UserError(
                f"dataset {path}: no {MANIFEST} there; `ridgeline data build CONFIG` makes a dataset"
            ) from None
        except (ValueError, NotADirectoryError):
            raise UserError(f"dataset {path}: {MANIFEST} is damaged; {REBUILD} builds it again") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"dataset {path}: {MANIFEST} is not a dataset's")
        for name, entry in manifest["files"].items():
            size = (path / name).stat().st_size if (path / name).is_file() else -1
            if size != entry["bytes"]:
                what = "is missing" if size < 0 else f"has {size:,} bytes, not {entry['bytes']:,}"
                raise UserError(f"dataset {path}: {name} {what}; {REBUILD} builds it again")
        return cls(path, manifest)

    def verify(self) -> None:
        """Compare the checksum of every file.

        Raises:
            UserError: the first file that differs.
        """
        for name, entry in self.manifest["files"].items():
            if digest(self.path / name) != entry["digest"]:
                raise UserError(f"dataset {self.path}: {name} is not what was built (checksum differs)")

    def split(self, name: str) -> TokenFile:
        """The tokens of ``"train"``, ``"validation"`` or ``"test"``; a split may be empty.

        Raises:
            UserError: another name, or files that do not fit the manifest.
        """
        if name not in SPLITS:
            raise UserError(f"split '{name}': no such split{nearest(name, SPLITS)}")
        if name not in self._opened:  # opened once: a training step asks every time
            tokens = read_tokens(self.path / name)
            found, said = str(tokens.tokens.dtype), self.manifest["dtype"]
            if found != said:
                raise UserError(f"dataset {self.path}: {name}.idx says {found}, the manifest says {said}")
            self._opened[name] = tokens
        return self._opened[name]

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer: one more than the highest id."""
        return int(self.manifest["vocab_size"])

    @property
    def vocab_hash(self) -> str:
        """Datasets with equal hashes may be mixed."""
        return str(self.manifest["vocab_hash"])

    @property
    def end_token_id(self) -> int:
        """The token after every document."""
        return int(self.manifest["end_token_id"])

    @property
    def tokenizer_path(self) -> Path:
        """``tokenizer.json``."""
        return self.path / "tokenizer.json"

    @property
    def tokenizer_files(self) -> list[Path]:
        """Everything of the tokenizer that a model's folder needs."""
        return [self.path / name for name in self.manifest["tokenizer_files"]]

    @property
    def fingerprint(self) -> str:
        """Names the configuration and the sources this was built from."""
        return str(self.manifest["fingerprint"])

    def tokens(self, split: str) -> int:
        """How many tokens a split has, without opening it."""
        return int(self.manifest["splits"][split]["tokens"])
