"""Products of quantised tokens with all quantised rows, exactly: rows are read once, as they are stored.

Rows of 4 bits are taken apart in words of 32 bits, of which a mask leaves the high halves of all bytes and a shift
before it the low ones: sixteen times each entry, as a signed byte. So are their sums, which are exact in 32 bits.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire_xform.lowering.kernels.folding import folded
from hire_xform.lowering.kernels.tpu.shapes import MOST_TOKENS, scored_together
from hire_xform.lowering.predict.few_bits import of_limbs, quantize, two_limbs

__all__ = ["fine_scores", "quantized_scores"]


def quantized_scores(x: jax.Array, q: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    """As ``quantized_scores`` of ``lowering/predict/few_bits.py``."""

    def step(x: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
        tokens, token_scale = quantize(x, 127)
        return _in_parts(functools.partial(_scores, bits=bits, limbs=1), (tokens, token_scale[:, None]), q, scale)

    return folded(step, x, q, scale)


def fine_scores(x: jax.Array, q: jax.Array, scale: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """As ``fine_scores`` there: both limbs of a token are multiplied with a row while it is at hand."""

    def step(x: jax.Array, q: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Those that are kept are those that are multiplied, however XLA would fuse and round either.
        first, second, token_scale = lax.optimization_barrier(two_limbs(x))
        both = jnp.concatenate([first, second], axis=1)
        made = _in_parts(functools.partial(_scores, bits=bits, limbs=2), (both, token_scale), q, scale)
        return made, of_limbs(first, second, token_scale)

    return folded(step, x, q, scale)


def _in_parts(fun: Any, tokens: tuple[jax.Array, jax.Array], q: jax.Array, scale: jax.Array) -> jax.Array:
    """``fun`` of as many tokens at a time as a kernel takes."""
    count = tokens[0].shape[0]
    if count <= MOST_TOKENS:
        return fun(*tokens, q, scale)
    missing = -count % MOST_TOKENS
    parts = [jnp.pad(a, ((0, missing), (0, 0))).reshape(-1, MOST_TOKENS, a.shape[1]) for a in tokens]
    made = lax.map(lambda part: fun(*part, q, scale), tuple(parts))
    return made.reshape(count + missing, -1)[:count]


def _scores(
    tokens: jax.Array, token_scale: jax.Array, q: jax.Array, scale: jax.Array, *, bits: int, limbs: int
) -> jax.Array:
    """Scores of tokens ``[T, limbs * d]`` in int8, f32 ``[T, n]``."""
    (n, width), count = q.shape, tokens.shape[0]
    d = tokens.shape[1] // limbs
    # One limb of all tokens after the other.
    tokens = jnp.concatenate([tokens[:, i * d : (i + 1) * d] for i in range(limbs)])
    together = scored_together(n, width)

    def kernel(tokens_ref: Any, token_scale_ref: Any, q_ref: Any, scale_ref: Any, out_ref: Any) -> None:
        raw = _products(tokens_ref, q_ref[...], bits).astype(jnp.float32)
        if limbs == 2:
            raw = raw[:count] + raw[count:] / 254.0
        out_ref[...] = raw * token_scale_ref[...] * scale_ref[...]

    def whole(operand: jax.Array) -> Any:
        return pl.BlockSpec(operand.shape, lambda i: (0, 0))

    return pl.pallas_call(
        kernel,
        name="hire_quantized_scores" if limbs == 1 else "hire_fine_scores",
        grid=(pl.cdiv(n, together),),
        in_specs=[
            whole(tokens),
            whole(token_scale),
            pl.BlockSpec((together, width), lambda i: (i, 0)),
            pl.BlockSpec((1, together), lambda i: (0, i)),
        ],
        out_specs=pl.BlockSpec((count, together), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct((count, n), jnp.float32),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens.shape[0] * n * d,
            bytes_accessed=q.nbytes + scale.nbytes + tokens.nbytes + token_scale.nbytes + 4 * count * n,
            transcendentals=0,
        ),
    )(tokens, token_scale, q, scale[None])


def _products(tokens: Any, rows: jax.Array, bits: int) -> jax.Array:
    """Sums of products of integers, int32 ``[T, r]``."""
    if bits == 8:
        return _dot(tokens[...], rows)
    half = rows.shape[1]
    words, upper = pltpu.bitcast(rows, jnp.uint32), jnp.uint32(0xF0F0F0F0)
    low = pltpu.bitcast((words << 4) & upper, jnp.int8)
    high = pltpu.bitcast(words & upper, jnp.int8)
    return lax.shift_right_arithmetic(_dot(tokens[:, :half], low) + _dot(tokens[:, half:], high), 4)


def _dot(tokens: jax.Array, rows: jax.Array) -> jax.Array:
    return lax.dot_general(tokens, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
