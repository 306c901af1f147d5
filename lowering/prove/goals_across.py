"""What is proved of a vocabulary projection whose rows several devices have parts of; as ``lowering/prove/goals.py``.

No score travels. With A the k-th largest of what the candidates' dense logits are at least (k is 1 for an arg max), k
of them are at least A. If no more than k rows *can* be at least A, those are the k largest. Each device sends its own k
largest lower bounds, and then how many of its rows can be at least A: 4 k and 4 bytes for each token. A nucleus takes
its largest lower bound and two sums. Derived here. All devices get the same answer, so that they branch alike.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.prove.goals import Goal, Nucleus, fewest_candidates, sum_rounding
from hire_xform.lowering.xla.nan_max import largest_or_nan

__all__ = ["proved_across"]

# In one count: rows that can be more than A, at most two a device, and whether any is A for sure.
_MORE = 1 << 16


def proved_across(
    goal: Goal,
    exact: jax.Array,
    error: jax.Array,
    others: jax.Array,
    out_dtype: jnp.dtype,
    names: Sequence[str],
    shards: int,
) -> jax.Array:
    """For each token whether what is asked for is proved of the rows of all devices, bool ``[T]``.

    For the body of a ``shard_map``; a NaN anywhere proves nothing.

    Args:
      goal: what is asked for.
      exact: f32 ``[T, K]``, the products of a device's candidates.
      error: f32 ``[T, K]``, how far the dense ones can be from them.
      others: f32 ``[T, n]``, above every dense product of its other rows; minus infinity for the candidates.
      out_dtype: what the dense product is rounded to.
      names: mesh axes that the rows are split over.
      shards: devices along them.
    """
    low, high = ((exact + part).astype(out_dtype).astype(jnp.float32) for part in (-error, error))
    finite = jnp.all(jnp.isfinite(low) & jnp.isfinite(high), axis=1)
    low = jnp.where(finite[:, None], low, -jnp.inf)
    others = others.astype(out_dtype).astype(jnp.float32)
    if isinstance(goal, Nucleus):
        return _nucleus(goal.eps, low, others, finite, tuple(names), shards)
    k, (candidates, rows) = fewest_candidates(goal), (exact.shape[1], others.shape[1])
    if k > shards * candidates:
        return jnp.full(exact.shape[:1], candidates == rows)
    floor = _kth_largest(low, k, tuple(names))
    # What is not a candidate is not known to be A; nor is a NaN known to be below it.
    unknown = jnp.logical_not(largest_or_nan(others, 1) < floor) | jnp.logical_not(finite)
    can = high >= floor[:, None]
    if k > 1:
        count = jnp.where(unknown, k + 1, jnp.sum(can, axis=1))
        return lax.psum(count, tuple(names)) == k
    # Rows that are all A for sure tie in the dense product too, where the lowest id of them is the arg max, as it is of
    # the exact logits.
    sure = low == high
    more = jnp.where(unknown, 2, jnp.minimum(jnp.sum(can & ~sure, axis=1), 2))
    total = lax.psum(more * _MORE + jnp.any(can & sure, axis=1), tuple(names))
    return (total < _MORE) | (total == _MORE)


def _kth_largest(low: jax.Array, k: int, names: tuple[str, ...]) -> jax.Array:
    """The k-th largest of all devices' ``[T, K]``, ``[T]``."""
    if k == 1:
        return lax.pmax(jnp.max(low, axis=1), names)
    own = lax.top_k(low, min(k, low.shape[1]))[0]
    return lax.top_k(lax.all_gather(own, names, axis=1, tiled=True), k)[0][:, -1]


def _nucleus(
    eps: float, low: jax.Array, others: jax.Array, finite: jax.Array, names: tuple[str, ...], shards: int
) -> jax.Array:
    peak = lax.pmax(jnp.max(low, axis=1), names)[:, None]
    inside = jnp.sum(jnp.exp(low - peak), axis=1)
    outside = jnp.where(finite, jnp.sum(jnp.exp(others - peak), axis=1), jnp.inf)
    inside, outside = lax.psum(jnp.stack([inside, outside]), names)
    return outside * (1.0 + sum_rounding(shards * others.shape[1])) * (1.0 - eps) <= eps * inside
