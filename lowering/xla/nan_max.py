"""The largest of some values, or NaN where there is one."""

import jax
import jax.numpy as jnp

__all__ = ["largest_or_nan"]


def largest_or_nan(values: jax.Array, axis: int | None = None, keepdims: bool = False) -> jax.Array:
    """``jnp.max``, a NaN always kept.

    On its CPU backend XLA splits a reduction of a few thousand values or more, and then a maximum passes over NaNs
    (seen on JAX 0.10 to 0.12). What a proof leans on must not.
    """
    largest = jnp.max(values, axis=axis, keepdims=keepdims)
    return jnp.where(jnp.any(jnp.isnan(values), axis=axis, keepdims=keepdims), jnp.nan, largest)
