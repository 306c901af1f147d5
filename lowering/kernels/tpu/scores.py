"""Products of quantised tokens with all quantised rows, exactly: rows are read once, as they are stored.

Rows of 4 bits are taken apart in words of 32 bits, of which a mask leaves the high halves of all bytes and a shift
before it the low ones: sixteen times each entry, as a signed byte. So are their sums, which are exact in 32 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire_xform.lowering.kernels.folding import folded
from hire_xform.lowering.kernels.results import result
from hire_xform.lowering.kernels.tpu.placing import in_hbm
from hire_xform.lowering.kernels.tpu.shapes import MOST_TOKENS, scored_together
from hire_xform.lowering.predict.few_bits import of_limbs
from hire_xform.lowering.primitives.stack_entry import StackEntry

__all__ = ["fine_scores", "quantized_scores", "scores_in_two"]

Rows = jax.Array | StackEntry


def quantized_scores(x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array, bits: int) -> jax.Array:
    """As ``quantized_scores`` of ``lowering/predict/few_bits.py``."""

    def step(x: jax.Array, *rows: jax.Array) -> jax.Array:
        return _in_parts(functools.partial(_scores, rows=rows, bits=bits, limbs=1), x)[0]

    return folded(step, x, scale, *_stacked(q))


def fine_scores(x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """As ``fine_scores`` there: both limbs of a token are multiplied with a row while it is at hand.

    The tokens that are kept are made of the integers that were multiplied.
    """

    def step(x: jax.Array, *rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        made, limbs, steps = _in_parts(functools.partial(_scores, rows=rows, bits=bits, limbs=2), x)
        return made, of_limbs(limbs[:, : x.shape[1]], limbs[:, x.shape[1] :], steps)

    return folded(step, x, scale, *_stacked(q))


def scores_in_two(x: jax.Array, basis_q: Rows, basis_scale: jax.Array, q: Rows, scale: jax.Array) -> jax.Array:
    """As ``scores_in_two`` there: what the first rows make stays in VMEM, while the first of the others come."""

    def step(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        return _in_parts(lambda part: [_in_two(part, arrays[:3], arrays[3:])], x)[0]

    return folded(step, x, basis_scale, *_stacked(basis_q), scale, *_stacked(q))


def _stacked(q: jax.Array | StackEntry) -> tuple[jax.Array, jax.Array]:
    """A stack of matrices ``[L, n, width]``, and which one is meant, int32 ``[1]``."""
    if not isinstance(q, StackEntry):
        return q[None], jnp.zeros(1, jnp.int32)
    rows, first = q.laid_out()
    # Each matrix is a part of what is read of the stack in all: XLA is not to bring all of it to VMEM for one.
    return in_hbm(rows.reshape(-1, *q.shape)), lax.div(first, jnp.int32(q.shape[0])).reshape(1)


def _in_parts(fun: Callable[[jax.Array], list[jax.Array]], x: jax.Array) -> list[jax.Array]:
    """``fun`` of as many tokens at a time as a kernel takes."""
    count = x.shape[0]
    if count <= MOST_TOKENS:
        return fun(x)
    missing = -count % MOST_TOKENS
    made = lax.map(fun, jnp.pad(x, ((0, missing), (0, 0))).reshape(-1, MOST_TOKENS, x.shape[1]))
    return [part.reshape(count + missing, -1)[:count] for part in made]


def _scores(x: jax.Array, *, rows: Sequence[jax.Array], bits: int, limbs: int) -> list[jax.Array]:
    """Scores of tokens ``[T, d]``, f32 ``[T, n]``, their limbs, int8 ``[T, limbs * d]``, and steps, f32 ``[T, 1]``.

    Args:
      x: the tokens, f32.
      rows: scales ``[n]``, rows ``[L, n, width]``, and which of these matrices it is.
      bits, limbs: of an entry, and of a token.
    """
    scale, q, number = rows
    (_, n, width), (count, d) = q.shape, x.shape
    together = scored_together(n, width)

    def kernel(
        _: Any, x_ref: Any, q_ref: Any, scale_ref: Any, out_ref: Any, limbs_ref: Any, step_ref: Any, held: Any
    ) -> None:
        @pl.when(pl.program_id(0) == 0)
        def quantise() -> None:
            parts, step_ref[...] = _limbs(x_ref[...], limbs)
            for i, part in enumerate(parts):
                # Sums of integers are of all first limbs, and then of all second ones.
                held[i * count : (i + 1) * count] = part
                limbs_ref[:, i * d : (i + 1) * d] = part

        raw = _products(held, q_ref[...], bits).astype(jnp.float32)
        if limbs == 2:
            raw = raw[:count] + raw[count:] / 254.0
        out_ref[...] = raw * step_ref[...] * scale_ref[...]

    shapes = [(count, n), (count, limbs * d), (count, 1)]
    made = [result(*of) for of in zip(shapes, (jnp.float32, jnp.int8, jnp.float32), strict=True)]
    return list(
        pl.pallas_call(
            kernel,
            name="hire_quantized_scores" if limbs == 1 else "hire_fine_scores",
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(pl.cdiv(n, together),),
                in_specs=[
                    pl.BlockSpec((count, d), _at_once),
                    pl.BlockSpec((None, together, width), lambda i, number: (number[0], i, 0)),
                    # Blocks of one axis would ask Pallas for the TPU that is here, and there need not be one.
                    pl.BlockSpec((1, together), lambda i, number: (0, i)),
                ],
                out_specs=[
                    pl.BlockSpec((count, together), lambda i, number: (0, i)),
                    *(pl.BlockSpec(shape, _at_once) for shape in shapes[1:]),
                ],
                scratch_shapes=[pltpu.VMEM((limbs * count, d), jnp.int8)],
            ),
            out_shape=made,
            cost_estimate=pl.CostEstimate(
                flops=2 * limbs * count * n * d,
                bytes_accessed=x.nbytes + n * width + scale.nbytes + sum(a.size * a.dtype.itemsize for a in made),
                transcendentals=0,
            ),
        )(number, x, q, scale[None])
    )


def _in_two(x: jax.Array, basis: Sequence[jax.Array], rows: Sequence[jax.Array]) -> jax.Array:
    """Scores of scores of tokens ``[T, d]``, f32 ``[T, n]``.

    Args:
      x: the tokens, f32.
      basis, rows: of each scales ``[n]``, rows ``[L, n, width]``, and which of these matrices it is.
    """
    (scale, q, number), (after_scale, after, after_number) = basis, rows
    (_, r, d), (_, n, _), count = q.shape, after.shape, x.shape[0]
    together, after_together = scored_together(r, d), scored_together(n, r)
    steps, after_steps = pl.cdiv(r, together), pl.cdiv(n, after_together)

    def kernel(*refs: Any) -> None:
        _, _, x_ref, q_ref, scale_ref, after_ref, after_scale_ref, out_ref, held, made, after_held, sizes = refs
        step = pl.program_id(0)

        def quantise(values: jax.Array, held: Any, size: int) -> None:
            parts, sizes[:, size : size + 1] = _limbs(values, 2)
            for i, part in enumerate(parts):
                held[i * count : (i + 1) * count] = part

        def products(held: Any, rows: Any, scale: Any, size: int) -> jax.Array:
            raw = _dot(held[...], rows[...]).astype(jnp.float32)
            return (raw[:count] + raw[count:] / 254.0) * sizes[:, size : size + 1] * scale[...]

        pl.when(step == 0)(lambda: quantise(x_ref[...], held, 0))

        @pl.when(step < steps)
        def first() -> None:
            at = pl.ds(pl.multiple_of(step * together, together), together)
            made[:, at] = products(held, q_ref, scale_ref, 0)

        pl.when(step == steps)(lambda: quantise(made[:, :r], after_held, 1))

        @pl.when(step >= steps)
        def second() -> None:
            out_ref[...] = products(after_held, after_ref, after_scale_ref, 1)

    def first(i: Any) -> Any:
        return jnp.minimum(i, steps - 1)

    def second(i: Any) -> Any:
        return jnp.maximum(i - steps, 0)

    made: jax.Array = pl.pallas_call(
        kernel,
        name="hire_scores_in_two",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(steps + after_steps,),
            in_specs=[
                pl.BlockSpec((count, d), lambda i, *numbers: (0, 0)),
                pl.BlockSpec((None, together, d), lambda i, *numbers: (numbers[0][0], first(i), 0)),
                pl.BlockSpec((1, together), lambda i, *numbers: (0, first(i))),
                pl.BlockSpec((None, after_together, r), lambda i, *numbers: (numbers[1][0], second(i), 0)),
                pl.BlockSpec((1, after_together), lambda i, *numbers: (0, second(i))),
            ],
            out_specs=pl.BlockSpec((count, after_together), lambda i, *numbers: (0, second(i))),
            scratch_shapes=[
                pltpu.VMEM((2 * count, d), jnp.int8),
                pltpu.VMEM((count, steps * together), jnp.float32),
                pltpu.VMEM((2 * count, r), jnp.int8),
                pltpu.VMEM((count, 2), jnp.float32),
            ],
        ),
        out_shape=result((count, n), jnp.float32),
        cost_estimate=pl.CostEstimate(
            flops=4 * count * r * (d + n),
            bytes_accessed=x.nbytes + r * d + scale.nbytes + n * r + after_scale.nbytes + 4 * count * n,
            transcendentals=0,
        ),
    )(number, after_number, x, q, scale[None], after, after_scale[None])
    return made


def _at_once(step: Any, number: Any) -> tuple[int, int]:
    """Of an operand that is one block, which block a step has."""
    return 0, 0


def _limbs(x: jax.Array, limbs: int) -> tuple[list[jax.Array], jax.Array]:
    """Tokens as ``quantize``, or ``two_limbs``, has them: int8 ``[T, d]`` each, and steps ``[T, 1]``."""
    size = jnp.abs(x)
    # A NaN is not below infinity; a maximum may pass over it.
    finite = jnp.min((size < jnp.inf).astype(jnp.float32), axis=1, keepdims=True) > 0.0
    step = jnp.where(finite, jnp.max(size, axis=1, keepdims=True) / 127.0, jnp.nan)
    divisor = jnp.where(step > 0.0, step, 1.0)
    first = _whole(x / divisor, step)
    if limbs == 1:
        return [_as_int8(first)], step
    return [_as_int8(first), _as_int8(_whole((x - first * divisor) / divisor * 254.0, step))], step


def _whole(values: jax.Array, step: jax.Array) -> jax.Array:
    """The closest integers in 8 bits, as floats; zeros where there is no step."""
    return jnp.where(step > 0.0, jnp.clip(jnp.round(values), -127.0, 127.0), 0.0)


def _as_int8(values: jax.Array) -> jax.Array:
    return values.astype(jnp.int32).astype(jnp.int8)


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
