"""Values of scalars that a program computes from numbers alone, as a normal quantile from a stated sparsity is."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.graph import Node, Operand, Value
from hire_xform.passes.ir.trace_context import concretely

# Equations followed back, and entries of a constant: a normal quantile has some 60 and tables of 9.
_MAX_EQUATIONS, _MAX_ENTRIES = 256, 64


def known_scalar(operand: Operand) -> float | None:
    """The value of a scalar that hangs on literals and small constants only; None for any other."""
    if not isinstance(operand, Value):
        value = np.asarray(operand.val)
    elif operand.shape:
        return None
    else:
        order = _computed_from(operand)
        if order is None:
            return None
        with concretely():
            value = np.asarray(_evaluate(operand, order))
    # Not of NumPy's own numbers alone: bfloat16 is none of them.
    real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    return float(value) if real else None


def _computed_from(value: Value) -> list[Node] | None:
    """The equations that make a value, in program order; None when more than numbers goes in."""
    nodes: set[Node] = set()
    queue = [value]
    while queue:
        at = queue.pop()
        if at.const is not None:
            if np.size(at.const) > _MAX_ENTRIES or compat.is_tracer(at.const):
                return None
            continue
        if at.node is None or at.node.eqn.effects or len(nodes) >= _MAX_EQUATIONS:
            return None
        if at.node in nodes:
            continue
        nodes.add(at.node)
        queue += [o for o in at.node.inputs if isinstance(o, Value)]
    return sorted(nodes, key=lambda n: n.order) if len({n.scope for n in nodes}) <= 1 else None


def _evaluate(value: Value, order: list[Node]) -> Any:
    env: dict[Value, Any] = {}

    def read(operand: Operand) -> Any:
        if not isinstance(operand, Value):
            return operand.val
        return operand.const if operand.const is not None else env[operand]

    for node in order:
        env.update(zip(node.outputs, compat.bind(node.eqn, [read(o) for o in node.inputs]), strict=True))
    return read(value)
