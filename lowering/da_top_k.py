"""DA-TOP-k (arXiv 2402.09360): the largest k of an array, each of several equal shards picking its own share.

    values, indices = da_top_k(scores, 256, shards=4)     # the best 64 of each quarter of the last axis

With one shard this is ``jax.lax.top_k``, but for two things: a NaN counts as the largest value whatever its sign (what
cannot be ranked must be computed), and no dtype falls onto the slow full sort that XLA's CPU backend runs for all but
f32. With the last axis split over ``shards`` devices no score leaves its device.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ["da_top_k", "da_top_k_p"]


def da_top_k(scores: jax.Array, k: int, shards: int = 1) -> tuple[jax.Array, jax.Array]:
    """The best ``ceil(k / shards)`` of each of ``shards`` equal contiguous blocks of the last axis.

    Ties go to the lower index, NaN is larger than everything. Differentiable in ``scores``.

    Args:
      scores: ``[..., n]``, real.
      k: how many to take over all blocks, ``1 <= k <= n``.
      shards: how many blocks, a divisor of ``n``.

    Returns:
      ``(values, indices)``, both ``[..., shards * ceil(k / shards)]``: block after block, each block's from best to
      worst; ``values`` has the scores' dtype, ``indices`` is int32 and counts along the whole axis.

    Raises:
      ValueError: ``k`` or ``shards`` does not fit ``n``, or ``scores`` is a scalar.
      TypeError: ``scores`` is complex or boolean.
    """
    scores = jnp.asarray(scores)
    # Here too, since an eager call runs the implementation without the abstract rule.
    _check(scores.shape, scores.dtype, k, shards)
    values, indices = da_top_k_p.bind(scores, k=int(k), shards=int(shards))
    return values, indices


def _check(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, k: int, shards: int) -> None:
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"da_top_k: scores of dtype {dtype} have no order; expected floating or integer scores")
    if not shape:
        raise ValueError("da_top_k: scores is a scalar; expected an array of one axis or more")
    n = shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"da_top_k: k={k} does not fit the last axis; expected 1 <= k <= {n}")
    if shards < 1 or n % shards:
        raise ValueError(f"da_top_k: shards={shards} does not divide the last axis; expected a divisor of {n}")


def _abstract(scores: ShapedArray, *, k: int, shards: int) -> tuple[ShapedArray, ShapedArray]:
    _check(scores.shape, scores.dtype, k, shards)
    shape = (*scores.shape[:-1], shards * -(-k // shards))
    # `update` keeps the operand's sharding: along the last axis each device's share stays with it.
    return scores.update(shape=shape), scores.update(shape=shape, dtype=jnp.dtype(jnp.int32), weak_type=False)


def _portable(scores: jax.Array, *, k: int, shards: int) -> tuple[jax.Array, jax.Array]:
    """``lax.top_k`` of f32 keys over the blocks as one more batch axis."""
    n = scores.shape[-1]
    keys = scores
    if jnp.issubdtype(scores.dtype, jnp.floating):
        # lax.top_k orders as IEEE totalOrder does: a positive NaN is above +inf, a negative one below -inf.
        keys = lax.select(lax.ne(scores, scores), lax.full_like(scores, jnp.nan), scores)
    # f32 holds these exactly, so the cast keeps the order; wider types keep their own (slower) sort.
    if scores.dtype.itemsize <= 2:
        keys = keys.astype(jnp.float32)
    lead = scores.shape[:-1]
    values, indices = lax.top_k(keys.reshape(*lead, shards, n // shards), -(-k // shards))
    if shards > 1:
        indices = indices + (jnp.arange(shards, dtype=jnp.int32) * (n // shards))[:, None]
    size = shards * -(-k // shards)
    return values.astype(scores.dtype).reshape(*lead, size), indices.reshape(*lead, size)


def _batch(args: Sequence[jax.Array], dims: Sequence[Any], *, k: int, shards: int) -> tuple[Any, Any]:
    (scores,), (dim,) = args, dims
    out = da_top_k_p.bind(jnp.moveaxis(scores, dim, 0), k=k, shards=shards)
    return out, (0, 0)


def _jvp(primals: Sequence[jax.Array], tangents: Sequence[Any], *, k: int, shards: int) -> tuple[Any, Any]:
    """As for a gather of the chosen scores; the choice itself is constant almost everywhere."""
    values, indices = da_top_k_p.bind(*primals, k=k, shards=shards)
    zero_indices = ad.Zero(ShapedArray(indices.shape, jax.dtypes.float0))
    if isinstance(tangents[0], ad.Zero):
        return (values, indices), (ad.Zero(tangents[0].aval.update(shape=values.shape)), zero_indices)
    moved = jnp.take_along_axis(tangents[0], indices, axis=-1, mode="promise_in_bounds")
    return (values, indices), (moved, zero_indices)


da_top_k_p = Primitive("da_top_k")
da_top_k_p.multiple_results = True
da_top_k_p.def_impl(jax.jit(_portable, static_argnames=("k", "shards")))
da_top_k_p.def_abstract_eval(_abstract)
batching.primitive_batchers[da_top_k_p] = _batch
ad.primitive_jvps[da_top_k_p] = _jvp
mlir.register_lowering(da_top_k_p, mlir.lower_fun(_portable, multiple_results=True))
