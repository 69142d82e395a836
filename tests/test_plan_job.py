"""Memory, time and the whole plan: against autograd's saved tensors, torch.chunk, a lab's log, and identities."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ridgeline.cli import plan as cli_plan
from ridgeline.config import JobConfig, parse_config
from ridgeline.errors import UserError
from ridgeline.hardware import Ceilings
from ridgeline.kernels.rope import cos_sin
from ridgeline.models import Decoder, DecoderConfig, config_from_section
from ridgeline.plan import History, compare, memory_plan, plan_job, time_plan
from ridgeline.plan import activations as kept_activations
from ridgeline.plan import calibration as calibrations
from ridgeline.plan.memory import MemorySetup, group_sizes, sharded_elements
from ridgeline.plan.resolve import resolve_model
from ridgeline.plan.step_time import TimeSetup, gathered_elements
from ridgeline.runs import Run

CPU = Ceilings(
    device="Test CPU",
    kind="cpu",
    gemm_flops_per_second={"fp32": 2e11, "bf16": 4e11},
    copy_bytes_per_second=2e10,
    read_bytes_per_second=3e10,
    all_reduce_bytes_per_second=2e9,
    all_gather_bytes_per_second=1e9,
    backend="gloo",
    measured_at="2026-01-01T00:00:00+00:00",
    versions={"torch": "2.13.0"},
    datasheet=None,
    threads=2,
    process_bytes=200 << 20,
)
GPU = replace(CPU, device="Test GPU", kind="cuda", backend="nccl", process_bytes=None)


def job(**tables: dict[str, Any]) -> JobConfig:
    return parse_config(tables)


def model(section: dict[str, Any] | None = None, vocab: int = 8192) -> DecoderConfig:
    return config_from_section(job(model=section or {}, train={"seq_len": 8}).model, vocab)


# What autograd keeps ----------------------------------------------------------------------------------------------


def saved_bytes(call: Any, exclude: set[int]) -> int:
    """Bytes of all storages that autograd saves during ``call``, each once, without those in ``exclude``."""
    storages: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in exclude:
            storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # kept alive: addresses stay distinct
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    assert out is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def addresses(*tensors: torch.Tensor) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


KINDS: list[tuple[str, int, dict[str, Any]]] = [
    ("llama", 4, {}),
    ("llama", 2, {}),
    ("qwen2", 2, {}),
    ("qwen3", 2, {}),
    ("gpt2", 4, {}),
    ("gptj", 4, {}),
    ("mistral", 2, {"sliding_window": 16, "sliding_layers": (0, 1)}),
]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("family", "kv_heads", "changes"), KINDS)
def test_kept_activations_are_what_autograd_saves(
    family: str, kv_heads: int, changes: dict[str, Any], dtype: str
) -> None:
    """The real decoder in eager mode, every storage that the forward pass saves: equal to the byte."""
    batch, seq, item = 2, 48, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    section = {"family": family, "layers": 2, "hidden": 96, "heads": 4, "context_length": 64}
    config = model({**section, "kv_heads": kv_heads}, 300).replace(**changes)
    decoder = Decoder(config).to(item)
    decoder.init_buffers()
    tokens = torch.randint(0, 300, (batch, seq))
    positions = torch.arange(seq)[None]
    got = saved_bytes(lambda: decoder(tokens, positions), addresses(tokens, positions, *decoder.parameters()))
    if config.positions == "rotary":  # the tables of cosines and sines, once for all layers
        got -= sum(table.nbytes for table in cos_sin(positions, decoder.inv_freq, 1.0, item))
    setup = MemorySetup(seq_len=seq, micro_batch_size=batch, dtype=dtype, compiled=False)
    assert got == kept_activations.kept(config, setup)


@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 2), ("gpt2", 4), ("qwen3", 2)])
def test_kept_activations_of_a_compiled_block(family: str, kv_heads: int) -> None:
    """The compiler's partition of forward and backward keeps what the list says, to the byte.

    The partitioner is Inductor's; generating its code too would take three times as long and keep the same tensors.
    """
    section = {"family": family, "layers": 1, "hidden": 96, "heads": 4, "kv_heads": kv_heads, "context_length": 64}
    config = model(section, 300)
    decoder = Decoder(config).to(torch.bfloat16)
    decoder.init_buffers()
    x = torch.randn(2, 48, 96, dtype=torch.bfloat16, requires_grad=True)
    rotation = None
    if config.positions == "rotary":
        rotation = cos_sin(torch.arange(48)[None], decoder.inv_freq, 1.0, torch.bfloat16)
    backend = "aot_eager_decomp_partition"
    block = torch.compile(decoder.blocks[0].forward, fullgraph=True, dynamic=False, backend=backend)
    got = saved_bytes(lambda: block(x, rotation), addresses(*(rotation or ()), *decoder.parameters()))
    assert got == kept_activations.block(config, MemorySetup(seq_len=48, micro_batch_size=2, compiled=True))


def test_checkpointing_keeps_the_blocks_inputs() -> None:
    from torch.utils.checkpoint import checkpoint

    config = model({"layers": 3, "hidden": 96, "heads": 4, "context_length": 64}, 300)
    decoder = Decoder(config)
    for block in decoder.blocks:
        inner = block.forward
        block.forward = lambda *a, f=inner: checkpoint(f, *a, use_reentrant=False, preserve_rng_state=False)  # type: ignore[method-assign]
    tokens = torch.randint(0, 300, (2, 48))
    positions = torch.arange(48)[None]
    got = saved_bytes(lambda: decoder(tokens, positions), addresses(tokens, positions, *decoder.parameters()))
    setup = MemorySetup(seq_len=48, micro_batch_size=2, dtype="fp32", compiled=False, recompute=True)
    assert got == kept_activations.kept(config, setup)
    plain = replace(setup, recompute=False)
    assert kept_activations.kept(config, setup) < kept_activations.kept(config, plain) / 4


# Memory -----------------------------------------------------------------------------------------------------------


def test_static_bytes_against_a_labs_log() -> None:
    """Section 4.4: 124,475,904 parameters with fp32 Adam are 1,899.4 MiB; the lab's log said 1,907.2 (0.4 % more)."""
    config = model({"family": "gpt2", "layers": 12, "hidden": 768, "heads": 12, "context_length": 1024}, 50304)
    plan = memory_plan(config, MemorySetup(seq_len=1024, micro_batch_size=2, dtype="fp32", compiled=False))
    static = sum(plan.moments["optimizer"].values()) / 2**20
    assert static == pytest.approx(1899.4, abs=0.05) and abs(static / 1907.2 - 1) < 0.005


