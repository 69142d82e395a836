"""What is kept of a compilation, level by level: plain data, no torch object."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Node:
    """A node of a graph: its name, the user's frames (outermost first), the nodes of the level above it comes from."""

    name: str
    frames: list[tuple[str, int, str]]
    parents: list[str] = field(default_factory=list)  # of the level above
    forward: list[str] = field(default_factory=list)  # of a backward node: the forward nodes it differentiates
    target: str = ""


@dataclass
class Graph:
    """A printed FX graph: lines with the name of the node each belongs to (None: no node's), and the nodes."""

    lines: list[tuple[str, str | None]]
    nodes: dict[str, Node]
    sequence: dict[int, list[str]] = field(default_factory=dict)  # autograd's numbers: forward and backward share them


@dataclass
class Loops:
    """A scheduler node: one loop nest or a call of a library, before or after fusion.

    ``bytes_moved``: what it reads and writes if every buffer is touched once and fused-away buffers never; ``flops``
    is None when the operator's formula is not known.
    """

    name: str
    kind: str  # "pointwise", "reduction", "library call", "template", "no kernel"
    lines: list[str]
    origins: list[str]  # ATen nodes
    outputs: list[str]  # buffers
    members: list[str]  # names before fusion
    bytes_moved: int
    flops: int | None
    dtype: str  # of the arithmetic: of the operands of a matrix product, fp32 otherwise
    matmul: bool = False


@dataclass
class Part:
    """One ATen graph through Inductor: ``phase`` is "forward", "backward" or "inference"."""

    phase: str
    aten: Graph
    before: list[Loops] = field(default_factory=list)
    after: list[Loops] = field(default_factory=list)
    code: str = ""


@dataclass
class Frame:
    """One Dynamo graph (there is one more after every graph break) and what became of it."""

    torch: Graph
    parts: list[Part] = field(default_factory=list)
