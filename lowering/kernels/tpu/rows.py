"""Products with, and sums of, chosen rows: each slab of rows is copied from HBM to VMEM once, and nothing else is.

The rows stay where they lie. A kernel sends for the slabs of a few steps ahead, as many copies at a time as hide what
one takes to come, and multiplies those that are there on the matrix unit. Rows of 16 bits are seen as words of 32, each
of two neighbouring rows, which is how a TPU stores them: a slab of an even number of rows is read exactly, a single row
together with its neighbour.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire_xform.lowering.kernels.folding import folded
from hire_xform.lowering.kernels.results import result
from hire_xform.lowering.kernels.tpu.placing import in_hbm
from hire_xform.lowering.kernels.tpu.shapes import AHEAD, MOST_TOKENS, bytes_of_slabs, rows_a_step

__all__ = ["combine_rows", "select_rows_dot"]


def select_rows_dot(x: jax.Array, rows: jax.Array, index: jax.Array, group: int, magnitudes: bool) -> jax.Array:
    """As ``select_rows_dot`` of ``lowering/primitives``, f32 ``[T, K * group]``."""

    def step(x: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
        return _by_index(functools.partial(_select, group=group, magnitudes=magnitudes), x, rows, index)

    return folded(step, x, rows, index)


def combine_rows(h: jax.Array, rows: jax.Array, index: jax.Array, group: int) -> jax.Array:
    """As ``combine_rows`` there, f32 ``[T, d]``."""

    def step(h: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
        return _by_index(functools.partial(_combine, group=group), h, rows, index)

    return folded(step, h, rows, index)


def _by_index(fun: Callable[..., jax.Array], x: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
    """``fun`` of tokens that share an index, as many at a time as a kernel takes; one by one where each has its own."""
    tokens = x.shape[0]
    if index.ndim == 1 and tokens <= MOST_TOKENS:
        return fun(x, rows, index)
    if index.ndim == 1:
        missing = -tokens % MOST_TOKENS
        parts = jnp.pad(x, ((0, missing), (0, 0))).reshape(-1, MOST_TOKENS, x.shape[1])
        made = lax.map(lambda part: fun(part, rows, index), parts)
        return made.reshape(tokens + missing, -1)[:tokens]
    if tokens <= MOST_TOKENS:
        return jnp.concatenate([fun(x[t : t + 1], rows, index[t]) for t in range(tokens)])
    return lax.map(lambda one: fun(one[0][None], rows, one[1])[0], (x, index))


def _select(x: jax.Array, rows: jax.Array, index: jax.Array, *, group: int, magnitudes: bool) -> jax.Array:
    tokens, wanted = x.shape[0], index.shape[0] * group
    x = jnp.abs(x) if magnitudes else x
    left = _terms(x, rows.dtype)
    step_rows = rows_a_step(group)

    def use(step: jax.Array, block: jax.Array, left: Any, out: Any) -> None:
        block = jnp.abs(block) if magnitudes else block
        made = _dot(left[...], block, ((1,), (1,)))
        at = pl.ds(pl.multiple_of(step * step_rows, step_rows), step_rows)
        out[:, at] = _summed(made, tokens)

    size = -(-wanted // step_rows) * step_rows
    return _call(use, left, rows, index, group, (tokens, size), "hire_select_rows_dot")[:, :wanted]


def _combine(h: jax.Array, rows: jax.Array, index: jax.Array, *, group: int) -> jax.Array:
    tokens, given = h.shape
    step_rows = rows_a_step(group)
    missing = -given % step_rows
    left = jnp.pad(_terms(h, rows.dtype), ((0, 0), (0, missing)))

    def use(step: jax.Array, block: jax.Array, left: Any, out: Any) -> None:
        at = pl.ds(pl.multiple_of(step * step_rows, step_rows), step_rows)
        out[...] += _summed(_dot(left[:, at], block, ((1,), (0,))), tokens)

    return _call(use, left, rows, index, group, (tokens, rows.shape[1]), "hire_combine_rows")


def _terms(x: jax.Array, dtype: Any) -> jax.Array:
    """Tokens as the matrix unit multiplies them with rows of a dtype, without a loss.

    Rows of 16 bits take tokens of 16 bits: those of 32 are the sum of three.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return x.astype(jnp.float32)
    if x.dtype == jnp.bfloat16:
        return x
    parts, rest = [], x.astype(jnp.float32)
    for _ in range(3):
        # Not a cast there and back, which XLA would drop.
        part = lax.reduce_precision(rest, 8, 7)
        parts.append(part.astype(jnp.bfloat16))
        rest = jnp.where(jnp.isfinite(part), rest - part, 0.0)
    return jnp.concatenate(parts)


