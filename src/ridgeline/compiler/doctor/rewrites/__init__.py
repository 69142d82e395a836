"""Source rewrites that make a graph break disappear, each only where it can be shown to keep the meaning.

::

    rewrite(text, line)  -->  Rewrite(name, new text, note)     or     Refused("why not, in one line")

Edits are made to the text by byte spans, so that comments and formatting of all other lines survive.
"""

from __future__ import annotations

import ast

from ridgeline.compiler.doctor.rewrites.branch import rewrite_branch, rewrite_ternary
from ridgeline.compiler.doctor.rewrites.item import rewrite_item, scalar_reads
from ridgeline.compiler.doctor.rewrites.loops import rewrite_loop
from ridgeline.compiler.doctor.rewrites.outline import is_printing, rewrite_printing, rewrite_returned_item
from ridgeline.compiler.doctor.rewrites.text import Refused, Rewrite, Source, unified_diff

__all__ = ["Refused", "Rewrite", "Source", "rewrite", "unified_diff"]


def rewrite(text: str, line: int) -> Rewrite:
    """The source with the trouble on ``line`` (from 1) gone.

    Raises:
        Refused: no rewrite of that line can be shown to keep the meaning.
    """
    source = Source(text)
    statement = source.statement_at(line)
    if statement is None:
        raise Refused(f"no statement on line {line}")
    if isinstance(statement, ast.If):
        return _branch(source, statement)
    if isinstance(statement, (ast.While, ast.For)):
        return rewrite_loop(source, statement)
    if is_printing(statement):
        return rewrite_printing(source, statement)
    ternary = next((one for one in ast.walk(statement) if isinstance(one, ast.IfExp)), None)
    if ternary is not None:
        return rewrite_ternary(source, ternary)
    if scalar_reads(statement):
        return _number(source, statement)
    raise Refused(f"no rewrite is known for '{ast.unparse(statement).splitlines()[0][:60]}'")


def _branch(source: Source, statement: ast.If) -> Rewrite:
    """An ``if``, or the loop that it leaves."""
    above = source.parent(statement)
    leaves = len(statement.body) == 1 and isinstance(statement.body[0], ast.Break)
    if leaves and isinstance(above, (ast.For, ast.While)):
        return rewrite_loop(source, above)
    return rewrite_branch(source, statement)


def _number(source: Source, statement: ast.stmt) -> Rewrite:
    """A number kept as a tensor; one that is returned is taken outside, where the function is the compiled one."""
    try:
        return rewrite_item(source, statement)
    except Refused as kept:
        if not isinstance(statement, ast.Return):
            raise
        try:
            return rewrite_returned_item(source, statement)
        except Refused as outside:
            raise Refused(f"{kept}; {outside}") from None