@given(st.integers(1, 9), st.integers(3, 500), st.sampled_from(["llama", "gpt2", "qwen3"]))
@settings(max_examples=40, deadline=None)
def test_the_largest_shard_is_torch_chunks_first(dp: int, vocab: int, family: str) -> None:
    config = model({"family": family, "layers": 2, "hidden": 36, "heads": 3, "intermediate": 70}, vocab)
    first = [torch.empty(shape, device="meta").chunk(dp, 0)[0].numel() for shape in config.parameter_shapes().values()]
    assert sharded_elements(config, dp) == sum(first)


def test_two_ranks_halve_what_is_sharded() -> None:
    config = model()
    one, two = (memory_plan(config, MemorySetup(seq_len=512, micro_batch_size=8, dp=dp)) for dp in (1, 2))
    for moment in one.moments:
        for category in ("parameters", "optimizer_state", "gradients"):
            if category in one.moments[moment]:
                assert two.moments[moment][category] * 2 == one.moments[moment][category]
    assert two.moments["loss"]["activations"] == one.moments["loss"]["activations"]
    assert two.peak_bytes < one.peak_bytes


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([64, 128, 256]), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_memory_adds_up_and_grows(layers: int, heads: int, seq: int, batch: int, recompute: bool) -> None:
    shape = {"layers": layers, "hidden": 64 * heads, "heads": heads, "context_length": 512}
    setup = MemorySetup(seq_len=seq, micro_batch_size=batch, recompute=recompute)
    plan = memory_plan(model(shape), setup)
    assert plan.peak_bytes == sum(plan.bytes_by_category.values())
    assert plan.peak_bytes == max(sum(moment.values()) for moment in plan.moments.values())
    assert all(size > 0 for size in plan.bytes_by_category.values())
    for larger in (
        memory_plan(model({**shape, "layers": layers + 1}), setup),
        memory_plan(model({**shape, "heads": heads + 1, "hidden": 64 * (heads + 1)}), setup),
        memory_plan(model(shape), replace(setup, micro_steps=2)),
    ):
        assert larger.peak_bytes > plan.peak_bytes
    for longer in (replace(setup, micro_batch_size=batch + 1), replace(setup, seq_len=2 * seq)):
        larger = memory_plan(model(shape), longer)
        assert larger.peak_bytes >= plan.peak_bytes  # a tiny batch peaks where it does not count
        assert sum(larger.moments["loss"].values()) > sum(plan.moments["loss"].values())
    assert memory_plan(model(shape), replace(setup, reshard_after_forward=False)).peak_bytes >= plan.peak_bytes


