"""Model folders: shards, damage, atomic writes, tokenizer files, and parameter counts others publish."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ridgeline.config import ModelSection
from ridgeline.errors import JobError, UserError
from ridgeline.models import Decoder, DecoderConfig, config_from_section, load, load_config, save
from ridgeline.models.describe import describe
from ridgeline.models.hf_config import from_hf_config
from test_models_families import CASES


def small(**changes) -> Decoder:
    torch.manual_seed(0)
    section = ModelSection(layers=2, hidden=32, heads=4, kv_heads=2, context_length=32, vocab_size=61)
    config = config_from_section(section).replace(eos_token_ids=(2,), bos_token_id=1, **changes)
    return Decoder(config)


@pytest.fixture
def folder(tmp_path) -> Path:
    model = small()
    return save(model, model.config, tmp_path / "model")


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def same(a: Decoder, b: Decoder) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_shards_and_index_are_read_by_us_and_by_transformers(tmp_path):
    model = small(tie_embeddings=False)
    path = save(model, model.config, tmp_path / "sharded", shard_bytes=20_000)
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) >= model.config.num_parameters * 4
    assert same(load(path), model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert theirs.num_parameters() == model.config.num_parameters
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    assert same(load(tmp_path / "theirs"), model)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"),
            r"model\.layers\.1\.self_attn\.k_proj\.weight' is missing",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}),
            r"model\.layers\.2\.mlp\.up_proj\.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"model\.norm\.weight' has shape \[31\], expected \[32\]",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), r"model\.norm\.weight' is int8"),
        (lambda t: t.update({"lm_head.weight": torch.ones(61, 32)}), r"lm_head\.weight' differs"),
    ],
)
def test_a_wrong_tensor_is_named(folder, change, named):
    edit(folder, change)
    with pytest.raises(UserError, match=named):
        load(folder)


def test_a_tied_head_written_out_is_accepted_when_equal(folder):
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same(load(folder), small())


class Evil:
    def __reduce__(self):
        return (open, ("pickle-was-loaded", "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_no_pickle_is_loaded(folder, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=f"{name}, a pickle"):
        load(folder)
    assert not Path("pickle-was-loaded").exists()


def test_damaged_and_foreign_files_are_one_line(folder):
    weights, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    for cut in (0, 5, 300, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="not a readable safetensors file"):
            load(folder)
    weights.unlink()
    index = folder / "model.safetensors.index.json"
    for content, named in (
        ("[]", "not a safetensors index"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "outside the folder"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors"),
    ):
        index.write_text(content)
        with pytest.raises(UserError, match=named):
            load(folder)
    index.unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        load(folder)
    with pytest.raises(UserError, match="is a file"):
        load(folder / "config.json")
    with pytest.raises(UserError, match="no model folder"):
        load(folder / "nowhere")


def test_dtypes(folder):
    assert load(folder).embed.weight.dtype == torch.float32
    half = load(folder, dtype="bf16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.inv_freq.dtype == torch.float32
    save(half, half.config, folder)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load(folder).embed.weight.dtype == torch.bfloat16
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert theirs.dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype 'int3'"):
        load(folder, dtype="int3")


def test_a_folder_that_is_no_model_is_not_overwritten(tmp_path):
    (tmp_path / "precious.txt").write_text("thesis")
    model = small()
    with pytest.raises(UserError, match="not a model folder"):
        save(model, model.config, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("name", ["thesis.tex", "lora.safetensors", "notes/a.txt", ".git/HEAD", "runs.json"])
def test_a_model_folder_with_a_file_of_somebody_else_is_not_replaced(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("years of work")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=f"holds {re.escape(name.partition('/')[0])}, which is no part of a model"):
        save(small(), small().config, folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("content", ['{"database": "localhost"}', "[1]", "not JSON", '{"model_type": ""}'])
def test_a_config_json_of_something_else_is_not_replaced(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json names no model_type"):
        save(small(), small().config, tmp_path)
    assert (tmp_path / "config.json").read_text() == content and len(list(tmp_path.iterdir())) == 1


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.path.insert(0, sys.argv[2])
from test_models_folder import small
from ridgeline.errors import JobError
from ridgeline.models import save
model = small()
try:
    save(model, model.config, sys.argv[1])
except JobError as error:
    print("refused:", error)
"""


