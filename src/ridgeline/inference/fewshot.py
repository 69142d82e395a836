"""Few-shot prompting: examples and queries from a file, answers scored against references.

A file is jsonl. Lines with ``input`` and ``output`` are examples; lines with ``query`` and ``answers`` (one text or a
list of accepted ones) are queries; at most one line with ``instruction``, and optionally ``input_name`` and
``output_name``, says how to lay out the prompt.

Two scores. *Exact match*: the answer equals an accepted one after Unicode normalisation, lower case, single spaces
and without a final full stop. *chrF* (Popovic 2015, https://aclanthology.org/W15-3049): the F2 score of character
n-grams, n = 1 to 6, spaces left out, the best over the accepted answers; 0 to 100, as sacrebleu prints it. Both are
means over the queries.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ridgeline.errors import UserError

ORDER, BETA = 6, 2.0


@dataclass(frozen=True)
class FewShot:
    """A parsed file: ``examples`` are (input, output), ``queries`` are (query, accepted answers)."""

    instruction: str
    input_name: str
    output_name: str
    examples: tuple[tuple[str, str], ...]
    queries: tuple[tuple[str, tuple[str, ...]], ...]

    def prompt(self, query: str) -> str:
        """The plain prompt: instruction, examples, and the query with its answer left open."""
        parts = [self.instruction] if self.instruction else []
        parts += [f"{self.input_name}: {given}\n{self.output_name}: {answer}" for given, answer in self.examples]
        return "\n\n".join([*parts, f"{self.input_name}: {query}\n{self.output_name}:"])

    def messages(self, query: str) -> list[dict[str, str]]:
        """The same as a chat: each example a turn of both sides."""
        turns = [{"role": "system", "content": self.instruction}] if self.instruction else []
        for given, answer in self.examples:
            turns += [{"role": "user", "content": given}, {"role": "assistant", "content": answer}]
        return [*turns, {"role": "user", "content": query}]


@dataclass(frozen=True)
class Answer:
    """One query with what the model wrote and what that is worth."""

    query: str
    answer: str
    accepted: tuple[str, ...]
    exact: bool
    chrf: float


@dataclass(frozen=True)
class Score:
    """``exact_match`` 0 to 1, ``chrf`` 0 to 100."""

    answers: tuple[Answer, ...]
    exact_match: float
    chrf: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def shipped() -> list[str]:
    """Names of the files that come with Ridgeline; `read` takes them in place of a path."""
    folder = resources.files("ridgeline.inference").joinpath("examples")
    return sorted(entry.name.removesuffix(".jsonl") for entry in folder.iterdir() if entry.name.endswith(".jsonl"))


def read(path: str | Path) -> FewShot:
    """Parse a file, or a shipped one by its name.

    Raises:
        UserError: no such file, or a line is not one of the three kinds (its number is named).
    """
    name, file = str(path), Path(path)
    if not file.is_file():
        if name not in shipped():
            raise UserError(f"no few-shot file at {name} (shipped ones: {', '.join(shipped())})")
        file = Path(str(resources.files("ridgeline.inference").joinpath("examples", f"{name}.jsonl")))
    head: dict[str, str] = {}
    examples: list[tuple[str, str]] = []
    queries: list[tuple[str, tuple[str, ...]]] = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        record = _record(line, f"{file}, line {number}")
        if "query" in record:
            queries.append((record["query"], _accepted(record, f"{file}, line {number}")))
        elif "output" in record:
            examples.append((record["input"], record["output"]))
        else:
            head = record
    if not queries:
        raise UserError(f"{file}: no line with 'query' and 'answers'")
    names = head.get("input_name", "Input"), head.get("output_name", "Output")
    return FewShot(head.get("instruction", ""), *names, tuple(examples), tuple(queries))


def score(task: FewShot, texts: Sequence[str]) -> Score:
    """Hold the model's ``texts``, one per query, against the accepted answers. Only the first line of each counts."""
    answers = []
    for (query, accepted), text in zip(task.queries, texts, strict=True):
        first = next((line.strip() for line in text.splitlines() if line.strip()), "")
        exact = normalised(first) in {normalised(answer) for answer in accepted}
        answers.append(Answer(query, first, accepted, exact, max(chrf(first, answer) for answer in accepted)))
    count = len(answers)
    return Score(tuple(answers), sum(a.exact for a in answers) / count, sum(a.chrf for a in answers) / count)


def normalised(text: str) -> str:
    """What exact match compares."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).rstrip(".").rstrip()


def chrf(hypothesis: str, reference: str) -> float:
    """Character n-gram F2 of one pair, 0 to 100. Orders that either text is too short for are left out."""
    precision = recall = 0.0
    orders = 0
    for n in range(1, ORDER + 1):
        ours, theirs = _grams(hypothesis, n), _grams(reference, n)
        if not ours or not theirs:
            continue
        matches = (ours & theirs).total()
        precision, recall, orders = precision + matches / ours.total(), recall + matches / theirs.total(), orders + 1
    if not orders or not precision or not recall:
        return 0.0
    precision, recall = precision / orders, recall / orders
    return 100 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def _grams(text: str, n: int) -> Counter[str]:
    letters = "".join(text.split())
    return Counter(letters[i : i + n] for i in range(len(letters) - n + 1))


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start})") from None


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        raise UserError(f"{where}: not JSON") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: not an object")
    kinds: list[set[str]] = [{"input", "output"}, {"query", "answers"}]
    heading = set(record) <= {"instruction", "input_name", "output_name"} and bool(record)
    if not heading and set(record) not in kinds:
        raise UserError(f"{where}: keys {sorted(record)}; expected input and output, or query and answers")
    for name, value in record.items():
        if name != "answers" and not isinstance(value, str):
            raise UserError(f"{where}: '{name}' is not a text")
    return record


def _accepted(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = record["answers"]
    accepted = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else ()
    if not accepted or not all(isinstance(answer, str) for answer in accepted):
        raise UserError(f"{where}: 'answers' is neither a text nor a list of texts")
    return accepted
