"""Follow an execution trace: versions of every storage, who wrote and who read each, and copies of the same form.

A write begins a new version; an operator's new result begins a new life of its storage, for ids of storages that are gone
are given again (torch numbers them by address). Tensors that no recorded operator makes, such as the one that wraps the
0.9 of ``momentum.mul_(0.9)``, can take such an id too; an argument in a form that the life before never had shows it.
An access counts for the innermost operator that makes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ridgeline.profiling.analyses import execution
from ridgeline.profiling.analyses.execution import Node, Tensor
from ridgeline.profiling.classify import SHELL

_BACKWARD = re.compile(r"autograd::engine::evaluate_function")
_OPTIMIZER = re.compile(r"Optimizer\.step#")
_ACCUMULATE = "AccumulateGrad"
_UNWRITTEN = re.compile(r"aten::(empty|new_empty|resize_|set_)")
_SHAPE_ONLY = re.compile(r"aten::(empty|new_|resize_$|set_|\w+_like$)")
_PURE_WRITE = re.compile(r"aten::(copy_|fill_|zero_|normal_|uniform_|bernoulli_)$")
_NUMBERS = ("double", "long int", "long", "bool", "c10::complex<double>")
"""Types in which torch wraps a Python number, as a tensor of no dimension on the CPU."""


@dataclass
class Version:
    """One version of a storage: from a write to the next, or to the end of its life."""

    storage: int
    life: int
    number: int
    bytes: int
    dtype: str
    written_by: Node | None = None
    written_at: int | None = None
    maker: Node | None = None
    written_in: str | None = None
    reads: list[tuple[Node, int, str]] = field(default_factory=list)
    accumulated: bool = False
    returned: bool = False

    @property
    def key(self) -> tuple[int, int, int]:
        """Storage, life and version."""
        return self.storage, self.life, self.number

    freed_ns: int | None = None
    released_by: str | None = None


@dataclass(frozen=True)
class Copy:
    """A copy into memory made for it, in the type and layout of its source."""

    node: Node
    source: Version
    at: int
    size: int


_Form = tuple[str, tuple[int, ...], tuple[int, ...]]


def _form(tensor: Tensor) -> _Form:
    return tensor.dtype, tensor.shape, tensor.strides


@dataclass
class Flow:
    """All versions and same-form copies of an execution trace."""

    nodes: Sequence[Node]
    versions: list[Version] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)


class _Walk:
    """Follows the nodes in the order in which they ended."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.flow = Flow(nodes)
        self.by_id = {node.id: node for node in nodes}
        self.phase: dict[int, str] = {}
        self.current: dict[int, Version] = {}
        self.lives: dict[int, int] = {}
        self.began: dict[int, int] = {}  # storage -> node that began its life; ids rise with the start of a node
        self.forms: dict[int, set[_Form]] = {}  # storage -> forms that tensors of its current life had
        self.now = 0
        self.done: dict[int, tuple[set[int], set[int]]] = {}  # (read, written) storages below a node not yet ended

    def phase_of(self, node: Node | None) -> str:
        """The phase that a node runs in, by the ranges and autograd nodes around it; each optimizer step has its own."""
        chain = []
        found = "forward"
        while node is not None:
            known = self.phase.get(node.id)
            if known or _BACKWARD.match(node.name) or _OPTIMIZER.match(node.name):
                found = known or ("backward" if _BACKWARD.match(node.name) else f"optimizer {node.id}")
                break
            chain.append(node.id)
            node = self.by_id.get(node.ctrl_deps) if node.ctrl_deps != node.id else None
        self.phase.update(dict.fromkeys(chain, found))
        return found

    def step(self, at: int, node: Node) -> None:
        """Account for one node that ended as the ``at``-th."""
        self.now = node.id
        read, written = self.done.pop(node.id, (set(), set()))
        above = self.done.setdefault(node.ctrl_deps, (set(), set()))
        what = execution.effects(str(node.attribute("op_schema") or ""))
        if _ACCUMULATE in node.name:
            for _, tensor in execution.tensors(node.inputs):
                self.version(tensor).accumulated = True
        elif what.known or not SHELL.match(node.name):
            self.access(at, node, what, read, written)
        above[0].update(read)
        above[1].update(written)

    def access(self, at: int, node: Node, what: execution.Effects, read: set[int], written: set[int]) -> None:
        """Reads and writes of an operator that none of its children made."""
        given = list(execution.tensors(node.inputs))
        results = [one for _, one in execution.tensors(node.outputs)]
        mine = {one.storage for _, one in given}
        changed = [(place, one) for place, one in given if place in what.changes]
        made = [one for one in results if one.storage not in mine]
        if what.known and not changed and not any(what.fresh):
            self.view(given, results)  # it moves nothing
            return
        phase = self.phase_of(node)
        blind = bool(_PURE_WRITE.match(node.name))
        self.note_copy(at, node, given)
        for place, one in [] if _SHAPE_ONLY.match(node.name) else given:
            if one.storage not in read and not (blind and place in what.changes):
                self.version(one).reads.append((node, at, phase))
                read.add(one.storage)
        for _, one in changed:
            if one.storage not in written:
                self.write(at, node, one, phase)
                written.add(one.storage)
        for one in made:
            self.create(at, node, one, phase, written)

    def version(self, tensor: Tensor) -> Version:
        """The current version of a tensor's storage; one from before the capture when it has none."""
        found = self.current.get(tensor.storage)
        if found is None or self.strange(tensor):
            found = self.begin(tensor)
        found.bytes = max(found.bytes, tensor.bytes)
        self.forms[tensor.storage].add(_form(tensor))
        return found

    def view(self, given: list[tuple[int, Tensor]], results: list[Tensor]) -> None:
        """The results of a view are other forms of what it was given."""
        for _, one in given:
            if one.storage in self.current and self.strange(one):
                self.begin(one)
        for one in results:
            if one.storage in self.current:
                self.forms[one.storage].add(_form(one))

    def strange(self, tensor: Tensor) -> bool:
        """Whether an argument cannot be of the life known under its id: a type which no view of that life had, or a
        wrapped number where there was none. Unrecorded aliases (``detach`` in C++) keep the type."""
        known = self.forms[tensor.storage]
        if tensor.dtype not in {dtype for dtype, *_ in known}:
            return True
        number = not tensor.shape and tensor.device == "cpu" and tensor.dtype in _NUMBERS
        return number and _form(tensor) not in known

    def live(self, tensor: Tensor) -> tuple[int, int, int]:
        """(life, version, bytes) with which a new life of a storage begins."""
        life = self.lives[tensor.storage] = self.lives.get(tensor.storage, -1) + 1
        self.began[tensor.storage] = self.now
        self.forms[tensor.storage] = {_form(tensor)}
        return life, 0, tensor.bytes

    def begin(self, tensor: Tensor) -> Version:
        """A new life of a storage."""
        found = Version(tensor.storage, *self.live(tensor), tensor.dtype)
        self.current[tensor.storage] = found
        self.flow.versions.append(found)
        return found

    def write(self, at: int, node: Node, tensor: Tensor, phase: str) -> None:
        """A write into existing memory: the first one of memory just made fills it, others begin a version."""
        old = self.version(tensor)
        if old.maker is not None and old.written_by is None and not old.reads:
            new = old
        else:
            new = Version(old.storage, old.life, old.number + 1, old.bytes, old.dtype, maker=old.maker)
            self.flow.versions.append(new)
            self.current[tensor.storage] = new
        new.written_by, new.written_at, new.written_in = node, at, phase

    def create(self, at: int, node: Node, tensor: Tensor, phase: str, written: set[int]) -> None:
        """A result that is no argument: new memory. Its writer is the innermost operator that returns it filled,
        whatever helpers wrote into it before (``aten::addmm`` copies its bias there first)."""
        found = self.current.get(tensor.storage) if tensor.storage in written else None
        if found is None:
            found = self.begin(tensor)
        elif self.began[tensor.storage] < node.id:
            # The id of a storage that is gone was given to this one: what a child wrote belongs to a new life.
            found.life, found.number, found.bytes, found.dtype, found.maker = *self.live(tensor), tensor.dtype, node
        found.maker = found.maker or node
        if not found.returned and not _UNWRITTEN.match(node.name):
            found.written_by, found.written_at, found.written_in, found.returned = node, at, phase, True
        self.forms[tensor.storage].add(_form(tensor))
        written.add(tensor.storage)

    def note_copy(self, at: int, node: Node, given: list[tuple[int, Tensor]]) -> None:
        """Remember a copy whose destination was made for it in the form of the source."""
        if node.name != "aten::copy_" or len(given) < 2:
            return
        (_, to), (_, source) = given[:2]
        target = self.version(to)
        fresh = target.maker is not None and target.written_by is None and not target.reads
        if fresh and to[2:] == source[2:] and to.storage != source.storage:
            self.flow.copies.append(Copy(node, self.version(source), at, to.bytes))


def follow(nodes: Sequence[Node]) -> Flow:
    """Versions and copies of an execution trace."""
    walk = _Walk(nodes)
    for at, node in enumerate(nodes):
        walk.step(at, node)
    walk.flow.versions = [one for one in walk.flow.versions if one.written_by or one.reads or one.accumulated]
    return walk.flow
