"""Compressed copies of a matrix that say, cheaply, which of its rows give the largest products.

A predictor is a *spec* (what to keep: :class:`Quantized`, :class:`LowRank`, :class:`Projected`) and a dictionary of
arrays made from the matrix once (:func:`pack_predictor`). :func:`predict_scores` reads only that dictionary:

    spec = Quantized(8)
    packed = pack_predictor(rows, spec)                  # rows [n, d]
    scores = predict_scores(x, packed, spec, n)          # x [T, d] -> f32 [T, n], close to x @ rows.T

Rows that hold a NaN or an infinity get NaN scores for themselves and leave the others' scores alone, so a selection
that takes NaN as the largest (``da_top_k`` does) always computes such rows exactly.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from hire_xform.lowering.predict.factors import matmul, principal_directions, weighted_factors
from hire_xform.lowering.predict.quantized import (
    entries,
    fine_scores,
    pack_nibbles,
    quantize,
    quantize_clipped,
    quantized_scores,
)
from hire_xform.lowering.xla.blocks import fold_row_blocks, map_row_blocks, rows_together
from hire_xform.lowering.xla.skinny_dot import skinny_dot

__all__ = [
    "LowRank",
    "Packed",
    "PredictorSpec",
    "Projected",
    "Quantized",
    "pack_predictor",
    "packed_shapes",
    "predict_scores",
    "predictor_bytes",
]

# The arrays of one packed predictor, by name; see `packed_shapes`.
Packed = Mapping[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Every entry in 8 or 4 bits, symmetric, with one f32 scale per row (HiRE-Q of arXiv 2402.09360 is 4 bits)."""

    # Bits of an entry: 8 or 4. Two 4-bit entries share a byte.
    bits: int = field(kw_only=False)

    def __post_init__(self) -> None:
        """Refuses a value out of range."""
        if isinstance(self.bits, bool) or self.bits not in (4, 8):
            raise ValueError(f"Quantized: bits={self.bits!r} is not supported; expected 8 or 4")


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The best rank-r approximation, kept as two factors (HiRE-LR of arXiv 2402.09360).

    With a calibration, the best for the inputs the model really sees: see :func:`pack_predictor`.
    """

    # Directions kept: an int >= 1, or a float in (0, 1] for that fraction of the columns (rounded up).
    rank: int | float = field(kw_only=False)
    # None keeps the tall factor in the matrix's own dtype (f32, or bf16); 8 quantises both factors as
    # `Quantized(8)` does. 4 keeps of the tall one an eighth of the directions, the leading ones, in 8 bits and the
    # others in 4: of trained matrices the leading ones make most of every product.
    bits: int | None = None

    def __post_init__(self) -> None:
        """Refuses a value out of range."""
        _check_rank("LowRank", self.rank, self.bits)

    def rank_for(self, n: int, d: int) -> int:
        """The number of directions kept of an ``[n, d]`` matrix, never more than its full rank."""
        return min(_directions(self.rank, d), n)


@dataclass(frozen=True, kw_only=True)
class Projected:
    """The rows on the principal directions of the inputs, as a calibration saw them; needs one.

    Where trained models' inputs live near a subspace of few dimensions, little is lost by it.
    """

    # Directions kept: an int >= 1, or a float in (0, 1] for that fraction of the columns (rounded up).
    rank: int | float = field(kw_only=False)
    # None keeps the projected rows in the matrix's own dtype (f32, or bf16); 8 keeps them, and the directions, as
    # `Quantized(8)` does; 4 keeps seven eighths of the rows' coordinates in 4 bits, as of `LowRank`.
    bits: int | None = None

    def __post_init__(self) -> None:
        """Refuses a value out of range."""
        _check_rank("Projected", self.rank, self.bits)

    def rank_for(self, n: int, d: int) -> int:
        """The number of directions kept of an ``[n, d]`` matrix."""
        return _directions(self.rank, d)


def _check_rank(owner: str, rank: int | float, bits: int | None) -> None:
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise ValueError(f"{owner}: rank={rank!r} is not a number; expected an int >= 1 or a float in (0, 1]")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"{owner}: rank={rank!r} is too small; expected an int >= 1 or a float in (0, 1]")
    if isinstance(rank, float) and not 0.0 < rank <= 1.0:
        raise ValueError(
            f"{owner}: rank={rank!r} is not a fraction of the columns; expected an int >= 1 or a float in (0, 1]"
        )
    if isinstance(bits, bool) or bits not in (None, 8, 4):
        raise ValueError(f"{owner}: bits={bits!r} is not supported; expected None, 8 or 4")


def _directions(rank: int | float, d: int) -> int:
    return max(1, min(math.ceil(rank * d - 1e-9) if isinstance(rank, float) else rank, d))


PredictorSpec = Quantized | LowRank | Projected
_EXPECTED = "expected Quantized(...), LowRank(...) or Projected(...)"


def leading_directions(rank: int) -> int:
    """How many of the directions that are kept in 4 bits are kept in 8 instead: an eighth."""
    return rank // 8


def factor_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype a low-rank factor of a matrix of ``dtype`` is kept in: f32, or bf16 for 16-bit matrices."""
    return jnp.dtype(jnp.bfloat16) if jnp.dtype(dtype).itemsize == 2 else jnp.dtype(jnp.float32)


