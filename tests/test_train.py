"""The loop, in one process: against transformers and torch's own parts, and its promises about failures."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ridgeline.config import OptimizerSection
from ridgeline.data import Dataset, batch
from ridgeline.errors import JobError, UserError
from ridgeline.hardware import Ceilings
from ridgeline.models import Decoder, config_from_section, load, save
from ridgeline.runs import Run
from ridgeline.train import train
from ridgeline.train.hold import hold
from ridgeline.train.limits import limits
from ridgeline.train.optimizer import build_optimizer
from ridgeline.train.record import drop_after
from ridgeline.train.schedule import learning_rate
from ridgeline.train.start import continued_config
from ridgeline.train.state import draw_parameters
from train_tools import SEQ, corpus, losses, pretend_ceilings, tiny, weights


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("corpus")
    pretend_ceilings(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIDGELINE_CACHE", str(folder))
        yield corpus(folder)


@pytest.fixture(scope="module")
def trained(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six steps, fp32, two micro-batches each."""
    return train(tiny(data), runs_root=tmp_path_factory.mktemp("runs"))


def test_schedule_equals_torch() -> None:
    """Linear warm-up then cosine, as torch's LinearLR and CosineAnnealingLR make them."""
    section = OptimizerSection(learning_rate=0.5, min_learning_rate=0.05, warmup_steps=4)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, 1.0, 3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16, 0.05)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [3])
    for step in range(1, 21):
        assert learning_rate(step, section, 20) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        scheduler.step()
    assert learning_rate(21, section, 20) == pytest.approx(0.05)
    assert learning_rate(1, OptimizerSection(warmup_steps=0), 1) == pytest.approx(1e-4)


def test_curve_equals_transformers_in_a_plain_loop(data: dict[str, Any], trained: Run, tmp_path: Path) -> None:
    """Same weights, batches, AdamW, clipping and schedule in transformers and plain torch: the same six losses."""
    transformers = pytest.importorskip("transformers")
    job = tiny(data)
    dataset = Dataset.open(data["path"])
    config = config_from_section(job.model, dataset.vocab_size)
    decoder = Decoder(config)
    draw_parameters(decoder, config, job.train.seed)
    save(decoder, config, tmp_path / "start")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    expected = []
    for step in range(1, 7):
        rows = torch.from_numpy(batch(dataset, step - 1, 8, SEQ, job.train.seed))
        logits = model(input_ids=rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, job.optimizer, 6)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((loss.item(), norm.item()))
    rows = [row for row in trained.metrics() if "loss" in row]
    for row, (loss, norm) in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=1e-5), row
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4), row


def test_first_loss_is_that_of_guessing(data: dict[str, Any], trained: Run) -> None:
    assert losses(trained)[1] == pytest.approx(math.log(Dataset.open(data["path"]).vocab_size), rel=0.02)
    assert losses(trained)[6] < losses(trained)[1]


def test_model_is_read_by_transformers(data: dict[str, Any], trained: Run) -> None:
    """Weights, logits and tokenizer of the exported folder, in transformers and back in ours."""
    transformers = pytest.importorskip("transformers")
    folder = trained.path / "artifacts/model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load(folder, dtype=torch.float32)
    dataset = Dataset.open(data["path"])
    rows = torch.from_numpy(batch(dataset, 0, 2, SEQ, 0))[:, :-1]
    with torch.no_grad():
        assert (ours.logits(ours(rows)) - theirs(rows).logits).abs().max() < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    document = dataset.split("train").document(0)
    assert tokenizer.decode(document[:-1]).startswith("the ")
    assert tokenizer(tokenizer.decode(document[:-1]))["input_ids"] == document[:-1].tolist()
    assert tokenizer.eos_token_id == dataset.end_token_id == theirs.config.eos_token_id


