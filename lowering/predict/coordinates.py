"""Rows in other coordinates, the leading ones kept in few bits, and how far products with them can be off: proved.

Bounds of what is left out are worth most in the coordinates in which inputs and rows spread alike. A matrix S, ``[d,
d]``, is made for that and *stored in 8 bits*; what is stored is S from then on, so that rounding it costs nothing.
With m the mean of the rows, a row w has coordinates c with ``w - m = S' c + e``, where e is what solving in f32 leaves,
measured. A token x is used as y, its two 8-bit limbs, and ``z = S y`` is computed up to f. Then, exactly,

    w . x = m . x + (w - m) . (x - y) + e . y + c . f + c . z

Of ``c . z`` the leading coordinates are kept in segments, each as q in few bits, with a scale; of z each segment is
used as its two limbs k. The score is ``m . x`` and the sum of ``q . k``, so that, by Cauchy and Schwarz,

    |w . x - s|  <=  sum_segments |c - q| |z|  +  |c_rest| |z_rest|                       what is not kept
                     + |w - m| |x - y| + |e| |y| + |c| |f| + sum_segments |q| |z - k|     what rounding does

A row keeps the norms of the first line and one *size*, at least ``|w| + |m|``; ``|c|`` and ``|e|`` are at most two
constants of the matrix times that. Norms are rounded up to bfloat16. With u = 2^-24:

- f: an entry of z is within ``8 u (1 + sqrt(d) / 64) |S_j| |x|``, as a score of ``lowering/prove/bounds.py`` is, so
  that ``|f|`` is at most that with the Frobenius norm of S.
- ``q . k`` is within ``8 u (1 + sqrt(r) / 64) |q| |z|`` of the computed one for integers, and for coordinates kept in
  floating point within ``r u / (1 - r u)``; ``m . x`` within ``slack(d)``; adding up rounds by u of each part.
- e: ``c S`` in f32 is within ``slack(d) |c| |S|_F`` of the exact one, whatever the order of its sums.
- S, of inputs and rows divided by their mean size, has entries around one whatever theirs are, so that nothing
  overflows or vanishes on the way but what ``tiny`` covers.

The coordinates: with C the inputs' second moments and G the rows' (both a little shrunk towards the identity), the
mean of ``|c_rest|^2 |z_rest|^2`` is least where S has both second moments equal and diagonal: from ``C^(1/2) G C^(1/2)
= V L V'``, ``S = L^(1/4) V' C^(-1/2)`` (derived: then both are ``L^(1/2)``; the trace of one times that of the other is
least there, by Cauchy and Schwarz). ``LowRank`` takes these, with C the identity where nothing is known of the inputs;
``Projected`` the principal directions of C, scaled to the same effect. Kept coordinates are scaled to equal size, so
that few bits serve all.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.predict.factors import factor_dtype, leading_directions, matmul, shrunk
from hire_xform.lowering.predict.few_bits import CLIPS, closest, fine_scores, pack_nibbles, quantize
from hire_xform.lowering.primitives.stack_entry import whole
from hire_xform.lowering.prove.bounds import U, norm, slack, tiny
from hire_xform.lowering.xla.blocks import fold_row_blocks, map_row_blocks, rows_together

__all__ = ["WHOLE", "coordinate_scores", "coordinate_shapes", "pack_coordinates"]

# What is packed of the matrix as a whole.
WHOLE = frozenset({"basis_q", "basis_scale", "centre", "constants"})

_CLIPS = {8: (1.0,), 4: CLIPS}
_LEVELS = {8: 127, 4: 7}
_SMALLEST = 2.0**-126


def _segments(rank: int, bits: int) -> list[tuple[int, int, int]]:
    """Coordinates that share a scale, from where to where, and their bits: the leading ones matter most."""
    lead = leading_directions(rank)
    if bits == 8 or rank < 24:
        return [(0, rank, bits)]
    return [(0, lead, 8), (lead, rank // 2, bits), (rank // 2, rank, bits)]


def coordinate_shapes(
    n: int, d: int, rank: int, bits: int | None, dtype: jax.typing.DTypeLike
) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of what :func:`pack_coordinates` makes of an ``[n, d]`` matrix of ``dtype``."""
    struct, half = jax.ShapeDtypeStruct, jnp.bfloat16
    segments = [(0, rank, 0)] if bits is None else _segments(rank, bits)
    made = {
        "basis_q": struct((d, d), jnp.int8),
        "basis_scale": struct((d,), jnp.float32),
        "centre": struct((d,), jnp.float32),
        "constants": struct((3,), jnp.float32),
        "error": struct((n, len(segments)), half),
        "rest": struct((n,), half),
        "size": struct((n,), half),
    }
    if bits is None:
        return {**made, "a": struct((n, rank), factor_dtype(dtype))}
    made["scale"] = struct((n, len(segments)), half)
    for i, (low, high, own) in enumerate(segments):
        width = high - low
        made[f"q{i}"] = struct((n, width), jnp.int8) if own == 8 else struct((n, (width + 1) // 2), jnp.uint8)
    return made


def pack_coordinates(
    rows: jax.Array, rank: int, bits: int | None, directions: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
) -> dict[str, jax.Array]:
    """The kept coordinates of every row of ``rows [n, d]``, what they are of, and the norms of what is not kept.

    A row that holds a NaN or an infinity gets norms that are NaN, and is left out of everything else.

    Args:
      rows: ``[n, d]``, f32 or 16 bits.
      rank: how many coordinates to keep.
      bits: bits of one: 8, mostly 4, or None for floating point.
      directions: from the rows' second moments, shrunk, the columns of ``S'``, the leading ones first, and the spread
        of the coordinates.
    """
    n, d = rows.shape

    def finite(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        good = jnp.all(jnp.isfinite(block), axis=1, keepdims=True)
        return jnp.where(good, block, 0).astype(jnp.float32), good

    def total(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        block, good = finite(block)
        return jnp.sum(block / n, axis=0), jnp.sum(good)

    def spread(block: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(finite(block)[0]), axis=1)

    peak = jnp.max(map_row_blocks(spread, rows_together(d), rows))
    unit = jnp.where(peak > _SMALLEST, peak, 1.0)
    sums, count = fold_row_blocks(total, rows_together(d), rows)
    centre = sums * (n / jnp.maximum(count, 1))

    def gram_of(block: jax.Array) -> jax.Array:
        block, good = finite(block)
        block = jnp.where(good, (block - centre) / unit, 0.0)
        return matmul(block.T, block)

    gram = fold_row_blocks(gram_of, rows_together(d), rows)
    basis, sizes = directions(shrunk(gram))
    # Coordinates that are kept are scaled to equal size.
    equal = jnp.where(jnp.arange(d) < rank, jnp.sqrt(sizes), 1.0)
    basis_q, basis_scale = quantize((basis * equal).T, 127)
    basis = basis_q.astype(jnp.float32) * basis_scale[:, None]
    inverse = jnp.linalg.inv(basis)
    frobenius = norm(basis.reshape(-1))
    half = jnp.dtype(jnp.bfloat16)

    def kept(block: jax.Array) -> dict[str, jax.Array]:
        block, good = finite(block)
        size = (norm(block) + norm(centre)) * (1.0 + 4.0 * U)
        centred = block - centre
        # Any coordinates would do: what they leave of the row is measured.
        own = jnp.where(good, matmul(centred, inverse), jnp.nan)
        left = norm(centred - matmul(own, basis)) * (1.0 + 4.0 * U)
        left = left + slack(d) * (norm(own) * frobenius + size)
        made: dict[str, jax.Array] = {"size": _rounded_up(jnp.where(good[:, 0], size, jnp.nan))}
        made["rest"] = _rounded_up(norm(own[:, rank:])) if rank < d else jnp.zeros_like(made["size"])
        made["own_ratio"] = jnp.where(good[:, 0], norm(own) / size, 0.0)
        made["left_ratio"] = jnp.where(good[:, 0], left / size, 0.0)
        if bits is None:
            made["a"] = own[:, :rank].astype(factor_dtype(rows.dtype))
            made["error"] = _rounded_up(_distance(own[:, :rank], made["a"]))[:, None]
            return made
        scales, errors = [], []
        for i, (low, high, few) in enumerate(_segments(rank, bits)):
            q, scale, error = _in_bits(own[:, low:high], few)
            made[f"q{i}"] = q if few == 8 else pack_nibbles(q)
            scales.append(scale)
            errors.append(_rounded_up(error))
        return {**made, "scale": jnp.stack(scales, axis=1).astype(half), "error": jnp.stack(errors, axis=1)}

    made = map_row_blocks(kept, rows_together(d), rows)
    ratios = [1.01 * jnp.max(made.pop(name)) for name in ("own_ratio", "left_ratio")]
    constants = jnp.stack([*ratios, frobenius]).astype(jnp.float32)
    return {**made, "basis_q": basis_q, "basis_scale": basis_scale, "centre": centre, "constants": constants}


def _in_bits(own: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Coordinates as integers in so many bits with a bfloat16 scale per row, and the norm of what is lost."""
    peak = jnp.max(jnp.abs(own), axis=1)

    def clipped(share: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        scale = _rounded_up(peak * share / _LEVELS[bits]).astype(jnp.float32)
        scale = jnp.where(scale >= _SMALLEST, scale, jnp.where(scale >= 0.0, 0.0, jnp.nan))
        rounded = jnp.round(own / jnp.where(scale > 0.0, scale, 1.0)[:, None])
        q = jnp.clip(rounded, -_LEVELS[bits], _LEVELS[bits]) * (scale > 0.0)[:, None]
        # An integer of 8 bits times a scale of 8 is exact.
        return q, scale, _distance(own, q * scale[:, None])

    q, scale, error = closest(clipped(share) for share in _CLIPS[bits])
    return jnp.where(jnp.isnan(q), 0.0, q).astype(jnp.int8), scale, error


def _distance(own: jax.Array, kept: jax.Array) -> jax.Array:
    """An upper bound of the norm of a difference; the difference is rounded once, by at most u of either term."""
    return norm(own - kept.astype(jnp.float32)) * (1.0 + 4.0 * U) + 2.0 * U * norm(own)


def _rounded_up(values: jax.Array) -> jax.Array:
    """Numbers of at least zero in bfloat16, never below themselves; NaN stays NaN."""
    values = jnp.where(jnp.isnan(values), jnp.nan, values)  # one NaN, whose bits survive the addition
    raised = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32) + jnp.uint32(0xFFFF)
    return lax.bitcast_convert_type((raised >> 16).astype(jnp.uint16), jnp.bfloat16)


def coordinate_scores(
    x: jax.Array, packed: dict[str, Any], rank: int, bits: int | None, *, input_bits: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Predicts products with every row and bounds them; see the head of this file.

    Args:
      x: ``[T, d]``, f32 or 16 bits.
      packed: from :func:`pack_coordinates`.
      rank, bits: as for that.
      input_bits: significant bits that the dense product keeps of its f32 inputs.

    Returns:
      What ``Predictor.bounds`` does.
    """
    x = x.astype(jnp.float32)
    d = x.shape[1]
    # An addition for each part of a score; and what is lost to zero before it is multiplied by a row.
    lost = 2.0**-100 * d
    z, y = fine_scores(x, packed["basis_q"], packed["basis_scale"], 8)
    scores = jnp.sum(x * packed["centre"], axis=1)[:, None]
    own_ratio, left_ratio, frobenius = packed["constants"]
    own_z, size = lax.stop_gradient(z), norm(lax.stop_gradient(x))
    limbs = _limbs_left(lax.stop_gradient(x), lax.stop_gradient(y), size)
    # What each row's norms are multiplied by.
    by_error, by_size = [], limbs + (1.01 * left_ratio + slack(d, input_bits) + slack(d)) * size
    by_size = by_size + own_ratio * (_score_rounding(d) * frobenius * size + lost)
    for part, k, own, rounding in _parts(z, packed, rank, bits):
        scores = scores + part
        length = norm(own)
        # What adding the parts up rounds, too.
        left = _limbs_left(own, k, length) + (rounding + 8.0 * U) * length
        by_error.append(length + left + lost)
        by_size = by_size + own_ratio * left
    by_rest = norm(own_z[:, rank:]) if rank < d else jnp.zeros_like(size)
    columns = [packed["error"][:, i].astype(jnp.float32) for i in range(len(by_error))]
    row = packed["size"].astype(jnp.float32)
    bound = by_rest[:, None] * packed["rest"].astype(jnp.float32)[None, :] + by_size[:, None] * row[None, :]
    for token, column in zip(by_error, columns, strict=True):
        bound = bound + token[:, None] * column[None, :]
    held = lax.stop_gradient(scores)
    upper = held + bound * (1.0 + 16.0 * U) + tiny(d)
    # The sums above are rounded, too: by some u of their largest term.
    upper = upper + 8.0 * U * (jnp.abs(upper) + jnp.abs(held))
    of_sums = slack(d, input_bits) * row[None, :] * size[:, None] + tiny(d)
    return scores, lax.stop_gradient(upper), 2.0 * of_sums


def _parts(
    z: jax.Array, packed: dict[str, Any], rank: int, bits: int | None
) -> Iterator[tuple[jax.Array, Any, Any, float]]:
    """Of each segment: its share of the scores, its coordinates as used and as they are, and a score's rounding."""
    if bits is None:
        a = whole(packed["a"])
        own = z[:, : a.shape[1]]
        if a.dtype == jnp.float32:
            share, k = lax.dot_general(a, own, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST).T, own
        else:
            share, k = _in_two_halves(own, a)
        yield share, lax.stop_gradient(k), lax.stop_gradient(own), slack(own.shape[1])
        return
    for i, (low, high, few) in enumerate(_segments(rank, bits)):
        own = z[:, low:high]
        share, k = fine_scores(own, packed[f"q{i}"], packed["scale"][:, i].astype(jnp.float32), few)
        yield share, lax.stop_gradient(k), lax.stop_gradient(own), _score_rounding(high - low)


def _in_two_halves(own: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Products of bfloat16 coordinates with a token's in two bfloat16 limbs: exact but for the sum, which is f32."""
    first = own.astype(a.dtype)
    second = (own - first.astype(jnp.float32)).astype(a.dtype)
    both = lax.dot_general(
        a, jnp.concatenate([first, second]), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    ).T
    tokens = own.shape[0]
    return both[:tokens] + both[tokens:], first.astype(jnp.float32) + second.astype(jnp.float32)


def _limbs_left(own: jax.Array, kept: jax.Array, length: jax.Array) -> jax.Array:
    """The norm of what two limbs leave out; what was kept is computed with a rounding of at most 4 u."""
    return norm(own - kept) + 8.0 * U * length


def _score_rounding(d: int) -> float:
    return 8.0 * U * (1.0 + d**0.5 / 64.0)
