"""Which units fire together: sums over tokens, from which groups of units are made when packing."""

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["SKETCHED_FROM", "cofiring"]

# Wider blocks keep a sketch of so many numbers a unit, instead of a count for each pair.
SKETCHED_FROM, SKETCH = 4096, 1024


def cofiring(weights: jax.Array) -> jax.Array:
    """The sum over tokens of how far two units are on together, or a sketch of it.

    Up to ``SKETCHED_FROM`` units that is ``weights' weights``. Beyond, each unit's course over the tokens is multiplied
    by random signs, drawn for each token from what it holds, ``S = weights' signs / sqrt(SKETCH)``: then ``S S'`` has
    that sum as its mean, and an error of about ``1 / sqrt(SKETCH)`` of the units' own (Johnson and Lindenstrauss).
    Tokens that are the same to the last bit have the same signs, and count by the square of how often they come.

    Args:
      weights: ``[T, m]``, one where a unit fires, or how much.

    Returns:
      f32 ``[m, m]`` or ``[m, SKETCH]``.
    """
    weights = weights.astype(jnp.float32)
    other = weights
    if weights.shape[1] > SKETCHED_FROM:
        other = jax.vmap(_signs)(weights) / SKETCH**0.5
    return lax.dot_general(weights, other, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _signs(token: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(token, jnp.uint32)
    odd = 2 * jnp.arange(bits.shape[0], dtype=jnp.uint32) * jnp.uint32(2654435761) + 1
    return jax.random.rademacher(jax.random.fold_in(jax.random.key(0), jnp.sum(bits * odd)), (SKETCH,), jnp.float32)
