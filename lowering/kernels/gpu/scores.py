"""Products of tokens in 8 bits with all rows in 8 or 4 bits: integers, so that sums are exact.

One kernel quantises the tokens. Another reads the rows once, where they lie, in a stack as well: four entries at a time
with few tokens, in tensor cores with more; but rows in 8 bits that are no stack are then XLA's, which reads them once.
All is scaled as in the portable form. (A GPU's quotients are within two units in the last place: far less than what
bounds allow for.)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hire_xform.lowering.kernels.folding import folded
from hire_xform.lowering.kernels.gpu.calls import call, dot, padded
from hire_xform.lowering.kernels.gpu.shapes import MOST_ENTRIES
from hire_xform.lowering.primitives.stack_entry import StackEntry, whole
from hire_xform.lowering.xla.skinny_dot import skinny_dot

__all__ = ["fine_scores", "quantized_scores"]

# Tokens, or halves of them, that are multiplied four entries at a time.
_FEW = 4
# Of a program: warps; words of 4 bytes that each thread takes at a time, and words of a row among these.
_WARPS = 4
_TAKEN, _WORDS = 8, 128
# In tensor cores: rows and bytes of a row at a time. A row of their operands is 32 bytes at least, and has 16 tokens.
_ROWS, _BYTES, _LEAST_BYTES, _LEAST_TOKENS = 64, 256, 32, 16
# Of one token and so few rows in 8 bits each program quantises the token by itself, of so many words: a kernel less.
_ALONE_ROWS, _ALONE_WORDS = 16384, 1024
# Programs that keep all multiprocessors busy: four on each of the 132 of an H100.
_PROGRAMS = 528
# Halves of bytes are read with 8 more than they stand for: four times 8 less.
_LESS = -0x07070708


def quantized_scores(
    x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array, bits: int, interpret: bool = False
) -> jax.Array:
    """As ``quantized_scores`` of ``lowering/predict/few_bits.py``."""
    return folded(
        functools.partial(_quantized, stacked=_stacked(q), bits=bits, interpret=interpret), *_operands(x, q, scale)
    )


def fine_scores(
    x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array, bits: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As ``fine_scores`` there; the tokens as they were kept are those that were multiplied."""
    made: tuple[jax.Array, jax.Array] = folded(
        functools.partial(_scores, limbs=2, stacked=_stacked(q), bits=bits, interpret=interpret),
        *_operands(x, q, scale),
    )
    return made


def _stacked(q: jax.Array | StackEntry) -> bool:
    return isinstance(q, StackEntry) and q.stack.size < MOST_ENTRIES


def _operands(x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array) -> tuple[jax.Array, ...]:
    """Tokens, scales, all rows of a stack or those that are given, and the number of the first that is read."""
    if isinstance(q, StackEntry) and _stacked(q):
        return x, scale, *q.laid_out()
    return x, scale, whole(q), jnp.int32(0)


def _quantized(*operands: jax.Array, **settings: Any) -> jax.Array:
    return _scores(*operands, limbs=1, **settings)[0]


