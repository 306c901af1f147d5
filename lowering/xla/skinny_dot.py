"""Skinny products: a matrix of many rows times a handful of activations, spelled the way the compilers are fast at.

Everything here is the one operation ``x @ rows.T`` with ``x`` of a few tokens. Its spelling matters on CPU: the matrix
has to stand on the left, and in 8-bit and 16-bit types a *single* activation row falls off the fast kernels (a factor
of 20 to 40), so one row is padded to two. Both choices cost nothing elsewhere.
"""

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["accumulation_dtype", "skinny_dot", "skinny_dot_transposed", "wide_dtype"]


def accumulation_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype a product of these operands is accumulated in: f32 at least, int32 for two int8 operands."""
    if all(jnp.issubdtype(dtype, jnp.integer) for dtype in dtypes):
        return jnp.dtype(jnp.int32)
    return jnp.promote_types(jnp.result_type(*dtypes), jnp.float32)


def wide_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype that chosen rows and what they meet are multiplied in: f32, or f64 where one of them is.

    Every product of two numbers of 16 bits or fewer is exact in f32, so nothing changes but the order of sums; and
    XLA's CPU backend has no 16-bit kernel for some of the products that differentiation makes. Only chosen rows are
    widened.
    """
    return jnp.dtype(jnp.float64 if any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes) else jnp.float32)


def _pad_to_two(x: jax.Array) -> jax.Array:
    """``[1, d] -> [2, d]`` for the types whose one-row product is slow on CPU; anything else unchanged."""
    if x.shape[0] == 1 and x.dtype.itemsize < 4:
        return lax.pad(x, jnp.zeros((), x.dtype), ((0, 1, 0), (0, 0, 0)))
    return x


def skinny_dot(x: jax.Array, rows: jax.Array) -> jax.Array:
    """``x @ rows.T`` for few ``x``.

    Args:
      x: ``[T, d]``.
      rows: ``[n, d]``, of the same dtype as ``x``.

    Returns:
      ``[T, n]`` in the accumulation dtype (f32, f64, or int32 for integers).
    """
    padded = _pad_to_two(x)
    # Integers are exact: a precision that is asked for around is not theirs.
    precision = lax.Precision.DEFAULT if jnp.issubdtype(rows.dtype, jnp.integer) else None
    out = lax.dot_general(
        rows,
        padded,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=accumulation_dtype(x.dtype, rows.dtype),
    )
    return out[:, : x.shape[0]].T


def skinny_dot_transposed(h: jax.Array, rows: jax.Array) -> jax.Array:
    """``h @ rows`` for few ``h``.

    Args:
      h: ``[T, n]``.
      rows: ``[n, d]``, of the same dtype as ``h``.

    Returns:
      ``[T, d]`` in the accumulation dtype.
    """
    padded = _pad_to_two(h)
    out = lax.dot_general(
        padded,
        rows,
        (((1,), (0,)), ((), ())),
        preferred_element_type=accumulation_dtype(h.dtype, rows.dtype),
    )
    return out[: h.shape[0]]
