"""The inventory against psutil, lscpu and made-up machines; the peak table against torch's own."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from ridgeline.errors import UserError
from ridgeline.hardware import inventory, limits, peaks_for
from ridgeline.hardware.gpus import parse_topology
from ridgeline.hardware.inventory import (
    cpu_inventory,
    largest_cache_bytes,
    memory_inventory,
    nic_inventory,
    numa_inventory,
)
from ridgeline.hardware.peaks import peak_flops, table


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """Two sockets, two cores each, two threads per core, AMX, two NUMA nodes, a quota and a memory limit."""
    flags = "fpu avx2 avx512f avx512_bf16 avx512_vnni amx_tile amx_bf16 amx_int8"
    entry = "processor\t: {}\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Big Xeon 8480\n"
    entry += f"stepping\t: 8\nflags\t\t: {flags}\n"
    files = {
        "proc/cpuinfo": "\n".join(entry.format(cpu) for cpu in range(8)),
        "proc/meminfo": "MemTotal:       1000 kB\nMemFree: 10 kB\nMemAvailable:    600 kB",
        "proc/self/cgroup": "0::/pod/box",
        "sys/fs/cgroup/pod/cpu.max": "max 100000",
        "sys/fs/cgroup/pod/box/cpu.max": "150000 100000",
        "sys/fs/cgroup/pod/memory.max": "409600",
        "sys/fs/cgroup/pod/box/memory.max": "max",
        "sys/devices/system/cpu/online": "0-7",
        "sys/class/net/eth0/speed": "25000",
        "sys/class/net/eth0/operstate": "up",
        "sys/class/net/eth0/device/uevent": "",
        "sys/class/net/veth1/speed": "-1",
        "sys/class/net/lo/speed": "1",
    }
    for cpu in range(8):
        base = f"sys/devices/system/cpu/cpu{cpu}"
        files |= {f"{base}/topology/physical_package_id": str(cpu // 4), f"{base}/topology/core_id": str(cpu % 4 // 2)}
        l3 = "0-3" if cpu < 4 else "4-7"
        files |= {f"{base}/cache/index3/level": "3", f"{base}/cache/index3/type": "Unified"}
        files |= {f"{base}/cache/index3/size": "32768K", f"{base}/cache/index3/shared_cpu_list": l3}
    for node in range(2):
        base = f"sys/devices/system/node/node{node}"
        files |= {f"{base}/cpulist": f"{4 * node}-{4 * node + 3}", f"{base}/distance": "10 21"}
        files |= {f"{base}/meminfo": f"Node {node} MemTotal:  500 kB"}
    return write(tmp_path, files)


def test_a_server_is_read_right(server: Path) -> None:
    cpu = cpu_inventory(server)
    assert (cpu["name"], cpu["sockets"], cpu["cores"], cpu["threads"]) == ("Big Xeon 8480", 2, 4, 8)
    assert cpu["features"]["amx_bf16"] and cpu["features"]["amx_tile"] and not cpu["features"]["avx_vnni"]
    assert cpu["model"] == "6-143-8" and cpu["quota_cores"] == 1.5
    assert cpu["caches"] == [{"level": 3, "type": "Unified", "bytes": 32 << 20, "instances": 2}]
    assert largest_cache_bytes(server) == 64 << 20
    assert memory_inventory(server) == {"total_bytes": 1_024_000, "available_bytes": 614_400, "limit_bytes": 409_600}
    assert [node["cpus"] for node in numa_inventory(server)] == ["0-3", "4-7"]
    assert numa_inventory(server)[1]["distances"] == [10, 21]
    nics = {nic["name"]: nic for nic in nic_inventory(server)}
    assert set(nics) == {"eth0", "veth1"}, "the loopback is left out"
    assert nics["eth0"]["bits_per_second"] == 25_000_000_000 and not nics["eth0"]["virtual"]
    assert nics["veth1"]["bits_per_second"] is None and nics["veth1"]["virtual"]


def test_what_is_unknown_is_none_and_never_guessed(tmp_path: Path) -> None:
    cpu = cpu_inventory(tmp_path)
    for name in ("name", "vendor", "model", "sockets", "cores", "quota_cores", "features"):
        assert cpu[name] is None, name
    assert memory_inventory(tmp_path) == {"total_bytes": None, "available_bytes": None, "limit_bytes": None}
    assert largest_cache_bytes(tmp_path) is None
    assert cpu["caches"] == [] and numa_inventory(tmp_path) == [] and nic_inventory(tmp_path) == []
    assert limits.busy_and_total_seconds(tmp_path) is None


def test_hardware_threads_of_one_core_count_once_and_a_quota_caps(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "allowed_cpus", lambda: [0, 1, 2, 3, 4])
    assert limits.physical_cores([0, 1, 2, 3, 4], server) == 3
    assert limits.usable_threads(server) == 2  # quota of 1.5 cores
    (server / "sys/fs/cgroup/pod/box/cpu.max").write_text("max 100000\n")
    assert limits.usable_threads(server) == 3


def test_cgroup_v1_quota_and_limit(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/job\n1:cpu,cpuacct:/job",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1048576",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        },
    )
    assert limits.quota_cores(tmp_path) == 2.5
    assert limits.memory_limit_bytes(tmp_path) == 1_048_576


def test_this_machine_agrees_with_psutil_and_lscpu() -> None:
    found = inventory()
    assert found["cpu"]["threads"] == psutil.cpu_count(logical=True)
    assert found["cpu"]["threads_allowed"] == len(psutil.Process().cpu_affinity())
    assert found["memory"]["total_bytes"] == psutil.virtual_memory().total
    assert {nic["name"] for nic in found["nics"]} == set(psutil.net_if_stats()) - {"lo"}
    json.dumps(found)
    if shutil.which("lscpu"):
        rows = json.loads(subprocess.run(["lscpu", "-J"], capture_output=True, text=True, check=True).stdout)["lscpu"]
        lscpu = dict(_flat(rows))
        assert found["cpu"]["name"] == lscpu["Model name:"]
        flags = lscpu["Flags:"].split()
        assert found["cpu"]["features"] == {name: name in flags for name in found["cpu"]["features"]}


def _flat(rows: list[dict]) -> list[tuple[str, str]]:
    return [pair for row in rows for pair in [(row["field"], row["data"]), *_flat(row.get("children", []))]]


def test_topology_of_several_gpus() -> None:
    text = (
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m\n"
        "GPU0\t X \tNV12\tSYS\tPXB\t0-31\t0\nGPU1\tNV12\t X \tPIX\tPXB\t0-31\t0\nGPU2\tSYS\tPIX\t X \tSYS\t32-63\t1\n"
        "NIC0\tPXB\tPXB\tSYS\t X\n\nLegend:\n\n  X    = Self\n"
    )
    assert parse_topology(text) == {(0, 1): "NV12", (0, 2): "SYS", (1, 2): "PIX"}
    assert parse_topology("no devices were found\n") == {}


def test_peaks_are_by_exact_name_only() -> None:
    peaks = peaks_for("NVIDIA A100-SXM4-80GB")
    assert peaks is not None
    assert peaks.flops_per_second["bf16"] == 312e12 and peaks.bytes_per_second == 2.039e12 and peaks.source
    for name in ("NVIDIA A100", "nvidia a100-sxm4-80gb", "NVIDIA H100", "AMD EPYC", "Intel(R) Xeon(R)", ""):
        assert peaks_for(name) is None, name
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    with pytest.raises(UserError, match="did you mean 'NVIDIA H200'"):
        peak_flops("NVIDIA H20O", "bf16")
    with pytest.raises(UserError, match="no fp8 peak"):
        peak_flops("NVIDIA A100-SXM4-80GB", "fp8")


def test_peak_table_agrees_with_torchs_own() -> None:
    """torch's table of datasheets; where it lists sparse rates it says so. Its L4 row lists sparse rates as dense."""
    torch = pytest.importorskip("torch")
    info = pytest.importorskip("torch._inductor.analysis.device_info")
    dtypes = {"fp32": torch.float32, "tf32": "torch.tf32", "bf16": torch.bfloat16, "int8": torch.int8}
    names = {"NVIDIA H100": "NVIDIA H100 80GB HBM3", "NVIDIA A100": "NVIDIA A100-SXM4-80GB"}
    names["AMD INSTINCT MI300X"] = "AMD Instinct MI300X"
    for theirs, ours in names.items():
        row, peaks = info.lookup_device_info(theirs), peaks_for(ours)
        assert row is not None and peaks is not None
        assert peaks.bytes_per_second == pytest.approx(row.dram_bw_gbs * 1e9, rel=0.01)
        for dtype, key in dtypes.items():
            sparse = getattr(row, "tops_sparsity_factor", 1) if dtype != "fp32" else 1
            assert peaks.flops_per_second[dtype] == pytest.approx(row.tops[key] / sparse * 1e12, rel=0.01), (
                ours,
                dtype,
            )


def test_peak_table_is_consistent() -> None:
    for name in table():
        peaks = peaks_for(name)
        assert peaks is not None and peaks.source
        rates = peaks.flops_per_second
        assert rates["fp32"] <= rates["fp16"] <= rates.get("fp8", rates["fp16"]), name
        assert rates.get("bf16", rates["fp16"]) == rates["fp16"], name
        assert rates["fp16"] <= rates.get("int8", rates["fp16"]), name