def test_run_holds_everything(trained: Run) -> None:
    assert trained.info["status"] == "done"
    summary = trained.summary
    assert summary["steps"] == 6 and summary["steady_steps"] == 4 and summary["skipped_steps"] == 0
    assert summary["validation_loss"] == pytest.approx(trained.metrics()[-1]["validation_loss"])
    steady = [row["tokens_per_second"] for row in trained.metrics() if row.get("steady")]
    assert summary["tokens_per_second"] == pytest.approx(float(np.median(steady)))
    for row in trained.metrics()[:-1]:
        parts = row["data_seconds"] + row["compute_seconds"] + row["optimizer_seconds"]
        assert 0.9 * row["step_seconds"] < parts <= row["step_seconds"]
        assert row["tokens"] == row["step"] * 8 * SEQ
        assert row["tokens_per_second"] == pytest.approx(8 * SEQ / row["step_seconds"])
    prediction = trained.load_json("prediction.json")
    assert prediction["parameters"] == summary["parameters"]
    assert not list((trained.path / "checkpoints").glob(".*")), "a partial checkpoint was left"


def test_tensorboard_reads_the_events(trained: Run) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(trained.path / "tensorboard")).Reload()
    scalars = {event.step: event.value for event in events.Scalars("train/loss")}
    assert scalars == pytest.approx(losses(trained))
    assert [event.step for event in events.Scalars("validation/loss")] == [6]


def test_mfu_is_the_arithmetic_it_says(data: dict[str, Any]) -> None:
    """6N + causal attention by hand, over the measured rate; unknown dtype gives no MFU at all."""
    job = tiny(data)
    config = config_from_section(job.model, 320)
    ceilings = Ceilings.from_dict(
        {
            "device": "test",
            "kind": "cpu",
            "gemm_flops_per_second": {"fp32": 1e9},
            **dict.fromkeys(("copy_bytes_per_second", "read_bytes_per_second", "all_reduce_bytes_per_second")),
            **dict.fromkeys(("all_gather_bytes_per_second", "backend", "datasheet")),
            "measured_at": "",
            "versions": {},
        }
    )
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 320 * 32
    by_hand = 6 * matrices + 12 * 2 * 32 * SEQ / 2
    found = limits(job, config, ceilings, world_size=2, nodes=1)
    assert found.mfu(1000.0) == pytest.approx(1000 * by_hand / 1e9)  # two processes share one machine's ceiling
    assert "0.001 TFLOP/s, measured fp32" in found.denominator
    assert limits(tiny(data, train__dtype="bf16"), config, ceilings, 1, 1).mfu(1000.0) is None


def test_decay_spares_norms_and_biases() -> None:
    from ridgeline.config import ModelSection

    decoder = Decoder(config_from_section(ModelSection(family="gpt2", layers=1, hidden=16, heads=2), 300))
    optimizer = build_optimizer(decoder, OptimizerSection(weight_decay=0.3))
    for group in optimizer.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.3}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(decoder.parameters()))
    assert optimizer.param_groups[0]["fused"] is True


def test_bf16_follows_fp32(data: dict[str, Any], trained: Run, tmp_path: Path) -> None:
    """bf16 compute on fp32 masters; also activation checkpointing and no resharding, which change nothing."""
    half = train(tiny(data, train__dtype="bf16"), runs_root=tmp_path)
    assert list(losses(half).values()) == pytest.approx(list(losses(trained).values()), rel=5e-3)
    assert losses(half) != losses(trained)
    masters = load(half.path / "artifacts/model").embed.weight
    assert masters.dtype == torch.float32 and not torch.equal(masters, masters.bfloat16().float())
    job = tiny(data, parallel__activation_checkpointing="full", parallel__reshard_after_forward=False)
    assert list(losses(train(job, runs_root=tmp_path)).values()) == pytest.approx(
        list(losses(trained).values()), rel=1e-6
    )


@pytest.mark.slow
def test_compiled_blocks_follow_eager(data: dict[str, Any], trained: Run, tmp_path: Path) -> None:
    """One graph for all blocks, no break, and validation compiles nothing more."""
    torch.compiler.reset()  # other tests of this process have compiled the same code for other shapes
    run = train(tiny(data, train__compile=True, train__eval_every=3), runs_root=tmp_path)
    assert list(losses(run).values()) == pytest.approx(list(losses(trained).values()), rel=1e-5)
    report = run.load_json("compile.json")
    assert report["graph_breaks"] == 0 and report["recompiles"] == 0 and report["seconds"] > 0
    assert not [row for row in run.metrics() if row.get("steady") and row["step"] == 1]
    assert run.summary["validation_loss"] == pytest.approx(trained.summary["validation_loss"], rel=1e-4)


