"""Scores as integers of the same order, which kernels count, compare and rank."""

from __future__ import annotations

import jax
from jax import lax

__all__ = ["LOWEST", "turned"]

# Below the integers of all scores.
LOWEST = -(2**31)


def turned(raw: jax.Array) -> jax.Array:
    """Bits of f32, as int32, as integers of the same order; or back."""
    return raw ^ (lax.shift_right_arithmetic(raw, 31) & 0x7FFFFFFF)
