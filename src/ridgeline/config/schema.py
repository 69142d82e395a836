"""The one configuration of a job: tables ``[data]``, ``[model]``, ``[train]``, ``[optimizer]``, ``[parallel]``.

Every default of the system that a user may change stands here and nowhere else. Field descriptions are
the help texts.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# A name is one folder below datasets/ on every file system: no separators, no control characters.
NAME = re.compile(r"[\w. -]{1,100}")


class Section(BaseModel):
    """A table of the configuration: unknown keys are errors, numbers are finite, values stay as validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class FilterSection(Section):
    """Document filters (Gopher rules, Rae et al. 2021, tables A1 and A2). ``enabled = false`` keeps every document."""

    enabled: bool = Field(True, description="apply the filters")
    min_words: int = Field(50, ge=0, description="fewest words a document may have")
    max_words: int = Field(100_000, ge=1, description="most words a document may have")
    min_mean_word_length: float = Field(3.0, ge=0)
    max_mean_word_length: float = Field(10.0, ge=0)
    max_symbol_word_ratio: float = Field(0.1, ge=0, description="'#' per word, and ellipses per word")
    max_bullet_line_ratio: float = Field(0.9, ge=0, le=1)
    max_ellipsis_line_ratio: float = Field(0.3, ge=0, le=1)
    min_alpha_word_ratio: float = Field(0.8, ge=0, le=1, description="share of words with at least one letter")
    min_stop_words: int = Field(2, ge=0, description="distinct English stop words a document must contain")
    repetition: bool = Field(True, description="apply the duplicate line, paragraph and n-gram limits too")


class TokenizerSection(Section):
    """The tokenizer: trained on the corpus, or loaded from ``path`` (a tokenizer.json or a folder that holds one)."""

    vocab_size: int = Field(8192, ge=257, description="vocabulary of a trained byte-level BPE, special tokens included")
    path: str | None = Field(None, description="load this tokenizer instead of training one")


class DataSection(Section):
    """Raw text in, token shards out."""

    name: str = Field("corpus", description="name of the dataset, and of its folder when path is not set")
    sources: list[str] = Field(
        default_factory=list,
        description="files, folders, globs or package:NAME/GLOB; txt, jsonl, parquet, plain or .gz or .zst",
    )
    path: str | None = Field(None, description="folder of the built dataset; default datasets/NAME")
    text_key: str = Field("text", description="field that holds the text in jsonl and parquet")
    on_bad_record: Literal["stop", "skip"] = Field("stop", description="what a malformed record does to the build")
    normalize: Literal["nfc", "nfkc", "none"] = Field("nfc", description="Unicode normal form")
    deduplicate: bool = Field(True, description="drop exact duplicates of the normalised text")
    filters: FilterSection = Field(default_factory=FilterSection)
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    split: tuple[float, float, float] = Field((0.949, 0.05, 0.001), description="train, validation, test shares")
    shard_documents: int = Field(1024, ge=1, description="documents in one unit of resumable work")
    workers: int = Field(0, ge=0, description="processes that tokenise; 0 = one per available core")
    seed: int = Field(0, description="seed of the document-hash split")

    @field_validator("name")
    @classmethod
    def _name_is_one_folder(cls, name: str) -> str:
        fits = NAME.fullmatch(name) and len(name.encode("utf-8")) <= 255  # what file systems allow
        if not fits or name.strip() in ("", ".", ".."):
            raise ValueError("must be letters, digits, '.', '_', '-' and spaces, at most 100, and not '.' or '..'")
        return name

    @model_validator(mode="after")
    def _split_sums_to_one(self) -> DataSection:
        if any(share < 0 for share in self.split) or abs(sum(self.split) - 1) > 1e-6:
            raise ValueError(f"split must be three shares that sum to 1, got {self.split} (sum {sum(self.split):g})")
        return self

    @property
    def folder(self) -> str:
        """Where the built dataset lies."""
        return self.path or f"datasets/{self.name}"


class ModelSection(Section):
    """A decoder to pretrain. ``init`` continues from a Hugging Face-layout folder and then fixes the shape."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "gpt2", "gptj"] = "llama"
    layers: int = Field(6, ge=1)
    hidden: int = Field(384, ge=8)
    heads: int = Field(6, ge=1)
    kv_heads: int | None = Field(None, ge=1, description="key/value heads (GQA); default = heads")
    head_dim: int | None = Field(None, ge=2, description="default = hidden / heads")
    intermediate: int | None = Field(
        None, ge=8, description="MLP width; default 8/3 hidden rounded up to 64, or 4 hidden"
    )
    context_length: int = Field(512, ge=8, description="longest sequence the model is built for")
    vocab_size: int | None = Field(None, ge=2, description="default = the dataset's tokenizer")
    rope_theta: float = Field(10_000.0, gt=0)
    norm_eps: float = Field(1e-5, gt=0)
    tie_embeddings: bool = True
    init: str | None = Field(None, description="Hugging Face-layout folder to continue from")


class TrainSection(Section):
    """The loop."""

    steps: int = Field(100, ge=1, description="optimiser steps")
    seq_len: int = Field(512, ge=8)
    global_batch_size: int = Field(8, ge=1, description="sequences per optimiser step, over all ranks")
    micro_batch_size: int = Field(8, ge=1, description="sequences per forward pass and rank")
    seed: int = 0
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="compute precision; master weights are always fp32")
    compile: bool = Field(True, description="compile each block with torch.compile")
    eval_every: int = Field(50, ge=0, description="steps between validations; 0 = only at the end")
    eval_batches: int = Field(4, ge=1, description="global batches per validation")
    checkpoint_every: int = Field(100, ge=0, description="steps between checkpoints; 0 = only at the end")
    keep_checkpoints: int = Field(2, ge=1)
    on_nonfinite: Literal["stop", "skip"] = Field("stop", description="what a non-finite loss or gradient does")


class OptimizerSection(Section):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = Field(1e-3, gt=0)
    min_learning_rate: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(10, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="applied to matrices, not to norms and biases")
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm limit; 0 = no clipping")


class ParallelSection(Section):
    """The layout."""

    procs: int = Field(1, ge=1, description="processes per node")
    reshard_after_forward: bool = Field(
        True, description="free gathered parameters between forward and backward (ZeRO-3)"
    )
    activation_checkpointing: Literal["none", "full"] = Field("none", description="recompute each block in backward")


class JobConfig(Section):
    """A whole job. Written to ``config.json`` of every run that has one."""

    data: DataSection = Field(default_factory=DataSection)
    model: ModelSection = Field(default_factory=ModelSection)
    train: TrainSection = Field(default_factory=TrainSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    parallel: ParallelSection = Field(default_factory=ParallelSection)

    @model_validator(mode="after")
    def _consistent(self) -> JobConfig:
        t, m = self.train, self.model
        per_step = t.micro_batch_size * self.parallel.procs
        if t.global_batch_size % per_step:
            raise ValueError(
                f"train.global_batch_size {t.global_batch_size} is not a multiple of micro_batch_size x procs = "
                f"{t.micro_batch_size} x {self.parallel.procs} = {per_step}"
            )
        if m.init is None and t.seq_len > m.context_length:
            raise ValueError(f"train.seq_len {t.seq_len} exceeds model.context_length {m.context_length}")
        if m.head_dim is None and m.hidden % m.heads:
            raise ValueError(f"model.hidden {m.hidden} is not a multiple of model.heads {m.heads}")
        if m.heads % (m.kv_heads or m.heads):
            raise ValueError(f"model.heads {m.heads} is not a multiple of model.kv_heads {m.kv_heads}")
        return self
