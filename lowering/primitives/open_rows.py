"""``hire_open_rows``: which entries are not below zero, the rows that a further stage of a proof reads."""

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.primitives.kernels import bind_step, step_primitive

__all__ = ["open_rows", "open_rows_p"]


def open_rows(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the values stand that are not below zero, NaNs among them.

    Args:
      values: f32 ``[n]``.

    Returns:
      int32 ``[n]``, these places in ascending order and then zeros, and how many they are, an int32 scalar.
    """

    def portable(values: jax.Array) -> list[jax.Array]:
        is_open = ~(values < 0.0)
        (index,) = jnp.nonzero(is_open, size=values.shape[0], fill_value=0)
        return [index.astype(jnp.int32), jnp.sum(is_open, dtype=jnp.int32)]

    index, count = bind_step(open_rows_p, portable, lax.stop_gradient(values))
    return index, count


# A kernel: rule(values) -> what open_rows returns.
open_rows_p = step_primitive("hire_open_rows")
