"""States what a ``Graph`` is: checked after each pass where ``HIRE_DEBUG`` is on.

A pass that breaks one of these rules makes wrong programs, or silent refusals, far from where it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.graph import Frame, Graph, Node, Operand, Scope, Value


class InvariantError(AssertionError):
    """What a pass made is not what it is stated to be: a bug of the pass, never of a user's program."""


def require(holds: bool, path: str, invariant: str) -> None:
    """Raises an ``InvariantError`` that names a place and what should hold there, where that does not hold."""
    if not holds:
        raise InvariantError(f"{path or 'the program'}: {invariant}")


def verify_graph(graph: Graph) -> None:
    """Checks all that is stated of a graph.

    Raises:
      InvariantError: something of it does not hold; the message has the path and the rule.
    """
    require(bool(graph.scopes) and graph.scopes[0] is graph.top, "", "the first scope is the top one")
    opened = [child for scope in graph.scopes for node in scope.nodes for child in node.children]
    require(Counter([graph.top, *opened]) == Counter(graph.scopes), "", "every scope is opened by one equation")
    nodes = [node for scope in graph.scopes for node in scope.nodes]
    _once((node.path for node in nodes), "no other equation has its path")
    require(Counter(graph.program_order()) == Counter(nodes), "", "the program's order has every equation once")
    seen: set[Node] = set()
    for node in graph.program_order():
        inner = (other for child in node.children for other in child.nodes)
        require(all(other in seen for other in inner), node.path, "a body's equations come before what opened it")
        seen.add(node)
    for scope in graph.scopes:
        _verify_scope(scope)


def _once(paths: Iterable[str], invariant: str) -> None:
    twice = [path for path, count in Counter(paths).items() if count > 1]
    require(not twice, twice[0] if twice else "", invariant)


def _verify_scope(scope: Scope) -> None:
    path = scope.root.path
    require((scope.kind == "top") == (scope.node is None), path, "all scopes but the top one are opened by an equation")
    if scope.node is not None:
        times = scope.node.params["length"] if scope.node.primitive is prims.scan_p else 1
        require(
            scope.iterations == scope.node.scope.iterations * times,
            path,
            "it runs as often as the scope around it, times the length of a scan",
        )
    root = scope.root
    require(root.parent is None and root.eqn is None, path, "the outermost frame of a scope is no call")
    require(list(root.inputs) == list(scope.inputs), path, "the outermost frame's inputs are the scope's")
    _verify_frame(root, scope)
    require(_nodes_in(root) == scope.nodes, path, "a scope's equations are those of its frames, in order")
    defined: set[Value] = set(scope.inputs)
    for value in scope.inputs:
        require(value.node is None and value.scope is scope, path, "an input of a scope is made by no equation")
    for order, node in enumerate(scope.nodes):
        require(node.order == order, node.path, "orders count a scope's equations from 0")
        _verify_node(node, scope, defined)
    outputs = {o for o in scope.outputs if isinstance(o, Value)}
    for value in outputs:
        require(value.const is not None or value in defined, path, "what a scope returns is made in it")
    for value in defined | outputs:
        at = path if value.node is None else value.node.path
        require(value.is_output == (value in outputs), at, "a value is marked as output when its scope returns it")
        _verify_consumers(value, at)


def _verify_consumers(value: Value, path: str) -> None:
    for node in set(value.consumers):
        times = sum(o is value for o in node.inputs)
        require(
            value.consumers.count(node) == times,
            path,
            f"{node.path} is among a value's consumers as often as it reads it",
        )
        require(node.scope is value.scope, path, "a value is read in its own scope only")


def _verify_node(node: Node, scope: Scope, defined: set[Value]) -> None:
    path = node.path
    require(node.scope is scope, path, "an equation's frame is of the scope that it stands in")
    require(node.primitive is node.eqn.primitive, path, "its primitive is its equation's")
    require(len(node.inputs) == len(node.eqn.invars), path, "it has an operand for each of its equation's")
    require(len(node.outputs) == len(node.eqn.outvars), path, "it has a result for each of its equation's")
    for operand, var in zip(node.inputs, node.eqn.invars, strict=True):
        _verify_type(operand, var, path)
        if isinstance(operand, Value):
            require(operand.scope is scope, path, "what it reads is of its own scope")
            require(operand.const is not None or operand in defined, path, "what it reads is made before it")
            require(node in operand.consumers, path, "it is among the consumers of what it reads")
    for value, var in zip(node.outputs, node.eqn.outvars, strict=True):
        _verify_type(value, var, path)
        require(value.node is node and value.scope is scope, path, "what it makes is said to be made by it")
        require(value not in defined and value.const is None, path, "a value is made once")
        defined.add(value)
    for number, child in enumerate(node.children):
        require(child.node is node, path, "what it opens is said to be opened by it")
        _verify_child(node, child, number)


