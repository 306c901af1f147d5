"""What a proof reads of a matrix, whatever the predictor: scores of all rows with proved bounds.

    proof = pack_proof(rows, spec)                    # once: what is kept of the rows, and how far off it can be
    found = scores_with_bounds(x, proof, spec)        # reads only that: scores, and what no product is above

``Quantized`` is bounded in ``lowering/prove/bounds.py``, ``LowRank`` and ``Projected`` in
``lowering/prove/coordinates.py``.
"""

from collections.abc import Mapping
from functools import partial

import jax

from hire_xform.lowering.predict.predictors import PredictorSpec, Quantized, pack_predictor, packed_shapes
from hire_xform.lowering.prove.bounds import ScoresWithBounds, bounds_of_packed, quantized_scores
from hire_xform.lowering.prove.coordinates import coordinate_scores, coordinate_shapes, pack_coordinates
from hire_xform.lowering.xla.blocks import map_row_blocks, rows_together

__all__ = ["Proof", "pack_proof", "proof_bytes", "proof_shapes", "scores_with_bounds"]

# What is packed, by name.
Proof = Mapping[str, jax.Array]


def pack_proof(rows: jax.Array, spec: PredictorSpec, covariance: jax.Array | None = None) -> dict[str, jax.Array]:
    """What is kept of ``rows [n, d]`` (f32 or 16 bits), and bounds of what is not; `jax.vmap` packs a stack.

    Args:
      rows: ``[n, d]``.
      spec: what to keep.
      covariance: ``[d, d]``, the mean of ``x x'`` over inputs, of any scale; ``Projected`` needs it, ``Quantized`` does
        not read it.
    """
    if isinstance(spec, Quantized):
        kept = partial(_pack_quantized, spec)
        return map_row_blocks(kept, rows_together(rows.shape[1]), rows)
    return pack_coordinates(rows, spec, covariance)


def _pack_quantized(spec: Quantized, rows: jax.Array) -> dict[str, jax.Array]:
    packed = pack_predictor(rows, spec)
    return {**packed, **bounds_of_packed(rows, packed, spec)}


def proof_shapes(n: int, d: int, spec: PredictorSpec, dtype: jax.typing.DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of the proof of an ``[n, d]`` matrix of ``dtype``."""
    if isinstance(spec, Quantized):
        bound = jax.ShapeDtypeStruct((n,), "float32")
        return {**packed_shapes(n, d, spec, dtype), "error": bound, "size": bound}
    return coordinate_shapes(n, d, spec, dtype)


def proof_bytes(n: int, d: int, spec: PredictorSpec, dtype: jax.typing.DTypeLike) -> int:
    """Bytes of the proof of an ``[n, d]`` matrix of ``dtype``, all read once per call."""
    return sum(s.size * s.dtype.itemsize for s in proof_shapes(n, d, spec, dtype).values())


def scores_with_bounds(x: jax.Array, proof: Proof, spec: PredictorSpec, *, input_bits: int = 24) -> ScoresWithBounds:
    """Predicts products with every row and bounds them.

    Args:
      x: ``[T, d]``, f32 or 16 bits.
      proof: from :func:`pack_proof`.
      spec: the predictor.
      input_bits: significant bits that the dense product keeps of its f32 inputs.
    """
    if isinstance(spec, Quantized):
        return quantized_scores(x, proof, spec, input_bits=input_bits)
    return coordinate_scores(x, dict(proof), spec, input_bits=input_bits)
