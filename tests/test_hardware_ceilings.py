"""Ceilings: what is measured, what is cached, and what survives."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ridgeline.errors import JobError, UserError
from ridgeline.hardware import Ceilings, ceilings, child, collectives, measure
from ridgeline.hardware.measured import cache_key, digest

ALONE = {
    "gemm_by_size": {"fp32": {"1024": 1e11, "2048": 2e11}, "bf16": {"1024": 4e11}},
    "copy_bytes_per_second": 2e10,
    "read_bytes_per_second": 3e10,
    "buffer_bytes": 1 << 30,
    "process_bytes": 1 << 28,
    "elementwise_per_second": 2e9,
    "others_share": 0.05,
    "seconds": 1.0,
    "notes": ["GEMM int8 not measured: no such kernel"],
}
GROUP = {
    "all_reduce_bytes_per_second": 2e9,
    "all_gather_bytes_per_second": 1e9,
    "backend": "gloo",
    "notes": [],
    "seconds": 1.0,
}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A cache of its own and measuring processes replaced by fixed answers; the list counts the measurements."""
    calls: list[bool] = []

    def alone(kind: str, threads: int, quick: bool, progress: Any) -> dict[str, Any]:
        calls.append(quick)
        time.sleep(0.05)
        return dict(ALONE)

    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(child, "measure", alone)
    monkeypatch.setattr(collectives, "measure", lambda *arguments: dict(GROUP))
    return calls


def test_measured_once_then_read_from_the_cache(measured: list[bool]) -> None:
    first = ceilings(device="cpu")
    assert first.gemm_flops_per_second == {"fp32": 2e11, "bf16": 4e11}, "the best size of each dtype"
    assert first.datasheet is None and any("not in the peak table" in note for note in first.notes)
    assert any("int8 not measured" in note for note in first.notes)
    assert ceilings(device="cpu") == first and measured == [False]
    assert ceilings(device="cpu", quick=True) == first and measured == [False]
    ceilings(device="cpu", refresh=True, quick=True)
    assert measured == [False, True]
    assert Ceilings.from_dict(json.loads(json.dumps(first.to_dict()))) == first


