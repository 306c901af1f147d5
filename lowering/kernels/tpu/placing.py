"""Where operands of kernels are to lie."""

from __future__ import annotations

import jax
from jax.experimental.pallas import tpu as pltpu

__all__ = ["in_hbm"]


def in_hbm(rows: jax.Array) -> jax.Array:
    """The same rows, which XLA is not to bring into VMEM as it does of what seems to be read whole, and fits."""
    return pltpu.with_memory_space_constraint(rows, pltpu.HBM)
