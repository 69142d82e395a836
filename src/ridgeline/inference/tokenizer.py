"""A model folder's tokenizer: text to ids and back, special tokens, chat template. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ridgeline.errors import UserError
from ridgeline.inference.chat import ChatTemplate, find_template

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Wraps ``tokenizers`` around a folder's ``tokenizer.json``; made by `Tokenizer.load`."""

    def __init__(self, raw: Any, special_tokens: Mapping[str, str], template: str | None, where: str = "") -> None:
        self._raw = raw
        self._where = where
        self.special_tokens = dict(special_tokens)  # name ("eos_token") -> text
        self._template = ChatTemplate(template, self.special_tokens) if template else None

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read ``tokenizer.json`` and, when present, ``tokenizer_config.json`` and the chat template.

        Raises:
            UserError: the file is missing or damaged.
        """
        from tokenizers import Tokenizer as Raw

        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{folder}: no tokenizer.json, so text cannot be read or written")
        try:
            raw = Raw.from_file(str(file))
        except Exception as error:  # the Rust side raises plain Exception
            raise UserError(f"{file}: not a tokenizer: {str(error).splitlines()[0]}") from None
        settings = _read_json(folder / "tokenizer_config.json")
        special = {**_special(_read_json(folder / "special_tokens_map.json")), **_special(settings)}
        return cls(raw, special, find_template(folder, settings), str(folder))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._raw.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; ``add_special_tokens`` lets the tokenizer's post-processor add its own (a BOS, say).

        Raises:
            UserError: the text holds a lone surrogate (bytes that were no UTF-8), which no tokenizer can take.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid UTF-8 (character {error.start} is a lone surrogate)") from None
        return list(self._raw.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        return str(self._raw.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_id(self, text: str) -> int | None:
        """The id of a token given by its text, None when there is none."""
        found = self._raw.token_to_id(text)
        return None if found is None else int(found)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can be used."""
        return self._template is not None

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Messages (``role``, ``content``) as the prompt text the model was trained on; encode it without specials.

        Raises:
            UserError: the model has no template, or the template refuses the messages.
        """
        if self._template is None:
            raise UserError(f"{self._where}: the model has no chat template; give a plain prompt")
        return self._template.render(messages, add_generation_prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a chat, ready for the assistant's answer."""
        return self.encode(self.apply_chat_template(messages), add_special_tokens=False)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    return document if isinstance(document, dict) else {}


def _special(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; an entry is a text or an added token's record."""
    found = {}
    for name in SPECIAL_NAMES:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found
