"""Fuel: what renderings may do and make. Templates come from strangers, and Jinja's sandbox bounds neither.

Every step costs: each round of a loop and each call pays for all nodes of its body (`costly` writes that into the
syntax tree), each operator, filter and method pays for what it reads and makes (`bounds.py`). Counted, not timed: a
template that renders does so everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

STEPS = 10_000_000
"""What is in one tank: about as many nodes of the syntax tree, a second or two."""
STEPS_PER_CHARACTER = 16
ROOM = 64 * 2**20
"""What may be made of it: characters of texts, and eight for each item of a list. Both grow with what it is given."""
ROOM_PER_CHARACTER = 64

_ROUND = 8
_SCANNED = 5  # a power of two: characters that are read in one step


class OutOfFuel(SecurityError):
    """The template does or makes too much. Nothing that is changed about the chat would help."""


class Fuel:
    """One tank: what is left to one rendering, or to several."""

    __slots__ = ("room", "steps")

    def __init__(self, given: int) -> None:
        self.steps = STEPS + STEPS_PER_CHARACTER * given
        self.room = ROOM + ROOM_PER_CHARACTER * given


_fuel: ContextVar[Fuel | None] = ContextVar("fuel", default=None)


@contextmanager
def fuelled(given: int = 0) -> Iterator[None]:
    """Within, templates of this thread share one tank: the one that is open already, or a new one.

    `given`: the characters that they are given. A new tank grows with it.
    """
    token = _fuel.set(_fuel.get() or Fuel(given))
    try:
        yield
    finally:
        _fuel.reset(token)


def step(cost: int) -> None:
    """Pays `cost` steps. Raises OutOfFuel when there are no more."""
    fuel = _fuel.get()
    if fuel is None or cost < 0:
        raise SecurityError("runs without fuel")
    fuel.steps -= cost
    if fuel.steps < 0:
        raise OutOfFuel(f"it does more than {STEPS} steps")


def scan(characters: int) -> None:
    """Pays for reading through a text."""
    step(characters >> _SCANNED)


def make(characters: int) -> None:
    """Pays for something of this size. Raises OutOfFuel when there is no more room."""
    fuel = _fuel.get()
    if fuel is None or characters < 0:
        raise SecurityError("runs without fuel")
    fuel.room -= characters
    if fuel.room < 0:
        raise OutOfFuel(f"it makes texts and lists of more than {ROOM} characters")


def costly(tree: nodes.Template) -> nodes.Template:
    """`tree` with each body that can run more than once paying for itself, and each operator that Jinja does not let
    the sandbox see written as a filter. (Their names hold a blank, so that templates cannot write them.)"""
    whole = _Costly().visit(tree)
    assert isinstance(whole, nodes.Template)
    if tree.environment is not None:
        whole.set_environment(tree.environment)
    return whole


class _Costly(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:
            test = cast("nodes.Expr", node.test)
            node.test = _filtered(test, "a test", nodes.Const(_size([test])))
        return _paying(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        return _paying(node)

    visit_CallBlock = visit_Macro
    visit_Block = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "all joined")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "a slice") if isinstance(node.arg, nodes.Slice) else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not _is_constant(node.key):
            node.key = _filtered(node.key, "a key")
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if len(node.ops) == 1 and node.ops[0].op in ("in", "notin"):
            return _membership(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if len(sides) == 2 and any(_is_constant(side) for side in sides):
            return node
        node.expr = _filtered(node.expr, "a side")
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, "a side")
        return node


def _membership(node: nodes.Compare) -> nodes.Node:
    """`x in y`, where y is not written out, as a filter of both."""
    operand = node.ops[0]
    if _is_constant(operand.expr):
        node.expr = node.expr if _is_constant(node.expr) else _filtered(node.expr, "a side")
        return node
    found = _filtered(node.expr, "is in", operand.expr)
    return found if operand.op == "in" else nodes.Not(found, lineno=node.lineno)


def _is_constant(node: nodes.Node) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, nodes.Const)


def _paying(node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
    cost = nodes.Const(_ROUND + _size(node.body), lineno=node.lineno)
    node.body.insert(0, nodes.ExprStmt(_filtered(cost, "a round"), lineno=node.lineno))
    return node


def _size(body: Sequence[nodes.Node]) -> int:
    return len(body) + sum(1 for node in body for _ in node.find_all(nodes.Node))


def _filtered(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)
