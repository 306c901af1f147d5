"""Chosen slabs of rows, copied from HBM to VMEM some steps before they are used: what all kernels of rows are made of.

The rows stay where they lie. Words of 32 bits hold two neighbouring rows of 16 bits, or four of 8, one below the other,
which is how a TPU stores them: a slab of whole words is read exactly, a single row of 16 bits with
its neighbour, and one of 8 bits with three others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire_xform.lowering.kernels.tpu.shapes import AHEAD, rows_a_step

__all__ = ["PARAMS", "Slabs", "stream"]

# An index is in bounds, as of the portable forms: to look again takes more instructions than a copy does.
PARAMS = pltpu.CompilerParams(disable_bounds_checks=True)

# Copies that are sent for one after the other: so many need few instructions each, but these are written down each.
_UNROLLED = 8


@dataclass(frozen=True)
class Slabs:
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
        """Whether each word that is read is of other rows besides."""
        return self.narrow and self.group == 1

    @property
    def a_word(self) -> int:
        """Rows that share their words."""
        return 4 // jnp.dtype(self.dtype).itemsize

    @property
    def words(self) -> int:
        """Words, one above the other, that a slab has."""
        return max(1, self.group * jnp.dtype(self.dtype).itemsize // 4)

    @property
    def a_step(self) -> int:
        """Slabs of a step."""
        return rows_a_step(self.group) // self.group

    @property
    def steps(self) -> int:
        """Steps that all slabs take, of which the last may have fewer."""
        return -(-self.count // self.a_step)

    def held(self) -> Any:
        """Where the words of some steps are kept."""
        return pltpu.VMEM((AHEAD, self.a_step * self.words, self.d), jnp.uint32 if self.narrow else self.dtype)

    def start(self, index: Any, rows: Any, held: Any, sent: Any, step: Any, slot: Any) -> None:
        """Sends for the slabs of a step."""
        source = rows.bitcast(jnp.uint32) if self.narrow else rows

        def send(slab: Any) -> None:
            at = index[step * self.a_step + slab]
            at = at >> (self.a_word // 2) if self.single else pl.multiple_of(at * self.words, self.words)
            to = held.at[slot, pl.ds(pl.multiple_of(slab * self.words, self.words), self.words)]
            pltpu.make_async_copy(source.at[pl.ds(at, self.words)], to, sent.at[slot]).start()

        full, tail = divmod(self.count, self.a_step)
        if not tail:
            _each(self.a_step, send)
        elif not full:
            _each(tail, send)
        else:
            pl.when(step < full)(functools.partial(_each, self.a_step, send))
            pl.when(step == full)(functools.partial(_each, tail, send))

    def wait(self, held: Any, sent: Any, step: Any, slot: Any) -> None:
        """Waits for all slabs of a step at once."""

        def came(slabs: int) -> None:
            words = slabs * self.words
            # What is waited for is so many bytes, whichever copies they are of: whole tiles, and parts of one.
            for part in (words - words % 8, words & 4, words & 2, words & 1):
                if part:
                    here = held.at[slot, pl.ds(0, part)]
                    pltpu.make_async_copy(here, here, sent.at[slot]).wait()

        full, tail = divmod(self.count, self.a_step)
        if not tail:
            came(self.a_step)
        elif not full:
            came(tail)
        else:
            pl.when(step < full)(functools.partial(came, self.a_step))
            pl.when(step == full)(functools.partial(came, tail))

    def block(self, held: Any, which: Any, step: Any, slot: Any) -> jax.Array:
        """The rows of a step, of which all have come: of 8 bits as bfloat16, which holds them."""
        taken = held[slot]
        if self.count % self.a_step:
            # What no copy has written may hold anything, a NaN most of all.
            came = lax.broadcasted_iota(jnp.int32, taken.shape, 0) < (self.count - step * self.a_step) * self.words
            taken = jnp.where(came, taken, jnp.zeros_like(taken))
        if self.single:
            at = pl.ds(pl.multiple_of(step * self.a_step, self.a_step), self.a_step)
            return _picked(taken, which[:, at], self.a_word)
        rows = pltpu.bitcast(taken, self.dtype) if self.narrow else taken
        return rows.astype(jnp.float32).astype(jnp.bfloat16) if rows.dtype == jnp.int8 else rows

    def which(self, index: jax.Array) -> jax.Array:
        """Of rows that share their words, which one is meant, int32 ``[1, steps * a_step]``.

        One number where slabs are read as they are.
        """
        if not self.single:
            return jnp.zeros((1, 1), jnp.int32)
        return jnp.pad(index & (self.a_word - 1), (0, -self.count % self.a_step))[None]


def _each(count: int, act: Callable[[Any], None]) -> None:
    """``act`` of each number below ``count``, written out so many at a time."""

    def some(part: jax.Array, _: None) -> None:
        for i in range(_UNROLLED):
            act(part * _UNROLLED + i)

    whole = count // _UNROLLED
    if whole > 1:
        lax.fori_loop(0, whole, some, None)
    for i in range(0 if whole < 2 else whole * _UNROLLED, count):
        act(i)


def _picked(words: jax.Array, which: jax.Array, rows: int) -> jax.Array:
    """Of words that hold two rows of bfloat16 each, or four of int8, ``[r, d]``, the row that ``which [1, r]`` says."""
    count, bits = words.shape[0], 32 // rows
    shift = (32 - bits) - bits * jnp.broadcast_to(which, (count, count)).T[:, :1]
    raised = lax.shift_left(words, jnp.broadcast_to(shift, words.shape).astype(jnp.uint32))
    if bits == 16:
        return pltpu.bitcast(raised & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)
    signed = lax.shift_right_arithmetic(pltpu.bitcast(raised, jnp.int32), jnp.int32(32 - bits))
    return signed.astype(jnp.float32).astype(jnp.bfloat16)


def stream(
    slabs: Slabs, sources: Sequence[Any], index: Any, held: Any, sent: Any, use: Sequence[Callable[[Any, Any], None]]
) -> None:
    """Takes the slabs of one matrix after the other, and sends for them some steps ahead, of the next matrix as well.

    Args:
      slabs: how they are read, the same of each matrix.
      sources: the matrices, in HBM.
      index: for each matrix a reference to the slabs' numbers, in scalar memory.
      held, sent: where they are kept, as :meth:`Slabs.held` says, and a semaphore for each of its ``AHEAD`` steps.
      use: for each matrix what is called with a step of it, from 0 on, and with where its rows are kept.
    """
    steps = slabs.steps
    total = steps * len(sources)

    def of_its_matrix(step: Any, act: Callable[[int, Any], None]) -> None:
        """``act`` of the number of the matrix that a step, of those of all, belongs to, and of the step's own."""
        for number in range(len(sources)):
            first = number * steps
            inside = step < first + steps if number == 0 else (first <= step) & (step < first + steps)
            pl.when(inside)(functools.partial(act, number, step - first))

    def start(all_steps: Any) -> None:
        slot = all_steps & (AHEAD - 1)
        of_its_matrix(all_steps, lambda i, step: slabs.start(index[i], sources[i], held, sent, step, slot))

    def body(all_steps: jax.Array, _: None) -> None:
        start(all_steps + (AHEAD - 1))
        slot = all_steps & (AHEAD - 1)

        def take(number: int, step: Any) -> None:
            slabs.wait(held, sent, step, slot)
            use[number](step, slot)

        if len(sources) == 1:
            take(0, all_steps)
        else:
            of_its_matrix(all_steps, take)

    lax.fori_loop(0, min(AHEAD - 1, total), lambda step, _: start(step), None)
    lax.fori_loop(0, total, body, None)
