"""A model's own sparsity on some of its hidden units: the largest k, the k-th largest, and moments of all units.

A model that keeps its k largest units, or those above a threshold, decides from all of them. Here the chosen units
decide: where they hold the model's k largest, so do they among themselves, and the same units are kept. Mean and
variance of all units of a linear product are exact without computing one, from a precomputed row and a matrix: with
``c`` the mean of the rows ``w`` of W, ``mean(W x) = c . x`` and ``var(W x) = x' G x``, ``G = (W - c)' (W - c) / m``
(derived; used for the thresholds of Gemma 3n and of Spark, arXiv 2506.06644).
"""

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["Moments", "among_largest", "kth_largest", "moments", "moments_bytes", "over_groups", "pack_moments"]

# {"mean": f32 [d], "gram": f32 [d, d]}, stack axes in front.
Moments = dict[str, jax.Array]


def kth_largest(values: jax.Array, rank: int) -> jax.Array:
    """The ``rank``-th largest of each token's values.

    Args:
      values: ``[T, K]``.
      rank: 1 for the largest; more than ``K`` means the smallest.

    Returns:
      ``[T, 1]``.
    """
    return lax.top_k(values, min(rank, values.shape[1]))[0][:, -1:]


def among_largest(values: jax.Array, k: int) -> jax.Array:
    """Which values are among their token's ``k`` largest; of equal ones the first, as ``lax.top_k`` has it.

    Args:
      values: ``[T, K]``.
      k: how many; more than ``K`` means all.

    Returns:
      bool ``[T, K]``.
    """
    tokens, size = values.shape
    if k >= size:
        return jnp.ones(values.shape, bool)
    index = lax.top_k(values, k)[1]
    return (
        jnp.zeros(values.shape, bool)
        .at[jnp.arange(tokens)[:, None], index]
        .set(True, unique_indices=True, mode="promise_in_bounds")
    )


def over_groups(values: jax.Array, size: int, largest: bool) -> jax.Array:
    """The sum, or the largest, of each group of ``size`` neighbouring values, at the place of every value of it.

    Args:
      values: ``[T, K]``, ``K`` a multiple of ``size``.
      size: values in a group.
      largest: the largest of a group instead of its sum.

    Returns:
      ``[T, K]``.
    """
    tokens, count = values.shape
    groups = values.reshape(tokens, count // size, size)
    made = groups.max(axis=-1) if largest else groups.sum(axis=-1)
    return jnp.repeat(made, size, axis=-1)


def pack_moments(rows: jax.Array) -> Moments:
    """Mean row and centred second moment of ``rows [m, d]``, in f32 (f64 for f64 rows)."""
    wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    mean = wide.mean(axis=0)
    centred = wide - mean
    gram = lax.dot_general(centred, centred, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    return {"mean": mean, "gram": gram / rows.shape[0]}


def moments_bytes(d: int) -> int:
    """Bytes of the moments of rows of ``d`` columns, all read once per token step."""
    return 4 * (d * d + d)


def moments(x: jax.Array, packed: Moments) -> tuple[jax.Array, jax.Array]:
    """Mean and variance over the rows ``w`` of ``w . x``.

    Args:
      x: ``[T, d]``.
      packed: from :func:`pack_moments`.

    Returns:
      Two arrays ``[T, 1]`` in the moments' dtype; the variance is at least 0.
    """
    mean, gram = packed["mean"], packed["gram"]
    x = x.astype(gram.dtype)
    # The matrix on the left and tokens behind it: the fast form for few tokens.
    mixed = lax.dot_general(gram, x, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST).T
    return (x * mean).sum(axis=1, keepdims=True), jnp.maximum((x * mixed).sum(axis=1, keepdims=True), 0.0)
