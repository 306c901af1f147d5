"""A feed-forward block that leaves out only units proved to be zero; where too many are not, the dense block is run.

A unit of a ReLU, squared-ReLU or ReGLU block is zero wherever its gate, the product (and bias) that goes into the ReLU,
is at most zero. The predictor's upper bound of the gate proves that without reading the unit. The units left open are
computed exactly, so the result is the dense one but for the order of its sum. How many are open is known before any is
read: of several compiled sizes the smallest that holds them is computed. Section 5 of the design; the bounds are
derived in ``lowering/prove/bounds.py``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.engine.block import Gather, UpProduct, chosen_products, combined, gather_chosen
from hire_xform.lowering.engine.engine import Operands, Steps
from hire_xform.lowering.engine.selection import Selection, rungs
from hire_xform.lowering.predict.predictors import Predictor
from hire_xform.lowering.prove.bounds import norm
from hire_xform.lowering.prove.intervals import rounded_up
from hire_xform.lowering.prove.proofs import scores_with_bounds
from hire_xform.lowering.xla.nan_max import largest_or_nan

__all__ = ["Block", "CertifiedBlock", "largest_norm"]

# A region of some of the units, as in `lowering/engine/block.py`. Its side inputs are operands; and for each product
# into the units it is given what is known of all of them, or None.
SideRegion = Callable[[list[jax.Array], list[jax.Array], Gather, Sequence[Any]], jax.Array]


@dataclass(frozen=True, kw_only=True)
class Block:
    """What is static of a certified block, whatever the proof.

    Attributes:
      units: hidden units, m.
      region: what the model does to the units: ``region(hiddens, sides, gather, moments)``.
      dense_region: the same of all of them: ``dense_region(hiddens, sides)``.
      dense_up: the dense product number ``i`` into the units: ``dense_up(i, x, rows)``, ``[T, m]``.
      dense_down: the dense contracting product, ``[T, d_out]``.
      own: the block as the program has it, of the original weights: ``own(xs, sides, leaves)``; ``[T, d_out]``.
      spec: the predictor of the products that are proved of.
      active: groups of units each token may have computed.
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
    dense_down: Callable[[jax.Array, jax.Array], jax.Array]
    own: Callable[[list[jax.Array], list[jax.Array], Any], jax.Array]
    spec: Predictor
    active: int
    group_size: int
    up_dtypes: tuple[jnp.dtype, ...]
    hidden_dtypes: tuple[jnp.dtype, ...]
    out_dtype: jnp.dtype
    input_bits: int = 24

    def own_rows(self, rows: jax.Array, first: Any) -> jax.Array:
        """The block's rows, ``[m, n]``, of a matrix that may be taller."""
        return rows if rows.shape[0] == self.units else lax.dynamic_slice_in_dim(rows, first, self.units)

    def start(self, rows: jax.Array, first: Any) -> Any:
        """Where its rows begin: at zero where they are all."""
        return 0 if rows.shape[0] == self.units else first

    def dense_hiddens(self, o: Operands) -> list[jax.Array]:
        """The dense products into all units, ``[T, m]`` each."""
        given = enumerate(zip(o.xs, o.rows, o.first_rows, strict=True))
        return [self.dense_up(i, x, self.own_rows(rows, first)) for i, (x, rows, first) in given]

    def dense(self, o: Operands) -> jax.Array:
        """The dense block of packed rows."""
        assert o.down is not None
        activation = self.dense_region(self.dense_hiddens(o), o.sides)
        return self.dense_down(activation, self.own_rows(o.down, o.first_down))

    def fallback(self, o: Operands) -> jax.Array:
        """The program's own block."""
        return self.dense(o) if o.leaves is None else self.own(o.xs, o.sides, o.leaves)

    def needed(self, o: Operands) -> tuple[jax.Array, jax.Array]:
        """For a calibration: about how many groups of units prove it, were they computed.

        Returns:
          What groups are chosen by, f32 ``[T, n]``, and how many of them each token needs, int32 ``[T]``, 1 to ``n``.
        """
        raise NotImplementedError

    def tangent(self, out: jax.Array, change: jax.Array) -> jax.Array:
        """That of the dense block."""
        return change

    def ups(self, o: Operands) -> list[UpProduct]:
        """The products into the units, for what is computed of some of them."""
        return [
            UpProduct(x=x, rows=rows, first_row=self.start(rows, first), packed=None, spec=self.spec, dtype=dtype)
            for x, rows, first, dtype in zip(o.xs, o.rows, o.first_rows, self.hidden_dtypes, strict=True)
        ]

    def gather(self, o: Operands, index: jax.Array) -> Gather:
        """What brings values of all units to those of the chosen groups."""
        return gather_chosen(index, o.xs[0].shape[0], self.units, self.group_size)

    def sparse(self, o: Operands, index: jax.Array, hiddens: Sequence[jax.Array], moments: Sequence[Any]) -> jax.Array:
        """The block of the chosen groups, from the products into them."""
        assert o.down is not None
        own = [h.astype(dtype) for h, dtype in zip(hiddens, self.hidden_dtypes, strict=True)]
        activation = self.region(own, o.sides, self.gather(o, index), moments)
        start = self.start(o.down, o.first_down)
        return combined(activation, o.down, index, start, self.group_size, self.out_dtype)

    def grouped(self, values: jax.Array) -> jax.Array:
        """The largest of each group of units, ``[T, units / group_size]``; of NaNs a NaN."""
        return largest_or_nan(values.reshape(values.shape[0], -1, self.group_size), -1)