def test_nonfinite_loss_stops_and_names_the_batch(data: dict[str, Any], tmp_path: Path) -> None:
    job = tiny(data, optimizer__learning_rate=1e30, optimizer__warmup_steps=0, optimizer__clip_norm=0.0, train__steps=9)
    with pytest.raises(
        JobError, match=r"at step \d+; samples \d+, .*\(documents [0-9a-f]{16} \(.*doc\d\d.txt"
    ) as caught:
        train(job, runs_root=tmp_path)
    run = Run.open("latest", tmp_path)
    assert run.info["status"] == "failed" and "samples" in run.info["error"]
    (file,) = (run.path / "artifacts/nonfinite").glob("*.npy")
    step = int(file.stem.split("-")[1])
    assert f"step {step};" in str(caught.value)
    assert np.array_equal(np.load(file), batch(Dataset.open(data["path"]), step - 1, 8, SEQ, job.train.seed))
    assert len(json.loads(file.with_suffix(".json").read_text())["samples"]) == 8


def test_nonfinite_step_is_skipped_when_asked(data: dict[str, Any], tmp_path: Path) -> None:
    """A start whose embedding of one token is NaN: exactly the batches that hold it are skipped, the rest train."""
    job = tiny(data, model__tie_embeddings=False, train__steps=8, train__on_nonfinite="skip")
    dataset = Dataset.open(data["path"])
    batches = [batch(dataset, step, 8, SEQ, 0)[:, :-1] for step in range(8)]
    held = np.array([[(rows == token).any() for rows in batches] for token in range(dataset.vocab_size)])
    token = next(token for token, where in enumerate(held) if 1 <= where.sum() <= 3)
    config = config_from_section(job.model, dataset.vocab_size)
    decoder = Decoder(config)
    draw_parameters(decoder, config, 0)
    decoder.embed.weight.data[token] = math.nan
    save(decoder, config, tmp_path / "poisoned")
    said: list[str] = []
    job = tiny(
        data,
        model__init=str(tmp_path / "poisoned"),
        train__steps=8,
        train__on_nonfinite="skip",
        train__eval_batches=1,
    )
    run = train(job, runs_root=tmp_path, say=said.append)
    bad = {int(step) + 1 for step in np.flatnonzero(held[token])}
    rows = {row["step"]: row for row in run.metrics() if "grad_norm" in row}
    assert {step for step, row in rows.items() if row["loss"] is None} == bad
    assert run.summary["skipped_steps"] == len(bad) and len(said) == len(bad)
    assert all(rows[step]["tokens_per_second"] == 0 for step in bad)
    assert rows[8]["tokens"] == (8 - len(bad)) * 8 * SEQ
    assert not any(rows[step]["steady"] for step in bad)


def test_init_continues_a_model(data: dict[str, Any], trained: Run, tmp_path: Path) -> None:
    """Not re-initialised: the loss of the first step is the given model's own; a wrong vocabulary is refused."""
    folder = trained.path / "artifacts/model"
    run = train(tiny(data, model__init=str(folder), train__steps=1), runs_root=tmp_path)
    rows = torch.from_numpy(batch(Dataset.open(data["path"]), 0, 8, SEQ, 0))
    with torch.no_grad():
        expected = load(folder).loss(rows[:, :-1], rows[:, 1:].contiguous(), reduction="mean")
    assert losses(run)[1] == pytest.approx(float(expected), rel=1e-6)
    other = Decoder(config := config_from_section(tiny(data).model, 256))
    save(other, config, tmp_path / "small")
    with pytest.raises(UserError, match="vocabulary 256 does not match the dataset's tokenizer"):
        train(tiny(data, model__init=str(tmp_path / "small")), runs_root=tmp_path)