def test_another_thread_count_or_software_is_measured_anew(
    measured: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    ceilings(device="cpu")
    ceilings(device="cpu", threads=63)
    monkeypatch.setattr("ridgeline.hardware.measured._version", lambda package: "9.9")
    assert ceilings(device="cpu").versions["torch"] == "9.9"
    assert len(measured) == 3


def test_the_callers_thread_settings_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(cache_key("cpu"))
    monkeypatch.setenv("OMP_NUM_THREADS", "17")
    assert digest(cache_key("cpu")) == before
    assert child.environment(3)["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("damage", ["{", "[]", "null", '{"key": 1}', "drop", "negative"])
def test_a_damaged_cache_is_measured_again_with_a_notice(
    measured: list[bool], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    ceilings(device="cpu")
    (file,) = Path(os.environ["RIDGELINE_CACHE"]).glob("ceilings-*.json")
    document = json.loads(file.read_text())
    if damage == "drop":
        del document["ceilings"]["gemm_flops_per_second"]
    elif damage == "negative":
        document["ceilings"]["copy_bytes_per_second"] = -1.0
    file.write_text(json.dumps(document) if damage in ("drop", "negative") else damage)
    with caplog.at_level(logging.WARNING):
        again = ceilings(device="cpu")
    assert len(measured) == 2 and again.copy_bytes_per_second == 2e10
    assert "measuring again" in caplog.text and any("measuring again" in note for note in again.notes)
    assert ceilings(device="cpu").copy_bytes_per_second == 2e10 and len(measured) == 2
    assert not [path for path in file.parent.iterdir() if path.suffix == ".tmp"]


def test_a_cache_that_cannot_be_written_does_not_lose_the_measurement(
    measured: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "file" / "below"))
    texts: list[str] = []
    result = ceilings(device="cpu", progress=lambda text, fraction: texts.append(text))
    assert result.read_bytes_per_second == 3e10
    assert any("not written" in text for text in texts) and any("not written" in note for note in result.notes)


def test_two_that_find_no_cache_measure_once(measured: list[bool]) -> None:
    threads = [threading.Thread(target=ceilings, kwargs={"device": "cpu"}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 1


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UserError, match="expected cpu or cuda"):
        ceilings(device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no GPU"):
            ceilings(device="cuda")


def test_a_measuring_process_that_dies_is_one_line() -> None:
    with pytest.raises(JobError, match="measuring ceilings failed: KeyError"):
        child.measure("no such kind", 1, True, lambda text, fraction: None)


def test_failing_collectives_leave_a_note_and_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "RANKS", 1)  # the workers still expect two and give up
    monkeypatch.setattr(collectives, "TIMEOUT_SECONDS", 1)
    result = collectives.measure("cpu", 1, 1, True)
    assert result["all_reduce_bytes_per_second"] is None
    assert "not measured" in result["notes"][0]


def test_launchers_variables_do_not_reach_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "OMP_PROC_BIND"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("HTTPS_PROXY_LIKE", "kept")
    env = child.environment(2)
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "OMP_PROC_BIND"} & set(env)
    assert env["HTTPS_PROXY_LIKE"] == "kept"


def test_bus_bytes_of_a_ring() -> None:
    """Ring all-reduce of 124.4 M fp32 gradients over 4 ranks: 747 MB per rank (workshops, 4.6)."""
    assert collectives.all_reduce_bus_bytes(124_439_808 * 4, 4) / 1e6 == pytest.approx(747, abs=0.5)
    assert collectives.all_gather_bus_bytes(1000, 2) == 500


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16", "fp16", "fp8", "int8"])
def test_each_gemm_multiplies(dtype: str) -> None:
    """What is timed is a product of two [n, n] matrices; a wrong product would make a rate of nothing."""
    torch.manual_seed(0)
    captured: list[torch.Tensor] = []
    multiply, undo = measure.gemm(dtype, 64, "cpu")
    try:
        cells = {
            name: cell.cell_contents
            for name, cell in zip(multiply.__code__.co_freevars, multiply.__closure__, strict=True)
        }
        captured = [value.double() for value in cells.values() if isinstance(value, torch.Tensor) and value.dim() == 2]
        product = multiply().double()
    finally:
        undo()
    a, b = captured
    error = (product - a @ b.T).abs().max() / (a @ b.T).abs().max()
    assert error < {"fp32": 1e-6, "tf32": 1e-3, "bf16": 1e-2, "fp16": 2e-3, "fp8": 1e-2, "int8": 1e-12}[dtype]
    assert torch.get_float32_matmul_precision() == "highest"


def test_sizes_that_would_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def seconds(work: Any, kind: str, repeats: int, budget: float) -> float:
        tried.append(budget)
        return 2.0 * 64**3 / 1e9  # as if the probe ran at 1 GFLOP/s

    monkeypatch.setattr(measure, "PROBE", 64)
    monkeypatch.setattr(measure, "best_seconds", seconds)
    effort = measure.Effort((256, 2048), 3, 0.05, 1)  # 2048: 17 GFLOP, not affordable whatever 256 gave
    rates = measure.gemm_rates("fp32", "cpu", effort)
    assert list(rates) == ["256"] and len(tried) == 2


def test_the_buffer_is_far_larger_than_the_caches_or_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    effort = measure.Effort((), 1, 1.0, 2 << 30)
    monkeypatch.setattr(measure, "largest_cache_bytes", lambda: 32 << 20)
    monkeypatch.setattr(measure, "usable_memory_bytes", lambda: 64 << 30)
    assert measure.buffer_bytes("cpu", effort) == 2 << 30
    monkeypatch.setattr(measure, "largest_cache_bytes", lambda: 1 << 30)  # 1 GiB of L3
    assert measure.buffer_bytes("cpu", effort) == 8 << 30
    monkeypatch.setattr(measure, "usable_memory_bytes", lambda: 16 << 30)  # an eighth is twice the cache: useless
    assert measure.buffer_bytes("cpu", effort) == 0
    monkeypatch.setattr(measure, "largest_cache_bytes", lambda: 32 << 20)
    monkeypatch.setattr(measure, "usable_memory_bytes", lambda: 4 << 30)
    assert measure.buffer_bytes("cpu", effort) == 512 << 20


def test_cuda_timing_divides_by_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event arithmetic, with a stand-in for the device: 8 ms over 4 calls are 2 ms each."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def elapsed_time(self, end: Event) -> float:
            return 8.0

    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("synchronize"))
    assert measure.cuda_seconds(lambda: order.append("work")) == pytest.approx(0.002)
    assert order == ["synchronize", "record", *["work"] * 4, "record", "synchronize"]


def test_busy_neighbours_are_noticed() -> None:
    assert measure.others_share((10.0, 100.0, 1.0), (26.0, 120.0, 11.0)) == pytest.approx(0.3)
    assert measure.others_share((10.0, 100.0, 1.0), (20.0, 120.0, 12.0)) == 0.0
    assert measure.others_share(None, (1.0, 2.0, 3.0)) is None


def test_a_disturbed_measurement_says_so(measured: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ceilings(device="cpu").disturbed
    monkeypatch.setitem(ALONE, "others_share", 0.4)
    monkeypatch.setitem(ALONE, "gemm_by_size", {"fp32": {"1024": 5e10}, "bf16": {"1024": 9e11}})
    monkeypatch.setitem(ALONE, "copy_bytes_per_second", 1e9)
    noisy = ceilings(device="cpu", refresh=True)
    assert noisy.gemm_flops_per_second == {"fp32": 2e11, "bf16": 9e11}, "what was reached once is kept"
    assert noisy.copy_bytes_per_second == 2e10 and any("kept from then" in note for note in noisy.notes)
    assert noisy.disturbed and any("40% of the CPUs" in note for note in noisy.notes)


def test_env_end_to_end_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing, inside a launcher's environment: inventory, GEMMs, bandwidth, two gloo processes, a run."""
    env = {**os.environ, "RIDGELINE_CACHE": str(tmp_path / "cache"), "RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}
    command = [sys.executable, "-m", "ridgeline", "env", "--quick", "--json", "--runs", str(tmp_path / "runs")]
    command += ["--device", "cpu"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    found = Ceilings.from_dict(document["ceilings"])
    assert found.kind == "cpu" and found.quick and {"fp32", "bf16"} <= set(found.gemm_flops_per_second)
    assert 1e8 < found.gemm_flops_per_second["fp32"] < 1e14
    assert found.copy_bytes_per_second is not None and 1e8 < found.copy_bytes_per_second < 2e12
    assert found.read_bytes_per_second is not None and found.all_reduce_bytes_per_second is not None
    assert found.all_gather_bytes_per_second is not None and found.backend == "gloo"
    assert found.process_bytes is not None and 50 << 20 < found.process_bytes < 4 << 30
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == document["run"]
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    assert json.loads((folder / "ceilings.json").read_text()) == document["ceilings"]
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "cache"))
    assert ceilings(device="cpu") == found, "read from the cache"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ceilings_of_a_gpu_stay_below_its_datasheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path))
    found = ceilings(quick=True, device="cuda")
    assert {"fp32", "tf32", "bf16", "fp16"} <= set(found.gemm_flops_per_second)
    if found.datasheet is not None:
        for dtype, rate in found.gemm_flops_per_second.items():
            assert rate <= 1.02 * found.datasheet["flops_per_second"][dtype], dtype
        assert found.copy_bytes_per_second is not None
        assert found.copy_bytes_per_second <= 1.02 * found.datasheet["bytes_per_second"]


def test_a_record_round_trips_and_refuses_nonsense() -> None:
    record = Ceilings("X", "cpu", {"fp32": 1.0}, None, None, None, None, None, "now", {}, None)
    assert Ceilings.from_dict(replace(record, notes=("a",)).to_dict()).notes == ("a",)
    with pytest.raises(UserError, match="not a complete record"):
        Ceilings.from_dict({"device": "X"})
    with pytest.raises(UserError, match="not positive"):
        Ceilings.from_dict({**record.to_dict(), "gemm_flops_per_second": {"fp32": 0.0}})