def _scores(
    x: jax.Array,
    scale: jax.Array,
    q: jax.Array,
    first: jax.Array,
    *,
    limbs: int,
    stacked: bool,
    bits: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Scores ``[T, n]``, and the tokens as they were kept."""
    (tokens, d), n, halves, width = x.shape, scale.shape[0], 8 // bits, q.shape[1] // 4
    struct, begin = jax.ShapeDtypeStruct, jnp.asarray(first, jnp.int32).reshape(1)
    if tokens == 1 and bits == 8 and n <= _ALONE_ROWS and width <= _ALONE_WORDS:
        high = _high(n, padded(width))
        kernel = functools.partial(
            _quantize_and_multiply, n=n, d=d, width=width, high=high, limbs=limbs, exact=interpret
        )
        out, grid = (struct((1, n), jnp.float32), struct((1, d), jnp.float32)), (-(-n // high),)
        operands = begin, _as_words(q), x, scale
        scores, kept = call(kernel, "scores_of_one", out, grid, *operands, warps=_WARPS, interpret=interpret)
        return scores, kept
    kernel = functools.partial(_quantize, d=d, size=padded(halves * width), width=halves * width, limbs=limbs)
    quantized = (
        struct((tokens, limbs, halves * width), jnp.int32),
        struct((tokens,), jnp.float32),
        struct((tokens, d), jnp.float32),
    )
    words, unit, kept = call(kernel, "quantize_tokens", quantized, (tokens,), x, warps=_WARPS, interpret=interpret)
    if tokens * limbs <= _FEW:
        wide = min(_WORDS, padded(width))
        high = _high(n, wide)
        sizes = {"n": n, "width": width, "wide": wide, "high": high}
        kernel = functools.partial(_multiply, **sizes, tokens=tokens, limbs=limbs, halves=halves, exact=interpret)
        given = begin, _as_words(q), words, unit, scale
        made, grid = struct((tokens, n), jnp.float32), (-(-n // high),)
        return call(kernel, "integer_scores", made, grid, *given, warps=_WARPS, interpret=interpret), kept
    entries = lax.bitcast_convert_type(words, jnp.int8).reshape(tokens * limbs, halves * 4 * width)
    if bits == 8 and not stacked and not interpret:
        raw = skinny_dot(entries, q)
    else:
        raw = _in_tensor_cores(entries, q, begin, n, halves, interpret)
    sums = raw.astype(jnp.float32).reshape(tokens, limbs, n)
    score = sums[:, 0] if limbs == 1 else sums[:, 0] + sums[:, 1] / 254.0
    return score * unit[:, None] * scale[None, :], kept


def _high(n: int, wide: int) -> int:
    """Rows of a program that takes so many words of each: fewer where there would not be enough programs."""
    high = max(1, _TAKEN * 32 * _WARPS // wide)
    while high > 1 and n < high * _PROGRAMS:
        high //= 2
    return high


def _in_tensor_cores(
    entries: jax.Array, q: jax.Array, begin: jax.Array, n: int, halves: int, interpret: bool
) -> jax.Array:
    """Tokens, int8 ``[T, d]``, with rows in bytes: int32 ``[T, n]``."""
    count, width = entries.shape[0], q.shape[1]
    high = max(_LEAST_TOKENS, padded(count))
    # Zeros where a block reaches beyond: the products there count for nothing.
    wide = max(_LEAST_BYTES, min(_BYTES, padded(width)))
    missing = -width % wide
    parts = [jnp.pad(part, ((0, high - count), (0, missing))) for part in jnp.split(entries, halves, axis=1)]
    out = jax.ShapeDtypeStruct((count, n), jnp.int32)
    kernel = functools.partial(_multiply_many, n=n, width=width, wide=wide, count=count)
    grid = (-(-n // _ROWS),)
    made: jax.Array = call(kernel, "integer_products", out, grid, begin, q, *parts, warps=_WARPS, interpret=interpret)
    return made


def _as_words(entries: jax.Array) -> jax.Array:
    """Four bytes to a word, as they lie in memory."""
    rows, width = entries.shape
    return lax.bitcast_convert_type(entries.reshape(rows, width // 4, 4), jnp.int32)


def _quantize(
    x_ref: Any, words_ref: Any, unit_ref: Any, kept_ref: Any, *, d: int, size: int, width: int, limbs: int
) -> None:
    token, word = pl.program_id(0), jnp.arange(size)
    packed, unit = _in_limbs(x_ref, kept_ref, jnp.bool_(True), token, word, d, limbs)
    for limb, values in enumerate(packed):
        triton.store(words_ref.at[token, jnp.int32(limb), word], values, mask=word < width)
    unit_ref[token] = unit


def _quantize_and_multiply(
    first_ref: Any,
    q_ref: Any,
    x_ref: Any,
    scale_ref: Any,
    out_ref: Any,
    kept_ref: Any,
    *,
    n: int,
    d: int,
    width: int,
    high: int,
    limbs: int,
    exact: bool,
) -> None:
    word, token = jnp.arange(padded(width)), jnp.int32(0)
    packed, unit = _in_limbs(x_ref, kept_ref, pl.program_id(0) == 0, token, word, d, limbs)
    row = pl.program_id(0) * high + jnp.arange(high)
    inside, at = row < n, first_ref[0] + row
    there = inside[:, None] & (word < width)[None, :]
    entries = triton.load(q_ref.at[at[:, None], word[None, :]], mask=there, other=0)
    raw = [jnp.sum(_dot4(entries, values[None, :], jnp.zeros_like(entries), exact), axis=1) for values in packed]
    scale = triton.load(scale_ref.at[row], mask=inside, other=0)
    triton.store(out_ref.at[token, row], _scaled(raw, unit, scale), mask=inside)


def _scaled(raw: list[jax.Array], unit: jax.Array, scale: jax.Array) -> jax.Array:
    """Scores of a token's products, one for each limb."""
    first, *second = [each.astype(jnp.float32) for each in raw]
    return (first + second[0] / 254.0 if second else first) * unit * scale


def _in_limbs(
    x_ref: Any, kept_ref: Any, keeps: Any, token: Any, word: jax.Array, d: int, limbs: int
) -> tuple[list[jax.Array], jax.Array]:
    """A token in one or two limbs of 8 bits, four entries to a word, and its scale; see ``quantize`` and ``two_limbs``.

    What is kept of it is stored by the program that ``keeps`` it.
    """
    columns = [4 * word + byte for byte in range(4)]
    entries = [triton.load(x_ref.at[token, column], mask=column < d, other=0) for column in columns]
    # What is no number counts as infinite.
    sizes = [jnp.where(jnp.abs(x) < jnp.inf, jnp.abs(x), jnp.inf) for x in entries]
    peak = jnp.max(functools.reduce(jnp.maximum, sizes))
    unit = jnp.where(peak < jnp.inf, peak / 127, jnp.nan)
    usable = unit > 0.0
    divisor = jnp.where(usable, unit, 1.0)
    packed = [jnp.zeros_like(word) for _ in range(limbs)]
    for byte, (column, x) in enumerate(zip(columns, entries, strict=True)):
        made = [jnp.where(usable, jnp.clip(_nearest(x / divisor), -127.0, 127.0), 0.0)]
        if limbs == 2:
            rest = _nearest((x - made[0] * unit) / divisor * 254.0)
            made.append(jnp.where(usable, jnp.clip(rest, -127.0, 127.0), 0.0))
        kept = made[0] if limbs == 1 else made[0] + made[1] / 254.0
        triton.store(kept_ref.at[token, column], kept * unit, mask=(column < d) & keeps)
        for limb, values in enumerate(made):
            packed[limb] |= (values.astype(jnp.int32) & 0xFF) << (8 * byte)
    return packed, unit


def _nearest(values: jax.Array) -> jax.Array:
    """The nearest integers, ties to even; Triton has no such function."""
    below = jnp.floor(values)
    more = values - below
    odd = (below.astype(jnp.int32) & 1) == 1
    return below + ((more > 0.5) | ((more == 0.5) & odd)).astype(jnp.float32)


def _multiply(
    first_ref: Any,
    q_ref: Any,
    words_ref: Any,
    unit_ref: Any,
    scale_ref: Any,
    out_ref: Any,
    *,
    n: int,
    width: int,
    wide: int,
    high: int,
    tokens: int,
    limbs: int,
    halves: int,
    exact: bool,
) -> None:
    """Some rows with all tokens.

    Args:
      first_ref: the first row of the matrix among ``q_ref``'s.
      q_ref: the rows, int32 ``[N, width]``.
      words_ref: the tokens, int32 ``[T, limbs, halves * width]``.
      unit_ref, scale_ref: the scales of tokens, and of rows.
      out_ref: ``[T, n]``.
      n, width: rows, and words of each.
      wide, high: words and rows taken at a time.
      tokens, limbs, halves: what these are multiplied by, and how many entries a byte has.
      exact: do without the GPU's own instruction.
    """
    row = pl.program_id(0) * high + jnp.arange(high)
    inside, at = row < n, first_ref[0] + row
    own = [(token, limb) for token in range(tokens) for limb in range(limbs)]

    def step(block: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        column = block * wide + jnp.arange(wide)
        there = column < width
        entries = triton.load(q_ref.at[at[:, None], column[None, :]], mask=inside[:, None] & there[None, :], other=0)
        parts = [entries] if halves == 1 else _nibbles(entries)
        sums, less = list(totals[: len(own)]), list(totals[len(own) :])
        for i, (token, limb) in enumerate(own):
            for half, part in enumerate(parts):
                word = words_ref.at[jnp.int32(token), jnp.int32(limb), half * width + column]
                values = triton.load(word, mask=there, other=0)[None, :]
                sums[i] = _dot4(part, values, sums[i], exact)
                if halves > 1:
                    less[i] = _dot4(jnp.full_like(values, _LESS), values, less[i], exact)
        return *sums, *less

    sums, less = [jnp.zeros((high, wide), jnp.int32)] * len(own), [jnp.zeros((1, wide), jnp.int32)] * len(own)
    made = lax.fori_loop(0, -(-width // wide), step, tuple(sums + (less if halves > 1 else [])))
    raw = [jnp.sum(total, axis=1) for total in made[: len(own)]]
    raw = [total + jnp.sum(made[len(own) + i]) if halves > 1 else total for i, total in enumerate(raw)]
    scale = triton.load(scale_ref.at[row], mask=inside, other=0)
    for token in range(tokens):
        score = _scaled(raw[token * limbs : (token + 1) * limbs], unit_ref[token], scale)
        triton.store(out_ref.at[jnp.int32(token), row], score, mask=inside)


def _nibbles(packed: jax.Array) -> list[jax.Array]:
    """The two halves of each byte that ``pack_nibbles`` joined, with 8 added, so that none is below zero."""
    shifted = packed ^ jnp.int32(-0x77777778)
    return [shifted & 0x0F0F0F0F, lax.shift_right_logical(shifted, 4) & 0x0F0F0F0F]


def _multiply_many(first_ref: Any, q_ref: Any, *refs: Any, n: int, width: int, wide: int, count: int) -> None:
    *token_refs, out_ref = refs
    high = token_refs[0].shape[0]
    row = pl.program_id(0) * _ROWS + jnp.arange(_ROWS)
    inside, at = row < n, first_ref[0] + row
    token = jnp.arange(high)

    def step(block: Any, total: jax.Array) -> jax.Array:
        column = block * wide + jnp.arange(wide)
        there = inside[:, None] & (column < width)[None, :]
        entries = triton.load(q_ref.at[at[:, None], column[None, :]], mask=there, other=0)
        parts = [entries]
        if len(token_refs) == 2:
            words = entries.astype(jnp.int32)
            parts = [lax.shift_right_arithmetic(words << left, 28).astype(jnp.int8) for left in (28, 24)]
        for part, ref in zip(parts, token_refs, strict=True):
            total += dot(part, triton.load(ref.at[token[:, None], column[None, :]]), trans_b=True)
        return total

    total = lax.fori_loop(0, -(-width // wide), step, jnp.zeros((_ROWS, high), jnp.int32))
    there = inside[:, None] & (token < count)[None, :]
    triton.store(out_ref.at[token[None, :], row[:, None]], total, mask=there)


def _dot4(a: jax.Array, b: jax.Array, total: jax.Array, exact: bool) -> jax.Array:
    """``total`` and the products of the four bytes of each word, as signed integers."""
    b = jnp.broadcast_to(b, a.shape)
    if exact:
        for left in (24, 16, 8, 0):
            total += lax.shift_right_arithmetic(a << left, 24) * lax.shift_right_arithmetic(b << left, 24)
        return total
    out = [jax.ShapeDtypeStruct(total.shape, jnp.int32)]
    dot = "dp4a.s32.s32 $0, $1, $2, $3;"
    return triton.elementwise_inline_asm(
        dot, args=[a, b, total], constraints="=r,r,r,r", pack=1, result_shape_dtypes=out
    )[0]
