"""Hugging Face-layout folders: config.json, ``*.safetensors`` (sharded past a size), tokenizer files.

No pickle is ever read. A folder is written under a temporary name and renamed, so it is whole or absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ridgeline.errors import JobError, UserError
from ridgeline.models.config import DecoderConfig
from ridgeline.models.decoder import Decoder
from ridgeline.models.hf_config import load_config, to_hf_config
from ridgeline.models.names import gather, hf_state_dict

SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# Everything `save` writes: a folder that holds another file is not ours to replace.
WRITTEN = {"config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES}
WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(path: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu") -> Decoder:
    """Load a folder, or a model of the Hugging Face hub by its id (``org/name``).

    ``dtype`` None keeps the stored one (the widest, when several are stored); names are bf16, fp16, fp32.
    Raises `UserError` naming the field or tensor that does not fit.
    """
    folder = find_folder(path)
    config = load_config(folder)
    with _tensors(folder) as (index, read):
        wanted = parse_dtype(dtype) or _widest(read(name).dtype for name in index)
        try:
            state = gather(index, read, config, wanted)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.load_state_dict({name: tensor.to(device) for name, tensor in state.items()}, assign=True)
    decoder.init_buffers(device)
    return decoder.eval()


def find_folder(path: str | Path) -> Path:
    """The local folder of ``path``; a hub id is fetched with ``huggingface_hub`` when that is installed."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path} is a file; expected a model folder ('ridgeline models import' makes one from GGUF)")
    if not HUB_ID.fullmatch(str(path)):
        raise UserError(f"no model folder at {path}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"no folder {path}, and the package huggingface_hub is not installed to fetch it") from None
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "merges.txt"]))
    except Exception as error:  # whatever the client raises: no network, no such model, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"no folder {path}, and the Hugging Face hub answered: {reason}") from None


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """bf16, fp16 or fp32 as torch's type; anything else of type str is a `UserError`."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(f"dtype '{dtype}' is not supported (valid: {', '.join(DTYPES)})")
        return DTYPES[dtype]
    return dtype


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    found = set(dtypes)
    return found.pop() if len(found) == 1 else torch.float32


@contextlib.contextmanager
def _tensors(folder: Path) -> Iterator[tuple[dict[str, Path], Any]]:
    """(tensor name -> file, reader of one tensor by name) of a folder; the files stay mapped meanwhile."""
    index = tensor_files(folder)
    with contextlib.ExitStack() as stack:
        files = {}
        for file in sorted(set(index.values())):
            try:
                files[file] = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a readable safetensors file: {error}") from None
        yield index, lambda name: files[index[name]].get_tensor(name)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor: from the index when there is one, else from the single file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _read_index(folder, index)
    single = folder / "model.safetensors"
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{single}: not a readable safetensors file: {error}") from None
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise UserError(f"{folder}: holds {pickles[0]}, a pickle, which is never loaded; convert it to safetensors")
    raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _read_index(folder: Path, index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        files = {name: folder / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not a safetensors index (an object with 'weight_map')") from None
    for name, file in files.items():
        if file.parent != folder:
            raise UserError(f"{index}: tensor '{name}' is said to lie outside the folder, in {file}")
        if not file.is_file():
            raise UserError(f"{index}: file {file.name}, which holds tensor '{name}', is missing")
    return _check_index(index, files)


def _check_index(index: Path, files: dict[str, Path]) -> dict[str, Path]:
    held: dict[Path, set[str]] = {}
    for file in set(files.values()):
        try:
            with safe_open(file, framework="pt") as opened:
                held[file] = set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a readable safetensors file: {error}") from None
    for name, file in files.items():
        if name not in held[file]:
            raise UserError(f"{index}: tensor '{name}' is not in {file.name}")
    return files


def save(
    model: Decoder | Mapping[str, Tensor],
    config: DecoderConfig,
    path: str | Path,
    tokenizer_files: str | Path | Sequence[str | Path] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a folder that `load` and transformers read. A model folder already there is replaced.

    One that holds any file of another kind is refused (`UserError` naming it), for replacing it would delete the file.

    ``model`` is a decoder or its state (our names). ``tokenizer_files`` is a folder to copy tokenizer files from, or
    the files. Raises `JobError` when the disk refuses; nothing is then left behind and an older folder is untouched.
    """
    state = model.state_dict() if isinstance(model, Decoder) else model
    copies = _tokenizer_files(tokenizer_files)

    def finish(folder: Path) -> None:
        for file in copies:
            shutil.copyfile(file, folder / file.name)
        if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
            write_json(folder / "tokenizer_config.json", _tokenizer_config(folder / "tokenizer.json", config))

    return write_folder(hf_state_dict(state, config), config, path, finish, shard_bytes)