# Time -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([64, 128]), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_time_adds_up_and_grows(layers: int, heads: int, seq: int, batch: int, recompute: bool) -> None:
    shape = {"layers": layers, "hidden": 64 * heads, "heads": heads, "context_length": 512}
    setup = TimeSetup(seq, global_batch_size=2 * batch, micro_batch_size=batch, recompute=recompute)
    plan = time_plan(model(shape), setup, CPU)
    assert plan.step_seconds == pytest.approx(sum(plan.step_seconds_by_part.values()))
    assert set(plan.formulas) == set(plan.step_seconds_by_part) and min(plan.step_seconds_by_part.values()) >= 0
    faster = replace(CPU, gemm_flops_per_second={"bf16": 8e11}, copy_bytes_per_second=4e10)
    assert time_plan(model(shape), setup, faster).step_seconds == pytest.approx(plan.step_seconds / 2)
    for slower in (
        time_plan(model({**shape, "layers": layers + 1}), setup, CPU),
        time_plan(model({**shape, "heads": heads + 1, "hidden": 64 * (heads + 1)}), setup, CPU),
        time_plan(model(shape), replace(setup, global_batch_size=3 * batch), CPU),
        time_plan(model(shape), replace(setup, seq_len=2 * seq), CPU),
        time_plan(model(shape), replace(setup, procs=2), CPU),  # two processes share the CPU and have to talk
    ):
        assert slower.step_seconds > plan.step_seconds
    if not recompute:
        assert time_plan(model(shape), replace(setup, recompute=True), CPU).step_seconds > plan.step_seconds


def test_two_gpus_halve_the_work_and_two_processes_on_a_cpu_do_not() -> None:
    one, two = TimeSetup(512, 8, 4), TimeSetup(512, 8, 4, procs=2)
    for part in ("block GEMMs", "head GEMMs", "attention", "elementwise"):
        single, pair = (time_plan(model(), setup, GPU).step_seconds_by_part[part] for setup in (one, two))
        assert pair == pytest.approx(single / 2, rel=0.02)  # each rank reads all weights: not exactly half
        single, pair = (time_plan(model(), setup, CPU).step_seconds_by_part[part] for setup in (one, two))
        assert pair == pytest.approx(single)
    assert time_plan(model(), one, CPU).step_seconds_by_part["collectives"] == 0
    assert time_plan(model(), two, CPU).step_seconds_by_part["collectives"] > 0


def test_gathers_follow_the_layout() -> None:
    """Field notes 3.3 with a kept root, g groups, A micro-steps: 2g - 1 all-gathers, (g-1)(A+1) + 1, or g."""
    config = model()
    block, root = group_sizes(config)
    layers = config.num_layers
    assert gathered_elements(config, TimeSetup(512, 8, 8)) == 2 * layers * block + root
    assert gathered_elements(config, TimeSetup(512, 8, 2)) == 5 * layers * block + root
    assert gathered_elements(config, TimeSetup(512, 8, 2, reshard_after_forward=False)) == layers * block + root
    assert block * layers + root == config.num_parameters


def test_what_was_not_measured_is_not_guessed() -> None:
    with pytest.raises(UserError, match="the bf16 GEMM was not measured"):
        time_plan(model(), TimeSetup(512, 8, 8), replace(CPU, gemm_flops_per_second={"fp32": 1e11}))
    deaf = replace(CPU, all_reduce_bytes_per_second=None)
    time_plan(model(), TimeSetup(512, 8, 8), deaf)
    with pytest.raises(UserError, match="collectives were not measured"):
        time_plan(model(), TimeSetup(512, 8, 4, procs=2), deaf)


