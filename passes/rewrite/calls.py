"""Emits calls again with what is rewritten inside: jitted functions, remat, custom derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.graph import Frame
from hire_xform.passes.rewrite.environment import PackedView


def constrained(frame: Frame, body: Callable) -> Callable:
    """The body with the shardings its jit stated, as constraints."""
    given, returned = compat.jit_shardings(frame.eqn)
    if not any(s is not None for s in (*given, *returned)):
        return body

    def with_constraints(operands: list[Any], seen: list[PackedView]) -> tuple[list[Any], list[Any]]:
        operands = [_constrain(o, s) for o, s in zip(operands, given, strict=True)]
        results, told = body(operands, seen)
        return [_constrain(r, s) for r, s in zip(results, returned, strict=True)], told

    with_constraints.__name__ = with_constraints.__qualname__ = body.__name__
    return with_constraints


def _constrain(value: Any, sharding: Any) -> Any:
    if value is None or sharding is None:
        return value
    return jax.lax.with_sharding_constraint(value, sharding)


def with_own_derivative(
    frame: Frame, body: Callable, operands: list[Any], passed: list[Any], seen: list[PackedView]
) -> list[Any]:
    """A custom-derivative call whose value is the rewritten body's and whose derivative is still its own rule.

    The rule may read the weights, which are then made from their packed rows: only if something differentiates.
    """
    if any(o is None for o in operands):
        return body(passed, seen)
    wrapped = jax.custom_jvp(lambda *flat: body(list(flat), seen))

    @wrapped.defjvp
    def _jvp(primals: Any, tangents: Any) -> Any:
        out, out_dot = jax.jvp(lambda *flat: compat.bind(frame.eqn, list(flat)), primals, tangents)
        return out, out_dot

    return wrapped(*operands)
