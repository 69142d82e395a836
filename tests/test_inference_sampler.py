"""Sampling against numpy in float64, transformers' processors, and the chi-square distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers

from ridgeline.inference.request import SamplingParams
from ridgeline.inference.sampler import Choice, draw, penalise, probabilities, sample, tell

VOCAB = 300


def scores(rows: int = 1, vocab: int = VOCAB, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def oracle(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """One row's distribution by the definitions, in float64, ties kept."""
    scaled = logits.astype(np.float64) / temperature
    if 0 < top_k < len(scaled):
        scaled = np.where(scaled < np.sort(scaled)[-top_k], -np.inf, scaled)
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    if top_p < 1:
        ordered = np.sort(p)[::-1]
        needed = int(np.searchsorted(np.cumsum(ordered), top_p)) + 1
        p = np.where(p < ordered[min(needed, len(p)) - 1], 0.0, p)
    return p / p.sum()


PARAMS = [
    (1.0, 0, 1.0),
    (0.3, 0, 1.0),
    (5.0, 0, 0.9),
    (1.0, 1, 1.0),
    (1.0, 7, 1.0),
    (1.0, VOCAB, 1.0),
    (1.0, VOCAB + 5, 0.5),
    (0.7, 40, 0.8),
    (1.0, 3, 0.01),
    (1.0, 0, 1e-9),
    (1.0, 0, 0.999999),
    (100.0, 0, 0.99),
]


def test_probabilities_equal_float64_in_one_mixed_batch():
    logits = scores(len(PARAMS))
    params = [SamplingParams(temperature=t, top_k=k, top_p=p) for t, k, p in PARAMS]
    weights = probabilities(logits, params).double()
    ours = (weights / weights.sum(-1, keepdim=True)).numpy()
    for row, settings in enumerate(PARAMS):
        expected = oracle(logits[row].numpy(), *settings)
        assert ((ours[row] > 0) == (expected > 0)).all(), settings
        np.testing.assert_allclose(ours[row], expected, rtol=2e-5, atol=1e-12, err_msg=str(settings))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 12, 0.9), (1.3, 0, 0.5), (1.0, 50, 1.0), (2.0, 5, 0.3)]
)
def test_probabilities_equal_transformers(temperature, top_k, top_p):
    logits = scores(4, seed=3)
    chain = [transformers.TemperatureLogitsWarper(temperature)]
    chain += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    chain += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    theirs = logits
    for warper in chain:
        theirs = warper(None, theirs)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    weights = probabilities(logits, [params] * 4)
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), theirs.softmax(-1), rtol=1e-5, atol=1e-9)


def test_ties_are_kept_and_do_not_depend_on_the_batch():
    """bf16 logits tie often. All tokens as likely as the last kept one stay, whoever else is in the batch."""
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    assert (probabilities(logits, [SamplingParams(top_k=2)]) > 0).tolist() == [[True, False, True, True, True, False]]
    assert (probabilities(logits, [SamplingParams(top_p=0.7)]) > 0).tolist() == [[True, False, True, True, True, False]]
    both = probabilities(logits.repeat(2, 1), [SamplingParams(top_k=2), SamplingParams(top_k=5)])
    assert torch.equal(both[:1], probabilities(logits, [SamplingParams(top_k=2)]))


def test_a_flat_nucleus_needs_the_full_sort():
    """More tokens are needed than the partial sort looks at; a peaked row in the same batch must not mind."""
    flat, peaked = scores(1, 5000, spread=0.01), scores(1, 5000, spread=5.0)
    weights = probabilities(torch.cat([flat, peaked]), [SamplingParams(top_p=0.9)] * 2)
    for row, logits in enumerate((flat, peaked)):
        assert (weights[row] > 0).sum() == (oracle(logits[0].numpy(), 1.0, 0, 0.9) > 0).sum()
    assert (weights[0] > 0).sum() > 4000


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_equals_transformers(penalty):
    logits, prompt = scores(2, seed=5), [4, 9, 9, 250]
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt]), logits[:1].clone())
    choices = [Choice(SamplingParams(repetition_penalty=penalty)), Choice(SamplingParams())]
    for choice in choices:
        choice.watch(prompt, VOCAB, torch.device("cpu"))
    ours = penalise(logits, choices)
    assert torch.equal(ours[:1], theirs) and torch.equal(ours[1], logits[1])


