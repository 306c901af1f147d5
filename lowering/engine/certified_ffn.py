"""A feed-forward block that leaves out only units proved to be zero; where too many are not, the dense block is run.

A unit of a ReLU, squared-ReLU or ReGLU block is zero wherever its gate, the product (and bias) that goes into the ReLU,
is at most zero. The predictor's upper bound of the gate proves that without reading the unit. The units left open are
computed exactly, so the result is the dense one but for the order of its sum. How many are open is known before any is
read: of several compiled sizes the smallest that holds them is computed. Section 5 of the design; the bounds are
derived in ``lowering/prove/bounds.py``.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.engine.proved_or_dense import proved_or_dense
from hire_xform.lowering.engine.selection import Selection, rungs
from hire_xform.lowering.engine.subgraph import UpProduct, chosen_units
from hire_xform.lowering.predict.predictors import PredictorSpec
from hire_xform.lowering.primitives.da_top_k import da_top_k
from hire_xform.lowering.prove.bounds import norm
from hire_xform.lowering.prove.intervals import rounded_up
from hire_xform.lowering.prove.proofs import Proof, scores_with_bounds
from hire_xform.lowering.xla.nan_max import largest_or_nan

__all__ = ["CertifiedBlock", "CertifiedOperands", "certified_ffn", "largest_norm", "upper_gate"]

# A region of some of the units, as in `lowering/engine/subgraph.py`, but given its side inputs as well: they are
# operands.
SideRegion = Callable[[list[jax.Array], list[jax.Array], Callable[[jax.Array], jax.Array]], jax.Array]


@dataclass(frozen=True, kw_only=True)
class CertifiedBlock:
    """What is static of a certified block.

    Attributes:
      units: hidden units, m.
      gate: which of the products into the units the gate rises with.
      region: what the model does to the units: ``region(hiddens, sides, gather)``.
      gate_value: an upper bound of the gate, f32 ``[T or 1, m]``, from one of product ``gate`` and the side inputs,
        whatever the dense program rounds of what its dtypes say.
      dense_up: the dense product number ``i`` into the units: ``dense_up(i, x, rows)``, ``[T, m]``.
      dense_down: the dense contracting product, ``[T, d_out]``.
      own: the block as the program has it, of the original weights: ``own(xs, sides, leaves)``; ``[T, d_out]``.
      spec: the gate's predictor.
      active: groups of units each token may have computed.
      smaller: fewer, ascending: the smallest size that holds all open groups is computed.
      group_size: units in a group.
      up_dtypes: dtypes of the products into the units. Whether the dense program rounds to them is not known.
      hidden_dtypes: dtypes in which ``region`` is given them.
      out_dtype: dtype of the result.
      input_bits: significant bits that the dense product keeps of f32 inputs.
    """

    units: int
    gate: int
    region: SideRegion
    gate_value: Callable[[jax.Array, list[jax.Array]], jax.Array]
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
    smaller: tuple[int, ...] = ()


class CertifiedOperands(NamedTuple):
    """The arrays of a certified block: ``u`` products into the units.

    Attributes:
      xs: the tokens, ``[T, d]`` for each product.
      sides: side inputs in canonical form: ``[T or 1, m or 1]``, or scalars.
      rows: ``[m, d]`` for each product, or taller matrices.
      first_rows: where the rows begin in them.
      down: ``[m, d_out]``, or taller.
      first_down: where its rows begin.
      proof: what is kept of the gate's rows, with bounds.
      largest: for each product but the gate, and for ``down``, the largest norm of a row, f32 scalars.
      leaves: the original weights, a pytree; None where they are not there, and the fallback reads the rows.
    """

    xs: list[jax.Array]
    sides: list[jax.Array]
    rows: list[jax.Array]
    first_rows: list[jax.Array]
    down: jax.Array
    first_down: jax.Array
    proof: Proof
    largest: list[jax.Array]
    leaves: Any = None


def largest_norm(rows: jax.Array) -> jax.Array:
    """An upper bound of the norm of every row of ``[n, d]``, f32 scalar; NaN or infinite where an entry is."""
    return largest_or_nan(norm(rows))


def certified_ffn(block: CertifiedBlock, operands: CertifiedOperands) -> tuple[jax.Array, jax.Array]:
    """A block with the units left out that are proved zero, for every token; else the dense block.

    Under ``vmap`` over tokens and side inputs the tokens of all examples are taken together.

    Returns:
      ``[T, d_out]``, and an int32 scalar: the number of the size that was computed, of ``smaller`` and then ``active``;
      one more for the dense block.
    """

    def attempt(o: CertifiedOperands) -> tuple[jax.Array, jax.Array]:
        groups = block.units // block.group_size
        selections = rungs(o.xs[0].shape[0], groups, (*block.smaller, block.active))
        with jax.named_scope("predict"):
            gate = upper_gate(block, o)
        with jax.named_scope("prove"):
            rung = _rung(block, o, gate, selections)
        sizes = [functools.partial(_open_units, block, o, gate, s) for s in selections]
        return lax.switch(rung, [*sizes, lambda: _fallback(block, o)]), rung

    return proved_or_dense(attempt, lambda o: _dense(block, o), operands)


def _fallback(block: CertifiedBlock, o: CertifiedOperands) -> jax.Array:
    return _dense(block, o) if o.leaves is None else block.own(o.xs, o.sides, o.leaves)


def _dense(block: CertifiedBlock, o: CertifiedOperands) -> jax.Array:
    def own(rows: jax.Array, first: jax.Array) -> jax.Array:
        return rows if rows.shape[0] == block.units else lax.dynamic_slice_in_dim(rows, first, block.units)

    hiddens = [
        block.dense_up(i, x, own(rows, first))
        for i, (x, rows, first) in enumerate(zip(o.xs, o.rows, o.first_rows, strict=True))
    ]
    activation = block.region(hiddens, o.sides, lambda values: values)
    return block.dense_down(activation, own(o.down, o.first_down))


def upper_gate(block: CertifiedBlock, o: CertifiedOperands) -> jax.Array:
    """Upper bounds of the gate of each group of units, f32 ``[T, units / group_size]``: at most zero proves zeros."""
    xs, sides = lax.stop_gradient((o.xs, o.sides))
    tokens, groups = xs[0].shape[0], block.units // block.group_size
    found = scores_with_bounds(xs[block.gate], o.proof, block.spec, input_bits=block.input_bits)
    gate = block.gate_value(rounded_up(found.upper, block.up_dtypes[block.gate]), sides)
    return largest_or_nan(jnp.broadcast_to(gate, (tokens, block.units)).reshape(tokens, groups, block.group_size), -1)


def _rung(block: CertifiedBlock, o: CertifiedOperands, gate: jax.Array, selections: Sequence[Selection]) -> jax.Array:
    """The number of the smallest selection that holds every open group, or how many there are: int32 scalar."""
    # A NaN is no proof of a zero.
    opened = jnp.logical_not(gate <= 0.0)
    shared = selections[-1].mode == "shared"
    needed = jnp.sum(jnp.any(opened, axis=0)) if shared else jnp.max(jnp.sum(opened, axis=1))
    rung = sum(((needed > s.size).astype(jnp.int32) for s in selections), jnp.int32(0))
    for finite in _stays_finite(block, *lax.stop_gradient((o.xs, o.sides)), o.largest):
        rung = jnp.where(finite, rung, len(selections))
    return rung


def _open_units(block: CertifiedBlock, o: CertifiedOperands, gate: jax.Array, selection: Selection) -> jax.Array:
    """The block of a selection that holds every open group."""
    with jax.named_scope("select"):
        # A shared set is of the groups that are open for any token: those with the largest bounds of all tokens.
        wanted = largest_or_nan(gate, 0) if selection.mode == "shared" else gate
        index = da_top_k(wanted, selection.size)[1]
    ups = [
        UpProduct(x=x, rows=rows, first_row=_start(rows, first, block), packed=None, spec=block.spec, dtype=dtype)
        for x, rows, first, dtype in zip(o.xs, o.rows, o.first_rows, block.hidden_dtypes, strict=True)
    ]
    return chosen_units(
        ups,
        lambda hiddens, gather: block.region(hiddens, o.sides, gather),
        o.down,
        index,
        units=block.units,
        first_row=_start(o.down, o.first_down, block),
        group_size=block.group_size,
        out_dtype=block.out_dtype,
    )


def _start(rows: jax.Array, first: jax.Array, block: CertifiedBlock) -> jax.Array | int:
    return 0 if rows.shape[0] == block.units else first


def _stays_finite(
    block: CertifiedBlock, xs: list[jax.Array], sides: list[jax.Array], largest: list[jax.Array]
) -> Iterator[jax.Array]:
    """That zero times whatever else there is, is zero: bool scalars, all of which must hold."""
    smallest = min((float(jnp.finfo(d).max) for d in (*block.up_dtypes, block.out_dtype)), default=1.0)
    limit = smallest / 64.0
    others = [x for i, x in enumerate(xs) if i != block.gate]
    for x, size in zip(others, largest, strict=False):
        yield largest_or_nan(norm(x)) * size < limit
    yield largest[-1] < jnp.inf
    for side in sides:
        if jnp.issubdtype(side.dtype, jnp.floating):
            yield largest_or_nan(jnp.abs(side)) < limit
