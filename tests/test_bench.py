"""Interleaving, evidence behind quoted figures, acceptance rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from ridgeline.bench import Session, interleave, write_evidence
from ridgeline.bench.acceptance import Row, load_rows, main, run_row
from ridgeline.bench.evidence import check, load_evidence, render
from ridgeline.errors import UserError

ROOT = Path(__file__).parents[1]


def test_order_alternates_and_a_failure_is_a_gap_with_a_reason():
    order = []

    def contender(name, fails=False):
        def run():
            order.append(name)
            if fails:
                raise RuntimeError("no such engine\nmore")
            return {"seconds": 1.0 + len(order)}

        return run

    session = interleave({"a": contender("a"), "b": contender("b"), "c": contender("c", fails=True)}, rounds=4)
    assert order == ["a", "b", "c", "b", "a", "a", "b", "b", "a"]
    assert session.failures == {"c": "RuntimeError: no such engine"}
    assert len(session.samples["a"]["seconds"]) == 4 and "c" not in session.samples
    with pytest.raises(KeyError):
        session.median("c", "seconds")


def test_interleaving_cancels_a_machine_that_drifts():
    clock = iter(range(1, 1000))
    slowing = lambda: {"seconds": 1.0 + 0.01 * next(clock)}
    session = interleave({"a": slowing, "b": slowing}, rounds=8)
    assert session.compare("a", "b", "seconds").verdict == "no difference"
    in_a_row = Session()
    for name in ("a", "b"):
        for _ in range(8):
            in_a_row.add(name, slowing())
    assert in_a_row.compare("a", "b", "seconds").verdict == "higher"


@pytest.fixture
def claims(tmp_path):
    write_evidence(
        tmp_path / "evidence" / "x.json",
        {"x.ratio": {"value": 4.444, "unit": "x", "format": ".1f", "aa_floor": 0.01}},
        {"x": [["what", "tokens/s"], ["ours", "12"]]},
        command="make bench",
        device="a machine",
        measures=["src"],
    )
    return tmp_path


@pytest.mark.parametrize(
    "text, problem",
    [
        ("It is 4.4<!-- evidence:x.ratio --> times faster.", None),
        ("It is 4.5<!-- evidence:x.ratio --> times faster.", "says 4.5"),
        ("It is 4.4<!-- evidence:x.other --> times faster.", "no evidence for 'x.other'"),
        ("It is 5 times faster.", "without evidence"),
        ("It reaches 300 tokens/s.", "without evidence"),
        ("The bar is 5 times. <!-- no-evidence: a bar -->", None),
        ("```\n5 times faster\n```", None),
        ("A model of 6 layers.", None),
        (
            "<!-- evidence-table:x -->\n| what | tokens/s |\n| --- | --- |\n| ours | 12 |\n<!-- /evidence-table -->",
            None,
        ),
        ("<!-- evidence-table:x -->\n| ours | 13 |\n<!-- /evidence-table -->", "not what the evidence says"),
        ("<!-- evidence-table:y -->\n<!-- /evidence-table -->", "no evidence table"),
    ],
)
def test_a_quoted_figure_is_held_against_its_evidence(claims, text, problem):
    (claims / "README.md").write_text(text)
    problems = check(claims)
    assert bool(problems) == bool(problem), problems
    if problem:
        assert problem in problems[0]


def test_render_makes_the_documents_true(claims):
    file = claims / "README.md"
    file.write_text("9.9<!-- evidence:x.ratio --> times\n<!-- evidence-table:x -->\nold\n<!-- /evidence-table -->\n")
    assert check(claims) and render(claims) == [file]
    assert check(claims) == [] and "| ours | 12 |" in file.read_text()
    assert render(claims) == []


def test_an_entry_without_its_origin_is_refused(claims):
    write_evidence(claims / "evidence" / "y.json", {"y": {"value": 1}}, {})
    with pytest.raises(ValueError, match="lacks aa_floor, command, device, unit"):
        load_evidence(claims)


def test_the_projects_own_documents_quote_only_evidence():
    assert check(ROOT) == []


def test_rows_run_and_say_why_they_fail(tmp_path):
    assert run_row(Row(1, "t", "echo yes", "shell", ["yes"]), tmp_path) is None
    assert "lacks 'no'" in run_row(Row(1, "t", "echo yes", "shell", ["no"]), tmp_path)
    assert "exit code 3" in run_row(Row(1, "t", "exit 3", "shell"), tmp_path)
    file = tmp_path / "acceptance.toml"
    file.write_text('[[row]]\nid = 1\ntitle = "t"\ncommand = "true"\noracle = "o"\n')
    assert main([str(file)]) == 0
    file.write_text('[[row]]\nid = 1\ntitle = "t"\ncommand = "false"\noracle = "o"\n')
    assert main([str(file)]) == 1
    file.write_text('[[row]]\nid = 56\ntitle = "t"\ncommand = "false"\noracle = "o"\n')
    with pytest.raises(UserError):
        load_rows(file)


def test_the_projects_rows_are_well_formed():
    rows = load_rows(ROOT / "acceptance.toml")
    assert rows and all(row.command and row.oracle for row in rows)
    assert f"{len(rows)} of 55 acceptance rows work" in (ROOT / "README.md").read_text()
