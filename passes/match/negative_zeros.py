"""Zeros of negative sign that are replaced before the largest entry is looked for, as Keras does on CPU."""

from __future__ import annotations

import jax.numpy as jnp
from jax.extend.core import primitives as prims

from hire_xform.passes.ir.graph import Node, Value
from hire_xform.passes.ir.pointwise import stretched_number


def source_of_replaced_zeros(node: Node | None) -> Value | None:
    """What an equation takes its entries from, where it replaces but zeros, by no more than the smallest number.

    That is ``where((x == 0) & anything, number, x)`` with a number between minus and plus the smallest normal one.
    Entries that differ by more than that keep their order.
    """
    if node is None or node.primitive is not prims.select_n_p or len(node.inputs) != 3:
        return None
    chosen, kept, number = node.inputs
    if not isinstance(kept, Value) or not isinstance(chosen, Value) or chosen.node is None:
        return None
    known = stretched_number(number)
    if known is None or not jnp.issubdtype(kept.aval.dtype, jnp.floating):
        return None
    if abs(known) > float(jnp.finfo(kept.aval.dtype).tiny) or chosen.node.primitive is not prims.and_p:
        return None
    return kept if any(_is_zero_of(kept, operand) for operand in chosen.node.inputs) else None


def _is_zero_of(value: Value, truth: object) -> bool:
    node = truth.node if isinstance(truth, Value) else None
    if node is None or node.primitive is not prims.eq_p:
        return False
    first, second = node.inputs
    return (first is value and stretched_number(second) == 0.0) or (second is value and stretched_number(first) == 0.0)