def write_folder(
    tensors: dict[str, Tensor],
    config: DecoderConfig,
    path: str | Path,
    finish: Callable[[Path], None],
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write tensors under their Hugging Face names and both configurations; ``finish`` adds the tokenizer's files."""
    target = Path(path)
    _refuse_foreign(target)
    with replaced_folder(target) as folder:
        _write_tensors(tensors, folder, shard_bytes)
        dtype = str(_widest(tensor.dtype for tensor in tensors.values())).removeprefix("torch.")
        write_json(folder / "config.json", to_hf_config(config, dtype))
        write_json(folder / "generation_config.json", generation_config(config))
        finish(folder)
    return target


def _refuse_foreign(target: Path) -> None:
    """`UserError` unless ``target`` is absent, empty, or a model folder with nothing else in it."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} exists and is not a model folder; it is not overwritten")
    entries = sorted(target.iterdir())
    if entries and not (target / "config.json").is_file():
        raise UserError(f"{target} exists and is not a model folder; it is not overwritten")
    for entry in entries:
        known = entry.name in WRITTEN or WEIGHTS.fullmatch(entry.name)
        if not known or not entry.is_file():
            raise UserError(f"{target} holds {entry.name}, which is no part of a model; it is not overwritten")
    if entries and not _names_a_model(target / "config.json"):
        raise UserError(f"{target / 'config.json'} names no model_type, so it is no model's; it is not overwritten")


def _names_a_model(file: Path) -> bool:
    try:
        document = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and bool(document.get("model_type"))


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes ``target``'s place at the end, or disappears when the body fails."""
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        _swap(temporary, target)
    except (OSError, SafetensorError) as error:
        raise JobError(f"could not write {target}: {error}; nothing was left behind") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _swap(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(aside / "old")
    try:
        temporary.rename(target)
    except OSError:
        (aside / "old").rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_tensors(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    mode = 0o666 & ~_umask()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        (folder / file).chmod(mode)  # safetensors makes files that only their owner may read
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) == 1:
        return
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(file: Path, document: Any) -> None:
    """Write one JSON document, readable by people."""
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")


def generation_config(config: DecoderConfig) -> dict[str, Any]:
    """``generation_config.json``: which tokens begin, end and pad."""
    eos = config.eos_token_ids
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
    }
    return {"_from_model_config": True} | {name: value for name, value in ids.items() if value is not None}


def _tokenizer_files(given: str | Path | Sequence[str | Path] | None) -> list[Path]:
    if given is None:
        return []
    if isinstance(given, (str, Path)) and Path(given).is_dir():
        return [file for name in TOKENIZER_FILES if (file := Path(given) / name).is_file()]
    files = [Path(given)] if isinstance(given, (str, Path)) else [Path(file) for file in given]
    for file in files:
        if not file.is_file():
            raise UserError(f"tokenizer file {file} does not exist")
    return files


def _tokenizer_config(tokenizer: Path, config: DecoderConfig) -> dict[str, Any]:
    """The least that makes transformers load ``tokenizer.json`` as it is, whatever the model's family."""
    try:
        added = {token["id"]: token["content"] for token in json.loads(tokenizer.read_text("utf-8"))["added_tokens"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{tokenizer}: not a tokenizer.json: {error}") from None
    eos = config.eos_token_ids[0] if config.eos_token_ids else None
    named = {
        "bos_token": added.get(config.bos_token_id),
        "eos_token": added.get(eos),
        "pad_token": added.get(config.pad_token_id),
    }
    fixed = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context_length,
    }
    return fixed | {name: value for name, value in named.items() if value is not None}
