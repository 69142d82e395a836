"""Whether a folder may take a dataset: nobody else's files are overwritten or deleted by a build."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ridgeline.data.dataset import FORMAT, MANIFEST
from ridgeline.data.ledger import SPLITS
from ridgeline.data.provenance import NAME
from ridgeline.data.tokenizing import COMPANIONS
from ridgeline.errors import UserError

WRITTEN = (
    MANIFEST,
    NAME,
    "tokenizer.json",
    *COMPANIONS,
    *(f"{split}{end}" for split in SPLITS for end in (".bin", ".idx")),
)
# What a build leaves in .build when it is cut off before its plan is there: what it cleared last time, half removed.
WORK = re.compile(r"lock|final|(read|tokens)-\d+\.(shard|npz)|read\.json|\..*\.tmp")


def refuse_foreign(folder: Path, rebuild: bool) -> None:
    """Raise :class:`UserError` naming the first file of somebody else that a build of ``folder`` would take.

    A folder with our manifest, or with the plan of an unfinished build, is ours. ``rebuild`` also takes one whose
    manifest is damaged when the rest of a dataset lies beside it.
    """
    work = folder / ".build"
    if (work / "plan.json").is_file() or _is_dataset(folder, rebuild):
        return
    found = [name for name in WRITTEN if (folder / name).exists()]
    if work.is_dir():
        left = {*WRITTEN}
        found += [
            f".build/{p.name}" for p in sorted(work.iterdir()) if p.name not in left and not WORK.fullmatch(p.name)
        ]
    if found:
        raise UserError(f"{folder} holds {found[0]}, which no build of ours left there; use another data.path")


def _is_dataset(folder: Path, rebuild: bool) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, RecursionError):
        return rebuild and all((folder / name).is_file() for name in (NAME, "tokenizer.json", "train.idx", "train.bin"))
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT
