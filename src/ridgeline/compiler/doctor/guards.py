"""Guards as text, taken apart: which source failed, what it was, what it is. Pure functions on strings.

Dynamo names a value by how to reach it: ``L['x']`` is a local, ``G['f']`` a global, ``L['self'].step`` an attribute. In
a failure the ``L[...]`` is left out: ``0/1: self.step == 1  # code  # file:line in f``.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ID = re.compile(r"^(\d+/\d+): ")
_MISMATCH = re.compile(
    r"tensor '(?P<source>.+?)' (?P<what>[\w ]+?) mismatch(?: at index (?P<index>\d+))?\."
    r" expected (?P<old>.+?), actual (?P<new>.+?)\.?$"
)
_STATE = re.compile(r"^GLOBAL_STATE changed: (.+?)\s*$")
_IDENTITY = re.compile(r"___check_(?:obj|type)_id\((.+?), \d+\)")
_USER_LINE = re.compile(r'File "(.+?)", line (\d+), in (\S+)')
_COMMENT = re.compile(r"\s{2,}# .*$")
_TREE = re.compile(r"source=([^,]+(?:\[[^\]]*\])?[^,]*), accessed_by=")
_LEAF = re.compile(r"^[|\s]*\+- ([A-Z_]+): (.*)$")
_PLACE = re.compile(r"#\s(?P<code>[^#]*?)\s+# (?P<file>\S+):(?P<line>\d+) in ")
READABLE = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Load, ast.Index, ast.UnaryOp, ast.USub)
UNKNOWN = "?"
MOST_TEXTS = 2000
_TENSOR = re.compile(r"check_tensor\((?P<source>.+?), \w+, .*?(?P<dtype>torch\.\w+), .*?size=\[(?P<sizes>[^\]]*)\]")
_ADDRESS = re.compile(r"0x[0-9a-f]+|\b\d{9,}\b")


@dataclass(frozen=True)
class Failure:
    """A guard that failed for one cached compilation. ``old`` and ``new`` are texts, ``?`` when not known."""

    compile_id: str
    guard: str
    source: str
    old: str = UNKNOWN
    new: str = UNKNOWN
    what: str = ""
    """size, stride, dtype, rank, dispatch key set, value, type, identity, length, global state, backend."""
    file: str = ""
    line: int = 0
    differing: int = 0
    """Guards of that compilation that the new call fails, as far as they can be read; see :func:`differing`."""


def parse_failure(reason: str, names: Mapping[str, Any] | None = None) -> Failure:
    """Take apart one reason of a recompilation; ``names`` are the failing frame's, to read the new value from."""
    head, *rest = reason.splitlines() or [""]
    match = _ID.match(head)
    compile_id = match.group(1) if match else ""
    guard = _COMMENT.sub("", head[match.end() :] if match else head).strip()
    place = _USER_LINE.search("\n".join(rest))
    file, line = (place.group(1), int(place.group(2))) if place else ("", 0)
    source, old, new, what = _read(guard, names or {})
    return Failure(compile_id, guard, source, old, new, what, file, line)


def _read(guard: str, names: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Source, old, new, what."""
    if match := _MISMATCH.search(guard):
        index = match["index"]
        what = match["what"].strip()
        method = {"size": "size", "stride": "stride"}.get(what)
        source = f"{match['source']}.{method}()[{index}]" if method and index else match["source"]
        return source, match["old"].strip(), match["new"].strip(), what
    if match := _STATE.match(guard):
        return match.group(1), UNKNOWN, UNKNOWN, "global state"
    if guard.startswith("BACKEND_MATCH"):
        return "backend", UNKNOWN, UNKNOWN, "backend"
    if match := _IDENTITY.search(guard):
        return _identity(match.group(1), guard, names)
    return _comparison(guard, names)


def _identity(source: str, guard: str, names: Mapping[str, Any]) -> tuple[str, str, str, str]:
    kind = re.search(r"type=<class '(.+?)'>", guard)
    value = _value(source, names)
    if "_type_id" in guard:
        new = f"{type(value[0]).__module__}.{type(value[0]).__qualname__}" if value else UNKNOWN
        return source, kind.group(1) if kind else UNKNOWN, new, "type"
    old = f"one {kind.group(1)} object" if kind else UNKNOWN
    return source, old, f"another: {_short(value[0])}" if value else "another", "identity"


def _comparison(guard: str, names: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """``n == 3``, ``len(d) != 2``, ``not d``: the side that is no constant is the source."""
    try:
        tree = ast.parse(guard, mode="eval").body
    except (SyntaxError, ValueError):
        return guard, UNKNOWN, UNKNOWN, "value"
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Not):
        source = ast.unparse(tree.operand)
        return f"len({source})", "0", _length(source, names), "length"
    if not isinstance(tree, ast.Compare) or len(tree.ops) != 1:
        return guard, UNKNOWN, UNKNOWN, "value"
    left, right = tree.left, tree.comparators[0]
    if isinstance(left, ast.Constant):
        left, right = right, left
    source, old = ast.unparse(left), ast.unparse(right)
    if isinstance(left, ast.Call) and ast.unparse(left.func) == "len" and left.args:
        return source, old, _length(ast.unparse(left.args[0]), names), "length"
    value = _value(source, names)
    return source, old, _short(value[0]) if value else UNKNOWN, "value"


def _length(source: str, names: Mapping[str, Any]) -> str:
    value = _value(source, names)
    try:
        return str(len(value[0])) if value else UNKNOWN
    except Exception:
        return UNKNOWN


def _value(source: str, names: Mapping[str, Any]) -> tuple[Any] | None:
    """The value of a source that is names, attributes and subscripts alone: nothing is called to read it."""
    source = re.sub(r"[LG]\['(\w+)'\]", r"\1", source)
    try:
        tree = ast.parse(source, mode="eval")
        if not all(isinstance(node, (ast.Expression, *READABLE)) for node in ast.walk(tree)):
            return None
        return (eval(compile(tree, "<guard>", "eval"), {"__builtins__": {}}, dict(names)),)
    except Exception:
        return None


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def cause(failures: Sequence[Failure]) -> Failure:
    """The failure to blame of one recompilation's. Entries come newest first and each tells the first guard it failed
    by, so: the compilation that the call is nearest to; among equals the source that most failed by; then the newest."""
    least = min(one.differing for one in failures)
    nearest = [one for one in failures if one.differing == least]
    votes = Counter(one.source for one in nearest)
    return max(nearest, key=lambda one: votes[one.source])


def differing(texts: Sequence[str], names: Mapping[str, Any]) -> int:
    """How many of a compilation's guards (as :class:`Guards` keeps them) do not hold for ``names``: values, lengths,
    and tensors' dtype and sizes. Guards that cannot be read count as held."""
    count = 0
    for text in texts:
        kind, _, guard = text.partition(" ")
        if kind == "TENSOR_MATCH":
            count += _other_tensor(guard, names)
        elif kind == "EQUALS_MATCH" or kind.endswith("_LENGTH"):
            _, old, new, _ = _comparison(guard, names)
            count += new not in (UNKNOWN, old)
    return count


def _other_tensor(guard: str, names: Mapping[str, Any]) -> bool:
    match = _TENSOR.search(guard)
    found = _value(match["source"], names) if match else None
    if match is None or found is None or not hasattr(found[0], "dtype"):
        return False
    sizes = [one.strip() for one in match["sizes"].split(",") if one.strip()]
    actual = [str(one) for one in found[0].shape]
    same = len(sizes) == len(actual) and all(a in ("None", b) for a, b in zip(sizes, actual, strict=True))
    return not same or match["dtype"] != str(found[0].dtype)


@dataclass(frozen=True)
class Guards:
    """What one compilation checks at every call: leaves of the guard tree, by source and first use."""

    count: int
    sources: list[str]
    places: dict[str, tuple[str, int]]
    """Source to (code line, line number) of the first use that is known."""
    texts: list[str]
    """The guards themselves, without addresses, comments and the state of the process; at most :data:`MOST_TEXTS`."""


def parse_guards(text: str) -> Guards:
    """Take apart ``dynamo_cpp_guards_str``."""
    count, by_source, places, source = 0, Counter[str](), dict[str, tuple[str, int]](), ""
    texts: list[str] = []
    for line in text.splitlines():
        if found := _TREE.search(line):
            source = found.group(1)
        leaf = _LEAF.match(line)
        if leaf is None or leaf.group(1) in ("GLOBAL_STATE", "TORCH_FUNCTION_MODE_STACK", "DEFAULT_DEVICE"):
            continue
        count += 1
        by_source[source or "shapes"] += 1
        if len(texts) < MOST_TEXTS:
            texts.append(_COMMENT.sub("", _ADDRESS.sub("#", f"{leaf.group(1)} {leaf.group(2)}")).strip())
        if (place := _PLACE.search(line)) and source not in places:
            places[plain(source)] = (place["code"].strip(), int(place["line"]))
    return Guards(count, [f"{plain(name)} ({n})" for name, n in by_source.most_common(8)], places, texts)


def plain(source: str) -> str:
    """``x`` of ``L['x']``."""
    return re.sub(r"[LG]\['([^']+)'\]", r"\1", source)