def test_draws_follow_the_distribution():
    """Chi-square over 40,000 draws: 60 degrees of freedom, so 130 is far beyond one in a million."""
    weights = probabilities(scores(1, 61, seed=2), [SamplingParams(temperature=1.5, top_k=61)])
    uniform = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    tokens = draw(weights.expand(40_000, -1), uniform)
    expected = (weights[0] / weights.sum()).double().numpy() * 40_000
    observed = np.bincount(tokens.numpy(), minlength=61)
    assert ((observed - expected) ** 2 / expected).sum() < 130


@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 1000])
def test_draw_inverts_the_cumulative_distribution(vocab):
    """Against numpy's own lookup, the ends of the unit interval included; weight 0 is never chosen."""
    weights = torch.rand(1, vocab, generator=torch.Generator().manual_seed(vocab))
    weights[:, ::3] = 0.0
    if vocab == 1:
        weights[:] = 1.0
    uniform = np.concatenate([[0.0, 1 - 2**-53, 2**-53], np.random.default_rng(0).random(500)])
    sums = np.cumsum(weights[0].double().numpy())
    tokens = draw(weights.expand(len(uniform), -1), torch.tensor(uniform)).numpy()
    assert (weights[0].numpy()[tokens] > 0).all()
    inside = np.abs(sums[:, None] - uniform * sums[-1]).min(0) > 1e-12  # away from a border the answer is unique
    assert (tokens[inside] == np.searchsorted(sums, uniform * sums[-1], side="right")[inside]).all()


def test_same_seed_same_tokens_in_any_company():
    logits = scores(6, 2000, seed=11)
    kinds = [
        SamplingParams(seed=5),
        SamplingParams(seed=5, top_k=20),
        SamplingParams(seed=5, top_p=0.8, temperature=1.4),
    ]
    others = [SamplingParams(seed=1, top_k=700), SamplingParams(temperature=0.0), SamplingParams(seed=9, top_p=0.99)]

    def tokens(choices: list[Choice], rows: list[int], take: int) -> list[list[int]]:
        return [[s.token for s in sample(logits[rows], choices)][:take] for _ in range(20)]

    alone = [tokens([Choice(p)], [row], 1) for row, p in enumerate(kinds)]
    together = tokens([Choice(p) for p in kinds + others], list(range(6)), 3)
    assert [[step[row]] for step in together for row in range(3)] == [alone[r][s] for s in range(20) for r in range(3)]
    assert alone[0] != tokens([Choice(SamplingParams(seed=6))], [0], 1)
    assert len({step[0] for step in alone[0]}) > 5


def test_log_probabilities_come_from_one_tensor():
    """Exact floats: greedy tokens have the log-probability that stands first (lm-eval compares with ==)."""
    logits = scores(3, seed=8).bfloat16()
    params = [SamplingParams(temperature=0.0, logprobs=4), SamplingParams(seed=3, temperature=5.0, logprobs=0)]
    params.append(SamplingParams(seed=1, temperature=8.0, logprobs=2))
    result = sample(logits, [Choice(p) for p in params])
    expected = logits.double().log_softmax(-1)
    for row, item in enumerate(result):
        assert item.logprob == pytest.approx(expected[row, item.token].item(), abs=1e-5)
        assert (item.token, item.logprob) in item.top
        best = max(value for _, value in item.top)
        assert (item.logprob == best) == (item.token in [token for token, value in item.top if value == best])
    assert len(result[0].top) == 4 and result[0].logprob == result[0].top[0][1]
    assert len(result[1].top) == 1
    assert len(result[2].top) in (2, 3)
    assert result[0].top[1][1] == pytest.approx(expected[0].sort(descending=True).values[1].item(), abs=1e-5)


def test_tiny_temperatures_are_greedy():
    logits = scores(1, seed=4) * 50
    for temperature in (1e-3, 1e-30, 5e-324):
        choice = Choice(SamplingParams(temperature=temperature, seed=0))
        assert sample(logits, [choice])[0].token == logits.argmax().item(), temperature
    assert math.isfinite(tell(logits, [0], [1])[0].logprob)
