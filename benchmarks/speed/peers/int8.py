"""XLA's int8: every product in 8 bits, inputs too, in its fastest form on a CPU; nothing is computed exactly."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.speed.cases import Weights
from benchmarks.speed.peers import INT8, NARROW, Kernel, Left, Settings
from benchmarks.speed.peers.on_jax import copies, kernel, nbytes, placed, program, rows_of, two_rows
from hire_xform.lowering.xla.huge_pages import on_huge_pages


def missing() -> str | None:
    """Nothing: it is JAX."""
    return None


@jax.jit
def _quantized(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In 8 bits, and a scale a row."""
    scale = jnp.max(jnp.abs(rows), axis=1) / 127.0
    return jnp.round(rows / scale[:, None]).astype(jnp.int8), scale


def _product(x: jax.Array, weight: tuple[jax.Array, jax.Array], name: str) -> jax.Array:
    """The weight on the left and two rows on the right: others miss XLA's fast loops, weight-only forms by far."""
    rows, scale = weight
    size = jnp.max(jnp.abs(x), axis=1, keepdims=True) / 127.0
    narrow = two_rows(jnp.round(x / size).astype(jnp.int8))
    sums = lax.dot_general(rows, narrow, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return sums[:, : len(x)].T.astype(jnp.float32) * scale * size


def kernels(weights: Weights, settings: Settings) -> Iterator[Kernel | Left]:
    """One."""
    case, name = weights.case, "XLA int8 x int8"
    reason = settings.short_of(case.elements)
    if reason:
        yield Left(name, reason)
        return
    packed = {key: _quantized(rows_of(key, array)) for key, array in placed(weights).items()}
    on_huge_pages(packed)
    read = nbytes(packed)
    tolerance = NARROW if case.stored.startswith("float8") else INT8
    yield kernel(name, jax.jit(program(case, _product)), copies(packed, read, settings), weights, read, tolerance)
