"""What is measured of a site's tokens: their inputs, which units fire, and where a predictor ranks what is wanted.

Everything is a sum over tokens, so that totals of batches are totals of all. A *position* is a place in the order in
which a predictor's scores have rows (or groups of units) chosen: with the totals by position in hand, the recall of
``k`` candidates is the share of the first ``k`` positions, for every ``k`` at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.primitives.arg_max import arg_max
from hire_xform.lowering.primitives.da_top_k import da_top_k
from hire_xform.lowering.prove.goals import Goal, candidates_needed, candidates_within, fewest_candidates, mass_margin

__all__ = [
    "KL_SIZES",
    "Sample",
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


@dataclass(frozen=True)
class Sample:
    """Some of a number of tokens, at equal distances; of fewer tokens than that one.

    Attributes:
      every: how far they lie apart.
      first: int32 scalar, at least 0 and less than ``every``: moved from batch to batch, it meets all positions.
    """

    every: int
    first: jax.Array

    def of(self, values: jax.Array) -> jax.Array:
        """Of ``[T, ...]`` those of the sample, ``[max(1, T // every), ...]``."""
        tokens = values.shape[0]
        count = max(1, tokens // self.every)
        # Slices, which copy whole rows where a gather would look each number up.
        some = lax.dynamic_slice_in_dim(values, self.first, (count - 1) * self.every + 1)
        return some[:: self.every]


def vocab_ranks(
    logits: jax.Array, scores: jax.Array, fill: str = "predicted", sample: Sample | None = None
) -> dict[str, jax.Array]:
    """Totals of a vocabulary projection and a predictor.

    With candidates C, logits z, scores s and ``p = softmax(z)``, what a sampler sees is ``q``, the softmax of z on C
    and of s elsewhere. Then ``KL(p | q) = sum_{not C} p (z - s) + log Z_q - log Z_p``, Z being the sums of
    exponentials, all of which running sums in the order of choice give for every number of candidates. Where minus
    infinity stands for the others ``KL(p | q)`` is infinite, but ``KL(q | p) = -log p(C)``.

    Args:
      logits: ``[T, V]``, the dense ones.
      scores: ``[T, V]``, the predictor's.
      fill: what stands for the logits of no candidate, "predicted" or "-inf".
      sample: of the tokens, which the divergence of all is taken from; None looks at all.

    Returns:
      ``wanted``: int32 ``[V]``, by position, the tokens whose dense arg max stands there. ``kl``: f32
      ``[min(V, KL_SIZES)]``, the sum over tokens of the KL divergence in nats, of 1, 2, ... candidates: ``KL(p | q)``,
      with ``fill="-inf"`` ``KL(q | p)``.
    """
    ranked = _ranked(scores)
    best = arg_max(logits)[:, None]
    own = jnp.take_along_axis(ranked, best, axis=1)
    # Of equal scores the lower index is chosen first, as `da_top_k` does.
    before = (ranked > own) | ((ranked == own) & (jnp.arange(ranked.shape[1])[None, :] < best))
    position = jnp.sum(before, axis=1)
    wanted = jnp.zeros(ranked.shape[1], jnp.int32).at[position].add(1)
    return {"wanted": wanted, "kl": _divergences(logits, scores, ranked, fill, sample)}


def _divergences(
    logits: jax.Array, scores: jax.Array, ranked: jax.Array, fill: str, sample: Sample | None
) -> jax.Array:
    if sample is not None:
        some = sample.of(logits)
        part = _divergences(some, sample.of(scores), sample.of(ranked), fill, None)
        return part * (logits.shape[0] / some.shape[0])
    logits, sizes = logits.astype(jnp.float32), min(logits.shape[1], KL_SIZES)
    values, order = _largest(ranked, sizes)

    def chosen(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, order, axis=1)

    whole = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    if fill == "-inf":
        mass = jnp.cumsum(jnp.exp(chosen(logits) - whole), axis=1)
        # No mass at all is that of the smallest number, so that sums stay finite.
        return -jnp.log(jnp.clip(mass, jnp.finfo(jnp.float32).tiny, 1.0)).sum(axis=0)

    def missing(logits: jax.Array, scores: jax.Array) -> jax.Array:
        share = jnp.exp(logits - whole)
        return jnp.where(share > 0, share * (logits - scores), 0.0)

    # What is never chosen, and what is not yet, added up without taking large sums apart. Of equal scores the first is
    # chosen, so those of a later index than the last one are not.
    last, numbers = values[:, -1:], jnp.arange(logits.shape[1])[None, :]
    never = (ranked < last) | ((ranked == last) & (numbers > order[:, -1:]))
    others = jnp.where(never, missing(logits, scores), 0.0).sum(axis=1, keepdims=True)
    rough = jax.nn.logsumexp(jnp.where(never, scores, -jnp.inf), axis=1, keepdims=True)
    exact, guessed = chosen(logits), chosen(scores)
    own = missing(exact, guessed)
    missed = lax.cumsum(own, axis=1, reverse=True) - own + others
    # In logarithms: a poor predictor's largest score may be so far above all logits that none is left beside it. As
    # shares of the dense softmax, whose sum is near one: its logarithm is small, and so is what rounding makes of it.
    later = _log_sums((guessed - whole)[:, ::-1], rough - whole)[:, ::-1]
    later = jnp.concatenate([later[:, 1:], rough - whole], axis=1)
    total = jnp.logaddexp(_log_sums(exact - whole, jnp.full_like(rough, -jnp.inf)), later)
    return jnp.maximum(missed + total, 0.0).sum(axis=0)


def _log_sums(values: jax.Array, start: jax.Array) -> jax.Array:
    """For each position of ``[T, n]`` the logarithm of the sum of exponentials up to it, and of ``start [T, 1]``.

    One position after the other, of all tokens: ten times as fast as ``lax.cumlogsumexp`` is on CPU.
    """

    def add(total: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = jnp.logaddexp(total, column)
        return total, total

    return lax.scan(add, start[:, 0], values.T, unroll=8)[1].T


def proved_ranks(
    logits: jax.Array,
    scores: jax.Array,
    upper: jax.Array,
    exact_error: jax.Array,
    goal: Goal = True,
    fill: str = "predicted",
    sample: Sample | None = None,
    within: float | None = None,
) -> dict[str, jax.Array]:
    """Totals of a certified vocabulary projection.

    Args:
      logits: ``[T, V]``, the dense ones.
      scores, upper, exact_error: as ``scores_with_bounds`` gives them.
      goal: what is to be proved.
      fill, sample: as for ``vocab_ranks``.
      within: how far log-probabilities may be from the dense ones, where that is to be proved, too.

    Returns:
      ``wanted``: int32 ``[V]``, by position in the order of upper bounds, the tokens that candidates up to there
      prove. ``kl``: as of ``vocab_ranks``, in that order.
    """
    ranked = _ranked(upper)
    needed = candidates_needed(goal, logits, ranked, exact_error)
    if within is not None:
        needed = jnp.maximum(needed, candidates_within(within, logits, scores, ranked, exact_error))
    wanted = jnp.zeros(logits.shape[1], jnp.int32).at[needed - 1].add(1)
    return {"wanted": wanted, "kl": _divergences(logits, scores, ranked, fill, sample)}


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
      ``wanted``: int32 ``[m / group_size]``, by position, units that are not zero. ``wanted_energy``: f32, likewise,
      sums over tokens of the share of the token's energy. So each counts the same: the first of a text may have ten
      thousand times the energy of the others, in two units that nothing else needs.
    """
    tokens, units = activation.shape
    energy = _energy(activation, down_norms)
    total = jnp.sum(energy, axis=1, keepdims=True)
    order = _largest(_ranked(scores), scores.shape[1])[1]

    def by_position(values: jax.Array) -> jax.Array:
        grouped = values.reshape(tokens, units // group_size, group_size).sum(axis=2)
        return jnp.take_along_axis(grouped, order, axis=1).sum(axis=0)

    return {
        "wanted": by_position((activation != 0).astype(jnp.int32)),
        "wanted_energy": by_position(energy / jnp.where(total > 0.0, total, 1.0)),
    }


def first_in_order(scores: jax.Array, size: jax.Array, most: int) -> jax.Array:
    """Which rows a selection of so many would choose, bool ``[T, n]``.

    Args:
      scores: ``[T, n]``.
      size: int scalar, at most ``most``, or else ``n`` for all rows.
      most: the largest size that will be asked for.
    """
    ranked = _ranked(scores)
    last = jnp.take(_largest(ranked, most)[0], jnp.minimum(size, most) - 1, axis=1)[:, None]
    # Of equal scores the lower index is chosen first, as `da_top_k` does.
    left = size - jnp.sum(ranked > last, axis=1, keepdims=True)
    equal = ranked == last
    chosen = (ranked > last) | (equal & (jnp.cumsum(equal, axis=1) <= left))
    return chosen | (size >= scores.shape[1])


def _energy(activation: jax.Array, down_norms: jax.Array) -> jax.Array:
    return jnp.square(activation.astype(jnp.float32) * down_norms)


def _largest(ranked: jax.Array, k: int) -> Sequence[jax.Array]:
    """The k largest of each token and where they stand, of scores without NaN; ties go to the lower index.

    A kernel's, but not under a mesh that values are typed by: JAX 0.12 does not lower there what XLA partitions of it.
    """
    return da_top_k(ranked, k) if jax.typeof(ranked).sharding.mesh.empty else lax.top_k(ranked, k)


def _ranked(scores: jax.Array) -> jax.Array:
    """Scores as the selection sees them: a NaN is the largest."""
    return jnp.where(jnp.isnan(scores), jnp.inf, scores).astype(jnp.float32)
