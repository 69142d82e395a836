"""`improve` of a served model, of runs recorded here, and its scores: loads, answers, targets and predictions by hand, and
one real session."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ridgeline.cli.improve import app, served_model
from ridgeline.config import load_config, parse_config
from ridgeline.errors import JobError, UserError
from ridgeline.inference import Engine, Request, SamplingParams
from ridgeline.models import Decoder, DecoderConfig
from ridgeline.models.folder import save
from ridgeline.profiling.improve import Load, Plan, Served, improve, parse_load
from ridgeline.profiling.improve.scores import by_knob, collect, score
from ridgeline.profiling.improve.serving import ServeJob, from_run, rules
from ridgeline.profiling.improve.serving.child import is_product
from ridgeline.profiling.improve.serving.outputs import Outputs, compare_outputs, gaps
from ridgeline.profiling.improve.targets import resolve, to_toml
from ridgeline.profiling.improve.trial import OwnJob, Trial, UserJob
from ridgeline.runs import Run
from ridgeline.serving.loading import engine_loader
from ridgeline.serving.settings import ServeSettings

TINY = DecoderConfig("llama", 97, 48, 2, 4, 2, 12, 64, 256, rope_dim=12, eos_token_ids=(2,))
STEPS = [{5: -0.1, 6: -2.5}, {7: -0.70, 8: -0.75}, {9: -0.2, 1: -3.0}]
"""The likeliest tokens of three steps: 5, then 7 (8 is 0.05 behind), then 9."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and no tokenizer."""
    torch.manual_seed(1)
    decoder = Decoder(TINY).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return save(decoder, TINY, tmp_path_factory.mktemp("models") / "tiny")


def outputs(*answers: list[int], dtype: str = "fp32") -> Outputs:
    """Answers whose likeliest tokens are those of ``STEPS``."""
    return Outputs(list(answers), [STEPS for _ in answers], dtype)


def test_answers_may_part_only_at_ties() -> None:
    """By hand: 7 and 8 are 0.05 apart, a tie in bf16 (0.125) and none in fp32; 4 is not among the likeliest; what follows a
    parted token does not count."""
    a = outputs([5, 7, 9], [5, 7, 9])
    assert gaps(a, outputs([5, 7, 9], [5, 8, 2])) == [pytest.approx(0.05)]
    assert gaps(a, outputs([4, 7, 9], [5, 7, 9])) == [math.inf] and gaps(a, outputs([5, 7], [5, 7, 9])) == [math.inf]
    same = compare_outputs([a], outputs([5, 7, 9], [5, 7, 9]))
    assert same.same and same.difference == 0 and same.why == "all 2 greedy answers are equal"
    parted = compare_outputs([a], outputs([5, 7, 9], [5, 8, 2]))
    assert (
        not parted.same
        and parted.why == "1 of 2 greedy answers part where the tokens were 0.05 nats apart, a tie is 0.001"
    )
    assert compare_outputs([a], outputs([5, 7, 9], [5, 8, 2], dtype="bf16")).same
    assert not compare_outputs([a], outputs([5, 7, 9], [6, 8, 2], dtype="bf16")).same  # 2.4 apart


def test_the_load_of_a_recorded_server_is_that_of_its_requests(tmp_path: Path) -> None:
    """Medians of 30 and 10 tokens. Mean batch 3, and requests spent half of their time in the queue: six at once."""
    config = {"model": "some/model", "dtype": "fp16", "compile": False, "max_batch": 3, "max_context": 90, "port": 8000}
    with Run.create("serve", "model", config=config, root=tmp_path) as run:
        for prompt, new in ((10, 8), (30, 10), (50, 90)):
            row = {"prompt_tokens": prompt, "completion_tokens": new, "total_seconds": 4.0, "queue_seconds": 2.0}
            run.log(status=200, **row)
        run.log(status=429, prompt_tokens=900, completion_tokens=0, total_seconds=None, queue_seconds=None)
        run.summarize(decode_batch_mean=3.0)
    assert from_run(run) == (Served("some/model", "fp16", False, 3, 90), Load(6, 30, 10))
    aim = resolve([run.id], runs_root=tmp_path)
    assert aim.load == Load(6, 30, 10) and aim.parents == (run.id,) and aim.name == "model"
    assert resolve([run.id], Load(1, 2, 3), tmp_path).load == Load(1, 2, 3)
    assert isinstance(aim.job(tmp_path / "trials", Plan()), ServeJob)
    with Run.create("serve", "idle", config=config, root=tmp_path) as idle:
        pass
    assert from_run(idle)[1] == Load(streams=3)
    with pytest.raises(UserError, match="takes no overrides"):
        resolve([run.id, "train.seed=1"], runs_root=tmp_path)