def test_a_full_disk_leaves_the_old_folder_whole(folder):
    """A file-size limit stands in for the full disk: the write fails half way with an OSError."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for target in (folder, folder.parent / "fresh"):
        command = [sys.executable, "-c", FULL_DISK, str(target), str(Path(__file__).parent)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert "refused: could not write" in done.stdout, done.stderr
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["model"], "nothing half-written stays behind"


def test_saving_over_a_model_replaces_it_whole(folder, monkeypatch):
    stale = folder / "model-00001-of-00002.safetensors"
    stale.write_bytes(b"from before")
    model = small(tie_embeddings=False)
    save(model, model.config, folder)
    assert same(load(folder), model) and not stale.exists()
    monkeypatch.setattr("ridgeline.models.folder.write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(JobError, match="No space"):
        save(small(), small().config, folder)
    assert same(load(folder), model) and len(list(folder.parent.iterdir())) == 1


def test_a_bare_tokenizer_is_used_as_it_is_by_transformers(tmp_path):
    """AutoTokenizer would otherwise rebuild a Llama tokenizer of its own from the same file."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|begin|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(["the cat sat on the mat, the hat"] * 3, trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    model = small()
    path = save(model, model.config, tmp_path / "model", tokenizer_files=[tmp_path / "tokenizer.json"])
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    for text in ("the hat", "Ωμέγα 12345\n\n  x", "<|begin|>a<|end|>"):
        assert theirs.encode(text) == trained.encode(text).ids
        assert theirs.decode(trained.encode(text).ids) == trained.decode(trained.encode(text).ids, False)
    assert (theirs.bos_token, theirs.eos_token) == ("<|begin|>", "<|end|>")
    again = save(load(path), model.config, tmp_path / "again", tokenizer_files=path)
    assert (again / "tokenizer_config.json").read_bytes() == (path / "tokenizer_config.json").read_bytes()
    generation = transformers.GenerationConfig.from_pretrained(path)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)
    with pytest.raises(UserError, match="does not exist"):
        save(model, model.config, tmp_path / "model", tokenizer_files=[tmp_path / "missing.json"])


def test_a_hub_id_is_found_in_the_local_cache(folder, tmp_path):
    """A cached snapshot, the network forbidden: ``org/name`` loads, and what is not cached is one line."""
    home = tmp_path / "home"
    repository = home / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / "abc123")
    code = """
from ridgeline.models import load
from ridgeline.errors import UserError
print(load("someone/tiny").config.hidden_size)
try:
    load("someone/else")
except UserError as error:
    print(error)
"""
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0] == "32" and len(lines) == 2 and "no folder someone/else" in lines[1], done.stderr


def test_parameter_counts_are_the_published_ones():
    gpt2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
    assert from_hf_config(gpt2).num_parameters == 124_439_808
    llama = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
    }
    assert from_hf_config(llama).num_parameters == 6_738_415_616
    gptj = {"model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64}
    assert from_hf_config(gptj).num_parameters == 6_050_882_784


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_known_without_allocating(case):
    name, fields = CASES[case]
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**fields))
        config = from_hf_config(theirs.config.to_dict())
        ours = Decoder(config)
    assert {n: tuple(p.shape) for n, p in ours.named_parameters()} == config.parameter_shapes()
    assert config.num_parameters == theirs.num_parameters()


def test_initialisation_is_described_for_every_parameter():
    for family in ("llama", "gpt2", "gptj", "qwen2"):
        config = config_from_section(ModelSection(family=family, layers=8, hidden=32, heads=4), 61)
        for name, shape in config.parameter_shapes().items():
            std, value = config.init_std(name), config.init_value(name)
            if len(shape) == 1:
                assert std is None and value == float(name.endswith("norm.weight"))
            else:
                residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
                assert value == 0 and std == pytest.approx(0.02 / 4 if residual else 0.02)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"family": "gpt2", "rope_theta": 5.0}, "rope_theta"),
        ({"family": "gptj", "hidden": 64, "heads": 4, "kv_heads": 2}, "kv_heads"),
        ({"hidden": 60, "heads": 4, "head_dim": 15}, "rope_dim 15"),
    ],
)
def test_a_section_its_family_cannot_express_is_refused(section, named):
    with pytest.raises(UserError, match=named):
        config_from_section(ModelSection(**section), 61)


def test_a_config_that_contradicts_its_family_is_refused(folder):
    config = load_config(folder)
    assert isinstance(config, DecoderConfig) and len({config, load_config(folder)}) == 1
    for change in (
        {"norm": "layer"},
        {"sliding_window": 4, "sliding_layers": (0,)},
        {"out_bias": True},
        {"rope_dim": 4},
    ):
        with pytest.raises(UserError):
            config.replace(**change)


def test_describe_counts_what_is_stored(folder):
    found = describe(folder)
    tensors = load_file(folder / "model.safetensors")
    assert found["bytes"] == sum(tensor.nbytes for tensor in tensors.values()) == 4 * found["parameters"]
    assert sum(row["count"] for row in found["tensors"]) == len(tensors)
    assert found["dtype_bytes"] == {"f32": found["bytes"]}
    assert {row["name"]: row["count"] for row in found["tensors"]}["model.layers.*.mlp.up_proj.weight"] == 2
