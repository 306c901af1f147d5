"""Rows in few bits, with a scale each, and products of them with tokens that are quantised as well."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.primitives.kernels import bind_step, step_primitive
from hire_xform.lowering.primitives.stack_entry import StackEntry, whole
from hire_xform.lowering.xla.blocks import map_row_blocks
from hire_xform.lowering.xla.promotion import usual_promotion
from hire_xform.lowering.xla.skinny_dot import skinny_dot

__all__ = [
    "CLIPS",
    "as_kept",
    "as_rows",
    "closest",
    "entries",
    "fine_scores",
    "integer_scores",
    "of_limbs",
    "pack_nibbles",
    "quantize",
    "quantize_clipped",
    "quantized_scores",
    "scores_in_two",
    "two_limbs",
    "unpack_nibbles",
]


def quantize(values: jax.Array, levels: int) -> tuple[jax.Array, jax.Array]:
    """Symmetric quantisation along the last axis.

    Returns:
      Integers of ``values``' shape as int8 in ``[-levels, levels]`` and f32 scales without the last axis. A scale is
      NaN where the slice holds a NaN or an infinity, and 0 where it is all zero; the integers are 0 there.
    """
    values = values.astype(jnp.float32)
    peak = jnp.max(jnp.abs(values), axis=-1)
    # Each element is tested: on CPU a maximum of many passes over NaNs.
    # Spelled in lax: each jnp.where, clip and round would be a function of its own to trace and lower at every site.
    finite = lax.reduce_and(lax.is_finite(values), (values.ndim - 1,))
    scale = lax.select(finite, peak / levels, lax.full_like(peak, jnp.nan))
    usable = scale > 0.0
    divisor = lax.select(usable, scale, lax.full_like(scale, 1.0))[..., None]
    rounded = lax.round(values / divisor, lax.RoundingMethod.TO_NEAREST_EVEN)
    q = lax.clamp(jnp.float32(-levels), rounded, jnp.float32(levels))
    q = lax.select(jnp.broadcast_to(usable[..., None], q.shape), q, lax.full_like(q, 0.0))
    return q.astype(jnp.int8), scale


# Clipping the largest entries makes the others' steps smaller; packing in 4 bits tries these shares of the largest.
CLIPS = (1.0, 0.9, 0.8, 0.7)


def closest(tried: Iterable[tuple[jax.Array, jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each row the way of keeping it with the least error: of ``(q [n, d], scale [n], error [n])`` each."""
    best, *others = tried
    for other in others:
        better = other[2] < best[2]
        kept = (jnp.where(better[:, None] if a.ndim > 1 else better, a, b) for a, b in zip(other, best, strict=True))
        q, scale, error = kept
        best = q, scale, error
    return best


