"""The engine against transformers' generate, and against itself alone: whatever is batched, the answers are the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ridgeline.errors import UserError
from ridgeline.inference import Engine, Generation, Request, SamplingParams, generate, stream
from ridgeline.inference.api import measure, run
from ridgeline.inference.cache import fit_context, token_bytes
from ridgeline.models import Decoder, DecoderConfig, load
from test_models_families import make_theirs

FAMILIES = ["llama", "mistral-window", "qwen2", "qwen3-layer_types", "gpt2", "gptj-partial", "llama-yarn"]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
TINY = DecoderConfig("llama", 97, 48, 2, 4, 2, 12, 64, 256, rope_dim=12, eos_token_ids=(2,))


def prompts(vocab: int = 101, lengths: tuple[int, ...] = (1, 3, 20, 33, 7, 16)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def tiny(config: DecoderConfig = TINY, dtype: torch.dtype = torch.float32, **options) -> Engine:
    torch.manual_seed(1)
    decoder = Decoder(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    decoder.requires_grad_(False).init_buffers()
    return Engine(decoder, None, **{"max_batch": 4, "chunk": 8, **options})


@pytest.mark.parametrize("case", FAMILIES)
def test_greedy_tokens_equal_transformers(case, tmp_path):
    """fp32, six prompts in four slots, prompts cut into chunks of eight, decode mixed with prefill."""
    theirs = make_theirs(case)
    theirs.save_pretrained(tmp_path)
    engine = Engine(load(tmp_path), None, max_batch=4, chunk=8)
    results = generate(engine, prompts(), GREEDY)
    for prompt, result in zip(prompts(), results, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=-1,
            pad_token_id=0,
        )
        assert result.tokens == expected[0, len(prompt) :].tolist()
        assert (result.finish_reason, result.prompt_tokens) == ("length", len(prompt))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone_equals_batched(dtype):
    """bf16 with prepacked linears wide enough that one row alone would take another kernel (see optimize.prepack)."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no oneDNN bf16 on this CPU")
    config = dataclasses.replace(TINY, intermediate_size=2048)
    packed = dtype == torch.bfloat16
    alone = [generate(tiny(config, dtype, pack=packed), [prompt], GREEDY)[0].tokens for prompt in prompts(97)]
    together = generate(tiny(config, dtype, pack=packed), prompts(97), GREEDY)
    assert [result.tokens for result in together] == alone
    if packed:  # and to the bit, not only to the same argmax
        asked = dataclasses.replace(GREEDY, logprobs=5)
        one = generate(tiny(config, dtype, pack=True), [prompts(97)[3]], asked)[0]
        many = generate(tiny(config, dtype, pack=True), prompts(97), asked)[3]
        assert one.top_logprobs == many.top_logprobs


def test_a_seed_gives_its_text_in_any_company():
    asked = SamplingParams(max_tokens=20, temperature=1.5, top_p=0.95, seed=42, repetition_penalty=1.2)
    alone = generate(tiny(), [prompts(97)[1]], asked)[0].tokens
    rest = [SamplingParams(max_tokens=9, seed=number) for number in range(5)]
    company = generate(tiny(), [*prompts(97)[:5], prompts(97)[1]], [*rest, asked])[5].tokens
    assert company == alone
    assert generate(tiny(), [prompts(97)[1]], dataclasses.replace(asked, seed=43))[0].tokens != alone


def test_cancel_frees_the_place_and_leaves_neighbours_alone():
    expected = generate(tiny(), [prompts(97)[2]], GREEDY)[0].tokens
    engine = tiny(max_batch=2)
    keep, made = Request("keep", prompts(97)[2], GREEDY), Generation()
    for name in ("first", "keep", "waiting"):
        engine.submit(keep if name == "keep" else Request(name, prompts(97)[3], GREEDY))
    assert engine.cancel("waiting") and not engine.cancel("waiting")
    for step in range(60):
        if step == 4:
            assert engine.cancel("first")  # slot 0: "keep" moves down
            engine.submit(Request("late", prompts(97)[0], GREEDY))
        for event in engine.step():
            assert event.request_id != "first" or step < 4
            if event.request_id == "keep":
                made.take(event)
        if step == 4:
            assert engine.stats()["running"] == 2
        if not engine.has_work():
            break
    assert made.tokens == expected
    assert engine.stats()["finished"] == {"cancelled": 2, "length": 2} and engine.stats()["kv_usage"] == 0.0


