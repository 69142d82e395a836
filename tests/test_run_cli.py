"""``ridgeline run --doctor``: settings reach an unmodified script, and what is wrong with them is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ridgeline.compiler.doctor.plan_toml import read_toml, to_toml, write_toml
from ridgeline.errors import UserError

SCRIPT = """
import sys, warnings
import torch, torch._dynamo
import helper
def f(x):
    warnings.warn("seen")
    return x * x.sum().item()
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
torch.compile(f, backend=backend)(torch.ones(3))
print(__name__, sys.argv[1:], helper.NAME, "graphs", len(graphs))
if "fail" in sys.argv:
    raise KeyError("mine")
raise SystemExit(3)
"""
SETTING = {"dynamo.capture_scalar_outputs": True, "dynamo.reorderable_logging_functions": ["warnings.warn"]}


def ridgeline(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ridgeline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=240)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "script.py").write_text(SCRIPT)
    (tmp_path / "inner" / "helper.py").write_text("NAME = 'beside'\n")
    write_toml(tmp_path / "doctor.toml", SETTING, ["from a test"])
    return tmp_path


def test_settings_reach_the_script_and_its_exit_code_comes_back(program: Path) -> None:
    done = ridgeline("run", "--doctor", "doctor.toml", "inner/script.py", "--lr", "1", folder=program)
    assert done.returncode == 3, done.stderr
    assert done.stdout == "__main__ ['--lr', '1'] beside graphs 1\n"
    (program / "doctor.toml").write_text("")
    plain = ridgeline("run", "--doctor", "doctor.toml", "inner/script.py", folder=program)
    assert "graphs 1" not in plain.stdout and plain.returncode == 3


def test_json_is_alone_on_stdout_and_a_failure_is_the_scripts_own(program: Path) -> None:
    done = ridgeline("run", "--doctor", "doctor.toml", "--json", "inner/script.py", "fail", folder=program)
    document = json.loads(done.stdout)
    assert done.returncode == 1 == document["exit_code"] and document["settings"] == SETTING
    assert "KeyError: 'mine'" in done.stderr and "runpy" not in done.stderr and "graphs 1" in done.stderr


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("[dynamo]\ncapture_scalar_output = true\n", ["inner/script.py"], "did you mean 'capture_scalar_outputs'?"),
        ("[dynamo]\ncapture_scalar_outputs = 3\n", ["inner/script.py"], "is a bool, not 3"),
        ("[compile]\nwhole = true\n", ["inner/script.py"], "regional = true"),
        ("", ["inner/scrip.py"], "did you mean 'script.py'?"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_script_runs(
    program: Path, text: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from ridgeline.cli.main import main

    (program / "doctor.toml").write_text(text)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as leaving:
        patch.chdir(program)
        main(["run", "--doctor", "doctor.toml", *arguments])
    printed = capsys.readouterr()
    assert leaving.value.code == 2 and printed.out == ""
    assert message in printed.err and len(printed.err.strip().splitlines()) == 1


def test_a_file_of_settings_survives_writing_and_reading(tmp_path: Path) -> None:
    setting = {
        "compile.regional": True,
        "compiler.dynamic_sources": "L['x'], G[\"y\\n\"]",
        "dynamo.recompile_limit": 64,
        **SETTING,
    }
    write_toml(tmp_path / "a.toml", setting, ["a note", "another"])
    assert read_toml(tmp_path / "a.toml") == setting
    assert (tmp_path / "a.toml").read_text().startswith("# a note\n# another\n")
    assert to_toml({}) == "\n" and [one.name for one in tmp_path.iterdir()] == ["a.toml"]


@pytest.mark.parametrize("text", ["[dynamo\n", "[inductor]\nx = 1\n", "capture_scalar_outputs = true\n", "\x00"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UserError, match=r"a\.toml"):
        read_toml(tmp_path / "a.toml")
    with pytest.raises(UserError, match="no such file"):
        read_toml(tmp_path / "b.toml")