def quantize_clipped(values: jax.Array, levels: int) -> tuple[jax.Array, jax.Array]:
    """As :func:`quantize` for ``[n, d]``, with each row's largest entries clipped where that brings it closer."""

    def clipped(share: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        limit = share * jnp.max(jnp.abs(values), axis=-1, keepdims=True)
        q, scale = quantize(jnp.clip(values, -limit, limit), levels)
        return q, scale, jnp.sum(jnp.square(values - q * scale[:, None]), axis=1)

    q, scale, _ = closest(clipped(share) for share in CLIPS)
    return q, scale


def pack_nibbles(q: jax.Array) -> jax.Array:
    """``int8 [..., d]`` in [-7, 7] to ``uint8 [..., ceil(d/2)]``: the first half in the low nibble, the rest high."""
    half = (q.shape[-1] + 1) // 2
    low, high = q[..., :half], q[..., half:]
    high = jnp.pad(high, [(0, 0)] * (q.ndim - 1) + [(0, half - high.shape[-1])])
    return ((low & 0xF) | ((high & 0xF) << 4)).astype(jnp.uint8)


def unpack_nibbles(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two int8 halves that :func:`pack_nibbles` joined; the second may end in one column of padding."""
    signed = lax.bitcast_convert_type(packed, jnp.int8)
    low = lax.shift_right_arithmetic(lax.shift_left(signed, jnp.int8(4)), jnp.int8(4))
    high = lax.shift_right_arithmetic(signed, jnp.int8(4))
    return low, high


# Bytes of 4-bit entries that are unpacked together: enough to use all cores, little enough to stay in cache.
_NIBBLE_BLOCK_BYTES = 4 * 2**20


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def quantized_scores(x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array, bits: int) -> jax.Array:
    """Integer products of quantised tokens and quantised rows, then both scales: f32 ``[T, n]``."""

    def portable(x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array) -> list[jax.Array]:
        tokens, token_scale = quantize(x, 127)
        return [integer_scores(tokens, q, bits).astype(jnp.float32) * token_scale[:, None] * scale[None, :]]

    return bind_step(quantized_scores_p, portable, x.astype(jnp.float32), q, scale, bits=bits)[0]


def integer_scores(tokens: jax.Array, kept: jax.Array | StackEntry, bits: int) -> jax.Array:
    """``int8 [T, d]`` times quantised rows, int32 ``[T, n]``: exact up to d = 2^17."""
    q = whole(kept)
    if bits == 8:
        return skinny_dot(tokens, q)
    half = q.shape[1]
    first, second = tokens[:, :half], tokens[:, half:]
    second = jnp.pad(second, ((0, 0), (0, half - second.shape[1])))

    def block_dot(block: jax.Array) -> jax.Array:
        low, high = unpack_nibbles(block)
        return (skinny_dot(first, low) + skinny_dot(second, high)).T

    return map_row_blocks(block_dot, max(1, _NIBBLE_BLOCK_BYTES // (2 * half)), q).T


@quantized_scores.defjvp
@usual_promotion()
def quantized_scores_jvp(bits: int, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """Straight through the rounding of ``x``; the packed arrays have no derivative."""
    x, q, scale = primals
    return quantized_scores(x, q, scale, bits), _scores_of_change(tangents[0], q, scale, bits)


def _scores_of_change(dx: jax.Array, q: jax.Array | StackEntry, scale: jax.Array, bits: int) -> jax.Array:
    integers = entries(q, bits, dx.shape[1]).astype(jnp.float32)
    return skinny_dot(dx.astype(jnp.float32), integers) * scale[None, :]


def entries(kept: jax.Array | StackEntry, bits: int, d: int) -> jax.Array:
    """The integers of quantised rows, int8 ``[n, d]``."""
    q = whole(kept)
    return q if bits == 8 else jnp.concatenate(unpack_nibbles(q), axis=1)[:, :d]


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def fine_scores(x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """As ``predict_scores`` with ``Quantized``, but each token in two 8-bit limbs: the second has what the first lost.

    One token costs no more than with one limb, since fast integer products take two at least.

    Args:
      x: f32 ``[T, d]``.
      q: the predictor's entries.
      scale: their scales.
      bits: bits of an entry.

    Returns:
      Scores, f32 ``[T, n]``, and the tokens as they were kept, f32 ``[T, d]``.
    """

    def portable(x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array) -> list[jax.Array]:
        first, second, step = two_limbs(x)
        raw = integer_scores(jnp.concatenate([first, second]), q, bits).astype(jnp.float32)
        sums = raw[: x.shape[0]] + raw[x.shape[0] :] / 254.0
        return [sums * step * scale[None, :], of_limbs(first, second, step)]

    scores, kept = bind_step(fine_scores_p, portable, x, q, scale, bits=bits)
    return scores, kept


def scores_in_two(
    x: jax.Array,
    basis_q: jax.Array | StackEntry,
    basis_scale: jax.Array,
    q: jax.Array | StackEntry,
    scale: jax.Array,
) -> jax.Array:
    """Scores of what tokens are on some directions: those are scores as well, all in 8 bits; f32 ``[T, n]``.

    Args:
      x: f32 ``[T, d]``.
      basis_q, basis_scale: the directions, ``[r, d]``, and their scales.
      q, scale: rows on them, ``[n, r]``, and theirs.
    """

    def portable(x: jax.Array, *arrays: Any) -> list[jax.Array]:
        on_directions, _ = fine_scores(x, *arrays[:2], 8)
        return [fine_scores(on_directions, *arrays[2:], 8)[0]]

    return bind_step(scores_in_two_p, portable, x, basis_q, basis_scale, q, scale)[0]


def two_limbs(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of ``[T, d]`` the leading 8 bits, the 8 that follow in steps of 1/254, and the scales ``[T, 1]``."""
    first, token_scale = quantize(x, 127)
    step = token_scale[:, None]
    rest = (x - first.astype(jnp.float32) * step) / jnp.where(step > 0.0, step, 1.0)
    return first, jnp.clip(jnp.round(rest * 254.0), -127.0, 127.0).astype(jnp.int8), step


def of_limbs(first: jax.Array, second: jax.Array, step: jax.Array) -> jax.Array:
    """Tokens ``[T, d]`` of what :func:`two_limbs` made of them, as they are kept."""
    return (first.astype(jnp.float32) + second.astype(jnp.float32) / 254.0) * step


def as_kept(x: jax.Array) -> jax.Array:
    """Tokens ``[T, d]`` as :func:`fine_scores` keeps them."""
    return of_limbs(*two_limbs(x))


def as_rows(q: jax.Array | StackEntry, scale: jax.Array, bits: int, d: int) -> jax.Array:
    """Quantised rows as f32 ``[n, d]``: with tokens as they are kept, their products are scores, but for rounding."""
    return entries(q, bits, d).astype(jnp.float32) * scale[:, None]


@fine_scores.defjvp
@usual_promotion()
def _fine_scores_jvp(bits: int, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    """Straight through the rounding of ``x``; the packed arrays have no derivative."""
    x, q, scale = primals
    return fine_scores(x, q, scale, bits), (_scores_of_change(tangents[0], q, scale, bits), tangents[0])


# A kernel: rule(x, q, scale, *, bits) -> what quantized_scores or fine_scores returns; x is f32.
quantized_scores_p = step_primitive("hire_quantized_scores")
fine_scores_p = step_primitive("hire_fine_scores")
# A kernel: rule(x, basis_q, basis_scale, q, scale) -> what scores_in_two returns; x is f32.
scores_in_two_p = step_primitive("hire_scores_in_two")
