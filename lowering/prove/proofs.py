"""What a proof reads of a matrix, whatever the predictor: scores of all rows with proved bounds.

    proof = pack_proof(rows, spec)                    # once: what is kept of the rows, and how far off it can be
    found = scores_with_bounds(x, proof, spec)        # reads only that: scores, and what no product is above

Each predictor that ``proves`` says how, in its file of ``lowering/predict``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from hire_xform.lowering.primitives.scores import bounded_scores
from hire_xform.lowering.primitives.stack_entry import StackEntry
from hire_xform.lowering.prove.bounds import ScoresWithBounds
from hire_xform.lowering.xla.slabs import slabs_of

if TYPE_CHECKING:
    from hire_xform.lowering.predict.predictors import Predictor

__all__ = [
    "PROBED",
    "Proof",
    "pack_proof",
    "proof_bytes",
    "proof_reads",
    "proof_shapes",
    "rows_of",
    "scores_with_bounds",
    "stage_reads",
]

# Rows, of those that look best, that are computed before each further stage: what is below them is not open.
PROBED = 8
# What is packed, by name.
Proof = Mapping[str, jax.Array]


def pack_proof(
    rows: jax.Array,
    spec: Predictor,
    covariance: jax.Array | None = None,
    arrays: Proof | None = None,
    numbers: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """What is kept of ``rows [n, d]`` (f32 or 16 bits), and bounds of what is not; `jax.vmap` packs a stack.

    Args:
      rows: ``[n, d]``.
      spec: what to keep.
      covariance: ``[d, d]``, the mean of ``x x'`` over inputs, of any scale; None where nothing is known of them.
      arrays, numbers: as for ``pack_predictor``.
    """
    return dict(spec.pack_proof(rows, spec.given("pack_proof", rows, covariance, arrays, numbers)))


def proof_shapes(n: int, d: int, spec: Predictor, dtype: jax.typing.DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of the proof of an ``[n, d]`` matrix of ``dtype``."""
    return spec.proof_shapes(n, d, dtype)


def proof_reads(
    n: int, d: int, spec: Predictor, dtype: jax.typing.DTypeLike
) -> list[tuple[float, jax.ShapeDtypeStruct]]:
    """Every array of the proof of an ``[n, d]`` matrix, and the share of its rows that a call is expected to read."""
    found = []
    for share, stage in zip(spec.expected, spec.stages, strict=True):
        for name, array in stage.proof_shapes(n, d, dtype).items():
            found.append((1.0 if name in stage.whole else share, array))
    return found


def proof_bytes(n: int, d: int, spec: Predictor, dtype: jax.typing.DTypeLike) -> int:
    """Bytes that a call is expected to read for the bounds of an ``[n, d]`` matrix of ``dtype``.

    Those of the first stage are read once per call; of each other what is expected, and the rows that are computed
    first to know what is open.
    """
    read = sum(share * s.size * s.dtype.itemsize for share, s in proof_reads(n, d, spec, dtype))
    first = min(PROBED, n) * d * jnp.dtype(dtype).itemsize * (len(spec.stages) - 1)
    return math.ceil(read + first)


def stage_reads(n: int, d: int, spec: Predictor, dtype: jax.typing.DTypeLike) -> list[tuple[Predictor, float, int]]:
    """Each stage after the first: how many of ``n`` rows it is expected to read, and the bytes of one.

    What is not of rows, such as a basis, is read whatever is open, and is not in them.
    """
    found = []
    for share, stage in zip(spec.expected[1:], spec.stages[1:], strict=True):
        kept = stage.proof_shapes(n, d, dtype)
        sizes = (s.size * s.dtype.itemsize for name, s in kept.items() if name not in stage.whole)
        found.append((stage, share * n, sum(sizes) // n))
    return found


def rows_of(proof: Proof, spec: Predictor, index: jax.Array) -> Proof:
    """The proof of chosen rows alone, of one stage: ``index`` says which, int32 ``[K]``."""

    def chosen(array: jax.Array | StackEntry) -> jax.Array:
        at = index
        if isinstance(array, StackEntry):
            array, first = array.laid_out()
            at = index + first
        return slabs_of(array, at, 1) if array.ndim == 2 else array.at[at].get(mode="promise_in_bounds")

    return {name: array if name in spec.whole else chosen(array) for name, array in proof.items()}


def scores_with_bounds(x: jax.Array, proof: Proof, spec: Predictor, *, input_bits: int = 24) -> ScoresWithBounds:
    """Predicts products with every row and bounds them.

    Args:
      x: ``[T, d]``, f32 or 16 bits.
      proof: from :func:`pack_proof`.
      spec: the predictor.
      input_bits: significant bits that the dense product keeps of its f32 inputs.
    """
    return ScoresWithBounds(*bounded_scores(x, proof, spec, input_bits))
