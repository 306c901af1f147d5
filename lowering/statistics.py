"""What is measured of a site's tokens: their inputs, which units fire, and where the predictor ranks what is wanted.

Everything is a sum over tokens, so that totals of batches are totals of all. A *position* is a place in the order in
which the predictor's scores have rows (or groups of units) chosen: with the totals by position in hand, the recall of
``k`` candidates is the share of the first ``k`` positions, for every ``k`` at once.
"""

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["covariance", "ffn_statistics", "vocab_statistics"]


def covariance(x: jax.Array) -> jax.Array:
    """The sum of ``x x'`` over tokens ``[T, d]``, f32 ``[d, d]``; not centred, since products are not."""
    x = x.astype(jnp.float32)
    return lax.dot_general(x, x, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def vocab_statistics(logits: jax.Array, scores: jax.Array) -> dict[str, jax.Array]:
    """Totals of a vocabulary projection.

    Args:
      logits: ``[T, V]``, the dense ones.
      scores: ``[T, V]``, the predictor's.

    Returns:
      ``wanted``: int32 ``[V]``, by position, the tokens whose dense arg max stands there.
    """
    scores = _ranked(scores)
    best = jnp.argmax(logits, axis=1)[:, None]
    own = jnp.take_along_axis(scores, best, axis=1)
    # Of equal scores the lower index is chosen first, as `da_top_k` does.
    before = (scores > own) | ((scores == own) & (jnp.arange(scores.shape[1])[None, :] < best))
    position = jnp.sum(before, axis=1)
    return {"wanted": jnp.zeros(scores.shape[1], jnp.int32).at[position].add(1)}


def ffn_statistics(
    activation: jax.Array, down_norms: jax.Array, scores: jax.Array, group_size: int
) -> dict[str, jax.Array]:
    """Totals of a feed-forward block.

    The energy of a unit is the square of what it adds: its activation times the norm of its down row.

    Args:
      activation: ``[T, m]``, of the dense block.
      down_norms: f32 ``[m]``.
      scores: ``[T, m / group_size]``, the predictor's, of each group.
      group_size: neighbouring units chosen together.

    Returns:
      ``fired``: int32 ``[m]``, tokens at which a unit is not zero. ``energy``: f32 ``[m]``.
      ``wanted``: int32 ``[m / group_size]``, by position, units that are not zero. ``wanted_energy``: f32, likewise.
    """
    tokens, units = activation.shape
    fired = activation != 0
    energy = jnp.square(activation.astype(jnp.float32) * down_norms)
    order = jnp.argsort(-_ranked(scores), axis=1, stable=True)

    def by_position(values: jax.Array) -> jax.Array:
        grouped = values.reshape(tokens, units // group_size, group_size).sum(axis=2)
        return jnp.take_along_axis(grouped, order, axis=1).sum(axis=0)

    return {
        "fired": jnp.sum(fired, axis=0, dtype=jnp.int32),
        "energy": jnp.sum(energy, axis=0),
        "wanted": by_position(fired.astype(jnp.int32)),
        "wanted_energy": by_position(energy),
    }


def _ranked(scores: jax.Array) -> jax.Array:
    """Scores as the selection sees them: a NaN is the largest."""
    return jnp.where(jnp.isnan(scores), jnp.inf, scores).astype(jnp.float32)