def test_running_requests_get_a_token_in_every_step_of_a_long_prefill():
    engine = tiny()
    engine.submit(Request("run", [5, 6], SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)))
    engine.step()
    engine.submit(Request("long", prompts(97, (180,))[0], GREEDY))
    for step in range(180 // 16):
        assert [event.request_id for event in engine.step()] == ["run"], step
    assert {event.request_id for event in engine.step()} == {"run", "long"}


def test_a_broken_row_ends_alone_and_leaves_its_slot_clean():
    engine, reference = tiny(max_batch=2), tiny()
    with torch.no_grad():
        engine._runner.decoder.embed.weight[96] = float("nan")
    with torch.no_grad():
        reference._runner.decoder.embed.weight[96] = 0.0
    head = engine._runner.decoder.embed.weight.clone().nan_to_num(0.0)
    engine._runner._head = engine._runner._step.tail.head = lambda hidden: hidden @ head.T  # tied: keep the head whole
    fine, broken = Request("fine", [3, 4, 5], GREEDY), Request("broken", [7, 96, 8], GREEDY)
    results = {"fine": Generation(), "next": Generation()}
    events = []
    for request in (broken, fine, Request("next", [3, 4, 5], GREEDY)):
        engine.submit(request)
    while engine.has_work():
        for event in engine.step():
            events.append(event)
            if event.request_id != "broken":
                results[event.request_id].take(event)
    (failure,) = [event for event in events if event.request_id == "broken"]
    assert failure.finish_reason == "error" and failure.token_id is None and "finite" in failure.text
    assert results["fine"].tokens == results["next"].tokens and len(results["fine"].tokens) == 12


def test_end_of_sequence_and_limits():
    engine = tiny()
    free = generate(engine, [[5, 6, 7]], GREEDY)[0].tokens
    ended = tiny(dataclasses.replace(TINY, eos_token_ids=(free[4],)))
    result = generate(ended, [[5, 6, 7]], dataclasses.replace(GREEDY, ignore_eos=False))[0]
    first = free.index(free[4])
    assert (result.tokens, result.finish_reason) == (free[: first + 1], "stop")
    for request, words in [
        (Request("a", [1] * 300), "300 tokens, more than fit the context of 256"),
        (Request("b", [1] * 200, SamplingParams(max_tokens=100)), "at most 56"),
        (Request("c", [97]), "outside 0 to 96"),
        (Request("d", []), "no tokens"),
        (Request("e", [1], SamplingParams(stop=("x",))), "tokenizer"),
    ]:
        with pytest.raises(UserError, match=words):
            engine.submit(request)
    assert not engine.has_work() and engine.stats()["waiting"] == 0
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        generate(engine, "text")


def test_cache_limits_name_both_sides():
    per_token = token_bytes(TINY, torch.float32)
    assert per_token == 2 * 2 * 2 * 12 * 4  # keys and values, layers, kv heads, head_dim, bytes
    assert fit_context(TINY, 4, None, torch.float32, 10**9) == 256
    assert fit_context(TINY, 4, None, torch.float32, 4 * per_token * 200) == 192
    assert fit_context(TINY, 4, 100, torch.float32, 10**9) == 100
    for wanted, limit, words in [
        (257, 10**9, "context of 256"),
        (1, 10**9, "from 2"),
        (200, 4 * per_token * 100, "at most 64 tokens fit"),
        (None, 1000, "does not fit"),
    ]:
        with pytest.raises(UserError, match=words):
            fit_context(TINY, 4, wanted, torch.float32, limit)
    with pytest.raises(UserError, match="max_batch"):
        tiny(max_batch=0)


def test_bytes_and_speed_are_counted_from_the_shapes():
    engine = tiny()
    before = engine.stats()
    generate(engine, [[5, 6, 7], [5]], dataclasses.replace(GREEDY, max_tokens=3))
    after = engine.stats()
    weights = 4 * sum(parameter.numel() for parameter in engine._runner.decoder.parameters())  # tied: the table is read
    resident = (4 + 2) + (5 + 3)  # two decode steps; after the first, prompt + 1 tokens are read, then one more
    assert after["decode_bytes"] == 2 * weights + resident * after["kv_bytes_per_token"]
    speed = measure(before, after, 1e9)
    assert (speed.decode_tokens, speed.prompt_tokens) == (4, 4)
    assert speed.mbu == pytest.approx(after["decode_bytes"] / after["decode_seconds"] / 1e9)
    assert measure(after, after, None).tokens_per_second is None


def test_closing_a_stream_frees_its_place():
    engine = tiny()
    events = stream(engine, [4, 5], SamplingParams(max_tokens=50, ignore_eos=True))
    assert next(events).prompt_tokens == 2
    events.close()
    assert not engine.has_work() and engine.stats()["running"] == 0
    with pytest.raises(UserError, match="same id"):
        list(run(engine, [Request("x", [1]), Request("x", [2])]))
    assert not engine.has_work()


@pytest.mark.slow
def test_compiled_equals_eager_and_nothing_is_compiled_again():
    """Two windows (sliding and full), batches of 1 to 4, contexts across several buckets: no graph after warm-up."""
    config = dataclasses.replace(TINY, family="qwen2", qkv_bias=True, sliding_window=70, sliding_layers=(1,))
    lengths = (1, 3, 90, 33, 7, 150)
    eager = generate(tiny(config), prompts(97, lengths), GREEDY)
    engine = tiny(config, compile=True)
    compiled = generate(engine, prompts(97, lengths), GREEDY)
    assert [result.tokens for result in compiled] == [result.tokens for result in eager]
    assert generate(engine, [prompts(97, lengths)[5]], GREEDY)[0].tokens == eager[5].tokens
    stats = engine.stats()
    assert stats["compiled"] and stats["compile_seconds"] > 0
    assert stats["recompiles"] == 0


@pytest.mark.slow
def test_the_smallest_compiled_engine_equals_eager():
    """As many rows as slots, and a context of one granule: the sizes at which a slab is read whole."""
    asked = prompts(97, (3, 9))
    eager = generate(tiny(max_batch=2, max_context=64), asked, GREEDY)
    compiled = generate(tiny(max_batch=2, max_context=64, compile=True), asked, GREEDY)
    assert [result.tokens for result in compiled] == [result.tokens for result in eager]
