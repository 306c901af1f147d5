"""Walks a jaxpr once and lays it out as a graph of values.

A ``Scope`` is straight-line code: the whole program, the body of a scan, while or shard_map, or a branch of a cond.
Call-like equations (jit, remat, custom derivatives) do not open a scope: their bodies are laid out in the scope around
them, so that a model cut into jitted pieces looks to the recognisers like one that is not. Where each equation really
stands is kept in its ``Frame``; the rewriter re-emits frames as the calls they were.

Every equation gets a stable path such as ``scan[0]/remat[0]/dot_general[3]``: the number counts equations of that name
in the same body; a jitted call carries its function's name, ``jit:layer[1]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.compat import Literal
from hire_xform.passes.ir.source_lines import UNKNOWN_SOURCE, source_line


@dataclass(eq=False, slots=True, repr=False)
class Value:
    """One runtime value. Operands of calls share the value of what is passed in, results that of what comes out.

    Attributes:
      aval: its abstract value (shape, dtype).
      scope: the scope in which it lives.
      node: the equation that makes it; None for inputs and constants.
      const: the closed-over array or non-scalar literal, when it is one.
      outer: for an input of an inner scope, the value of the scope around it that is passed in unchanged (or sliced,
        when ``scanned``); None when it changes from one iteration to the next.
      scanned: True when one slice of ``outer``'s leading axis arrives per iteration.
      split: in a shard_map, which dimensions of ``outer`` are cut over devices: (dimension, parts, mesh axes).
      consumers: equations that read it.
      is_output: True when the scope returns it.
    """

    aval: Any
    scope: Scope
    node: Node | None = None
    const: Any = None
    outer: Operand | None = None
    scanned: bool = False
    split: tuple[tuple[int, int, Any], ...] = ()
    consumers: list[Node] = field(default_factory=list)
    is_output: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.aval.shape)


Operand = Value | Literal


@dataclass(eq=False, slots=True, repr=False)
class Frame:
    """A body of equations: the root of a scope, or a call laid out inside one."""

    parent: Frame | None
    eqn: Any
    kind: str
    path: str
    scope: Scope
    jaxpr: Any
    items: list[Node | Frame] = field(default_factory=list)
    inputs: list[Operand] = field(default_factory=list)
    outputs: list[Operand] = field(default_factory=list)

    def ancestors(self) -> list[Frame]:
        """This frame and those around it, innermost first, up to the scope's root."""
        found: list[Frame] = []
        frame: Frame | None = self
        while frame is not None:
            found.append(frame)
            frame = frame.parent
        return found


@dataclass(eq=False, slots=True, repr=False)
class Node:
    """One equation that is not a call, with its operands and results as values.

    ``order`` is its place in its scope, ``primitive`` the equation's own, which every pass asks for.
    """

    eqn: Any
    primitive: Any
    frame: Frame
    path: str
    inputs: list[Operand]
    order: int
    outputs: list[Value] = field(default_factory=list)
    children: list[Scope] = field(default_factory=list)

    @property
    def scope(self) -> Scope:
        """The scope it stands in."""
        return self.frame.scope

    @property
    def source(self) -> str:
        """The user's ``file:line (function)``; that of the call it stands in where JAX kept none for it."""
        for eqn in (self.eqn, *(frame.eqn for frame in self.frame.ancestors() if frame.eqn is not None)):
            line = source_line(eqn)
            if line != UNKNOWN_SOURCE:
                return line
        return UNKNOWN_SOURCE

    @property
    def inner(self) -> Scope:
        """The body of a scan, while or shard_map."""
        return self.children[0]

    @property
    def params(self) -> dict[str, Any]:
        """Its parameters."""
        return self.eqn.params


@dataclass(eq=False, slots=True, repr=False)
class Scope:
    """Straight-line code and where it stands.

    Attributes:
      kind: "top", "scan", "while", "cond" or "shard_map".
      node: the loop or branch equation that opened it (None at the top).
      root: its outermost frame.
      nodes: all equations, calls laid out, in program order.
      inputs: the values of the body's operands, in order.
      iterations: how often the body runs per call of the program, loops around it counted; a while counts once, and
        so does a shard_map, of which each device runs its own.
    """

    kind: str
    node: Node | None
    iterations: int
    root: Frame = field(init=False)
    nodes: list[Node] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)

    @property
    def outputs(self) -> list[Operand]:
        """What the body returns."""
        return self.root.outputs

    def chain(self) -> list[Scope]:
        """This scope and those around it, innermost first."""
        found: list[Scope] = []
        scope: Scope | None = self
        while scope is not None:
            found.append(scope)
            scope = scope.node.scope if scope.node is not None else None
        return found


