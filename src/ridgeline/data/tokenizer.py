"""The tokenizer of a corpus: a byte-level BPE trained on it, or one that is loaded; and what text becomes under it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ridgeline.errors import UserError

END = "<|endoftext|>"
# What ends a document in the published families, most specific first: a chat model's own end-of-turn token
# (the `eos_token` of its settings) is not what separates documents in pretraining.
DOCUMENT_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")


def train_tokenizer(texts: Iterable[Sequence[str]], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of ``vocab_size`` tokens (fewer when the text has fewer pairs) over batches of texts.

    ``<|endoftext|>`` is token 0 and all 256 bytes are tokens, so every text can be encoded. The same texts in the
    same order give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_file(path: str) -> Path:
    """The tokenizer.json that ``path`` (the file or its folder) means.

    Raises:
        UserError: there is none.
    """
    given = Path(path).expanduser()
    file = given / "tokenizer.json" if given.is_dir() else given
    if not file.is_file():
        raise UserError(f"data.tokenizer.path: no tokenizer.json at {given}")
    return file


def load_tokenizer(file: Path) -> Tokenizer:
    """Read a tokenizer.json for whole documents: without the truncation and padding that it may carry.

    Raises:
        UserError: the file is no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"tokenizer {file}: cannot be read ({' '.join(str(error).split())[:160]})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A document that spells out "<|endoftext|>" means those letters, not the end of a document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the highest id: ids may have gaps, and added tokens lie past the model's own vocabulary."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def vocab_hash(tokenizer: Tokenizer) -> str:
    """160 bits over (id, token) of the whole vocabulary: two corpora with equal hashes may be mixed."""
    pairs = sorted((index, token) for token, index in tokenizer.get_vocab(with_added_tokens=True).items())
    return hashlib.blake2b(json.dumps(pairs).encode(), digest_size=20).hexdigest()


def end_token(tokenizer: Tokenizer, file: Path | None = None) -> tuple[str, int]:
    """The token that ends a document: the first of DOCUMENT_ENDS it has, else the ``eos_token`` beside ``file``.

    Raises:
        UserError: the tokenizer has neither.
    """
    named = [*DOCUMENT_ENDS, *([_configured_end(file)] if file else [])]
    for token in named:
        index = tokenizer.token_to_id(token) if token else None
        if index is not None:
            return str(token), index
    raise UserError(f"tokenizer {file}: has no end-of-document token (looked for {', '.join(DOCUMENT_ENDS)})")


def settings(end: str) -> dict[str, Any]:
    """``tokenizer_config.json``, so that transformers opens the folder too."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}


def token_dtype(size: int) -> type[np.uint16] | type[np.int32]:
    """Megatron's rule: uint16 below 65,500 tokens, int32 from there."""
    return np.uint16 if size < 65500 else np.int32


class EncodeTask(NamedTuple):
    """What a worker needs to encode ``texts``. ``digest`` is that of the tokenizer's file, for its cache."""

    file: str
    digest: str
    end: int
    texts: list[str]


def encode_batch(task: EncodeTask) -> tuple[npt.NDArray[Any], list[int]]:
    """Token ids of all texts in one array, each followed by the end token, and how many tokens each has."""
    tokenizer, dtype = _worker_tokenizer(task.file, task.digest)
    pieces, lengths = [], []
    for encoding in tokenizer.encode_batch_fast(task.texts, add_special_tokens=False):
        ids = encoding.ids
        ids.append(task.end)
        pieces.append(np.array(ids, dtype))
        lengths.append(len(ids))
    return (np.concatenate(pieces) if pieces else np.empty(0, dtype)), lengths


@functools.lru_cache(maxsize=1)
def _worker_tokenizer(file: str, digest: str) -> tuple[Tokenizer, type[np.uint16] | type[np.int32]]:
    tokenizer = load_tokenizer(Path(file))
    return tokenizer, token_dtype(vocab_size(tokenizer))


def _configured_end(file: Path | None) -> str | None:
    beside = file.with_name("tokenizer_config.json") if file else None
    if beside is None or not beside.is_file():
        return None
    try:
        token = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{beside}: {error}") from None
    return token.get("content") if isinstance(token, dict) else token
