"""What a proof reads of a matrix, whatever the predictor: scores of all rows with proved bounds.

    proof = pack_proof(rows, spec)                    # once: what is kept of the rows, and how far off it can be
    found = scores_with_bounds(x, proof, spec)        # reads only that: scores, and what no product is above

Each predictor that ``proves`` says how, in its file of ``lowering/predict``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax

from hire_xform.lowering.primitives.scores import bounded_scores
from hire_xform.lowering.prove.bounds import ScoresWithBounds

if TYPE_CHECKING:
    from hire_xform.lowering.predict.predictors import Predictor

__all__ = ["Proof", "pack_proof", "proof_bytes", "proof_shapes", "scores_with_bounds"]

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


def proof_bytes(n: int, d: int, spec: Predictor, dtype: jax.typing.DTypeLike) -> int:
    """Bytes of the proof of an ``[n, d]`` matrix of ``dtype``, all read once per call."""
    return sum(s.size * s.dtype.itemsize for s in proof_shapes(n, d, spec, dtype).values())


def scores_with_bounds(x: jax.Array, proof: Proof, spec: Predictor, *, input_bits: int = 24) -> ScoresWithBounds:
    """Predicts products with every row and bounds them.

    Args:
      x: ``[T, d]``, f32 or 16 bits.
      proof: from :func:`pack_proof`.
      spec: the predictor.
      input_bits: significant bits that the dense product keeps of its f32 inputs.
    """
    return ScoresWithBounds(*bounded_scores(x, proof, spec, input_bits))