@dataclass(eq=False, slots=True, repr=False)
class Graph:
    """The whole program: its scopes in program order (the top first) and all closed-over arrays."""

    jaxpr: Any
    top: Scope
    scopes: list[Scope]
    _ordered: list[Node] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """Puts the equations in order once: every pass walks them."""
        _put_in_order(self.top, self._ordered)

    def program_order(self) -> Sequence[Node]:
        """All equations in the order they run, a loop's body before the loop itself."""
        return self._ordered


def _put_in_order(scope: Scope, found: list[Node]) -> None:
    for node in scope.nodes:
        for child in node.children:
            _put_in_order(child, found)
        found.append(node)


def levels(graph: Graph) -> int:
    """How deeply the program's loops, branches and calls are nested."""
    deepest = 0
    left = [(graph.top.root, 0)]
    while left:
        frame, level = left.pop()
        deepest = max(deepest, level)
        for item in frame.items:
            if isinstance(item, Frame):
                left.append((item, level + 1))
            else:
                for child in item.children:
                    left.append((child.root, level + 1))
    return deepest


def nodes_in(item: Node | Frame) -> list[Node]:
    """The equations of a call laid out, in order; of any other equation that itself."""
    return [item] if isinstance(item, Node) else [node for inner in item.items for node in nodes_in(inner)]


def used_nodes(graph: Graph) -> set[Node]:
    """The equations whose results lead to those of the program, or that have an effect; compilers leave out others."""
    used: set[Node] = set()
    left: list[tuple[Scope, Sequence[Operand]]] = [(graph.top, graph.top.outputs)]
    while left:
        scope, wanted = left.pop()
        read = {o for o in wanted if isinstance(o, Value)}
        for node in reversed(scope.nodes):
            if not node.eqn.effects and read.isdisjoint(node.outputs):
                continue
            used.add(node)
            # All of a loop's state is taken to be read.
            state = len(carried_inputs(node)) if node.primitive in (prims.scan_p, prims.while_p) else 0
            for child in node.children:
                results = enumerate(zip(child.outputs, node.outputs, strict=True))
                left.append((child, [inner for i, (inner, outer) in results if i < state or outer in read]))
            for operand in node.inputs:
                if isinstance(operand, Value):
                    read.add(operand)
    return used


def walk(jaxpr: Any) -> Graph:
    """Lays out a closed jaxpr as a graph."""
    scopes: list[Scope] = []
    inner, consts = compat.close(jaxpr)
    top = _open_scope("top", None, 1, inner, consts, "", scopes)
    return Graph(jaxpr, top, scopes)


def label(eqn: Any) -> str:
    """The name under which an equation is counted in paths; the same on every JAX version."""
    kind = compat.CALL_PRIMITIVES.get(eqn.primitive)
    if kind == "jit":
        return f"jit:{eqn.params.get('name', '')}"
    return kind if kind is not None else str(eqn.primitive)


