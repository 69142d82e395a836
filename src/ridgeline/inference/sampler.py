"""From logits to tokens, for a whole batch at once with each row's own parameters.

A row's choice depends on its own logits, parameters and generator alone, never on its neighbours: the same seed gives
the same text in any batch. One uniform number per token is drawn from the row's generator and looked up in the
cumulative distribution (inverse transform sampling), so nothing is sorted unless top-p asks for it.

Cuts keep ties: top-k keeps every token as likely as the k-th, top-p every token as likely as the last one needed to
reach p. transformers does the same for top-k; for top-p it lets the order of its sort decide among equals, which would
make the choice depend on how a batch was sorted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ridgeline.inference.request import SamplingParams

BLOCK = 128  # of the two-level cumulative sum
COLDEST = 1e-20  # below it fp32 knows only 0, and 0 / 0 is no weight
NUCLEUS = 512  # most likely tokens tried before a full sort


@dataclass
class Choice:
    """How one sequence chooses: its parameters, its generator, and the tokens it has seen (for the penalty)."""

    params: SamplingParams
    random: random.Random = field(init=False)
    seen: Tensor | None = None  # bool [vocab], only with a repetition penalty

    def __post_init__(self) -> None:
        self.random = random.Random(self.params.seed)  # None: seeded from the system

    def watch(self, tokens: Sequence[int], vocab: int, device: torch.device) -> None:
        """Note ``tokens`` (the prompt, then each new one) for the repetition penalty."""
        if self.params.repetition_penalty == 1.0:
            return
        if self.seen is None:
            self.seen = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.seen[torch.tensor(tokens, device=device)] = True

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all that is wanted."""
        return self.params.greedy and self.params.repetition_penalty == 1.0 and self.params.logprobs is None


@dataclass(frozen=True)
class Sampled:
    """A chosen token; ``logprob`` and ``top`` (id, log-probability, best first) when asked for."""

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


def sample(logits: Tensor, choices: Sequence[Choice]) -> list[Sampled]:
    """Choose one token per row. ``logits`` ``[rows, vocab]``, finite, any float dtype."""
    scores = logits.float()
    adjusted = penalise(scores, choices)
    tokens = adjusted.argmax(-1)
    drawing = [row for row, choice in enumerate(choices) if not choice.params.greedy]
    if drawing:
        params = [choices[row].params for row in drawing]
        weights = probabilities(adjusted[drawing], params)
        uniform = torch.tensor([choices[row].random.random() for row in drawing], dtype=torch.float64)
        tokens[drawing] = draw(weights, uniform.to(weights.device))
    chosen: list[int] = tokens.tolist()
    sampled = [Sampled(token) for token in chosen]
    telling = [row for row, choice in enumerate(choices) if choice.params.logprobs is not None]
    if telling:
        asked = [choices[row].params.logprobs or 0 for row in telling]
        for row, told in zip(telling, tell(scores[telling], [chosen[row] for row in telling], asked), strict=True):
            sampled[row] = told
    return sampled


