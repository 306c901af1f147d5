"""What is known of the values of pointwise equations: literal numbers, and activations that leave exact zeros."""

from __future__ import annotations

import math

import numpy as np
from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.compat import Literal
from hire_xform.passes.ir.graph import Node, Operand, Value

# Flat almost everywhere, or of no derivative: one through them is zero.
STEPS = frozenset(
    {prims.sign_p, prims.round_p, prims.floor_p, prims.ceil_p, prims.stop_gradient_p, prims.bitcast_convert_type_p}
)

# Layout and placement hints that the replay of a region on fewer units must leave out: they name whole shapes.
HINTS = frozenset({prims.sharding_constraint_p, compat.RESHARD})


def literal_number(operand: Operand) -> float | None:
    """The value of a scalar literal; None for anything else."""
    if not isinstance(operand, Literal):
        return None
    try:
        return float(np.asarray(operand.val))
    except (TypeError, ValueError):
        return None


def stretched_number(operand: Operand) -> float | None:
    """The literal that an operand is everywhere, stretched or converted; conversions may have rounded it."""
    while isinstance(operand, Value) and operand.node is not None and operand.node.primitive in _KEEP_NUMBER:
        operand = operand.node.inputs[0]
    return literal_number(operand)


def known_number(operand: Operand) -> float | None:
    """The small integer that an operand is everywhere: a literal, stretched or converted, exact in each dtype."""
    number = stretched_number(operand)
    # Conversion to integers or half precision keeps a small integer only.
    return number if number is not None and number.is_integer() and abs(number) <= 128 else None


def stretched_scalar(operand: Operand) -> Operand | None:
    """The scalar that an operand is everywhere; None for what is not one scalar stretched."""
    while isinstance(operand, Value) and operand.shape:
        if operand.node is None or operand.node.primitive not in _KEEP_NUMBER:
            return None
        operand = operand.node.inputs[0]
    return operand


_KEEP_NUMBER = frozenset({prims.broadcast_in_dim_p, prims.convert_element_type_p, prims.copy_p, compat.PVARY})


def leaves_zeros(
    node: Node, operand_zero: list[bool], operand_value: list[float | None], operand_hidden: list[bool]
) -> bool:
    """True when the result is exactly zero for a whole range of inputs, as a ReLU's is.

    Args:
      node: a pointwise equation.
      operand_zero: for each operand, whether it has that property.
      operand_value: for each operand, its value when it is one known number everywhere.
      operand_hidden: for each operand, whether it depends on the hidden units.
    """
    p = node.primitive
    zero_at = [z or v == 0.0 for z, v in zip(operand_zero, operand_value, strict=True)]
    if p is prims.max_p:
        # max(u, 0); with max(zeros, negative) the zeros pass.
        return any(v == 0.0 for v in operand_value) or (
            any(operand_zero) and any(v is not None and v <= 0.0 for v in operand_value)
        )
    if p is prims.min_p:
        return any(operand_zero) and any(v is not None and v >= 0.0 for v in operand_value)
    if p is prims.clamp_p:
        return operand_value[0] == 0.0 or operand_zero[1]
    if p is prims.mul_p:
        return any(operand_zero)
    if p is prims.div_p:
        return operand_zero[0]
    if p is prims.integer_pow_p:
        return operand_zero[0] and node.params["y"] > 0
    if p is prims.pow_p:
        exponent = operand_value[1]
        return operand_zero[0] and exponent is not None and exponent > 0 and not math.isnan(exponent)
    if p is prims.select_n_p:
        # where(u > 0, u, 0): the choice must hang on the units. Zeros inside a branch may be those not chosen (ELU).
        literal_zero = operand_hidden[0] and any(v == 0.0 for v in operand_value[1:])
        return literal_zero or (all(zero_at[1:]) and any(operand_zero[1:]))
    if p in COMPARES:
        # u * (u > 0): false over a range.
        return any(operand_hidden)
    if p is prims.and_p:
        return any(operand_zero)
    if p in _ZERO_TO_ZERO:
        return operand_zero[0]
    if p in (prims.add_p, prims.sub_p):
        return all(zero_at) and any(operand_zero)
    return False


COMPARES = frozenset({prims.gt_p, prims.ge_p, prims.lt_p, prims.le_p})

_ZERO_TO_ZERO = {compat.PVARY, compat.RESHARD} | compat.primitives_named(
    "abs cbrt ceil convert_element_type copy erf expm1 floor log1p name neg real reduce_precision round "
    "sharding_constraint sign sin sinh sqrt square stop_gradient tan tanh asin asinh atan"
)
