"""A feed-forward block that leaves out only units proved to be zero; where too many are not, the dense block is run.

What is at most zero only where a unit is zero is bounded without reading the unit:

- of a ReLU, squared-ReLU or ReGLU block the gate, the product (and bias) that goes into the ReLU. Bounds are derived in
  ``lowering/prove/bounds.py``;
- of a block that subtracts a threshold of its own at mean and deviation, the magnitude of the activation. Each product
  into the units lies between bounds, and so does all that the model makes of it (``lowering/prove/intervals.py``). Mean
  and deviation come from moments, not from the units; what the dense ones can be off by is bounded in
  ``passes/prove/sum_bounds.py``.

The units left open are computed exactly, so the result is the dense one but for the rounding of its sums, those of the
mean and the deviation among them. How many are open is known before any is read: of several compiled sizes the smallest
that holds them is computed. Too many open units, and whatever is not finite, run dense.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.engine.block import (
    Gather,
    UpProduct,
    beside_one_another,
    chosen_products,
    combined,
    gather_chosen,
)
from hire_xform.lowering.engine.engine import Operands, Steps
from hire_xform.lowering.engine.selection import Selection, rungs
from hire_xform.lowering.predict.predictors import Predictor
from hire_xform.lowering.primitives.stored_rows import own_rows
from hire_xform.lowering.prove.bounds import norm, slack, tiny
from hire_xform.lowering.prove.intervals import Interval, rounded, rounded_up
from hire_xform.lowering.prove.moment_bounds import UnitMoments, bounded_moments
from hire_xform.lowering.prove.proofs import Proof, scores_with_bounds
from hire_xform.lowering.xla.nan_max import largest_or_nan

__all__ = ["CertifiedBlock", "GatedBlock", "ThresholdBlock", "largest_norm"]

# A region of some of the units, as in `lowering/engine/block.py`. Its side inputs are operands; and for each product
# into the units it is given what is known of all of them, or None.
SideRegion = Callable[[list[jax.Array], list[jax.Array], Gather, Sequence[Any]], jax.Array]


class Open(NamedTuple):
    """What is known of all units, none computed.

    Attributes:
      upper: f32 ``[T, m]``, at most zero only where the unit is zero; NaN where nothing is known.
      sure: what must hold besides for the open units to do: bool scalars, or ``[T]``.
      moments: of each product what is known of its sums over all units, for the region; None where it sums none.
    """

    upper: jax.Array
    sure: Sequence[jax.Array]
    moments: Sequence[UnitMoments | None]


@dataclass(frozen=True, kw_only=True)
class CertifiedBlock:
    """A block that leaves out units proved to be zero.

    Attributes:
      units: hidden units, m.
      region: what the model does to the units: ``region(hiddens, sides, gather, moments)``.
      dense_region: the same of all of them: ``dense_region(hiddens, sides)``.
      dense_up: the dense product number ``i`` into the units: ``dense_up(i, x, rows)``, ``[T, m]``.
      dense_down: the dense contracting product, ``[T, d_out]``, of the rows of each matrix; of several beside one
        another.
      own: the block as the program has it, of the original weights: ``own(xs, sides, leaves)``; ``[T, d_out]``.
      spec: the predictor of the products that are proved of.
      active: groups of units each token may have computed.
      smaller: fewer groups than ``active``, ascending: the smallest size that holds all open groups is computed.
      group_size: units in a group; where the model chooses groups, a multiple of theirs.
      up_dtypes: dtypes of the products into the units. Whether the dense program rounds to them is not known.
      hidden_dtypes: dtypes in which ``region`` is given them.
      out_dtype: dtype of the result.
      input_bits: significant bits that the dense products keep of f32 inputs.
    """

    one_by_one = False
    units: int
    region: SideRegion
    dense_region: Callable[[list[jax.Array], list[jax.Array]], jax.Array]
    dense_up: Callable[[int, jax.Array, jax.Array], jax.Array]
    dense_down: Callable[[jax.Array, Sequence[jax.Array]], jax.Array]
    own: Callable[[list[jax.Array], list[jax.Array], Any], jax.Array]
    spec: Predictor
    active: int
    group_size: int
    up_dtypes: tuple[jnp.dtype, ...]
    hidden_dtypes: tuple[jnp.dtype, ...]
    out_dtype: jnp.dtype
    input_bits: int = 24
    smaller: tuple[int, ...] = ()

    def own_rows(self, rows: jax.Array, first: Any) -> jax.Array:
        """The block's rows, ``[m, n]``, of a matrix that may be taller."""
        return own_rows(rows, first, self.units)

    def start(self, rows: jax.Array, first: Any) -> Any:
        """Where its rows begin: at zero where they are all."""
        return 0 if rows.shape[0] == self.units else first

    def dense_hiddens(self, o: Operands) -> list[jax.Array]:
        """The dense products into all units, ``[T, m]`` each."""
        given = enumerate(zip(o.xs, o.rows, o.first_rows, strict=True))
        return [self.dense_up(i, x, self.own_rows(rows, first)) for i, (x, rows, first) in given]

    def dense(self, o: Operands) -> jax.Array:
        """The dense block of packed rows."""
        activation = self.dense_region(self.dense_hiddens(o), o.sides)
        return self.dense_down(activation, [self.own_rows(rows, first) for rows, first in _contracting(o)])

    def fallback(self, o: Operands) -> jax.Array:
        """The program's own block."""
        return self.dense(o) if o.leaves is None else self.own(o.xs, o.sides, o.leaves)

    def opened(self, o: Operands) -> Open:
        """Bounds of what is zero only where a unit is, from predictors alone."""
        raise NotImplementedError

    def steps(self, o: Operands) -> tuple[Steps, Sequence[Selection]]:
        """Chosen are the groups that are open: how many they are is known before any is read."""
        selections = rungs(o.xs[0].shape[0], self.units // self.group_size, (*self.smaller, self.active))
        with jax.named_scope("predict"):
            opened = self.opened(o)
            upper = self.grouped(opened.upper)
        with jax.named_scope("prove"):
            rung = _rung(upper, opened.sure, selections)
        steps = Steps(
            # A shared set is of the groups that are open for any token: those with the largest bounds of all tokens.
            scores=largest_or_nan(upper, 0)[None] if selections[-1].mode == "shared" else upper,
            compute=lambda index: chosen_products(self.ups(o), index, self.group_size),
            result=lambda index, hiddens: self.sparse(o, index, hiddens, opened.moments),
            rung=rung,
        )
        return steps, selections

    def needed(self, o: Operands) -> tuple[jax.Array, jax.Array]:
        """For a calibration: how many groups of units prove it, were they computed.

        Returns:
          What groups are chosen by, f32 ``[T, n]``, and how many of them each token needs, int32 ``[T]``, 1 to ``n``:
          those that are open, or all where something else is not sure.
        """
        opened = self.opened(o)
        upper = self.grouped(opened.upper)
        count = jnp.maximum(jnp.sum(_is_open(upper), axis=1, dtype=jnp.int32), 1)
        for sure in opened.sure:
            count = jnp.where(sure, count, upper.shape[1])
        return upper, count

    def tangent(self, out: jax.Array, change: jax.Array) -> jax.Array:
        """That of the dense block."""
        return change

    def ups(self, o: Operands) -> list[UpProduct]:
        """The products into the units, for what is computed of some of them."""
        return [
            UpProduct(x=x, rows=rows, first_row=self.start(rows, first), packed=None, spec=self.spec, dtype=dtype)
            for x, rows, first, dtype in zip(o.xs, o.rows, o.first_rows, self.hidden_dtypes, strict=True)
        ]

    def sparse(self, o: Operands, index: jax.Array, hiddens: Sequence[jax.Array], moments: Sequence[Any]) -> jax.Array:
        """The block of the chosen groups, from the products into them."""
        own = [h.astype(dtype) for h, dtype in zip(hiddens, self.hidden_dtypes, strict=True)]
        gather = gather_chosen(index, o.xs[0].shape[0], self.units, self.group_size)
        activation = self.region(own, o.sides, gather, moments)
        made = [
            combined(activation, rows, self.start(rows, first), index, self.group_size, self.out_dtype)
            for rows, first in _contracting(o)
        ]
        return beside_one_another(made)

    def grouped(self, values: jax.Array) -> jax.Array:
        """The largest of each group of units, ``[T, units / group_size]``; of NaNs a NaN."""
        return largest_or_nan(values.reshape(values.shape[0], -1, self.group_size), -1)


@dataclass(frozen=True, kw_only=True)
class GatedBlock(CertifiedBlock):
    """One of ReLU and its kin: a unit is zero where its gate is at most zero.

    Attributes:
      gate: which of the products into the units the gate rises with. It is proved of; of the others the largest norm
        of a row is known.
      gate_value: an upper bound of the gate, f32 ``[T or 1, m]``, from one of product ``gate`` and the side inputs,
        whatever the dense program rounds of what its dtypes say.
    """

    gate: int
    gate_value: Callable[[jax.Array, list[jax.Array]], jax.Array]

    def opened(self, o: Operands) -> Open:
        """Upper bounds of the gate; and that zero times whatever else there is, is zero."""
        xs, sides = lax.stop_gradient((o.xs, o.sides))
        proof = o.proofs[self.gate]
        assert proof is not None
        found = scores_with_bounds(xs[self.gate], proof, self.spec, input_bits=self.input_bits)
        gate = self.gate_value(rounded_up(found.upper, self.up_dtypes[self.gate]), sides)
        upper = jnp.broadcast_to(gate, (xs[0].shape[0], self.units))
        return Open(upper, list(_stays_finite(self, o)), [None] * len(xs))


@dataclass(frozen=True, kw_only=True)
class ThresholdBlock(CertifiedBlock):
    """One that subtracts a threshold at mean and deviation of all its units.

    Attributes:
      bounds: upper bounds of the magnitude of the activation, f32 ``[T, m]``, and of which tokens all bounds are known,
        bool ``[T]``: from an interval ``[T, m]`` for each product into the units, the side inputs, and the moments.
    """

    bounds: Callable[[list[Interval], list[jax.Array], list[UnitMoments | None]], tuple[jax.Array, jax.Array]]

    def opened(self, o: Operands) -> Open:
        """Upper bounds of the magnitude of the activation; and that all are known."""
        xs, sides = lax.stop_gradient((o.xs, o.sides))
        assert o.largest_down is not None
        hiddens = [_hidden(self, *own) for own in zip(xs, o.proofs, o.largest, self.up_dtypes, strict=True)]
        moments = [
            None if packed is None else bounded_moments(x, packed, input_bits=self.input_bits)
            for x, packed in zip(xs, o.moments, strict=True)
        ]
        upper, known = self.bounds(hiddens, sides, moments)
        return Open(lax.stop_gradient(upper), [known, o.largest_down < jnp.inf], moments)


def _contracting(o: Operands) -> list[tuple[jax.Array, Any]]:
    """The contracting matrices, and where their rows begin."""
    assert o.down is not None
    return [(o.down, o.first_down), *zip(o.beside, o.first_beside, strict=True)]


def largest_norm(rows: jax.Array) -> jax.Array:
    """An upper bound of the norm of every row of ``[n, d]``, f32 scalar; NaN or infinite where an entry is."""
    return largest_or_nan(norm(rows))


def _rung(upper: jax.Array, sure: Sequence[jax.Array], selections: Sequence[Selection]) -> jax.Array:
    """The number of the smallest selection that holds every open group, or how many there are: int32 scalar."""
    opened, shared = _is_open(upper), selections[-1].mode == "shared"
    needed = jnp.sum(jnp.any(opened, axis=0)) if shared else jnp.max(jnp.sum(opened, axis=1))
    rung = sum(((needed > s.size).astype(jnp.int32) for s in selections), jnp.int32(0))
    for holds in sure:
        rung = jnp.where(jnp.all(holds), rung, len(selections))
    return rung


def _is_open(upper: jax.Array) -> jax.Array:
    """Which groups are not proved zero; a NaN is no proof."""
    return jnp.logical_not(upper <= 0.0)


def _hidden(block: CertifiedBlock, x: jax.Array, proof: Proof | None, largest: Any, dtype: jnp.dtype) -> Interval:
    """Bounds of a product into the units, ``[T, m]``: from its proof, or else from the largest norm of a row."""
    if proof is not None:
        found = scores_with_bounds(x, proof, block.spec, input_bits=block.input_bits)
        return rounded(Interval(found.lower, found.upper), dtype)
    d = x.shape[1]
    most = norm(x)[:, None] * largest * (1.0 + 1e-6) * (1.0 + slack(d, block.input_bits)) + tiny(d)
    most = jnp.broadcast_to(most, (x.shape[0], block.units))
    return rounded(Interval(-most, most), dtype)


def _stays_finite(block: GatedBlock, o: Operands) -> Iterator[jax.Array]:
    """That zero times whatever else there is, is zero: bool ``[T]`` or scalars, all of which must hold."""
    assert o.largest_down is not None
    xs, sides = lax.stop_gradient((o.xs, o.sides))
    limit = min(float(jnp.finfo(d).max) for d in (*block.up_dtypes, block.out_dtype)) / 64.0
    for x, largest in zip(xs, o.largest, strict=True):
        if largest is not None:
            yield norm(x) * largest < limit
    yield o.largest_down < jnp.inf
    for side in sides:
        if jnp.issubdtype(side.dtype, jnp.floating):
            yield jnp.all(jnp.abs(side) < limit, axis=-1) if side.ndim else jnp.abs(side) < limit
