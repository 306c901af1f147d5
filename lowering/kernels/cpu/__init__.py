"""Kernels for CPUs in C++, called through XLA's FFI on XLA's threads; instruction sets are chosen at run time.

:func:`install` puts them in the place of the portable forms, where the library was built and can be loaded. They serve
up to ``MOST_TOKENS`` tokens of f32 or less: with more, the rows are read from the cache again and again, which XLA's
products are made for.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hire_xform.lowering.kernels.cpu import library, steps
from hire_xform.lowering.kernels.rules import Rules
from hire_xform.lowering.primitives.kernels import ENTRIES, no_built_in, register_built_in
from hire_xform.lowering.primitives.stack_entry import StackEntry
from hire_xform.lowering.primitives.stored_rows import scaled_in

__all__ = ["MOST_TOKENS", "install"]

MOST_TOKENS = 16
# Columns that a scale's entry is for are one, all, or a multiple of this: `kScaled` of kernels.h.
SCALED = 64
_FLOATS = frozenset({jnp.dtype(t) for t in (jnp.float32, jnp.bfloat16, jnp.float16)})
# Steps whose kernels read a matrix where it lies in a stack, or are told whether an order is needed.
_TAKES = {name: frozenset({ENTRIES}) for name in ("hire_quantized_scores", "hire_fine_scores", "hire_products")}
_TAKES["da_top_k"] = frozenset({"ordered"})
_ROWS = _FLOATS | {jnp.dtype(t) for t in (jnp.float8_e4m3fn, jnp.float8_e5m2)}
_INTEGERS = frozenset({jnp.dtype(t) for t in (jnp.int8, jnp.int4)})


@functools.cache
def install() -> str | None:
    """Registers the kernels; why not, where there are none. Calling it again changes nothing."""
    loaded = library.load()
    if isinstance(loaded, str):
        no_built_in("cpu", f"no native kernels, since {loaded}")
        return loaded
    rules = Rules(lambda module: steps)
    for name, rule, serves in (
        ("hire_quantized_scores", rules.quantized_scores, _scores_served),
        ("hire_fine_scores", rules.fine_scores, _scores_served),
        ("hire_products", _products, _products_served),
        ("hire_select_rows_dot", rules.select_rows_dot, _rows_served),
        ("hire_combine_rows", rules.combine_rows, _rows_served),
        ("hire_select_stored_rows_dot", rules.select_stored_rows_dot, _stored_rows_served),
        ("hire_combine_stored_rows", rules.combine_stored_rows, _stored_rows_served),
        ("da_top_k", rules.da_top_k, _largest_served),
        ("hire_arg_max", _arg_max, _floats_served),
        ("hire_open_rows", rules.open_rows, _open_rows_served),
    ):
        named = f"native, {library.instruction_sets()[0]}"
        register_built_in(name, "cpu", rule, serves, named, takes=_TAKES.get(name, frozenset()))
    return None


def _few(x: Any) -> bool:
    return 0 < x.shape[0] <= MOST_TOKENS and 0 not in x.shape


def _scores_served(x: Any, q: Any, scale: Any, *, bits: int) -> bool:
    return _few(x) and 0 not in q.shape


def _products_served(x: Any, rows: Any) -> bool:
    return _few(x) and 0 not in rows.shape and jnp.dtype(rows.dtype) in _ROWS


def _rows_served(x: Any, rows: Any, index: Any, **settings: Any) -> bool:
    kept = jnp.dtype(rows.dtype)
    known = jnp.dtype(x.dtype) in _FLOATS and kept in _ROWS | _INTEGERS
    # Two entries of four bits share a byte.
    known = known and (kept != jnp.int4 or rows.shape[1] % 2 == 0)
    return known and _few(x) and 0 not in rows.shape and jnp.dtype(index.dtype) == jnp.int32


def _stored_rows_served(x: Any, index: Any, values: Any, *others: Any, operations: Any, **settings: Any) -> bool:
    """Rows of int8 or int4 times one scale, in blocks that the loops take. These multiply in f32; nothing is proved."""
    if jnp.dtype(values.dtype) not in _INTEGERS or len(others) != 1 or not _rows_served(x, values, index):
        return False
    columns = values.shape[1] // others[0].shape[1]
    blocks = columns in (1, values.shape[1]) or columns % SCALED == 0
    return scaled_in(operations, _FLOATS) in _FLOATS and blocks


def _largest_served(scores: Any, **settings: Any) -> bool:
    return jnp.dtype(scores.dtype) == jnp.float32 and 0 not in scores.shape


def _open_rows_served(values: Any) -> bool:
    return jnp.dtype(values.dtype) == jnp.float32 and 0 not in values.shape


def _floats_served(values: Any) -> bool:
    return jnp.dtype(values.dtype) in _FLOATS and 0 not in values.shape


def _products(x: jax.Array, rows: jax.Array | StackEntry) -> jax.Array:
    return steps.products(x.astype(jnp.float32), rows)


def _arg_max(values: jax.Array) -> jax.Array:
    return steps.arg_max(values.astype(jnp.float32))
