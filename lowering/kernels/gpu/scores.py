"""Products of tokens in 8 bits with all rows in 8 or 4 bits, in tensor cores: integers, so that sums are exact.

Rows that are one matrix of a stack are read where they lie. Rows in 8 bits that are not are left to XLA, which reads
them once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hire_xform.lowering.kernels.folding import folded
from hire_xform.lowering.kernels.gpu.calls import call, padded
from hire_xform.lowering.kernels.gpu.shapes import MOST_ENTRIES
from hire_xform.lowering.predict.few_bits import integer_scores, of_limbs, quantize, two_limbs
from hire_xform.lowering.primitives.stack_entry import StackEntry, whole

__all__ = ["fine_scores", "quantized_scores"]

# Rows and bytes of a row that a program takes at a time: 16 KiB, some of which are on their way while others are
# multiplied. A row of tensor cores' operands is 32 bytes at least, and has 16 tokens.
_ROWS, _BYTES, _LEAST_BYTES, _LEAST_TOKENS = 64, 256, 32, 16
_WARPS = 4


def quantized_scores(
    x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array, bits: int, interpret: bool = False
) -> jax.Array:
    """As ``quantized_scores`` of ``lowering/predict/few_bits.py``, and equal to it."""
    products = _products_with(q, scale.shape[0], bits, interpret)

    def step(x: jax.Array, scale: jax.Array, *rows: jax.Array) -> jax.Array:
        tokens, token_scale = quantize(x, 127)
        return products(tokens, *rows).astype(jnp.float32) * token_scale[:, None] * scale[None, :]

    return folded(step, x, scale, *_laid_out(q))


def fine_scores(
    x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array, bits: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As ``fine_scores`` there, and equal to it: only the integer products are the kernel's."""
    products = _products_with(q, scale.shape[0], bits, interpret)

    def step(x: jax.Array, scale: jax.Array, *rows: jax.Array) -> Any:
        first, second, unit = two_limbs(x)
        raw = products(jnp.concatenate([first, second]), *rows).astype(jnp.float32)
        sums = raw[: x.shape[0]] + raw[x.shape[0] :] / 254.0
        return sums * unit * scale[None, :], of_limbs(first, second, unit)

    return folded(step, x, scale, *_laid_out(q))


def _laid_out(q: jax.Array | StackEntry) -> tuple[jax.Array, jax.Array]:
    """All rows of a stack, or those that are given, and the number of the first that is read."""
    if isinstance(q, StackEntry) and q.stack.size < MOST_ENTRIES:
        return q.laid_out()
    return whole(q), jnp.int32(0)


def _products_with(q: jax.Array | StackEntry, n: int, bits: int, interpret: bool) -> Callable[..., jax.Array]:
    """``int8 [T, d]`` times ``n`` quantised rows, as :func:`_laid_out` gives them: int32 ``[T, n]``."""
    if bits == 8 and not isinstance(q, StackEntry) and not interpret:
        return lambda tokens, rows, first: integer_scores(tokens, rows, bits)
    return functools.partial(_integers, n=n, bits=bits, interpret=interpret)


def _integers(tokens: jax.Array, q: jax.Array, first: jax.Array, *, n: int, bits: int, interpret: bool) -> jax.Array:
    count, width = tokens.shape[0], q.shape[1]
    high = max(_LEAST_TOKENS, padded(count))
    halves = [tokens] if bits == 8 else [tokens[:, :width], tokens[:, width:]]
    # Zeros where a block reaches beyond: the products there count for nothing.
    bytes_ = max(_LEAST_BYTES, min(_BYTES, padded(width)))
    wide = -(-width // bytes_) * bytes_
    halves = [jnp.pad(half, ((0, high - count), (0, wide - half.shape[1]))) for half in halves]
    made = jax.ShapeDtypeStruct((count, n), jnp.int32)
    kernel = functools.partial(_kernel, n=n, width=width, count=count, bytes_=bytes_)
    grid, begin = (-(-n // _ROWS),), jnp.asarray(first, jnp.int32).reshape(1)
    return call(kernel, "integer_scores", made, grid, q, begin, *halves, warps=_WARPS, interpret=interpret)


def _kernel(q_ref: Any, first_ref: Any, *refs: Any, n: int, width: int, count: int, bytes_: int) -> None:
    *token_refs, out_ref = refs
    high = token_refs[0].shape[0]
    row = pl.program_id(0) * _ROWS + jnp.arange(_ROWS)
    inside, at = row < n, first_ref[0] + row
    token = jnp.arange(high)

    def step(block: Any, total: jax.Array) -> jax.Array:
        column = block * bytes_ + jnp.arange(bytes_)
        there = inside[:, None] & (column < width)[None, :]
        entries = triton.load(q_ref.at[at[:, None], column[None, :]], mask=there, other=0)
        parts = [entries] if len(token_refs) == 1 else _nibbles(entries)
        for part, ref in zip(parts, token_refs, strict=True):
            tokens = triton.load(ref.at[token[:, None], column[None, :]])
            total += triton.dot(part, tokens, trans_b=True)
        return total

    total = lax.fori_loop(0, -(-width // bytes_), step, jnp.zeros((_ROWS, high), jnp.int32))
    there = inside[:, None] & (token < count)[None, :]
    triton.store(out_ref.at[token[None, :], row[:, None]], total, mask=there)


def _nibbles(packed: jax.Array) -> list[jax.Array]:
    """The two halves that ``pack_nibbles`` joined, int8."""
    wide = packed.astype(jnp.int32)
    return [lax.shift_right_arithmetic(wide << left, 28).astype(jnp.int8) for left in (28, 24)]
