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
        n, is_open = values.shape[0], ~(values < 0.0)
        # Spelled out: what `jnp.nonzero` is made of can't stand in a primitive on later JAX.
        before = lax.cumsum(is_open.astype(jnp.int32))
        places = jnp.where(is_open, before - 1, n)
        rows = lax.iota(jnp.int32, n)
        index = jnp.zeros(n, jnp.int32).at[places].set(rows, mode="drop")
        return [index, jnp.sum(is_open, dtype=jnp.int32)]

    index, count = bind_step(open_rows_p, portable, lax.stop_gradient(values))
    return index, count


# A kernel: rule(values) -> what open_rows returns.
open_rows_p = step_primitive("hire_open_rows")
