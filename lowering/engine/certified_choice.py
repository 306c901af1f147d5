"""A feed-forward block whose model chooses its units, by a top-k or a threshold: proved to choose as the dense block.

Each product into the units lies between bounds, and so does all that the model makes of it
(``lowering/prove/intervals.py``). The candidates, the groups whose score can be largest, are computed exactly, which
leaves them bounds no wider than the rounding of a sum in another order. What is certified is that, of every dense
evaluation in f32 (products of f32 or 16 bits summed in f32 or better, in any order):

- every unit outside the candidates is exactly zero: under a threshold whatever mean and deviation round to, behind the
  k-th largest score, or off for another reason;
- of every candidate that is not zero, every comparison of the model's with what is taken from all units (whether it is
  among the k largest, whether it is above the cutoff) comes out as in the dense block. A score that rounding could move
  across the k-th or the cutoff, a tie included, is not decided: then the dense block is run;
- the k-th largest score of the candidates is that of all units.

So the result is the dense one up to the rounding of its sums and, where the model subtracts a cutoff, of the mean and
the deviation that it is made of. Those are computed from moments, not from the units; what the dense ones can be off by
is bounded in ``passes/prove/sum_bounds.py``. Too many open units, and whatever is not finite, run dense as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.engine.proved_or_dense import proved_or_dense
from hire_xform.lowering.engine.rows import combine_rows
from hire_xform.lowering.engine.selection import choose, select
from hire_xform.lowering.engine.subgraph import Gather, UpProduct, chosen_products, gather_chosen
from hire_xform.lowering.predict.predictors import PredictorSpec
from hire_xform.lowering.primitives.ranks import Moments
from hire_xform.lowering.prove.bounds import norm, product_error, slack, tiny
from hire_xform.lowering.prove.intervals import Interval, rounded
from hire_xform.lowering.prove.moment_bounds import UnitMoments, bounded_moments
from hire_xform.lowering.prove.proofs import Proof, scores_with_bounds
from hire_xform.lowering.xla.nan_max import largest_or_nan
from hire_xform.lowering.xla.skinny_dot import skinny_dot

__all__ = ["ChoiceBlock", "ChoiceOperands", "Largest", "certified_choice", "groups_needed"]


class Largest(NamedTuple):
    """Bounds of the largest scores of a token, from the candidates and the largest bound of all others.

    Attributes:
      low, high: f32 ``[T, R]``: at ``r - 1`` the bounds of the r-th largest of the candidates.
      outside: f32 ``[T, 1]``, above the score of every other unit; minus infinity where there is none.
    """

    low: jax.Array
    high: jax.Array
    outside: jax.Array

    def at(self, rank: int) -> Interval:
        """Bounds of the ``rank``-th largest of all units, ``[T, 1]``; the 0-th is infinite."""
        if rank == 0:
            return Interval(jnp.full_like(self.outside, jnp.inf), jnp.full_like(self.outside, jnp.inf))
        if rank > self.low.shape[1]:
            return Interval(jnp.full_like(self.outside, -jnp.inf), self.outside)
        low, high = self.low[:, rank - 1 : rank], self.high[:, rank - 1 : rank]
        return Interval(low, jnp.maximum(high, self.outside))


class Proving(Protocol):
    """What the model does to the units, on intervals; a hidden is ``[T, K]`` for each product into them."""

    @property
    def compares(self) -> bool:
        """Whether units are compared, so that how far apart two dense products can be decides what is proved."""

    def score(
        self, hiddens: Sequence[Interval], sides: Sequence[jax.Array], gather: Gather, moments: Sequence
    ) -> Interval:
        """What the model chooses units by, ``[T, K]``."""

    def settle(
        self,
        hiddens: Sequence[Interval],
        sides: Sequence[jax.Array],
        gather: Gather,
        moments: Sequence,
        largest: Largest,
    ) -> tuple[jax.Array, jax.Array]:
        """Which units are exactly zero, and of which every comparison is decided: bool ``[T, K]`` each."""


@dataclass(frozen=True, kw_only=True)
class ChoiceBlock:
    """What is static of a certified block whose model chooses units itself.

    Attributes:
      units: hidden units, m.
      region: what the model does to the units: ``region(hiddens, sides, gather, moments)``.
      proving: the same on intervals.
      ranks: of which ranks the model takes the largest score, its k among them; none for a threshold.
      dense_region: what the model does to all of them: ``dense_region(hiddens, sides)``.
      dense_up: the dense product number ``i`` into the units: ``dense_up(i, x, rows)``, ``[T, m]``.
      dense_down: the dense contracting product, ``[T, d_out]``.
      own: the block as the program has it, of the original weights: ``own(xs, sides, leaves)``; ``[T, d_out]``.
      spec: the predictor of the products that the score hangs on.
      active: groups of units each token may have computed.
      group_size: units in a group; where the model chooses groups, a multiple of theirs.
      up_dtypes: dtypes of the products into the units. Whether the dense program rounds to them is not known.
      hidden_dtypes: dtypes in which ``region`` is given them.
      out_dtype: dtype of the result.
      input_bits: significant bits that the dense products keep of f32 inputs.
    """

    units: int
    region: Callable[[list[jax.Array], list[jax.Array], Gather, list], jax.Array]
    proving: Proving
    ranks: tuple[int, ...]
    dense_region: Callable[[list[jax.Array], list[jax.Array]], jax.Array]
    dense_up: Callable[[int, jax.Array, jax.Array], jax.Array]
    dense_down: Callable[[jax.Array, jax.Array], jax.Array]
    own: Callable[[list[jax.Array], list[jax.Array], Any], jax.Array]
    spec: PredictorSpec
    active: int
    group_size: int
    up_dtypes: tuple[jnp.dtype, ...]
    hidden_dtypes: tuple[jnp.dtype, ...]
    out_dtype: jnp.dtype
    input_bits: int = 24


class ChoiceOperands(NamedTuple):
    """The arrays of such a block: ``u`` products into the units, and for each of them an entry in the lists.

    Attributes:
      xs: the tokens, ``[T, d]``.
      sides: side inputs in canonical form: ``[T or 1, m or 1]``, or scalars.
      rows: ``[m, d]``, or taller matrices.
      first_rows: where the rows begin in them.
      down: ``[m, d_out]``, or taller.
      first_down: where its rows begin.
      proofs: what is kept of the rows, with bounds; None where the score does not hang on them.
      largest: the largest norm of a row, f32 scalars, where there is no proof.
      moments: from ``pack_bounded_moments``; None where the model takes no mean of them.
      largest_down: the largest norm of a row of ``down``.
      leaves: the original weights, a pytree; None where they are not there, and the fallback reads the rows.
    """

    xs: list[jax.Array]
    sides: list[jax.Array]
    rows: list[jax.Array]
    first_rows: list[jax.Array]
    down: jax.Array
    first_down: jax.Array
    proofs: list[Proof | None]
    largest: list[jax.Array | None]
    moments: list[Moments | None]
    largest_down: jax.Array
    leaves: Any = None


def certified_choice(block: ChoiceBlock, operands: ChoiceOperands) -> tuple[jax.Array, jax.Array]:
    """A block whose candidates are proved to hold the units that the dense block keeps; else the dense block.

    Under ``vmap`` over tokens and side inputs the tokens of all examples are taken together.

    Returns:
      ``[T, d_out]``, and a bool scalar: whether the dense block was run.
    """
    return proved_or_dense(lambda o: _attempt(block, o), lambda o: _dense(block, o), operands)


def _dense(block: ChoiceBlock, o: ChoiceOperands) -> jax.Array:
    activation = block.dense_region(_dense_hiddens(block, o), o.sides)
    return block.dense_down(activation, _own(block, o.down, o.first_down))


def _dense_hiddens(block: ChoiceBlock, o: ChoiceOperands) -> list[jax.Array]:
    return [
        block.dense_up(i, x, _own(block, rows, first))
        for i, (x, rows, first) in enumerate(zip(o.xs, o.rows, o.first_rows, strict=True))
    ]


def _own(block: ChoiceBlock, rows: jax.Array, first: jax.Array) -> jax.Array:
    return rows if rows.shape[0] == block.units else lax.dynamic_slice_in_dim(rows, first, block.units)


class _Bounded(NamedTuple):
    """All units, none computed: for each product its bounds and how far two dense ones can be apart."""

    hiddens: list[Interval]
    apart: list[jax.Array]
    moments: list[UnitMoments | None]
    score: Interval


def _bounded(block: ChoiceBlock, o: ChoiceOperands) -> _Bounded:
    hiddens, apart, found = [], [], []
    xs, sides = lax.stop_gradient((o.xs, o.sides))
    tokens = xs[0].shape[0]
    for x, proof, largest, packed, dtype in zip(xs, o.proofs, o.largest, o.moments, block.up_dtypes, strict=True):
        if proof is not None:
            bound = scores_with_bounds(x, proof, block.spec, input_bits=block.input_bits)
            values, off = Interval(bound.lower, bound.upper), bound.exact_error
        else:
            assert largest is not None
            relative = slack(x.shape[1], block.input_bits)
            product = norm(x)[:, None] * largest * (1.0 + 1e-6)
            most = jnp.broadcast_to(product * (1.0 + relative) + tiny(x.shape[1]), (tokens, block.units))
            values, off = Interval(-most, most), 2.0 * (relative * product + tiny(x.shape[1]))
        hiddens.append(rounded(values, dtype))
        apart.append(jnp.broadcast_to(off, (tokens, block.units)))
        found.append(None if packed is None else bounded_moments(x, packed, input_bits=block.input_bits))
    score = block.proving.score(hiddens, sides, lambda values: values, found)
    full = score.map(lambda end: jnp.broadcast_to(lax.stop_gradient(end), (tokens, block.units)))
    return _Bounded(hiddens, apart, found, full)


def _grouped(block: ChoiceBlock, values: jax.Array) -> jax.Array:
    """The largest of each group of units, ``[T, units / group_size]``; of NaNs a NaN."""
    return largest_or_nan(values.reshape(values.shape[0], -1, block.group_size), -1)


def _attempt(block: ChoiceBlock, o: ChoiceOperands) -> tuple[jax.Array, jax.Array]:
    tokens, groups = o.xs[0].shape[0], block.units // block.group_size
    selection = choose(tokens, groups, block.active)
    with jax.named_scope("predict"):
        bounded = _bounded(block, o)
    with jax.named_scope("select"):
        # In ascending order, as ties of a top-k are broken.
        index = jnp.sort(select(_grouped(block, bounded.score.high), selection), axis=-1)
    ups = [
        UpProduct(x=x, rows=rows, first_row=_start(rows, first, block), packed=None, spec=block.spec, dtype=dtype)
        for x, rows, first, dtype in zip(o.xs, o.rows, o.first_rows, block.hidden_dtypes, strict=True)
    ]
    with jax.named_scope("compute"):
        hiddens = chosen_products(ups, index, block.group_size)
        terms = [
            chosen_products([up], index, block.group_size, magnitudes=True)[0] if close else None
            for up, close in zip(ups, _bounded_closely(block, o), strict=True)
        ]
    gather = gather_chosen(index, tokens, block.units, block.group_size)
    with jax.named_scope("prove"):
        fallback = jnp.logical_not(_proved(block, o, bounded, hiddens, terms, index, gather))

    def sparse() -> jax.Array:
        own = [h.astype(up.dtype) for h, up in zip(hiddens, ups, strict=True)]
        activation = block.region(own, o.sides, gather, bounded.moments)
        start = _start(o.down, o.first_down, block)
        down_index = index if isinstance(start, int) else index + start // block.group_size
        return combine_rows(
            activation, o.down, down_index, group_size=block.group_size, preferred_element_type=block.out_dtype
        )

    return lax.cond(fallback, lambda: _fallback(block, o), sparse), fallback


def _fallback(block: ChoiceBlock, o: ChoiceOperands) -> jax.Array:
    return _dense(block, o) if o.leaves is None else block.own(o.xs, o.sides, o.leaves)


def _start(rows: jax.Array, first: jax.Array, block: ChoiceBlock) -> jax.Array | int:
    return 0 if rows.shape[0] == block.units else first


def _proved(
    block: ChoiceBlock,
    o: ChoiceOperands,
    bounded: _Bounded,
    hiddens: list[jax.Array],
    terms: list[jax.Array | None],
    index: jax.Array,
    gather: Gather,
) -> jax.Array:
    """Whether what is certified holds for every token, a bool scalar; a NaN proves nothing."""
    tokens, sides = o.xs[0].shape[0], lax.stop_gradient(o.sides)
    exact, score = _exact(block, o, bounded, hiddens, terms, gather)
    others = _grouped(block, bounded.score.high)
    at = (slice(None), index) if index.ndim == 1 else (jnp.arange(tokens)[:, None], index)
    chosen = jnp.zeros(others.shape, bool).at[at].set(True, unique_indices=True, mode="promise_in_bounds")
    outside = largest_or_nan(jnp.where(chosen, -jnp.inf, others), 1, keepdims=True)
    largest = _largest(block.ranks, score, outside)
    zero, settled = block.proving.settle(exact, sides, gather, bounded.moments, largest)
    proved = jnp.all(zero | settled)
    zero, _ = block.proving.settle(bounded.hiddens, sides, lambda values: values, bounded.moments, largest)
    zero = jnp.broadcast_to(zero, (tokens, block.units)).reshape(tokens, -1, block.group_size).all(axis=-1)
    proved &= jnp.all(zero | chosen)
    for rank in block.ranks:
        proved &= jnp.all(largest.outside <= largest.at(rank).low)
    return proved & (o.largest_down < jnp.inf)


def _bounded_closely(block: ChoiceBlock, o: ChoiceOperands) -> list[bool]:
    """For each product whether computed units are bounded by their own terms: where the choice hangs on it."""
    return [proof is not None and block.proving.compares for proof in o.proofs]


def _exact(
    block: ChoiceBlock,
    o: ChoiceOperands,
    bounded: _Bounded,
    hiddens: Sequence[jax.Array],
    terms: Sequence[jax.Array | None],
    gather: Gather,
) -> tuple[list[Interval], Interval]:
    """What dense products of computed units can be, and their score.

    Args:
      block, o, bounded: the block.
      hiddens: for each product the computed units, ``[T, K]``.
      terms: the same of magnitudes; None where the norms' bound will do.
      gather: brings what is known of all units to these.
    """
    exact = []
    for x, value, own, off, dtype in zip(
        o.xs, lax.stop_gradient(hiddens), lax.stop_gradient(terms), bounded.apart, block.up_dtypes, strict=True
    ):
        near = gather(off) if own is None else product_error(own, x.shape[1], block.input_bits)
        value = value.astype(jnp.float32)
        exact.append(rounded(Interval(value - near, value + near), dtype))
    score = block.proving.score(exact, lax.stop_gradient(o.sides), gather, bounded.moments)
    return exact, score.map(lambda end: jnp.broadcast_to(end, exact[0].low.shape))


def groups_needed(block: ChoiceBlock, o: ChoiceOperands) -> tuple[jax.Array, jax.Array]:
    """For a calibration: how many candidates prove the choice, all units computed.

    Returns:
      Upper bounds of the groups' scores, f32 ``[T, n]``, by which candidates are taken, and about how many of them each
      token needs, int32 ``[T]``, 1 to n: all n where rounding alone could change the choice.
    """

    def all_units(values: jax.Array) -> jax.Array:
        return values

    sides, bounded = lax.stop_gradient(o.sides), _bounded(block, o)
    terms = [
        skinny_dot(*(jnp.abs(a.astype(jnp.float32)) for a in (x, _own(block, rows, first)))) if close else None
        for x, rows, first, close in zip(o.xs, o.rows, o.first_rows, _bounded_closely(block, o), strict=True)
    ]
    exact, score = _exact(block, o, bounded, _dense_hiddens(block, o), terms, all_units)
    upper = _grouped(block, bounded.score.high)
    largest = _largest(block.ranks, score, jnp.full_like(upper[:, :1], -jnp.inf))
    zero, settled = block.proving.settle(exact, sides, all_units, bounded.moments, largest)
    provable = jnp.all(zero | settled, axis=1) & (o.largest_down < jnp.inf)
    zero, _ = block.proving.settle(bounded.hiddens, sides, all_units, bounded.moments, largest)
    wanted = jnp.logical_not(zero.reshape(*upper.shape, block.group_size).all(axis=-1))
    upper = jnp.where(jnp.isnan(upper), jnp.inf, upper)
    for rank in block.ranks:
        wanted |= upper > largest.at(rank).low
    least = jnp.min(jnp.where(wanted, upper, jnp.inf), axis=1, keepdims=True)
    count = jnp.maximum(jnp.sum(upper >= least, axis=1, dtype=jnp.int32), 1)
    return upper, jnp.where(provable, count, upper.shape[1])


def _largest(ranks: Sequence[int], score: Interval, outside: jax.Array) -> Largest:
    if not ranks:
        return Largest(outside[:, :0], outside[:, :0], outside)
    most = min(max(ranks) + 1, score.low.shape[1])
    # A NaN is no bound: below it anything may lie, and above.
    low = lax.top_k(jnp.where(jnp.isnan(score.low), -jnp.inf, score.low), most)[0]
    high = lax.top_k(jnp.where(jnp.isnan(score.high), jnp.inf, score.high), most)[0]
    return Largest(low, high, outside)