def _summed(made: jax.Array, tokens: int) -> jax.Array:
    """The products of tokens, from those of their terms: the small ones first."""
    parts = [made[i : i + tokens] for i in range(0, made.shape[0], tokens)]
    return functools.reduce(lax.add, reversed(parts))


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[tuple[int], tuple[int]]) -> jax.Array:
    precision = lax.Precision.HIGHEST if b.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class _Slabs:
    """How chosen rows are read: ``count`` slabs of ``group`` rows of ``d`` columns, some at a step."""

    count: int
    group: int
    d: int
    dtype: Any

    @property
    def narrow(self) -> bool:
        """Whether words of 32 bits hold several rows."""
        return jnp.dtype(self.dtype).itemsize < 4

    @property
    def single(self) -> bool:
        """Whether half of each word that is read is of another row."""
        return self.narrow and self.group == 1

    @property
    def words(self) -> int:
        """Words, one above the other, that a slab has."""
        return max(1, self.group * jnp.dtype(self.dtype).itemsize // 4)

    @property
    def a_step(self) -> int:
        """Slabs of a step."""
        return rows_a_step(self.group) // self.group

    def held(self) -> Any:
        """Where the words of some steps are kept."""
        return pltpu.VMEM((AHEAD, self.a_step * self.words, self.d), jnp.uint32 if self.narrow else self.dtype)

    def copy(self, index: Any, rows: Any, held: Any, sent: Any, step: Any, slab: Any) -> Any:
        """The copy of one slab of a step."""
        slot, at = lax.rem(step, AHEAD), index[step * self.a_step + slab]
        at = at >> 1 if self.single else pl.multiple_of(at * self.words, self.words)
        to = held.at[slot, pl.ds(pl.multiple_of(slab * self.words, self.words), self.words)]
        source = rows.bitcast(jnp.uint32) if self.narrow else rows
        return pltpu.make_async_copy(source.at[pl.ds(at, self.words)], to, sent.at[slot])

    def block(self, step: Any, held: Any, odd: Any) -> jax.Array:
        """The rows of a step, of which all have come."""
        taken = held[lax.rem(step, AHEAD)]
        if self.count % self.a_step:
            # What no copy has written may hold anything, a NaN most of all.
            came = lax.broadcasted_iota(jnp.int32, taken.shape, 0) < (self.count - step * self.a_step) * self.words
            taken = jnp.where(came, taken, jnp.zeros_like(taken))
        if self.single:
            return _halves(taken, odd[:, pl.ds(pl.multiple_of(step * self.a_step, self.a_step), self.a_step)])
        return pltpu.bitcast(taken, self.dtype) if self.narrow else taken


def _call(
    use: Callable[..., None],
    left: jax.Array,
    rows: jax.Array,
    index: jax.Array,
    group: int,
    out_shape: tuple[int, int],
    name: str,
) -> jax.Array:
    """A kernel that has ``use(step, block, left, out)`` called with the chosen rows, ``rows_a_step`` at a time."""
    slabs = _Slabs(index.shape[0], group, rows.shape[1], rows.dtype)

    def kernel(index_ref: Any, odd_ref: Any, left_ref: Any, rows_ref: Any, out_ref: Any, held: Any, sent: Any) -> None:
        out_ref[...] = jnp.zeros_like(out_ref)
        copy = functools.partial(slabs.copy, index_ref, rows_ref, held, sent)
        _stream(copy, lambda step: use(step, slabs.block(step, held, odd_ref), left_ref, out_ref), slabs)

    # Of two rows that share their words, whether the second one is meant; nothing where slabs are read as they are.
    odd = jnp.pad(index & 1, (0, -slabs.count % slabs.a_step))[None] if slabs.single else jnp.zeros((1, 1), jnp.int32)
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    moved = bytes_of_slabs(slabs.count, group, slabs.d, rows.dtype)
    return pl.pallas_call(
        kernel,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(),
            in_specs=[whole, whole, pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=whole,
            scratch_shapes=[slabs.held(), pltpu.SemaphoreType.DMA((AHEAD,))],
        ),
        out_shape=result(out_shape, jnp.float32),
        cost_estimate=pl.CostEstimate(
            flops=2 * left.shape[0] * slabs.count * group * slabs.d,
            bytes_accessed=moved + left.nbytes + odd.nbytes + index.nbytes + 4 * math.prod(out_shape),
            transcendentals=0,
        ),
    )(index, odd, left, in_hbm(rows))


def _halves(words: jax.Array, odd: jax.Array) -> jax.Array:
    """Of words that hold two rows of bfloat16 each, ``[r, d]``, the first or, where ``odd [1, r]``, the second row."""
    count = words.shape[0]
    shift = 16 - 16 * jnp.broadcast_to(odd, (count, count)).T[:, :1]
    raised = lax.shift_left(words, jnp.broadcast_to(shift, words.shape).astype(jnp.uint32)) & jnp.uint32(0xFFFF0000)
    return pltpu.bitcast(raised, jnp.float32).astype(jnp.bfloat16)


def _stream(copy: Callable[..., Any], use: Callable[[Any], None], slabs: _Slabs) -> None:
    """Copies slabs some steps ahead of ``use(step)``."""
    count, a_step = slabs.count, slabs.a_step
    steps = -(-count // a_step)

    def each(step: Any, act: Callable[[Any], None]) -> None:
        def one(slab: jax.Array, _: None) -> None:
            def go() -> None:
                act(copy(step, slab))

            if count % a_step:
                pl.when(step * a_step + slab < count)(go)
            else:
                go()

        lax.fori_loop(0, a_step, one, None)

    def start(step: Any) -> None:
        each(step, lambda sent: sent.start())

    for step in range(min(AHEAD - 1, steps)):
        start(jnp.int32(step))

    def body(step: jax.Array, _: None) -> None:
        pl.when(step + AHEAD - 1 < steps)(lambda: start(step + AHEAD - 1))
        each(step, lambda sent: sent.wait())
        use(step)

    lax.fori_loop(0, steps, body, None)