@dataclass(frozen=True, kw_only=True)
class CertifiedBlock(Block):
    """A block that leaves out units proved to be zero.

    Attributes:
      gate: which of the products into the units the gate rises with. It is proved of; of the others the largest norm
        of a row is known.
      gate_value: an upper bound of the gate, f32 ``[T or 1, m]``, from one of product ``gate`` and the side inputs,
        whatever the dense program rounds of what its dtypes say.
      smaller: fewer groups than ``active``, ascending: the smallest size that holds all open groups is computed.
    """

    gate: int
    gate_value: Callable[[jax.Array, list[jax.Array]], jax.Array]
    smaller: tuple[int, ...] = ()

    def steps(self, o: Operands) -> tuple[Steps, Sequence[Selection]]:
        """Chosen are the groups that are open: how many they are is known before any is read."""
        selections = rungs(o.xs[0].shape[0], self.units // self.group_size, (*self.smaller, self.active))
        with jax.named_scope("predict"):
            gate = _upper_gate(self, o)
        with jax.named_scope("prove"):
            rung = _rung(self, o, gate, selections)
        steps = Steps(
            # A shared set is of the groups that are open for any token: those with the largest bounds of all tokens.
            scores=largest_or_nan(gate, 0)[None] if selections[-1].mode == "shared" else gate,
            compute=lambda index: chosen_products(self.ups(o), index, self.group_size),
            result=lambda index, hiddens: self.sparse(o, index, hiddens, [None] * len(hiddens)),
            rung=rung,
        )
        return steps, selections

    def needed(self, o: Operands) -> tuple[jax.Array, jax.Array]:
        """For a calibration: upper bounds of the gate, and how many groups are open."""
        gate = _upper_gate(self, o)
        return gate, jnp.maximum(jnp.sum(_opened(gate), axis=1), 1)


def largest_norm(rows: jax.Array) -> jax.Array:
    """An upper bound of the norm of every row of ``[n, d]``, f32 scalar; NaN or infinite where an entry is."""
    return largest_or_nan(norm(rows))


def _upper_gate(block: CertifiedBlock, o: Operands) -> jax.Array:
    """Upper bounds of the gate of each group of units, f32 ``[T, units / group_size]``: at most zero proves zeros."""
    xs, sides = lax.stop_gradient((o.xs, o.sides))
    proof = o.proofs[block.gate]
    assert proof is not None
    found = scores_with_bounds(xs[block.gate], proof, block.spec, input_bits=block.input_bits)
    gate = block.gate_value(rounded_up(found.upper, block.up_dtypes[block.gate]), sides)
    return block.grouped(jnp.broadcast_to(gate, (xs[0].shape[0], block.units)))


def _rung(block: CertifiedBlock, o: Operands, gate: jax.Array, selections: Sequence[Selection]) -> jax.Array:
    """The number of the smallest selection that holds every open group, or how many there are: int32 scalar."""
    opened, shared = _opened(gate), selections[-1].mode == "shared"
    needed = jnp.sum(jnp.any(opened, axis=0)) if shared else jnp.max(jnp.sum(opened, axis=1))
    rung = sum(((needed > s.size).astype(jnp.int32) for s in selections), jnp.int32(0))
    for finite in _stays_finite(block, o):
        rung = jnp.where(finite, rung, len(selections))
    return rung


def _opened(gate: jax.Array) -> jax.Array:
    """Which groups are not proved zero; a NaN is no proof."""
    return jnp.logical_not(gate <= 0.0)


def _stays_finite(block: CertifiedBlock, o: Operands) -> Iterator[jax.Array]:
    """That zero times whatever else there is, is zero: bool scalars, all of which must hold."""
    assert o.largest_down is not None
    xs, sides = lax.stop_gradient((o.xs, o.sides))
    limit = min(float(jnp.finfo(d).max) for d in (*block.up_dtypes, block.out_dtype)) / 64.0
    for x, largest in zip(xs, o.largest, strict=True):
        if largest is not None:
            yield largest_or_nan(norm(x)) * largest < limit
    yield o.largest_down < jnp.inf
    for side in sides:
        if jnp.issubdtype(side.dtype, jnp.floating):
            yield largest_or_nan(jnp.abs(side)) < limit
