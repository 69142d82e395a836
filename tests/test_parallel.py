"""The parallel room against identities, numpy, published vectors, and one process against two."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel_checks import odd_config, sharded, single
from ridgeline.config import OptimizerSection
from ridgeline.errors import JobError, UserError
from ridgeline.parallel import norm, rng
from ridgeline.parallel.mesh import joined
from ridgeline.train import checkpoint
from ridgeline.train.optimizer import build_optimizer
from ridgeline.train.state import TrainState

CHECKS = Path(__file__).with_name("parallel_checks.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that needs two processes, in one launch through torchrun."""
    target = tmp_path_factory.mktemp("two") / "results.json"
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(CHECKS), str(target)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert target.is_file(), done.stderr[-2000:]
    results: dict[str, Any] = json.loads(target.read_text())
    results["folder"] = target.parent
    return results


def result(two: dict[str, Any], name: str) -> Any:
    value = two[name]
    assert not (isinstance(value, dict) and "error" in value), value["error"]
    return value


def test_bits_are_splitmix64() -> None:
    """The reference implementation's first outputs for the seed 1234567."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert rng.bits(np.uint64(1234567), 0, 5).tolist() == expected
    assert rng.bits(np.uint64(1234567), 3, 2).tolist() == expected[3:]


def test_normal_is_normal() -> None:
    """Kolmogorov-Smirnov distance from the normal distribution, and independence of neighbours and streams."""
    draws = np.sort(rng.normal(0, "w", 0, 200_001).astype(np.float64))
    exact = torch.special.ndtr(torch.from_numpy(draws)).numpy()
    distance = np.abs(exact - (np.arange(len(draws)) + 0.5) / len(draws)).max()
    assert distance < 1.63 / np.sqrt(len(draws))  # the 1 % point
    a, b = rng.normal(0, "w", 0, 100_000), rng.normal(0, "v", 0, 100_000)
    for pair in ((a[::2], a[1::2]), (a[:-1], a[1:]), (a, b), (a, rng.normal(1, "w", 0, 100_000))):
        assert abs(np.corrcoef(*pair)[0, 1]) < 4 / np.sqrt(len(pair[0]))


@pytest.mark.parametrize("cut", [1, 2, 5, rng.BLOCK - 1, rng.BLOCK, rng.BLOCK + 7])
def test_any_part_can_be_drawn_alone(cut: int) -> None:
    whole = rng.normal(7, "name", 0, 2 * rng.BLOCK + 11)
    assert np.array_equal(whole[:cut], rng.normal(7, "name", 0, cut))
    assert np.array_equal(whole[cut:], rng.normal(7, "name", cut, len(whole) - cut))


def test_rows_of_a_parameter() -> None:
    whole = rng.normal_rows(1, "w", (97, 3, 2), 0, 97)
    assert np.array_equal(whole[49:], rng.normal_rows(1, "w", (97, 3, 2), 49, 48))
    assert rng.normal_rows(1, "w", (1, 5), 1, 0).shape == (0, 5)
    assert not np.array_equal(whole[:48], whole[49:])
    with pytest.raises(ValueError, match="negative"):
        rng.normal(1, "w", -1, 3)


def test_initialisation_is_the_same_bits_on_two_processes(two: dict[str, Any]) -> None:
    one = {n: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for n, p in single().named_parameters()}
    assert result(two, "initialisation") == one
    with joined() as layout:
        alone = sharded(layout)
        assert all(
            torch.equal(p.full_tensor(), q) for p, q in zip(alone.parameters(), single().parameters(), strict=True)
        )


def test_gradients_equal_one_process_in_every_layout(two: dict[str, Any]) -> None:
    rows = result(two, "gradients")
    assert len(rows) == 16
    for row in rows:
        exact = row["fp32"]
        assert row["loss"] < (1e-6 if exact else 1e-3), row
        assert row["gradient"] < (1e-5 if exact else 2e-2), row
        assert row["norm"] < (1e-5 if exact else 3e-3), row


def test_collectives_are_as_many_as_predicted(two: dict[str, Any]) -> None:
    """FSDP2's calls counted by torch's CommDebugMode."""
    for row in result(two, "collective_counts"):
        assert row["counted"] == row["predicted"], row


def test_norm_over_plain_and_sharded_with_an_empty_shard(two: dict[str, Any]) -> None:
    found = result(two, "norm")
    assert found["empty"] > 0
    assert found["norm"] == pytest.approx(found["expected"], rel=1e-6)
    assert found["halved"] == pytest.approx(found["expected"] / 2, rel=1e-6)


def test_norm_equals_torch() -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (7,), (0, 4))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    grads = norm.gradients(parameters)
    ours = float(norm.global_norm(grads))
    assert ours == pytest.approx(float(torch.nn.utils.get_total_norm(grads)), rel=1e-6)
    norm.scale_(grads, norm.clip_factor(ours, 0.5))
    assert float(torch.nn.utils.get_total_norm(grads)) == pytest.approx(0.5, rel=1e-4)
    assert norm.clip_factor(3.0, 0.0) == 1.0
    assert float(norm.global_norm([])) == 0.0


def test_collectives_give_right_values_and_counts(two: dict[str, Any]) -> None:
    found = result(two, "collectives")
    assert found["reduced"] == [[3.0] * 3] * 2
    assert found["gathered"] == [[0, 0], [1, 1]]
    assert found["scattered"] == [0.0, 2.0]
    assert found["sent"] == [0, 10, 11, 12]
    assert found["cast"] == [8]
    assert found["counts"] == {
        "all_reduce": [1, 24],
        "all_gather": [1, 32],
        "reduce_scatter": [1, 16],
        "all_to_all": [1, 24],
        "broadcast": [1, 8],
    }


def test_collectives_refuse_what_gloo_gets_wrong(two: dict[str, Any]) -> None:
    strided, column, fp8, uneven, splits = result(two, "collectives")["refused"]
    assert "not contiguous" in strided and "not contiguous" in column
    assert "float8_e4m3fn cannot be reduced" in fp8
    assert "3 rows do not divide over 2 ranks" in uneven
    assert "do not fit 3 rows" in splits


def test_checkpoint_of_two_processes_loads_on_two_and_on_one(two: dict[str, Any]) -> None:
    """Odd sizes: 97 rows over 2 ranks; every tensor bit for bit."""
    found = result(two, "checkpoint")
    assert found["equal"] and found["tensors"] == 42
    folder = two["folder"] / "checkpoints"
    expected = torch.load(folder / "expected.pt", weights_only=True)
    with joined() as layout:
        decoder = sharded(layout, seed=11)
        state = TrainState(decoder, odd_config(), build_optimizer(decoder, OptimizerSection()))
        saved = checkpoint.find_agreed(folder)
        assert saved is not None and saved.manifest["world_size"] == 2
        checkpoint.load(state.tensors(), saved)
        for name, tensor in state.tensors().items():
            assert torch.equal(tensor.full_tensor(), expected[name]), name


def test_world_without_a_group_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes announced and no master to meet at: refused, never trained on as two diverging models."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(JobError, match="rank 0: no process group of 2 processes"), joined(timeout_seconds=5):
        pass
    assert not torch.distributed.is_initialized()


def test_rows_of_a_rank() -> None:
    with joined() as layout:
        assert layout.rows(8) == range(8)
        two = type(layout)(1, 2, 1, 1, layout.device, layout.mesh)
        assert two.rows(8) == range(4, 8)
        with pytest.raises(UserError, match="9 does not divide over 2"):
            two.rows(9)
