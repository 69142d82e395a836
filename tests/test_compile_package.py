"""Packages: they answer as the model does, in a process without a compiler, and are refused by name elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch

from ridgeline.compiler.package import manifest
from ridgeline.compiler.package.build import Wanted, _prove, build
from ridgeline.compiler.package.load import load, restore
from ridgeline.compiler.target import Logits, Target, resolve
from ridgeline.config import ModelSection
from ridgeline.errors import JobError, UserError
from ridgeline.models import Decoder, config_from_section

SOURCE = """\
import torch


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, x, scale):
        return {"hidden": torch.tanh(self.linear(x)) * scale, "total": x.sum()}


def example_inputs():
    return {"x": torch.randn(3, 8), "scale": torch.full((4,), 2.0)}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("target") / "tiny.py"
    file.write_text(SOURCE)
    return file


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A package of both parts, made by the verb; and the document it printed."""
    out = tmp_path_factory.mktemp("made") / "package"
    done = ridgeline("compile", "package", f"{source}:Tiny", out, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


@pytest.fixture
def package(made, tmp_path):
    """A copy that a test may change."""
    copied = tmp_path / "package"
    copied.mkdir()
    for file in made[0].iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    return copied


def ridgeline(*arguments, **environment):
    command = [sys.executable, "-m", "ridgeline", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **{k: str(v) for k, v in environment.items()}},
    )


def python(script, **environment):
    environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_program_runs_without_a_compiler_and_compiles_nothing(made, source, tmp_path):
    """A fresh process with no C++ compiler and an empty cache folder; compared with the model itself, run eagerly."""
    script = f"""
import json, sys, torch
from ridgeline.compiler.package.load import load
from ridgeline.compiler.target import resolve
found = resolve({f"{source}:Tiny"!r})
got = load({str(made[0])!r})(**found.kwargs)
expected = found.call(**found.kwargs)
print(json.dumps({{name: float((got[name] - expected[name]).abs().max()) for name in expected}}))
"""
    cache = tmp_path / "cache"
    errors = python(script, CXX="/nonexistent/g++", TORCHINDUCTOR_CACHE_DIR=cache)
    assert set(errors) == {"hidden", "total"} and max(errors.values()) < 1e-5
    assert not cache.exists() or not list(cache.rglob("*.so"))


def test_the_manifest_says_what_it_was_made_with_and_of_what(made):
    folder, printed = made
    document = manifest.read(folder)
    assert {**document, "folder": str(folder)} == printed
    assert document["made_for"]["torch"] == torch.__version__ and document["parameters"] == 8 * 4 + 4
    assert [one["shape"] for one in document["inputs"]] == [[3, 8], [4]]
    assert set(document["files"]) == {"model.pt2", "cache.zip"}
    for name, about in document["files"].items():
        assert (folder / name).stat().st_size == about["bytes"]
    assert document["largest_relative_error"] < 1e-5


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("torch", "2.9.0+cpu", r"made for torch 2\.9\.0\+cpu, this is"),
        ("system", "Plan9", "made for system Plan9"),
        ("architecture", "riscv64", "made for architecture riscv64"),
        ("libc", "glibc 99.1", "made for libc glibc 99.1"),
        ("libc", "musl 1.2", "made for libc musl 1.2"),
        ("instructions", ["avx512f", "avx9000"], "made for a CPU with .*avx9000, which this one lacks"),
    ],
)
def test_a_machine_or_torch_it_was_not_made_for_is_refused_by_name(package, field, value, says):
    document = json.loads((package / "manifest.json").read_text())
    document["made_for"][field] = value
    (package / "manifest.json").write_text(json.dumps(document))
    for use in (load, restore):
        with pytest.raises(UserError, match=says):
            use(package)


def test_another_python_number_of_threads_or_device_matters_where_it_matters(package):
    document = json.loads((package / "manifest.json").read_text())
    original = dict(document["made_for"])
    for field, value in (("python", "3.99"), ("threads", 99)):
        document["made_for"] = {**original, field: value}
        (package / "manifest.json").write_text(json.dumps(document))
        load(package)  # machine code knows no Python, and runs with any number of threads
        with pytest.raises(UserError, match=f"made for {field} {value}, this is"):
            restore(package)
    if not torch.cuda.is_available():
        document["made_for"] |= {"device": "NVIDIA H200", "device_type": "cuda"}
        (package / "manifest.json").write_text(json.dumps(document))
        with pytest.raises(UserError, match="made for device NVIDIA H200, this is no GPU"):
            load(package)


def test_damage_is_named(package, tmp_path):
    program = package / "model.pt2"
    raw = program.read_bytes()
    program.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.pt2: damaged"):
        load(package)
    program.unlink()
    with pytest.raises(UserError, match=r"model\.pt2: damaged or missing"):
        load(package)
    (package / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load(package)
    (package / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="package format 99"):
        load(package)
    with pytest.raises(UserError, match="not a package"):
        load(tmp_path)
    empty = {"format": 1, "files": {}}
    (package / "manifest.json").write_text(json.dumps(empty))
    with pytest.raises(UserError, match=r"made without cache\.zip"):
        restore(package)


def test_restored_caches_are_hit_by_a_fresh_process_that_builds_no_library(made, source, tmp_path):
    cache = tmp_path / "cache"
    done = ridgeline("compile", "restore", made[0], "--json", TORCHINDUCTOR_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)["files"]
    libraries = {file.name for file in cache.rglob("*.so")}
    assert written == sum(1 for file in cache.rglob("*") if file.is_file()) and libraries
    script = f"""
