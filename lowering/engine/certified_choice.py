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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.engine.block import Gather, chosen_products
from hire_xform.lowering.engine.certified_ffn import Block
from hire_xform.lowering.engine.engine import Operands, Steps
from hire_xform.lowering.engine.selection import Selection, choose, entries
from hire_xform.lowering.prove.bounds import norm, product_error, slack, tiny
from hire_xform.lowering.prove.intervals import Interval, rounded
from hire_xform.lowering.prove.moment_bounds import UnitMoments, bounded_moments
from hire_xform.lowering.prove.proofs import scores_with_bounds
from hire_xform.lowering.xla.nan_max import largest_or_nan
from hire_xform.lowering.xla.skinny_dot import skinny_dot

__all__ = ["ChoiceBlock", "Largest"]


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
class ChoiceBlock(Block):
    """A block whose model chooses its units itself.

    Attributes:
      proving: what the model does to the units, on intervals. Its score hangs on the products that have a proof.
      ranks: of which ranks the model takes the largest score, its k among them; none for a threshold.
    """

    proving: Proving
    ranks: tuple[int, ...]

    def steps(self, o: Operands) -> tuple[Steps, Sequence[Selection]]:
        """Candidates are the groups whose score can be largest; they are proved to do once they are computed."""
        with jax.named_scope("predict"):
            bounded = _bounded(self, o)
            scores = self.grouped(bounded.score.high)

        def compute(index: jax.Array) -> _Computed:
            ups = self.ups(o)
            hiddens = chosen_products(ups, index, self.group_size)
            terms = [
                chosen_products([up], index, self.group_size, magnitudes=True)[0] if close else None
                for up, close in zip(ups, _bounded_closely(self, o), strict=True)
            ]
            return _Computed(hiddens, terms)

        steps = Steps(
            scores=scores,
            compute=compute,
            in_order=True,
            result=lambda index, made: self.sparse(o, index, made.hiddens, bounded.moments),
            proved=lambda index, made: _proved(self, o, bounded, made, index),
        )
        return steps, (choose(o.xs[0].shape[0], self.units // self.group_size, self.active),)

    def needed(self, o: Operands) -> tuple[jax.Array, jax.Array]:
        """All groups of a token that needs them to be told apart, or whose choice rounding alone could change."""

        def all_units(values: jax.Array) -> jax.Array:
            return values

        assert o.largest_down is not None
        sides, bounded = lax.stop_gradient(o.sides), _bounded(self, o)
        terms = [
            skinny_dot(*(jnp.abs(a.astype(jnp.float32)) for a in (x, self.own_rows(rows, first)))) if close else None
            for x, rows, first, close in zip(o.xs, o.rows, o.first_rows, _bounded_closely(self, o), strict=True)
        ]
        exact, score = _exact(self, o, bounded, _Computed(self.dense_hiddens(o), terms), all_units)
        upper = self.grouped(bounded.score.high)
        largest = _largest(self.ranks, score, jnp.full_like(upper[:, :1], -jnp.inf))
        zero, settled = self.proving.settle(exact, sides, all_units, bounded.moments, largest)
        provable = jnp.all(zero | settled, axis=1) & (o.largest_down < jnp.inf)
        zero, _ = self.proving.settle(bounded.hiddens, sides, all_units, bounded.moments, largest)
        wanted = jnp.logical_not(zero.reshape(*upper.shape, self.group_size).all(axis=-1))
        upper = jnp.where(jnp.isnan(upper), jnp.inf, upper)
        for rank in self.ranks:
            wanted |= upper > largest.at(rank).low
        least = jnp.min(jnp.where(wanted, upper, jnp.inf), axis=1, keepdims=True)
        count = jnp.maximum(jnp.sum(upper >= least, axis=1, dtype=jnp.int32), 1)
        return upper, jnp.where(provable, count, upper.shape[1])


class _Computed(NamedTuple):
    """For each product the computed units, ``[T, K]``, and the same of magnitudes where the norms' bound won't do."""

    hiddens: list[jax.Array]
    terms: list[jax.Array | None]


class _Bounded(NamedTuple):
    """All units, none computed: for each product its bounds and how far two dense ones can be apart."""

    hiddens: list[Interval]
    apart: list[jax.Array]
    moments: list[UnitMoments | None]
    score: Interval


def _bounded(block: ChoiceBlock, o: Operands) -> _Bounded:
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


def _proved(block: ChoiceBlock, o: Operands, bounded: _Bounded, made: _Computed, index: jax.Array) -> jax.Array:
    """Whether what is certified holds for every token, a bool scalar; a NaN proves nothing."""
    tokens, sides, gather = o.xs[0].shape[0], lax.stop_gradient(o.sides), block.gather(o, index)
    assert o.largest_down is not None
    exact, score = _exact(block, o, bounded, made, gather)
    others = block.grouped(bounded.score.high)
    chosen = jnp.zeros(others.shape, bool)
    chosen = chosen.at[entries(index, others)].set(True, unique_indices=True, mode="promise_in_bounds")
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


def _bounded_closely(block: ChoiceBlock, o: Operands) -> list[bool]:
    """For each product whether computed units are bounded by their own terms: where the choice hangs on it."""
    return [proof is not None and block.proving.compares for proof in o.proofs]


def _exact(
    block: ChoiceBlock, o: Operands, bounded: _Bounded, made: _Computed, gather: Gather
) -> tuple[list[Interval], Interval]:
    """What dense products of computed units can be, and their score; ``gather`` brings values of all units to these."""
    exact = []
    for x, value, own, off, dtype in zip(o.xs, *lax.stop_gradient(made), bounded.apart, block.up_dtypes, strict=True):
        near = gather(off) if own is None else product_error(own, x.shape[1], block.input_bits)
        value = value.astype(jnp.float32)
        exact.append(rounded(Interval(value - near, value + near), dtype))
    score = block.proving.score(exact, lax.stop_gradient(o.sides), gather, bounded.moments)
    return exact, score.map(lambda end: jnp.broadcast_to(end, exact[0].low.shape))


def _largest(ranks: Sequence[int], score: Interval, outside: jax.Array) -> Largest:
    if not ranks:
        return Largest(outside[:, :0], outside[:, :0], outside)
    most = min(max(ranks) + 1, score.low.shape[1])
    # A NaN is no bound: below it anything may lie, and above.
    low = lax.top_k(jnp.where(jnp.isnan(score.low), -jnp.inf, score.low), most)[0]
    high = lax.top_k(jnp.where(jnp.isnan(score.high), jnp.inf, score.high), most)[0]
    return Largest(low, high, outside)
