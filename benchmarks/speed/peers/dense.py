"""Dense JAX: f32 and bf16, a row for each output or a column, on huge pages and as XLA allocates."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.speed.cases import Weights
from benchmarks.speed.peers import BF16, EXACT, NARROW, Kernel, Left, Settings
from benchmarks.speed.peers.on_jax import (
    columns_of,
    copies,
    kernel,
    nbytes,
    placed,
    plain,
    program,
    rows_of,
    scanned,
    stacked,
    two_rows,
)
from hire_xform.lowering.xla.huge_pages import on_huge_pages

ROWS, COLUMNS = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))

# Above this only one form of each dtype is made.
LARGE = 3 << 30


def missing() -> str | None:
    """Nothing: it is JAX."""
    return None


def _columns(x: jax.Array, w: jax.Array, name: str) -> jax.Array:
    return x @ w


def _as_written(x: jax.Array, w: jax.Array, name: str) -> jax.Array:
    return x @ w if name.endswith("down") else x @ w.T


def _bf16_rows(x: jax.Array, w: jax.Array, name: str) -> jax.Array:
    narrow = two_rows(x.astype(jnp.bfloat16))
    return lax.dot_general(w, narrow, ROWS, preferred_element_type=jnp.float32)[:, : len(x)].T


def _bf16_columns(x: jax.Array, w: jax.Array, name: str) -> jax.Array:
    narrow = two_rows(x.astype(jnp.bfloat16))
    return lax.dot_general(narrow, w, COLUMNS, preferred_element_type=jnp.float32)[: len(x)]


def kernels(weights: Weights, settings: Settings) -> Iterator[Kernel | Left]:
    """Every form. What is stored in fewer bits also runs as a user writes it, widened by the program."""
    case, base = weights.case, placed(weights)
    f32, tall = jnp.float32, dict(base)
    if case.stored != "float32":
        tolerance = NARROW if "8" in case.stored else BF16
        sets = copies(base, nbytes(base), settings)
        step = jax.jit(program(case, plain))
        yield kernel(f"dense, widened from {case.stored}", step, sets, weights, nbytes(base), tolerance, dense=True)
        tall = {name: array.astype(f32) for name, array in base.items()}
        on_huge_pages(tall)
    forms = (
        ("dense f32, rows", f32, None, plain, True),
        ("dense f32, columns", f32, columns_of, _columns, True),
        ("dense f32, x @ W.T", f32, None, _as_written, True),
        ("dense f32, as XLA allocates", f32, None, plain, False),
        ("dense bf16, rows", jnp.bfloat16, rows_of, _bf16_rows, True),
        ("dense bf16, columns", jnp.bfloat16, columns_of, _bf16_columns, True),
    )
    large = 4 * case.elements > LARGE
    for name, dtype, layout, product, huge in forms:
        if large and name not in ("dense f32, rows", "dense bf16, rows"):
            yield Left(name, f"not for more than {LARGE / 1e9:g} GB of weights, to leave room for others")
            continue
        read = case.elements * jnp.dtype(dtype).itemsize
        # What is made anew: turned, narrowed, or in ordinary pages.
        reason = settings.short_of(read) if layout or not huge else None
        if reason:
            yield Left(name, reason)
            continue
        turned = tall
        if layout:
            turned = {key: layout(key, array).astype(dtype) for key, array in tall.items()}
        if not huge:
            turned = {key: jnp.array(array, copy=True) for key, array in tall.items()}
        else:
            on_huge_pages(turned)
        sets = copies(turned, read, settings, huge=huge)
        yield kernel(
            name,
            jax.jit(program(case, product)),
            sets,
            weights,
            read,
            EXACT if dtype == f32 and case.stored == "float32" else BF16 if "8" not in case.stored else NARROW,
            dense=True,
        )
    if case.scanned:
        sets = copies(stacked(case, tall), 4 * case.elements, settings)
        step = jax.jit(scanned(case, plain))
        yield kernel("dense f32, a scan over layers", step, sets, weights, 4 * case.elements, EXACT, dense=True)
