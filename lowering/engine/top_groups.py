"""Exact top-k of groups of hidden units, for training: every unit is computed, the smaller groups are zeroed.

Training with the top-k in the block is what HiRE (arXiv 2402.09360) asks of a model that is to decode with few units;
that a dense-trained quality survives it was shown by Li et al. (Lazy Neuron, arXiv 2210.06313).
"""

import jax
import jax.numpy as jnp

from hire_xform.lowering.primitives.ranks import among_largest

__all__ = ["group_energy", "keep_top_groups"]


def group_energy(activation: jax.Array, down_norms: jax.Array, group_size: int) -> jax.Array:
    """What groups of hidden units are ranked by: the squares of what their units add, summed.

    A unit adds its activation times its row of the contracting matrix; the size of that is ``|activation|`` times the
    norm of the row.

    Args:
      activation: ``[T, m]``.
      down_norms: f32 ``[m]``, the norm of each row of the contracting matrix.
      group_size: neighbouring units in a group, a divisor of ``m``.

    Returns:
      f32 ``[T, m / group_size]``.
    """
    energy = jnp.square(activation.astype(jnp.float32) * down_norms)
    return energy.reshape(activation.shape[0], -1, group_size).sum(axis=-1)


def keep_top_groups(activation: jax.Array, down_norms: jax.Array, *, active: int, group_size: int) -> jax.Array:
    """The activation with all but each token's groups of largest energy set to zero.

    Which groups are kept is not differentiated: gradients flow through the kept units, those of the others are zero.
    Of equal groups the first is kept.

    Args:
      activation: ``[T, m]``.
      down_norms: f32 ``[m]``; see :func:`group_energy`.
      active: groups to keep for each token, ``1 <= active <= m / group_size``.
      group_size: neighbouring units in a group, a divisor of ``m``.

    Returns:
      ``[T, m]`` of the activation's dtype.

    Raises:
      ValueError: a size does not fit.
    """
    tokens, units = activation.shape
    if group_size < 1 or units % group_size:
        raise ValueError(f"keep_top_groups: group_size={group_size} does not divide the {units} hidden units")
    groups = units // group_size
    if not 1 <= active <= groups:
        raise ValueError(f"keep_top_groups: active={active}; expected 1 <= active <= {groups}")
    if active == groups:
        return activation
    energy = group_energy(*jax.lax.stop_gradient((activation, down_norms)), group_size)
    kept = among_largest(energy, active)
    grouped = activation.reshape(tokens, groups, group_size)
    return jnp.where(kept[:, :, None], grouped, jnp.zeros((), activation.dtype)).reshape(tokens, units)