def test_targets_are_told_apart(tmp_path: Path) -> None:
    """Configuration, command, runs of train and improve; a run of another kind and a load for a training job are refused."""
    config = parse_config({"data": {"name": "x", "sources": ['a "b" \u00e9.txt']}, "train": {"steps": 7}})
    resolved = config.model_dump(mode="json")
    with Run.create("train", "x", config=resolved, root=tmp_path) as trained:
        pass
    job = resolve([trained.id, "train.seed=5"], runs_root=tmp_path).job(tmp_path / "trials", Plan())
    assert resolve(["latest:train"], runs_root=tmp_path).settings() == {"target": [trained.id]}
    assert resolve(["latest:train"], runs_root=tmp_path).name == "x"
    assert isinstance(job, OwnJob) and job.job == parse_config(resolved, ["train.seed=5"])
    (tmp_path / "again.toml").write_text(to_toml(resolved), encoding="utf-8")
    assert load_config(tmp_path / "again.toml") == config
    settings = {"target": [trained.id], "warmup": 1}
    with Run.create("improve", "x", config=settings, root=tmp_path) as improved:
        pass
    again = resolve(["latest:improve"], runs_root=tmp_path)
    assert again.own and again.config == resolved and again.parents == (improved.id,)
    assert isinstance(resolve(["python", "train.py"]).job(tmp_path / "t", Plan()), UserJob)
    assert resolve(["job.toml"]).own and not resolve(["python", "job.toml"]).own
    with Run.create("load", "x", root=tmp_path):
        pass
    with pytest.raises(UserError, match="of kind load: improve takes a run of train"):
        resolve(["latest"], runs_root=tmp_path)
    with pytest.raises(UserError, match="--load is for a served model"):
        resolve([trained.id], Load(), tmp_path)
    for wrong in ("8x64", "8x0x1", "axbxc", "8x64x32x1", "-1x2x3"):
        with pytest.raises(UserError, match="expected STREAMSxPROMPTxNEW"):
            parse_load(wrong)
    assert parse_load("8x64x32") == Load(8, 64, 32) == Load()


def test_a_serve_command_is_read_as_serve_reads_it(model: Path) -> None:
    """Its own parser: the same options, the same refusals; every other command is left alone."""
    options = ["serve", str(model), "--max-batch", "3", "--dtype", "fp32", "--no-compile", "--prefill-chunk", "9"]
    expected = Served(str(model), "fp32", False, 3, None, 9)
    assert served_model(["ridgeline", *options], None) == expected
    assert served_model(["/usr/bin/python3", "-m", "ridgeline", *options], None) == expected
    assert served_model(["serve.sh", "serve"], None) is None and served_model(["python", "serve.py"], None) is None
    with pytest.raises(UserError, match=r"serve: .*--max-bach"):
        served_model(["ridgeline", "serve", str(model), "--max-bach", "3"], None)