import json, torch
from torch._dynamo.utils import counters
from ridgeline.compiler.target import resolve
found = resolve({f"{source}:Tiny"!r})
with torch.no_grad():
    torch.compile(found.module, dynamic=False)(**found.kwargs)
print(json.dumps({{"hit": counters["aot_autograd"]["autograd_cache_hit"], "miss": counters["aot_autograd"]["autograd_cache_miss"]}}))
"""
    assert python(script, TORCHINDUCTOR_CACHE_DIR=cache) == {"hit": 1, "miss": 0}
    assert {file.name for file in cache.rglob("*.so")} == libraries
    again = ridgeline("compile", "restore", made[0], "--json", TORCHINDUCTOR_CACHE_DIR=cache)
    assert json.loads(again.stdout)["files"] == 0  # what is there stays


def test_an_archive_that_writes_elsewhere_is_refused(package, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with zipfile.ZipFile(package / "cache.zip", "w") as archive:
        archive.writestr("../outside", "x")
    document = json.loads((package / "manifest.json").read_text())
    document["files"]["cache.zip"]["sha256"] = manifest.digest(package / "cache.zip")
    (package / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="damaged"):
        restore(package)
    assert not (tmp_path / "outside").exists()


def test_a_language_models_batch_and_length_stay_free(tmp_path):
    """One program for every shape, with a length at which attention has another form when compiled in place."""
    torch.manual_seed(0)
    section = ModelSection(family="llama", hidden=32, heads=4, kv_heads=2, layers=1, context_length=300, vocab_size=67)
    model = Logits(Decoder(config_from_section(section))).eval()
    target = Target("tiny", model, (torch.randint(0, 67, (1, 8)),), module=model)
    document = build(target, Wanted("tiny", cache=False, max_batch=5), tmp_path / "package")
    assert document["inputs"] == [{"shape": ["1 to 5", "1 to 300"], "dtype": "torch.int64"}]
    loaded = load(tmp_path / "package")
    for shape in ((1, 1), (5, 3), (2, 300)):
        tokens = torch.randint(0, 67, shape)
        with torch.no_grad():
            assert torch.allclose(loaded(tokens), model(tokens), rtol=1e-4, atol=1e-5), shape
    with pytest.raises(ValueError, match="the package takes"):
        loaded(tokens, tokens)
    assert [one.name for one in tmp_path.iterdir()] == ["package"]  # nothing temporary is left


def test_folders_of_others_are_not_overwritten(source, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    target = resolve(f"{source}:Tiny")
    with pytest.raises(UserError, match="not empty and not a package"):
        build(target, Wanted("tiny"), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        build(target, Wanted("tiny"), tmp_path / "thesis.txt")
    done = ridgeline("compile", "package", f"{source}:Tiny", tmp_path / "x", "--no-program", "--no-cache")
    assert done.returncode == 2 and "nothing is left to write" in done.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.txt"]


def test_without_a_compiler_it_is_one_line_and_nothing_is_left(source, tmp_path):
    environment = {"CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": tmp_path / "cache"}
    done = ridgeline("compile", "package", f"{source}:Tiny", tmp_path / "out" / "package", **environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no working C++ compiler" in done.stderr.strip().splitlines()[-1]
    assert list((tmp_path / "out").iterdir()) == []


def test_features_are_compared_as_linux_names_them(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "processor\t: 0\nflags\t\t: fpu fma avx512f avx512_vnni\n\nflags\t\t: other\n"
    )
    features = manifest.cpu_features(tmp_path)
    assert features == {"fpu", "fma", "avx512f", "avx512_vnni"}
    assert manifest.missing_features(["fma", "avx512vnni", "amx-tile"], features) == ["amx-tile"]
    assert manifest.missing_features(["anything"], manifest.cpu_features(tmp_path / "nowhere")) == []


def test_a_program_that_answers_otherwise_is_not_packaged(made, source):
    """Other weights than those compiled: what the proof at the end of a build must notice."""
    same, other = resolve(f"{source}:Tiny"), resolve(f"{source}:Tiny", seed=1)
    assert _prove(same, made[0]) < 1e-5
    with pytest.raises(JobError, match="differs from the model"):
        _prove(other, made[0])