def packed_shapes(
    n: int, d: int, spec: PredictorSpec, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of what :func:`pack_predictor` makes of an ``[n, d]`` matrix of ``dtype``."""
    struct = jax.ShapeDtypeStruct
    match spec:
        case Quantized(bits=8):
            return {"q": struct((n, d), jnp.int8), "scale": struct((n,), jnp.float32)}
        case Quantized(bits=4):
            return {"q": struct((n, (d + 1) // 2), jnp.uint8), "scale": struct((n,), jnp.float32)}
        case LowRank(bits=None) | Projected(bits=None):
            r = spec.rank_for(n, d)
            return {"a": struct((n, r), factor_dtype(dtype)), "basis": struct((d, r), jnp.float32)}
        case LowRank() | Projected():
            r = spec.rank_for(n, d)
            made = {
                "q": struct((n, r), jnp.int8),
                "scale": struct((n,), jnp.float32),
                "basis_q": struct((r, d), jnp.int8),
                "basis_scale": struct((r,), jnp.float32),
            }
            lead = leading_directions(r)
            if spec.bits == 4:
                made["q"] = struct((n, (r - lead + 1) // 2), jnp.uint8)
            if spec.bits == 4 and lead:
                made |= {"lead_q": struct((n, lead), jnp.int8), "lead_scale": struct((n,), jnp.float32)}
            return made
    raise TypeError(f"predictor {spec!r} is unknown; {_EXPECTED}")


def predictor_bytes(n: int, d: int, spec: PredictorSpec, dtype: jax.typing.DTypeLike = jnp.float32) -> int:
    """Bytes one call of :func:`predict_scores` reads of the packed predictor of an ``[n, d]`` matrix of ``dtype``."""
    return sum(s.size * s.dtype.itemsize for s in packed_shapes(n, d, spec, dtype).values())


def pack_predictor(rows: jax.Array, spec: PredictorSpec, covariance: jax.Array | None = None) -> dict[str, jax.Array]:
    """Makes the predictor of a matrix: read everything once, keep little.

    With the covariance C of the inputs, ``LowRank`` minimises ``|(W - A B) C^(1/2)|_F``, the error of the scores over
    those inputs, instead of ``|W - A B|_F``: A B is the truncated SVD of ``W C^(1/2)``, times ``C^(-1/2)`` (Eckart and
    Young in the norm of C). C is shrunk towards a multiple of the identity first, so that directions the inputs were
    never seen in count a little.

    Args:
      rows: ``[n, d]``, floating; its rows are what a product is predicted for. `jax.vmap` packs a stack of them.
      spec: what to keep.
      covariance: ``[d, d]``, the mean of ``x x'`` over inputs, of any scale; None where nothing is known of them.
        ``Quantized`` does not read it, ``Projected`` needs it.

    Returns:
      Arrays as in :func:`packed_shapes`.

    Raises:
      ValueError: ``rows`` is not a floating matrix with at least one row and column, or the covariance is missing.
    """
    if rows.ndim != 2 or 0 in rows.shape or not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(
            f"pack_predictor: rows of shape {rows.shape} and dtype {rows.dtype}; expected a non-empty floating [n, d]"
        )
    match spec:
        case Quantized():
            return map_row_blocks(partial(_pack_quantized, spec.bits), rows_together(rows.shape[1]), rows)
        case LowRank() | Projected():
            return _pack_factors(rows, spec, covariance)
    raise TypeError(f"predictor {spec!r} is unknown; {_EXPECTED}")


def _pack_quantized(bits: int, rows: jax.Array) -> dict[str, jax.Array]:
    q, scale = quantize(rows, 127 if bits == 8 else 7)
    return {"q": q if bits == 8 else pack_nibbles(q), "scale": scale}


def _pack_factors(rows: jax.Array, spec: LowRank | Projected, covariance: jax.Array | None) -> dict[str, jax.Array]:
    n, d = rows.shape

    def gram_of(block: jax.Array) -> jax.Array:
        finite = jnp.all(jnp.isfinite(block), axis=1, keepdims=True)
        block = jnp.where(finite, block, 0).astype(jnp.float32)
        return matmul(block.T, block)

    gram = fold_row_blocks(gram_of, rows_together(d), rows)
    rank = spec.rank_for(n, d)
    if covariance is not None:
        covariance = covariance.astype(jnp.float32)
    elif isinstance(spec, Projected):
        raise ValueError("pack_predictor: Projected without a covariance; expected that of the inputs, [d, d]")
    if covariance is None or isinstance(spec, Projected):
        of_rows = of_inputs = principal_directions(gram if covariance is None else covariance, rank)
    else:
        of_rows, of_inputs = weighted_factors(gram, covariance, rank)
    of_rows, of_inputs = of_rows[:, ::-1], of_inputs[:, ::-1]  # the leading direction first
    if spec.bits is not None:
        # Directions of equal size lose least to one scale per row, so each direction's size moves into the inputs'.
        squares = jnp.sum(of_rows * matmul(gram, of_rows), axis=0)
        size = jnp.sqrt(jnp.maximum(squares / n, 0.0))
        size = jnp.where(size > 1e-6 * jnp.max(size), size, 1.0)
    else:
        size = jnp.ones(of_rows.shape[1], jnp.float32)

    lead = leading_directions(rank) if spec.bits == 4 else 0

    def factor(block: jax.Array) -> dict[str, jax.Array]:
        finite = jnp.all(jnp.isfinite(block), axis=1, keepdims=True)
        block = jnp.where(finite, block, 0).astype(jnp.float32)
        a = jnp.where(finite, matmul(block, of_rows / size), jnp.nan)
        if spec.bits is None:
            return {"a": a.astype(factor_dtype(rows.dtype))}
        made: dict[str, jax.Array] = {}
        if lead:
            made["lead_q"], made["lead_scale"] = quantize(a[:, :lead], 127)
        if spec.bits == 8:
            made["q"], made["scale"] = quantize(a, 127)
        else:
            q, made["scale"] = quantize_clipped(a[:, lead:], 7)
            made["q"] = pack_nibbles(q)
        return made

    parts = map_row_blocks(factor, rows_together(d), rows)
    if spec.bits is not None:
        basis_q, basis_scale = quantize((of_inputs * size).T, 127)
        return {**parts, "basis_q": basis_q, "basis_scale": basis_scale}
    return {**parts, "basis": of_inputs}


def predict_scores(x: jax.Array, packed: Packed, spec: PredictorSpec, n: int) -> jax.Array:
    """The predicted ``x @ rows.T``, from the packed predictor alone.

    Activations are quantised per token where the predictor is: symmetric, in 8 bits, for low rank in two limbs of 8.
    The derivative with respect to ``x`` is that of the product with the decompressed rows, since rounding has none.

    Args:
      x: ``[T, d]``, floating.
      packed: from :func:`pack_predictor` with the same ``spec``.
      spec: what was kept.
      n: rows of the matrix.

    Returns:
      f32 ``[T, n]``. NaN for rows that held a NaN or an infinity, and for every row of a token that holds one.
    """
    match spec:
        case Quantized():
            return quantized_scores(x, packed["q"], packed["scale"], spec.bits)
        case LowRank() | Projected():
            if spec.bits is not None:
                # Both maps enlarge some directions a hundredfold, and with them what one limb would lose.
                z, _ = fine_scores(x.astype(jnp.float32), packed["basis_q"], packed["basis_scale"], 8)
                lead = leading_directions(z.shape[1]) if spec.bits == 4 else 0
                scores, _ = fine_scores(z[:, lead:], packed["q"], packed["scale"], spec.bits)
                if lead:
                    scores = scores + fine_scores(z[:, :lead], packed["lead_q"], packed["lead_scale"], 8)[0]
                return scores
            z = jnp.matmul(x.astype(jnp.float32), packed["basis"], preferred_element_type=jnp.float32)
            return skinny_dot(z.astype(packed["a"].dtype), packed["a"]).astype(jnp.float32)
    raise TypeError(f"predictor {spec!r} is unknown; {_EXPECTED}")


def unpacked_rows(packed: Packed, spec: Quantized, d: int) -> jax.Array:
    """The rows of ``d`` columns that a quantised predictor stands for, f32 ``[n, d]``."""
    return entries(packed["q"], spec.bits, d).astype(jnp.float32) * packed["scale"][:, None]