def numbered(eqns: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """The equations of one body, each with its own part of its path: ``dot_general[3]``."""
    counts: dict[str, int] = {}
    for eqn in eqns:
        name = label(eqn)
        number = counts.get(name, 0)
        counts[name] = number + 1
        yield f"{name}[{number}]", eqn


def _open_scope(
    kind: str, node: Node | None, iterations: int, jaxpr: Any, consts: Sequence[Any], prefix: str, scopes: list[Scope]
) -> Scope:
    scope = Scope(kind, node, iterations)
    scopes.append(scope)
    if node is not None:
        node.children.append(scope)
    frame = Frame(None, None, kind, prefix, scope, jaxpr)
    scope.root = frame
    scope.inputs = [Value(v.aval, scope) for v in jaxpr.invars]
    frame.inputs = list(scope.inputs)
    _fill(frame, consts, scopes)
    for out in frame.outputs:
        if isinstance(out, Value):
            out.is_output = True
    return scope


def _fill(frame: Frame, consts: Sequence[Any], scopes: list[Scope]) -> None:
    scope, jaxpr = frame.scope, frame.jaxpr
    env: dict[Any, Operand] = dict(zip(jaxpr.invars, frame.inputs, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        env[var] = Value(var.aval, scope, const=const)
    literals: dict[int, Value] = {}

    def read(atom: Any) -> Operand:
        if not isinstance(atom, Literal):
            return env[atom]
        if getattr(atom.val, "ndim", 0) == 0:
            return atom
        if id(atom.val) not in literals:
            literals[id(atom.val)] = Value(atom.aval, scope, const=atom.val)
        return literals[id(atom.val)]

    for own_path, eqn in numbered(jaxpr.eqns):
        path = f"{frame.path}{own_path}"
        operands = [read(a) for a in eqn.invars]
        if eqn.primitive in compat.CALL_PRIMITIVES and not _means_its_derivative(eqn):
            inner, inner_consts = compat.close(compat.call_jaxpr(eqn))
            called = Frame(frame, eqn, compat.CALL_PRIMITIVES[eqn.primitive], f"{path}/", scope, inner)
            called.inputs = operands
            frame.items.append(called)
            _fill(called, inner_consts, scopes)
            env.update(zip(eqn.outvars, called.outputs, strict=True))
            continue
        node = Node(eqn, eqn.primitive, frame, path, operands, len(scope.nodes))
        frame.items.append(node)
        scope.nodes.append(node)
        node.outputs = [Value(v.aval, scope, node=node) for v in eqn.outvars]
        env.update(zip(eqn.outvars, node.outputs, strict=True))
        for operand in operands:
            if isinstance(operand, Value):
                operand.consumers.append(node)
        if node.primitive in _WITH_SCOPES:
            _enter(node, f"{path}/", scopes)
    frame.outputs = [read(a) for a in jaxpr.outvars]


def _means_its_derivative(eqn: Any) -> bool:
    """True for a custom derivative of what hands an operand through, such as a clipped gradient.

    Laid out, its result would be its operand, and the derivative that it is there for would be lost: it stays closed.
    """
    if compat.CALL_PRIMITIVES[eqn.primitive] != "custom":
        return False
    return any(i is not None for i in _handed_through(compat.close(compat.call_jaxpr(eqn))[0]))


def _handed_through(jaxpr: Any) -> list[int | None]:
    """For each result of a jaxpr the number of the operand that it is, if it is one."""
    number: dict[Any, int] = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive in compat.CALL_PRIMITIVES:
            inner = _handed_through(compat.close(compat.call_jaxpr(eqn))[0])
            for var, i in zip(eqn.outvars, inner, strict=True):
                if i is not None and not isinstance(eqn.invars[i], Literal) and eqn.invars[i] in number:
                    number[var] = number[eqn.invars[i]]
    return [None if isinstance(v, Literal) else number.get(v) for v in jaxpr.outvars]


_WITH_SCOPES = frozenset({prims.scan_p, prims.while_p, prims.cond_p, compat.SHARD_MAP})


def _enter(node: Node, prefix: str, scopes: list[Scope]) -> None:
    """Opens the scopes of a loop, branch or shard_map; all other equations with sub-jaxprs stay closed."""
    around = node.scope.iterations
    if node.primitive is prims.scan_p:
        scan = compat.scan_parts(node.eqn)
        body, consts = compat.close(scan.jaxpr)
        scope = _open_scope("scan", node, around * scan.length, body, consts, prefix, scopes)
        for i, value in enumerate(scope.inputs):
            carried = scan.num_consts <= i < scan.num_consts + scan.num_carry
            if not carried:
                value.outer, value.scanned = node.inputs[i], i >= scan.num_consts
            elif scope.outputs[i - scan.num_consts] is value:
                value.outer = node.inputs[i]
    elif node.primitive is prims.while_p:
        loop = compat.while_parts(node.eqn)
        body, consts = compat.close(loop.body_jaxpr)
        scope = _open_scope("while", node, around, body, consts, prefix, scopes)
        for i, value in enumerate(scope.inputs):
            constant = i < loop.body_nconsts
            if constant or scope.outputs[i - loop.body_nconsts] is value:
                value.outer = node.inputs[loop.cond_nconsts + i]
    elif node.primitive is prims.cond_p:
        for i, branch in enumerate(node.params["branches"]):
            body, consts = compat.close(branch)
            scope = _open_scope("cond", node, around, body, consts, f"{prefix}branch[{i}]/", scopes)
            for value, operand in zip(scope.inputs, node.inputs[1:], strict=True):
                value.outer = operand
    elif node.primitive is compat.SHARD_MAP:
        mapped = compat.shard_map_parts(node.eqn)
        body, consts = compat.close(mapped.jaxpr)
        scope = _open_scope("shard_map", node, around, body, consts, prefix, scopes)
        for i, (value, operand) in enumerate(zip(scope.inputs, node.inputs, strict=True)):
            value.outer, value.split = operand, mapped.split(i)


def carried_inputs(node: Node) -> list[Value]:
    """The values inside a scan or while that are its carry, in order."""
    if node.primitive is prims.scan_p:
        scan = compat.scan_parts(node.eqn)
        return node.inner.inputs[scan.num_consts : scan.num_consts + scan.num_carry]
    return node.inner.inputs[compat.while_parts(node.eqn).body_nconsts :]


def carry_of(value: Value) -> Operand | None:
    """What a loop's body returns for a value of its state."""
    scope = value.scope
    if scope.kind not in ("scan", "while") or scope.node is None:
        return None
    carry = carried_inputs(scope.node)
    return scope.outputs[carry.index(value)] if value in carry else None


def dtype_of(operand: Operand) -> Any:
    """The dtype of a value or literal."""
    aval: Any = operand.aval
    return aval.dtype