def test_the_prefill_chunk_reaches_the_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces a step: 20 prompt tokens in pieces of 4 take three steps to the first token, in one piece one; the tokens
    are the same. The server hands its setting on, and refuses 0."""
    answers = []
    for chunk, expected in ((4, 3), (None, 1)):
        engine = Engine.load(model, dtype="fp32", compile=False, chunk=chunk)
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        engine.submit(Request("one", list(range(20)), params))
        steps = [[event.token_id for event in engine.step()] for _ in range(6)]
        assert next(at for at, tokens in enumerate(steps, 1) if tokens) == expected
        answers.append([token for tokens in steps for token in tokens])
    assert answers[0] == answers[1][:4] and len(answers[0]) == 4
    seen: dict[str, Any] = {}

    def load(folder: Path, **options: Any) -> Engine:
        seen.update(options)
        raise JobError("seen enough")

    monkeypatch.setattr(Engine, "load", load)
    with pytest.raises(JobError, match="seen enough"):
        engine_loader(model, ServeSettings(prefill_chunk=16), dtype="fp32", compile=False)()
    assert seen["chunk"] == 16
    with pytest.raises(UserError, match="--prefill-chunk is 0: at least 1"):
        ServeSettings(prefill_chunk=0)


def base(served: Served, load: Load, **facts: Any) -> Trial:
    """A pass of 1 s: 0.2 s of prefill and 0.8 s of decode in 100 steps, each 2 ms of matrix products."""
    known = {"prefill_seconds": 0.2, "decode_seconds": 0.8, "decode_steps": 100, "product_seconds": 0.002}
    known |= {"threads": 4, "cores": 4, "cuda": False, "compiled": served.compile, **facts}
    return Trial(1.0, [], ranks=[known], traces=Path("traces"))


def test_findings_of_a_server_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.8 s of decode of which 0.2 s products: 0.6 s to fuse. 10 requests on 4 slots are 3 rounds, on 10 slots one. Prompts of
    300 in pieces of 128; one thread of four; bf16 only where it is fp32 and the processor has units for it."""
    monkeypatch.setattr(rules, "processor_has_bf16", lambda: True)
    plain, ten = Served("m", "fp32", False, 4), Load(10, 300, 10)
    found = {one.name: one for one in rules.of_served(base(plain, ten, threads=1), plain, ten)}
    assert list(found) == ["threads", "slots", "precision", "not compiled", "prefill"]  # by what they may save
    assert found["not compiled"].predicted == pytest.approx((0.15, 0.57))
    assert found["slots"].predicted == pytest.approx((2 / 3 / 10, 2 / 3))
    assert found["slots"].knob is not None and found["slots"].knob.overrides == ("max_batch=10",)
    assert found["prefill"].knob is not None and found["prefill"].knob.overrides == ("prefill_chunk=300",)
    assert found["precision"].knob is not None and found["precision"].knob.overrides == ('dtype="bf16"',)
    assert found["threads"].knob is not None and found["threads"].knob.variables == {"OMP_NUM_THREADS": "4"}
    assert found["threads"].predicted == pytest.approx((0.0, 0.75))
    good, few = Served("m", "bf16", True, 8), Load(8, 100, 10)
    assert rules.of_served(base(good, few), good, few) == []
    assert [is_product(name) for name in ("aten::mm", "mkldnn::_linear_pointwise", "aten::mul", "aten::_to_copy")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_predictions_are_scored(tmp_path: Path) -> None:
    """By hand: predicted 20 to 40 % of a step of 2 s. 30 % is inside, 50 % off by 10 %, 41 % within the floor of 2 %."""

    def row(name: str, gain: float | None, high: float = 0.8) -> dict[str, Any]:
        measured = {"before_seconds": 2.0, "gain_seconds": gain, "floor_seconds": 0.04}
        return {
            "name": name,
            "knob": {"name": name},
            "predicted_seconds": [0.4 if high else 0.0, high],
            "gain": None if gain is None else measured,
            "kept": gain is not None and gain > 0.04,
        }

    rows = [row("a", 0.6), row("a", 1.0), row("b", 0.82), row("never run", None), row("asked for", 0.5, high=0.0)]
    assert score(rows[3]) is None and score(rows[4]) is None
    with Run.create("improve", "job", root=tmp_path) as run:
        run.save_json("improve.json", {"findings": rows})
    with Run.create("improve", "broken", root=tmp_path):
        pass
    scores = collect(tmp_path)
    assert [(one.run, one.knob, one.inside) for one in scores] == [
        (run.id, "a", True), (run.id, "a", False), (run.id, "b", True),
    ]  # fmt: skip
    assert scores[1].error == pytest.approx(0.1) and scores[1].to_dict()["error"] == scores[1].error
    a, b, everything = by_knob(scores)
    assert (a["knob"], a["measured_knobs"], a["kept"], a["inside"]) == ("a", 2, 2, 1)
    assert a["mean_measured"] == pytest.approx(0.4) and a["mean_error"] == pytest.approx(0.05)
    assert b["mean_error"] == pytest.approx(0.01) and (everything["knob"], everything["measured_knobs"]) == ("all", 3)
    shown = CliRunner().invoke(app, ["--scores", "--runs", str(tmp_path)])
    assert shown.exit_code == 0 and "20% .. 40%" in shown.stdout
    document = json.loads(CliRunner().invoke(app, ["--scores", "--json", "--runs", str(tmp_path)]).stdout)
    assert [one["knob"] for one in document["knobs"]] == ["a", "b", "all"] and len(document["scores"]) == 3
    assert CliRunner().invoke(app, ["--scores", "--runs", str(tmp_path / "none")]).exit_code == 2
    assert CliRunner().invoke(app, ["--scores", "job.toml", "--runs", str(tmp_path)]).exit_code == 2
    assert CliRunner().invoke(app, []).exit_code == 2


def test_a_server_with_too_few_slots(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve requests and one slot: found, with a trace and a run to show for it. With slots for eight, as the finding asks, every
    answer is the same to the token, and a pass takes two rounds of decode steps instead of twelve."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [
        sys.executable,
        "-m",
        "ridgeline",
        "serve",
        str(model),
        "--dtype",
        "fp32",
        "--no-compile",
        "--max-batch",
        "1",
    ]
    aim, load, plan = served_model(command, None), Load(12, 4, 24), Plan(warmup=1, timed=3, timeout=100)
    answer = improve(aim, load=load, plan=plan, top=0, runs_root=tmp_path)
    (row,) = [row for row in answer.rows if row.finding.name == "slots"]
    assert row.finding.text == "12 requests at once and 1 slots: 11 wait for a slot" and row.finding.knob is not None
    assert Path(row.finding.trace).is_file() and row.finding.predicted[1] > 0
    document = answer.to_dict()
    assert document["load"] == {"streams": 12, "prompt_tokens": 4, "new_tokens": 24}
    assert document["tokens_per_second"] == pytest.approx(12 * 24 / document["step_seconds"])
    run = Run.open("latest:improve", tmp_path)
    assert (run.summary["kept"], run.summary["predictions"]) == ([], 0) and run.load_json("improve.json") == document
    assert resolve([run.id], runs_root=tmp_path).served == aim
    job = ServeJob(aim, load, tmp_path / "trials", plan)
    eight, blind = job.run([row.finding.knob], plan), rules.by_name(aim, load)["slots"]
    before = json.loads((run.path / "artifacts/trials/run00/result.json").read_text())
    assert [one["facts"]["decode_steps"] for one in (before, {"facts": eight.ranks[0]})] == [12 * 23, 2 * 23]
    assert eight.outputs is not None and eight.outputs.tokens == before["tokens"]
    assert {len(tokens) for tokens in eight.outputs.tokens} == {24} and blind.overrides == ("max_batch=12",)