# The plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_is_consistent_and_is_json() -> None:
    plan = plan_job(job(), model(), CPU)
    document = json.loads(json.dumps(plan.to_dict()))
    assert document["parameters"] == 13_767_552
    assert document["step_seconds"] == pytest.approx(sum(document["step_seconds_by_part"].values()))
    assert document["peak_bytes"] == sum(document["bytes_by_category"].values())
    assert document["bytes_by_category"]["process"] == 200 << 20
    assert document["tokens_per_second"] == pytest.approx(8 * 512 / document["step_seconds"])
    rate = document["flops"]["per_token"] * document["tokens_per_second"]
    assert document["mfu"] == pytest.approx(rate / 4e11) and "measured bf16 GEMM" in document["mfu_formula"]
    recomputed = plan_job(job(parallel={"activation_checkpointing": "full"}), model(), CPU).to_dict()
    assert recomputed["flops"]["per_step"] > document["flops"]["per_step"]
    assert recomputed["flops"]["per_token"] == document["flops"]["per_token"]


def test_a_plan_from_a_busy_machine_says_so() -> None:
    assert plan_job(job(), model(), CPU).notes == ()
    assert "busy machine" in plan_job(job(), model(), replace(CPU, others_share=0.5)).notes[0]


def test_calibration_scales_every_part_and_is_named() -> None:
    plain = plan_job(job(), model(), CPU).to_dict()
    history = History((("toy", plain["step_seconds"] / 100, 9.0), ("run-a", plain["step_seconds"], 1.5)))
    scaled = plan_job(job(), model(), CPU, history).to_dict()
    assert scaled["step_seconds"] == pytest.approx(1.5 * plain["step_seconds"])
    assert scaled["step_seconds_uncalibrated"] == plain["step_seconds"]
    assert scaled["step_seconds"] == pytest.approx(sum(scaled["step_seconds_by_part"].values()))
    assert scaled["calibration"] == {"factor": 1.5, "runs": ("run-a",)} and plain["calibration"] is None


def finished_run(root: Path, prediction: dict[str, Any], **summary: float) -> Run:
    run = Run.create("train", root=root)
    run.save_json("prediction.json", prediction)
    run.summarize(**summary)
    run.finish()
    return run


def test_finished_runs_correct_the_next_prediction(tmp_path: Path) -> None:
    prediction = plan_job(job(), model(), CPU).to_dict()
    seconds = prediction["step_seconds"]
    assert calibrations.for_job(CPU, "bf16", 1, True, tmp_path) == History()
    for factor in (2.0, 3.0, 10.0):
        run = finished_run(tmp_path / "runs", prediction, tokens_per_second=4096 / (seconds * factor))
        assert calibrations.record(run, tmp_path) == pytest.approx(factor)
    calibrations.record(run, tmp_path)  # the same run again counts once
    known = calibrations.for_job(CPU, "bf16", 1, True, tmp_path)
    near = known.near(seconds)
    assert near is not None and near.factor == pytest.approx(3.0) and len(near.runs) == 3
    assert known.near(seconds / 5) is None and known.near(seconds * 5) is None, "toys and giants tell nothing"
    for other in (("fp32", 1, True), ("bf16", 2, True), ("bf16", 1, False)):
        assert calibrations.for_job(CPU, *other, tmp_path) == History()
    assert calibrations.for_job(replace(CPU, device="Other"), "bf16", 1, True, tmp_path) == History()
    # A run planned with the factor still reports against the uncalibrated prediction: the factor does not compound.
    again = plan_job(job(), model(), CPU, known).to_dict()
    run = finished_run(tmp_path / "runs", again, step_seconds=seconds * 3)
    assert calibrations.record(run, tmp_path) == pytest.approx(3.0)
    (file,) = tmp_path.glob("calibration-*.json")
    file.write_text("{")
    assert calibrations.for_job(CPU, "bf16", 1, True, tmp_path) == History()