def _verify_type(operand: Operand, var: object, path: str) -> None:
    found, stated = operand.aval, getattr(var, "aval", None)
    for name in ("shape", "dtype"):
        same = getattr(found, name, None) == getattr(stated, name, None)
        require(same, path, f"the {name} of a value is that of its variable")


def _operands_of(node: Node, child: Scope) -> Sequence[Operand]:
    """The operands of an equation that enter a body it opens, in order."""
    if node.primitive is prims.while_p:
        return node.inputs[compat.while_parts(node.eqn).cond_nconsts :]
    return node.inputs[1:] if node.primitive is prims.cond_p else node.inputs


def _verify_child(node: Node, child: Scope, number: int) -> None:
    path = child.root.path
    kinds = {prims.scan_p: "scan", prims.while_p: "while", prims.cond_p: "cond", compat.SHARD_MAP: "shard_map"}
    require(child.kind == kinds.get(node.primitive), path, "a scope's kind is that of the equation that opened it")
    branches = len(node.params["branches"]) if node.primitive is prims.cond_p else 1
    require(len(node.children) == branches, node.path, "a branch has a scope for each case, any other equation one")
    operands = _operands_of(node, child)
    require(len(child.inputs) == len(operands), path, "a body has an input for each operand that enters it")
    require(len(child.outputs) == len(node.outputs), path, "a body returns what the equation around it makes")
    for value, operand in zip(child.inputs, operands, strict=True):
        require(value.outer is None or value.outer is operand, path, "an input's outer value is the operand there")
        require(not value.scanned or child.kind == "scan", path, "only a scan cuts its operands by iteration")
        require(not value.split or child.kind == "shard_map", path, "only a shard_map cuts its operands over devices")
        if not value.scanned and not value.split:
            _verify_type(value, operand, path)
        elif value.scanned:
            shape = getattr(operand.aval, "shape", ())
            require(tuple(shape[1:]) == value.shape, path, "what a scan cuts is one slice along its leading axis")
    if child.kind == "scan":
        scan = compat.scan_parts(node.eqn)
        carry = child.inputs[scan.num_consts : scan.num_consts + scan.num_carry]
    elif child.kind == "while":
        carry = child.inputs[compat.while_parts(node.eqn).body_nconsts :]
    else:
        return
    for value, returned in zip(carry, child.outputs, strict=False):
        kept = value.outer is None or returned is value
        require(kept, path, "state has an outer value only where no iteration changes it")


def _verify_frame(frame: Frame, scope: Scope) -> None:
    require(frame.scope is scope, frame.path, "a frame is of the scope around it")
    require(len(frame.inputs) == len(frame.jaxpr.invars), frame.path, "a frame has an operand for each that it takes")
    require(len(frame.outputs) == len(frame.jaxpr.outvars), frame.path, "a frame returns what its body does")
    require(len(frame.items) == len(frame.jaxpr.eqns), frame.path, "a frame has an item for each equation of its body")
    for item, eqn in zip(frame.items, frame.jaxpr.eqns, strict=True):
        require(item.eqn is eqn, item.path, "a frame's items are its equations, in order")
        require(item.path.startswith(frame.path), item.path, "a path begins with that of the frame around it")
        if isinstance(item, Frame):
            require(item.parent is frame, item.path, "a call's parent is the frame it stands in")
            require(
                item.kind == compat.CALL_PRIMITIVES.get(eqn.primitive), item.path, "a call's kind is its equation's"
            )
            require(item is not frame, item.path, "no frame stands in itself")
            _verify_frame(item, scope)
        else:
            require(item.frame is frame, item.path, "an equation's frame is the one it stands in")


def _nodes_in(frame: Frame) -> list[Node]:
    found: list[Node] = []
    for item in frame.items:
        found += [item] if isinstance(item, Node) else _nodes_in(item)
    return found