def test_profiled_run_leaves_the_original_alone(data: dict[str, Any], trained: Run, tmp_path: Path) -> None:
    """In place it is the same curve; of a finished run it is a new run of kind profile from its last checkpoint."""
    from ridgeline.profiling import ProfileSpec

    spec = ProfileSpec(wait=1, warmup=1, active=2)
    within = train(tiny(data), profile=spec, runs_root=tmp_path)
    assert losses(within) == losses(trained) and (within.path / "artifacts/traces/rank0.json.gz").is_file()
    before = {file: file.read_bytes() for file in trained.path.rglob("*") if file.is_file()}
    later = train(tiny(data), profile=spec, resume=str(trained.path), runs_root=tmp_path)
    assert {file: file.read_bytes() for file in trained.path.rglob("*") if file.is_file()} == before
    assert later.kind == "profile" and later.info["parents"] == [trained.id]
    assert sorted(losses(later)) == [7, 8, 9, 10]
    assert (later.path / "artifacts/traces/rank0.json.gz").is_file()
    assert not (later.path / "checkpoints").exists() and not (later.path / "artifacts/model").exists()


def test_resume_refuses_another_job(data: dict[str, Any], trained: Run, tmp_path: Path) -> None:
    for change, name in (({"train__seed": 1}, "train.seed"), ({"model__hidden": 64}, "model.hidden")):
        with pytest.raises(UserError, match=f"{name} was .* and is now"):
            train(tiny(data, **change), resume=str(trained.path), runs_root=tmp_path)
    assert weights(trained)


def test_resume_names_the_kind_of_a_run_that_is_not_training(tmp_path: Path) -> None:
    other = Run.create("serve", config={"name": "x"}, root=tmp_path)
    with pytest.raises(UserError, match="is a run of kind serve, not train"):
        continued_config(other, [])


def test_trains_outside_the_main_thread(data: dict[str, Any], trained: Run, tmp_path: Path) -> None:
    """Signals can not be caught there; training works all the same, and twice in one process."""
    found: list[Run] = []
    thread = threading.Thread(target=lambda: found.append(train(tiny(data), runs_root=tmp_path)))
    thread.start()
    thread.join()
    assert losses(found[0]) == losses(trained) and weights(found[0]) == weights(trained)


def test_metrics_after_a_step_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 3, "validation_loss": 1.0}\n{"step": 4')
    assert drop_after(file, 2) == 2
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_resuming_a_run_that_is_done_leaves_it_as_it_is(data: dict[str, Any], tmp_path: Path) -> None:
    """Neither its summary nor its configuration changes, whether fewer or as many steps are asked for."""
    run = train(tiny(data, train__checkpoint_every=3), runs_root=tmp_path)
    before = {
        name: (run.path / name).read_bytes() for name in ("summary.json", "config.json", "run.json", "metrics.jsonl")
    }
    for steps in (3, 6):
        with pytest.raises(UserError, match=f"is at step 6 and train.steps is {steps}: nothing to do"):
            train(tiny(data, train__checkpoint_every=3, train__steps=steps), resume=run.id, runs_root=tmp_path)
    assert before == {name: (run.path / name).read_bytes() for name in before}


def test_a_short_continuation_keeps_the_speed_of_the_steps_before(data: dict[str, Any], tmp_path: Path) -> None:
    run = train(tiny(data, train__checkpoint_every=3), runs_root=tmp_path)
    rate, peak = run.summary["tokens_per_second"], run.summary["peak_memory_bytes"]
    longer = train(tiny(data, train__checkpoint_every=3, train__steps=7), resume=run.id, runs_root=tmp_path)
    assert longer.summary["steps"] == 7 and longer.summary["steady_steps"] == 0
    assert (
        longer.summary["tokens_per_second"] == pytest.approx(rate) and longer.summary["peak_memory_bytes"] >= 0.5 * peak
    )


def test_one_process_trains_a_run_at_a_time(data: dict[str, Any], tmp_path: Path) -> None:
    run = train(tiny(data, train__checkpoint_every=3), runs_root=tmp_path)
    before = (run.path / "run.json").read_bytes()
    with hold(run.path), pytest.raises(JobError, match="another process is training it now"):
        train(tiny(data, train__steps=8), resume=run.id, runs_root=tmp_path)
    assert (run.path / "run.json").read_bytes() == before
    assert train(tiny(data, train__steps=8), resume=run.id, runs_root=tmp_path).summary["steps"] == 8