def penalise(scores: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Repetition penalty (Keskar et al. 2019, arXiv:1909.05858): seen tokens' positive scores are divided by it,
    negative ones multiplied. ``scores`` ``[rows, vocab]`` fp32 -> same."""
    rows = [row for row, choice in enumerate(choices) if choice.seen is not None]
    if not rows:
        return scores
    seen = torch.stack([tensor for row in rows if (tensor := choices[row].seen) is not None])
    penalty = _column([choices[row].params.repetition_penalty for row in rows], scores)
    old = scores[rows]
    out = scores.clone()
    out[rows] = torch.where(seen, torch.where(old < 0, old * penalty, old / penalty), old)
    return out


def probabilities(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Unnormalised probabilities after temperature, top-k and top-p. ``scores`` ``[rows, vocab]`` fp32 -> same shape.

    The most likely token has weight 1, what is cut has weight 0.
    """
    temperatures = _column([max(p.temperature, COLDEST) for p in params], scores)
    scaled = (scores - scores.amax(-1, keepdim=True)) / temperatures
    vocab = scaled.shape[-1]
    limited = [row for row, p in enumerate(params) if 0 < p.top_k < vocab]
    if limited:
        counts = torch.tensor([params[row].top_k for row in limited], device=scores.device)
        best = scaled[limited].topk(int(counts.max())).values
        _cut(scaled, limited, best.gather(-1, counts[:, None] - 1))
    weights = scaled.exp()
    nucleus = [row for row, p in enumerate(params) if p.top_p < 1.0]
    if nucleus:
        wanted = _column([params[row].top_p for row in nucleus], scores).double()
        _cut(weights, nucleus, nucleus_threshold(weights[nucleus], wanted), 0.0)
    return weights


def nucleus_threshold(weights: Tensor, top_p: Tensor) -> Tensor:
    """The weight of the last token of the smallest set that holds ``top_p`` of the mass.

    ``weights`` ``[rows, vocab]``, ``top_p`` ``[rows, 1]`` -> ``[rows, 1]``. A full sort only for rows too flat for the
    `NUCLEUS` most likely tokens to hold the mass.
    """
    total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    best = weights.topk(min(NUCLEUS, weights.shape[-1])).values
    threshold, covered = _reach(best, top_p * total)
    if not bool(covered.all()):
        flat = (~covered).squeeze(-1)
        ordered = weights[flat].sort(-1, descending=True).values
        threshold[flat] = _reach(ordered, top_p[flat] * total[flat])[0]
    return threshold


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token whose part of the cumulative distribution holds ``uniform``. ``[rows, vocab]``, ``[rows]`` -> ``[rows]``.

    Two levels: find the block, then the token in it, in float64, so that no tail is lost to rounding and a token of
    weight 0 is never chosen.
    """
    rows, vocab = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -vocab % BLOCK)).view(rows, -1, BLOCK)
    sums = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    total = sums[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    block = _first_above(sums, target)
    before = torch.where(block > 0, sums.gather(-1, (block - 1).clamp_min(0)), 0.0)
    inside = padded.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double()
    # A rounding error at the block's end must not point behind its last token of positive weight.
    last = BLOCK - 1 - (inside > 0).flip(-1).int().argmax(-1, keepdim=True)
    token = torch.minimum(_first_above(inside.cumsum(-1), target - before), last)
    return (block * BLOCK + token).squeeze(-1)


def tell(scores: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Sampled]:
    """Log-probabilities of ``tokens`` and of the best ``counts[row]``, all floats from one tensor.

    ``scores`` ``[rows, vocab]`` fp32. The chosen token is always among the top ones.
    """
    logprobs = scores.log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=scores.device)[:, None]).squeeze(-1).tolist()
    best = logprobs.topk(min(max(1, *counts), scores.shape[-1])) if max(counts) else None
    values, ids = (best.values.tolist(), best.indices.tolist()) if best else ([], [])
    told = []
    for row, (token, count) in enumerate(zip(tokens, counts, strict=True)):
        top = list(zip(ids[row], values[row], strict=True))[:count] if best else []
        if all(other != token for other, _ in top):
            top.append((token, chosen[row]))
        told.append(Sampled(token, chosen[row], top))
    return told


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _cut(values: Tensor, rows: list[int], threshold: Tensor, fill: float = float("-inf")) -> None:
    """Overwrite what lies below ``threshold`` ``[len(rows), 1]`` in the given rows of ``values``, in place."""
    kept = values[rows]
    values[rows] = kept.masked_fill(kept < threshold, fill)


def _reach(ordered: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(value at which the running sum of ``ordered`` reaches ``wanted``, whether it does), each ``[rows, 1]``."""
    sums = ordered.cumsum(-1, dtype=torch.float64)
    index = (sums < wanted).sum(-1, keepdim=True)
    covered = index < ordered.shape[-1]
    return ordered.gather(-1, index.clamp_max(ordered.shape[-1] - 1)), covered


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """Index of the first entry of the rising ``sums`` above ``target``, at most the last. ``[rows, n]`` -> ``[rows, 1]``."""
    return (sums <= target).sum(-1, keepdim=True).clamp_max(sums.shape[-1] - 1)
