"""What is measured of a site's tokens: their inputs, which units fire, and where a predictor ranks what is wanted.

Everything is a sum over tokens, so that totals of batches are totals of all. A *position* is a place in the order in
which a predictor's scores have rows (or groups of units) chosen: with the totals by position in hand, the recall of
``k`` candidates is the share of the first ``k`` positions, for every ``k`` at once.
"""

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.prove.goals import Goal, candidates_needed, fewest_candidates, mass_margin

__all__ = [
    "KL_SIZES",
    "covariance",
    "first_in_order",
    "groups_wanted",
    "open_share",
    "proved_ranks",
    "unit_ranks",
    "unit_totals",
    "vocab_ranks",
]

# Candidates up to which the KL divergence of a vocabulary projection is measured.
KL_SIZES = 1024


def covariance(x: jax.Array) -> jax.Array:
    """The sum of ``x x'`` over tokens ``[T, d]``, f32 ``[d, d]``; not centred, since products are not."""
    x = x.astype(jnp.float32)
    return lax.dot_general(x, x, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def vocab_ranks(logits: jax.Array, scores: jax.Array, fill: str = "predicted") -> dict[str, jax.Array]:
    """Totals of a vocabulary projection and a predictor.

    With candidates C, logits z, scores s and ``p = softmax(z)``, what a sampler sees is ``q``, the softmax of z on C
    and of s elsewhere. Then ``KL(p | q) = sum_{not C} p (z - s) + log Z_q - log Z_p``, Z being the sums of
    exponentials, all of which running sums in the order of choice give for every number of candidates. Where minus
    infinity stands for the others ``KL(p | q)`` is infinite, but ``KL(q | p) = -log p(C)``.

    Args:
      logits: ``[T, V]``, the dense ones.
      scores: ``[T, V]``, the predictor's.
      fill: what stands for the logits of no candidate, "predicted" or "-inf".

    Returns:
      ``wanted``: int32 ``[V]``, by position, the tokens whose dense arg max stands there. ``kl``: f32
      ``[min(V, KL_SIZES)]``, the sum over tokens of the KL divergence in nats, of 1, 2, ... candidates: ``KL(p | q)``,
      with ``fill="-inf"`` ``KL(q | p)``.
    """
    ranked = _ranked(scores)
    best = jnp.argmax(logits, axis=1)[:, None]
    own = jnp.take_along_axis(ranked, best, axis=1)
    # Of equal scores the lower index is chosen first, as `da_top_k` does.
    before = (ranked > own) | ((ranked == own) & (jnp.arange(ranked.shape[1])[None, :] < best))
    position = jnp.sum(before, axis=1)
    wanted = jnp.zeros(ranked.shape[1], jnp.int32).at[position].add(1)
    return {"wanted": wanted, "kl": _divergences(logits.astype(jnp.float32), scores, ranked, fill)}


def _divergences(logits: jax.Array, scores: jax.Array, ranked: jax.Array, fill: str) -> jax.Array:
    sizes = min(logits.shape[1], KL_SIZES)
    order = lax.top_k(ranked, sizes)[1]

    def chosen(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, order, axis=1)

    if fill == "-inf":
        mass = jnp.cumsum(chosen(jax.nn.softmax(logits, axis=1)), axis=1)
        # No mass at all is that of the smallest number, so that sums stay finite.
        return -jnp.log(jnp.clip(mass, jnp.finfo(jnp.float32).tiny, 1.0)).sum(axis=0)
    # In logarithms: a poor predictor's largest score may be so far above all logits that none is left beside it.
    share = jax.nn.softmax(logits, axis=1)
    missed = jnp.where(share > 0, share * (logits - scores), 0.0)
    tokens = jnp.arange(logits.shape[0])[:, None]
    # What is never chosen, and what is not yet, added up without taking large sums apart.
    others = missed.at[tokens, order].set(0.0).sum(axis=1, keepdims=True)
    missed = lax.cumsum(chosen(missed), axis=1, reverse=True) - chosen(missed) + others
    rough = jax.nn.logsumexp(scores.at[tokens, order].set(-jnp.inf), axis=1, keepdims=True)
    later = lax.cumlogsumexp(chosen(scores), axis=1, reverse=True)
    later = jnp.pad(later[:, 1:], ((0, 0), (0, 1)), constant_values=-jnp.inf)
    exact = lax.cumlogsumexp(chosen(logits), axis=1)
    total = jnp.logaddexp(exact, jnp.logaddexp(later, rough))
    return jnp.maximum(missed + total - jax.nn.logsumexp(logits, axis=1, keepdims=True), 0.0).sum(axis=0)


def proved_ranks(
    logits: jax.Array,
    scores: jax.Array,
    upper: jax.Array,
    exact_error: jax.Array,
    goal: Goal = True,
    fill: str = "predicted",
) -> dict[str, jax.Array]:
    """Totals of a certified vocabulary projection.

    Args:
      logits: ``[T, V]``, the dense ones.
      scores, upper, exact_error: as ``scores_with_bounds`` gives them.
      goal: what is to be proved.
      fill: as for ``vocab_ranks``.

    Returns:
      ``wanted``: int32 ``[V]``, by position in the order of upper bounds, the tokens that candidates up to there
      prove. ``kl``: as of ``vocab_ranks``, in that order.
    """
    ranked = _ranked(upper)
    needed = candidates_needed(goal, logits, ranked, exact_error)
    wanted = jnp.zeros(logits.shape[1], jnp.int32).at[needed - 1].add(1)
    return {"wanted": wanted, "kl": _divergences(logits.astype(jnp.float32), scores, ranked, fill)}


def open_share(goal: Goal, logits: jax.Array, upper: jax.Array) -> jax.Array:
    """The share of the rows that bounds leave open where the largest logits are known, added up over tokens: f32.

    Args:
      goal: what is to be proved.
      logits: ``[T, V]``, the dense ones.
      upper: f32 ``[T, V]``.
    """
    vocab = logits.shape[1]
    floor = lax.top_k(logits.astype(jnp.float32), min(fewest_candidates(goal), vocab))[0][:, -1:]
    return jnp.sum(jnp.mean(~(upper < floor - mass_margin(goal, vocab)), axis=1, dtype=jnp.float32))


def groups_wanted(needed: jax.Array, groups: int) -> dict[str, jax.Array]:
    """Totals of a certified block.

    Args:
      needed: int ``[T]``, how many groups of units prove it, 1 to ``groups``.
      groups: n, how many there are.

    Returns:
      ``wanted``: int32 ``[n]``, the tokens that need 1, 2, ... groups.
    """
    return {"wanted": jnp.zeros(groups, jnp.int32).at[needed - 1].add(1)}


def unit_totals(activation: jax.Array, down_norms: jax.Array, group_size: int = 1) -> dict[str, jax.Array]:
    """Totals of a feed-forward block's units.

    The energy of a unit is the square of what it adds: its activation times the norm of its down row.

    Args:
      activation: ``[T, m]``, of the dense block.
      down_norms: f32 ``[m]``.
      group_size: neighbouring units that are a group.

    Returns:
      ``fired``: int32 ``[m]``, tokens at which a unit is not zero. ``energy``: f32 ``[m]``. ``touched``: int32 scalar,
      groups of which any unit is not zero.
    """
    grouped = (activation != 0).reshape(activation.shape[0], -1, group_size)
    return {
        "touched": jnp.sum(grouped.any(axis=2), dtype=jnp.int32),
        "fired": jnp.sum(activation != 0, axis=0, dtype=jnp.int32),
        "energy": jnp.sum(_energy(activation, down_norms), axis=0),
    }


def unit_ranks(
    activation: jax.Array, down_norms: jax.Array, scores: jax.Array, group_size: int
) -> dict[str, jax.Array]:
    """Totals of a feed-forward block and a predictor.

    Args:
      activation: ``[T, m]``, of the dense block.
      down_norms: f32 ``[m]``.
      scores: ``[T, m / group_size]``, the predictor's, of each group.
      group_size: neighbouring units chosen together.

    Returns:
      ``wanted``: int32 ``[m / group_size]``, by position, units that are not zero. ``wanted_energy``: f32, likewise.
    """
    tokens, units = activation.shape
    order = lax.top_k(_ranked(scores), scores.shape[1])[1]

    def by_position(values: jax.Array) -> jax.Array:
        grouped = values.reshape(tokens, units // group_size, group_size).sum(axis=2)
        return jnp.take_along_axis(grouped, order, axis=1).sum(axis=0)

    return {
        "wanted": by_position((activation != 0).astype(jnp.int32)),
        "wanted_energy": by_position(_energy(activation, down_norms)),
    }


def first_in_order(scores: jax.Array, size: jax.Array, most: int) -> jax.Array:
    """Which rows a selection of so many would choose, bool ``[T, n]``.

    Args:
      scores: ``[T, n]``.
      size: int scalar, at most ``most``, or else ``n`` for all rows.
      most: the largest size that will be asked for.
    """
    ranked = _ranked(scores)
    last = jnp.take(lax.top_k(ranked, most)[0], jnp.minimum(size, most) - 1, axis=1)[:, None]
    # Of equal scores the lower index is chosen first, as `da_top_k` does.
    left = size - jnp.sum(ranked > last, axis=1, keepdims=True)
    equal = ranked == last
    chosen = (ranked > last) | (equal & (jnp.cumsum(equal, axis=1) <= left))
    return chosen | (size >= scores.shape[1])


def _energy(activation: jax.Array, down_norms: jax.Array) -> jax.Array:
    return jnp.square(activation.astype(jnp.float32) * down_norms)


def _ranked(scores: jax.Array) -> jax.Array:
    """Scores as the selection sees them: a NaN is the largest."""
    return jnp.where(jnp.isnan(scores), jnp.inf, scores).astype(jnp.float32)