def test_a_run_without_a_measurement_is_not_recorded(tmp_path: Path) -> None:
    prediction = plan_job(job(), model(), CPU).to_dict()
    assert calibrations.record(finished_run(tmp_path / "runs", prediction), tmp_path) is None
    assert calibrations.record(finished_run(tmp_path / "runs", {}, step_seconds=1.0), tmp_path) is None
    busy = plan_job(job(), model(), replace(CPU, others_share=0.5)).to_dict()
    assert calibrations.record(finished_run(tmp_path / "runs", busy, step_seconds=1.0), tmp_path) is None
    assert not list(tmp_path.glob("calibration-*"))


def test_predicted_beside_measured() -> None:
    prediction = plan_job(job(), model(), CPU).to_dict()
    measured = {
        "tokens_per_second": prediction["tokens_per_second"] / 2,
        "parameters": 13_767_552,
        "peak_memory_bytes": 1,
    }
    rows = {row["name"]: row for row in compare(prediction, measured)}
    assert rows["parameters"]["ratio"] == 1 and rows["step seconds"]["ratio"] == pytest.approx(0.5)
    assert rows["tokens per second"]["ratio"] == pytest.approx(2)
    assert rows["peak bytes per rank"]["predicted"] == prediction["peak_bytes"]
    assert rows["MFU"]["measured"] is None and rows["MFU"]["ratio"] is None
    assert all(row["predicted"] is None and row["ratio"] is None for row in compare({}, {}))


def test_where_the_vocabulary_comes_from(tmp_path: Path) -> None:
    folder = tmp_path / "built"
    wanted = {"data": {"path": str(folder), "tokenizer": {"vocab_size": 999}}}
    config, notes = resolve_model(job(**wanted))
    assert config.vocab_size == 999 and "not built yet" in notes[0]
    folder.mkdir()
    (folder / "manifest.json").write_text('{"vocab_size": 777}')
    assert resolve_model(job(**wanted))[0].vocab_size == 777 and resolve_model(job(**wanted))[1] == []
    assert resolve_model(job(**wanted, model={"vocab_size": 555}))[0].vocab_size == 555
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        resolve_model(job(**wanted))


def test_plan_show_prints_and_leaves_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ridgeline.cli.env.measure_with_progress", lambda *a, **k: CPU)
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    config = tmp_path / "tiny.toml"
    config.write_text(f'[data]\npath = "{tmp_path}/none"\n[model]\nlayers = 2\n')
    arguments = ["show", str(config), "train.steps=5", "model.layers=3", "--runs", str(tmp_path / "runs")]
    shown = CliRunner().invoke(cli_plan.app, arguments)
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.stdout.split())
    for part in (
        "6N",
        "causal attention",
        "optimizer state",
        "collectives",
        "tokens/s",
        "not calibrated",
        "assumed from data.tokenizer",
    ):
        assert part in text, part
    (run,) = [Run.open(path) for path in (tmp_path / "runs").iterdir()]
    prediction = run.load_json("prediction.json")
    assert run.kind == "plan" and run.info["status"] == "done" and run.config["model"]["layers"] == 3
    assert (
        run.summary["parameters"] == prediction["parameters"] and run.load_json("ceilings.json")["device"] == "Test CPU"
    )
    document = json.loads(CliRunner().invoke(cli_plan.app, [*arguments, "--json"]).stdout)
    assert document["step_seconds"] == prediction["step_seconds"]
    bad = CliRunner().invoke(cli_plan.app, ["show", str(config), "optimizer.leaning_rate=1"])
    assert bad.exit_code == 2


def test_setups_name_what_the_configuration_names() -> None:
    """Nothing of the configuration that time or memory depends on is dropped on the way."""
    base, other = asdict(TimeSetup(512, 8, 8)), job(
        train={"global_batch_size": 16, "micro_batch_size": 2, "seq_len": 128, "dtype": "fp32", "compile": False},
        parallel={"procs": 4, "reshard_after_forward": False, "activation_checkpointing": "full"},
        optimizer={"clip_norm": 0},
    )  # fmt: skip
    inputs = plan_job(other, model(), CPU).time.inputs
    assert all(inputs[name] != value for name, value in base.items()) and inputs["micro_steps"] == 2
