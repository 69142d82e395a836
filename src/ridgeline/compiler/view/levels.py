"""The levels of a compilation woven together: every line knows what it was made from.

The idea: an *entity* is a Python line, a torch IR node, an ATen node, a loop nest, a fused kernel, or a piece of
generated code. Each names its parents on the level above, so what a line became is all that lies below it and what it
came from is all that lies above: two walks, whatever line is clicked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ridgeline.compiler.view.code import CallSite, call_sites, definitions
from ridgeline.compiler.view.records import Frame, Graph, Loops, Node, Part
from ridgeline.compiler.view.roofline import Bound, Device, bound
from ridgeline.compiler.view.source import code_of, functions

PANES = {
    "python": ("Python", "what was written"),
    "torch": ("torch IR", "what Dynamo captured"),
    "aten": ("ATen IR", "after AOTAutograd: decomposed, forward and backward apart"),
    "loops": ("Loops", "one nest for each buffer, before fusion"),
    "fused": ("Fused loops", "what shares a kernel, after fusion"),
    "code": ("Generated code", "what runs"),
}


@dataclass
class Pane:
    """Lines of one level with the entity of each (-1: none), cut into titled sections.

    ``comments``: lines that quote a Python line, with its entity; they can be clicked and do not light up.
    """

    name: str
    title: str
    about: str
    lines: list[str] = field(default_factory=list)
    of: list[int] = field(default_factory=list)
    sections: list[dict[str, Any]] = field(default_factory=list)  # title, first, phase
    comments: dict[int, int] = field(default_factory=dict)

    def add(self, text: str, entity: int = -1) -> None:
        """One more line."""
        self.lines.append(text)
        self.of.append(entity)

    def section(self, title: str, phase: str = "") -> None:
        """What follows has this title."""
        self.sections.append({"title": title, "first": len(self.lines), "phase": phase})


@dataclass
class Kernel:
    """One fused kernel or library call: what it moves and computes, and what that means on the device."""

    entity: int
    name: str
    loops: str
    phase: str
    graph: int
    kind: str
    operators: int
    bytes_moved: int
    bytes_unfused: int
    flops: int | None
    dtype: str
    peak: float | None  # FLOP/s of the device that applies
    intensity: float | None
    bound: str
    floor_seconds: float | None
    sources: list[dict[str, Any]]  # file, line, code, entity

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass
class View:
    """All panes, the entities' parents (``weak``: lines of the callers), the kernels, the device they are held against."""

    title: str
    panes: list[Pane]
    up: list[list[int]]
    weak: list[list[int]]
    kernels: list[Kernel]
    device: Device
    compiled_for: str
    graphs: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `report.compile_page` draws, short file names included."""
        note = f"Predicted from the fusions made for {self.compiled_for.upper()}; each buffer once."
        if self.device.source.startswith("measured"):
            note += " Data in a cache can be faster than this floor."
        else:
            note += " That device's compiler fuses otherwise."
        return {
            "title": self.title.rpartition("/")[2] or self.title,
            "subtitle": f"{self.title}, compiled for {self.compiled_for.upper()}",
            "panes": [asdict(pane) for pane in self.panes],
            "up": self.up,
            "weak": self.weak,
            "kernels": [_short_paths(kernel.to_dict()) for kernel in self.kernels],
            "device": self.device.to_dict(),
            "totals": self.totals(),
            "note": f"{note} Rates: {self.device.source}.",
        }

    def totals(self) -> dict[str, Any]:
        """Sums over the kernels; ``flops`` of those whose FLOPs are known."""
        launched = [one for one in self.kernels if one.kind != "no kernel"]
        return {
            "graphs": self.graphs,
            "kernels": len(launched),
            "bytes_moved": sum(one.bytes_moved for one in launched),
            "bytes_unfused": sum(one.bytes_unfused for one in launched),
            "flops": sum(one.flops or 0 for one in launched),
            "kernels_without_flops": sum(one.flops is None for one in launched),
            "floor_seconds": sum(one.floor_seconds or 0.0 for one in launched),
        }


def build(title: str, frames: Sequence[Frame], device: Device, compiled_for: str = "cpu") -> View:
    """The view of what `internals.inductor.record` returned."""
    return _Builder(title, frames, device, compiled_for).view()


class _Builder:
    def __init__(self, title: str, frames: Sequence[Frame], device: Device, compiled_for: str) -> None:
        self.title, self.frames, self.device, self.compiled_for = title, frames, device, compiled_for
        self.panes = {name: Pane(name, *about) for name, about in PANES.items()}
        self.up: list[list[int]] = []
        self.weak: list[list[int]] = []
        self.python: dict[tuple[str, int], int] = {}
        self.kernels: list[Kernel] = []

    def view(self) -> View:
        self._python()
        for number, frame in enumerate(self.frames):
            self.panes["torch"].section(f"graph {number}")
            torch = self._graph("torch", frame.torch, self._from_python)
            forward: dict[str, int] = {}
            for part in frame.parts:
                found = self._part(number, part, torch, forward)
                forward = found if part.phase == "forward" else forward
        panes = list(self.panes.values())
        counted = len(self.frames)
        return View(self.title, panes, self.up, self.weak, self.kernels, self.device, self.compiled_for, counted)

    def _entity(self, up: Iterable[int], weak: Iterable[int] = ()) -> int:
        self.up.append(list(dict.fromkeys(up)))
        self.weak.append(list(dict.fromkeys(weak)))
        return len(self.up) - 1

    # Python

    def _python(self) -> None:
        """Every function some node comes from; a line that nodes come from is an entity."""
        graphs = [frame.torch for frame in self.frames] + [p.aten for frame in self.frames for p in frame.parts]
        places = [(file, line) for g in graphs for n in g.nodes.values() for file, line, _ in n.frames]
        for place in dict.fromkeys(places):
            self.python[place] = self._entity(())
        pane = self.panes["python"]
        for one in functions(dict.fromkeys(places)):
            pane.section(one.title)
            for number, text in enumerate(one.lines(), one.first):
                pane.add(f"{number:>4}  {text}", self.python.get((one.file, number), -1))

    def _from_python(self, node: Node) -> int:
        places = [self.python[file, line] for file, line, _ in node.frames]
        return self._entity(places[-1:], places[:-1])

    # graphs

    def _graph(self, pane_name: str, graph: Graph, make: Callable[[Node], int]) -> dict[str, int]:
        """The lines of a graph; a comment says which Python line the next nodes come from, and is that line."""
        pane, entities = self.panes[pane_name], {}
        last = None
        for text, name in graph.lines:
            if name is None:
                pane.add(text)
                continue
            node = graph.nodes[name]
            place = node.frames[-1] if node.frames else None
            if place is not None and place != last and " = " in text:
                code = f"    # {Path(place[0]).name}:{place[1]} in {place[2]}: {code_of(place[0], place[1])}"
                pane.comments[len(pane.lines)] = self.python[place[0], place[1]]
                pane.add(code)
                last = place
            entities[name] = make(node)
            pane.add(text, entities[name])
        return entities

    def _part(self, number: int, part: Part, torch: dict[str, int], forward: dict[str, int]) -> dict[str, int]:
        title = f"graph {number} · {part.phase}"
        for name in ("aten", "loops", "fused", "code"):
            self.panes[name].section(title, part.phase)

        def from_torch(node: Node) -> int:
            above = [torch[name] for name in node.parents if name in torch]
            above += [forward[name] for name in node.forward if name in forward]
            return self._entity(above) if above else self._from_python(node)

        aten = self._graph("aten", part.aten, from_torch)
        before = {one.name: self._loops("loops", one, [aten[n] for n in one.origins]) for one in part.before}
        after = [
            self._loops("fused", one, [before[n] for n in one.members if n in before] or [aten[n] for n in one.origins])
            for one in part.after
        ]
        sites = call_sites(part.code)
        names = self._code(part, after, sites)
        sizes = {one.name: one.bytes_moved for one in part.before}
        for one, entity, name in zip(part.after, after, names, strict=True):
            self._kernel(number, part, one, entity, name, sum(sizes.get(member, 0) for member in one.members))
        return aten

    def _loops(self, pane_name: str, loops: Loops, above: list[int]) -> int:
        entity = self._entity(above)
        for line in loops.lines:
            self.panes[pane_name].add(line, entity)
        return entity

    # code and kernels

    def _code(self, part: Part, after: list[int], sites: list[CallSite]) -> list[str]:
        """The generated source; a call belongs to the loops it runs, a kernel's definition to its calls."""
        chosen = [_site(one, sites) for one in part.after]
        calls: dict[int, int] = {}
        for at, site in enumerate(sites):
            above = [entity for entity, index in zip(after, chosen, strict=True) if index == at]
            if above:
                calls.update(dict.fromkeys(range(site.first, site.last + 1), self._entity(above)))
        for name, (first, last) in definitions(part.code).items():
            above = list(dict.fromkeys(calls[s.last] for s in sites if s.name == name and s.last in calls))
            if above:
                calls.update(dict.fromkeys(range(first, last + 1), self._entity(above)))
        for number, text in enumerate(part.code.splitlines()):
            self.panes["code"].add(text, calls.get(number, -1))
        return [sites[index].name if index is not None else "" for index in chosen]

    def _kernel(self, number: int, part: Part, loops: Loops, entity: int, name: str, unfused: int) -> None:
        if loops.kind == "no kernel" or (loops.kind == "library call" and not loops.bytes_moved and not loops.flops):
            return
        limit: Bound = bound(loops.bytes_moved, loops.flops, loops.dtype, loops.matmul, self.device)
        self.kernels.append(
            Kernel(
                entity=entity,
                name=name or loops.name,
                loops=loops.name,
                phase=part.phase,
                graph=number,
                kind=loops.kind,
                operators=len(loops.origins),
                bytes_moved=loops.bytes_moved,
                bytes_unfused=max(unfused, loops.bytes_moved),
                flops=loops.flops,
                dtype=loops.dtype,
                peak=self.device.peak(loops.dtype, loops.matmul),
                intensity=limit.intensity,
                bound=limit.by,
                floor_seconds=limit.floor_seconds,
                sources=self._sources(part.aten, loops.origins),
            )
        )

    def _sources(self, graph: Graph, origins: list[str]) -> list[dict[str, Any]]:
        """The innermost Python lines behind some ATen nodes, those of most nodes first."""
        count: dict[tuple[str, int], int] = {}
        for name in origins:
            for file, line, _ in graph.nodes[name].frames[-1:]:
                count[file, line] = count.get((file, line), 0) + 1
        ordered = sorted(count, key=lambda place: -count[place])
        return [
            {"file": file, "line": line, "code": code_of(file, line), "entity": self.python[file, line]}
            for file, line in ordered
        ]


def _short_paths(kernel: dict[str, Any]) -> dict[str, Any]:
    for source in kernel["sources"]:
        source["file"] = Path(source["file"]).name
    return kernel


def _site(loops: Loops, sites: list[CallSite]) -> int | None:
    """The first call that mentions a buffer these loops write: whoever makes a buffer names it before its readers."""
    wanted = set(loops.outputs)
    return next((at for at, site in enumerate(sites) if wanted & site.buffers), None)
