"""The GPU script's own code, on the CPU here; on an NVIDIA GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ridgeline.profiling import Trace
from ridgeline.profiling.analyses.snapshot import read_snapshot, snapshot_peak

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
# What a bare GPU machine with torch lacks: the script must not need them.
ABSENT = ("pydantic", "polars", "msgspec", "starlette", "uvicorn", "gguf", "zstandard", "plotly", "openai")


def run(*arguments, tmp_path):
    """The script in a process where the packages of ``ABSENT`` cannot be imported."""
    block = (
        "import sys, runpy\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {ABSENT}: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"sys.argv = ['gpu.py', {', '.join(repr(a) for a in arguments)}]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    out = tmp_path / "gpu.json"
    environment = {**os.environ, "RIDGELINE_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", block.replace("'OUT'", repr(str(out)))],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment,
    )
    return done, json.loads(out.read_text()) if out.is_file() else None


def test_the_script_runs_whole_on_a_cpu_without_our_heavier_packages(tmp_path):
    done, document = run("--device", "cpu", "--quick", "--out", "OUT", tmp_path=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert document["results"] and all(result["ok"] for result in document["results"].values())
    (row,) = Trace.load(tmp_path / "captures/trace.json.gz").temporal_breakdown().to_dicts()
    assert row["device"] == "cpu" and 0 < row["compute_ns"] <= row["span_ns"]
    # Toy shapes beside a ceiling that was measured in a moment: no upper bound can be held to here.
    assert document["results"]["training_step"]["eager"]["mfu_of_measured_bf16_gemm"] > 0


@pytest.mark.gpu
def test_the_script_passes_on_this_gpu(tmp_path):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    done, document = run("--quick", "--out", "OUT", tmp_path=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (row,) = Trace.load(tmp_path / "captures/trace.json.gz").temporal_breakdown().to_dicts()
    assert row["device"] == "gpu" and row["kernel_count"] > 0
    peak = snapshot_peak(read_snapshot(tmp_path / "captures/snapshot.pickle"))
    assert peak["bytes"].sum() > 0
