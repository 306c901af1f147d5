"""Bounds in stages: of all rows from few bits, then of those that can still matter from more.

What is open is decided by the rows that look best, of which a few are computed exactly first: a row below what these
are for sure will not be read. A stage reads the open rows in blocks, in a loop that runs as often as there are such
blocks, so that as many rows are read as are open, of any program that was compiled.

Nothing here is to be proved: bounds of a stage hold for every row, whichever are asked for, and a row that is left out
keeps those it has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.predict.predictors import Predictor
from hire_xform.lowering.primitives.open_rows import open_rows
from hire_xform.lowering.prove.bounds import ScoresWithBounds
from hire_xform.lowering.prove.proofs import Proof, rows_of, scores_with_bounds
from hire_xform.lowering.xla.in_line import loop

__all__ = ["narrowed"]

# Rows that a stage reads together.
TOGETHER = 512


def narrowed(
    x: jax.Array,
    proof: Proof,
    spec: Predictor,
    opened: Callable[[ScoresWithBounds], jax.Array],
    *,
    few: int = 0,
    input_bits: int = 24,
) -> tuple[ScoresWithBounds, Sequence[jax.Array]]:
    """Scores and bounds of all rows: of the first stage, and closer ones where a further stage read the row.

    Args:
      x: ``[T, d]``, f32 or 16 bits.
      proof: from ``pack_proof``.
      spec: the predictor, of one stage or several.
      opened: from what is known, how far each row can be above what is read for sure, f32 ``[n]``: rows below zero are
        left alone. NaN where nothing is known.
      few: so many open rows, or fewer, are not worth a stage.
      input_bits: significant bits that the dense product keeps of f32 inputs.

    Returns:
      Scores and bounds, and of each stage after the first how many rows it read, int32 scalars.
    """
    found = scores_with_bounds(x, spec.part(proof, 0), spec.stages[0], input_bits=input_bits)
    counts = []
    for number, stage in enumerate(spec.stages[1:], 1):
        with jax.named_scope(f"stage{number}"):
            index, count = open_rows(opened(found))
            count = jnp.where(count > few, count, 0)
            found = _read(x, spec.part(proof, number), stage, found, index, count, input_bits)
            counts.append(count)
    return found, counts


def _read(
    x: jax.Array,
    proof: Proof,
    stage: Predictor,
    found: ScoresWithBounds,
    index: jax.Array,
    count: jax.Array,
    input_bits: int,
) -> ScoresWithBounds:
    """With the closer bounds of the first ``count`` rows of an index."""
    together = min(TOGETHER, index.shape[0])

    def unread(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return state[0] < count

    def read(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        start, scores, upper = state
        # The last block begins earlier where it would not fit; entries behind the last open row are row zero, again.
        here = lax.dynamic_slice_in_dim(index, start, together)
        own = scores_with_bounds(x, rows_of(proof, stage, here), stage, input_bits=input_bits)
        before, above = (values.at[:, here].get(mode="promise_in_bounds") for values in (scores, upper))
        closer = own.upper - own.scores <= above - before
        scores = scores.at[:, here].set(jnp.where(closer, own.scores, before), mode="promise_in_bounds")
        upper = upper.at[:, here].set(jnp.where(closer, own.upper, above), mode="promise_in_bounds")
        return start + together, scores, upper

    start = (jnp.int32(0), found.scores, found.upper)
    _, scores, upper = loop(functools.partial(lax.while_loop, unread), read, start)
    return ScoresWithBounds(scores, upper, found.exact_error)
