"""A GGUF file's tokenizer as ``tokenizer.json`` and its companions.

GGUF keeps the tokens, the merges and the *name* of the rule that splits text before merging
(``tokenizer.ggml.pre``). The rule's regular expression is not in the file: those below are the ones the models' own
``tokenizer.json`` files carry. A name that is not known is refused: a wrong rule gives text that looks almost right.
"""

from __future__ import annotations

from typing import Any

from ridgeline.errors import UserError, nearest
from ridgeline.models.config import DecoderConfig

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # token types; 1 is a normal token

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = BYTE_LEVEL | {"use_regex": False}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTES_ONLY]}


# name -> (pre_tokenizer, normalizer, ignore_merges: a whole word that is a token is taken without merging)
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
RULES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, bool]] = {
    "gpt-2": (BYTE_LEVEL, None, False),
    "smollm": (DIGITS, None, False),
    "llama-bpe": (_split(WORDS + r"\p{N}{1,3}" + REST), None, True),
    "qwen2": (_split(WORDS + r"\p{N}" + REST), {"type": "NFC"}, False),
}


def tokenizer_documents(values: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """File name -> content for the tokenizer's files, from a GGUF file's metadata."""
    kind, rule = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise UserError(f"tokenizer.ggml.model '{kind}' is not supported (valid: gpt2, the byte-level BPE)")
    if rule not in RULES:
        raise UserError(f"tokenizer.ggml.pre '{rule}' is not supported{nearest(str(rule), RULES)}")
    tokens = _tokens(values, config)
    settings = _settings(values, tokens, config)
    documents = {"tokenizer.json": _tokenizer(values, tokens, rule), "tokenizer_config.json": settings}
    if "chat_template" in settings:
        documents["chat_template.jinja"] = settings["chat_template"]
    return documents


def _tokens(values: dict[str, Any], config: DecoderConfig) -> list[str]:
    tokens = values.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not isinstance(values.get("tokenizer.ggml.merges"), list):
        raise UserError("tokenizer.ggml.tokens or tokenizer.ggml.merges is missing")
    if len(tokens) > config.vocab_size:
        raise UserError(f"tokenizer.ggml.tokens has {len(tokens)} entries for a vocabulary of {config.vocab_size}")
    if len(set(tokens)) != len(tokens):
        raise UserError("tokenizer.ggml.tokens repeats a token")
    return tokens


def _types(values: dict[str, Any], tokens: list[str]) -> list[int]:
    types = values.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    return types


def _tokenizer(values: dict[str, Any], tokens: list[str], rule: str) -> dict[str, Any]:
    """``tokenizer.json``: control tokens are special, user-defined ones are matched whole but shown."""
    pre, normalizer, ignore_merges = RULES[rule]
    types = _types(values, tokens)
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for index, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED)
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        # rows that only pad the embedding ([PAD151936]) are no tokens
        "vocab": {token: index for index, token in enumerate(tokens) if types[index] != UNUSED},
        "merges": [_merge(text) for text in values["tokenizer.ggml.merges"]],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre,
        "post_processor": _post_processor(values, tokens, rule),
        "decoder": BYTE_LEVEL | {"add_prefix_space": True},
        "model": model,
    }


def _merge(text: str) -> list[str]:
    left, space, right = text.partition(" ")
    if not space or not left or not right or " " in right:
        raise UserError(f"tokenizer.ggml.merges holds {text!r}, which is not a pair")
    return [left, right]


def _post_processor(values: dict[str, Any], tokens: list[str], rule: str) -> dict[str, Any]:
    """ByteLevel offsets, and BOS or EOS around the text where the file asks for them (Llama 3 always begins)."""
    ends: list[int | None] = []
    for name, default in (("bos", rule == "llama-bpe"), ("eos", False)):
        wanted = values.get(f"tokenizer.ggml.add_{name}_token", default)
        ends.append(_token_id(values, name, tokens) if wanted else None)
    before, after = ([] if end is None else [end] for end in ends)
    if not before and not after:
        return BYTE_LEVEL | {"trim_offsets": False}

    def special(index: int, type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": tokens[index], "type_id": type_id}}

    def sequence(name: str, type_id: int) -> list[dict[str, Any]]:
        middle = {"Sequence": {"id": name, "type_id": type_id}}
        return [*(special(i, type_id) for i in before), middle, *(special(i, type_id) for i in after)]

    used = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in (*before, *after)}
    template = {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": used,
    }
    return {"type": "Sequence", "processors": [BYTE_LEVEL | {"trim_offsets": False}, template]}


def _token_id(values: dict[str, Any], name: str, tokens: list[str]) -> int:
    index = values.get(f"tokenizer.ggml.{name}_token_id")
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise UserError(f"tokenizer.ggml.{name}_token_id = {index} is not a token of this vocabulary")
    return index


def _settings(values: dict[str, Any], tokens: list[str], config: DecoderConfig) -> dict[str, Any]:
    """``tokenizer_config.json``: the class that uses tokenizer.json as it is, named tokens, the chat template."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context_length,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if values.get(f"tokenizer.ggml.{key}_token_id") is not None:
            settings[f"{name}_token"] = tokens[_token_id(values, key, tokens)]
    if values.get("tokenizer.chat_template"):
        settings["chat_template"] = values["tokenizer.chat_template"]
    return settings
