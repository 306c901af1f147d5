"""The programs that are timed to measure a machine: each a function, and operands for one or more calls of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hire_xform.lowering.engine.block import UpProduct, ffn
from hire_xform.lowering.engine.head import certified_logits, vocab_logits
from hire_xform.lowering.predict.few_bits import fine_scores, quantized_scores
from hire_xform.lowering.predict.predictors import Given, PackedArrays, Predictor
from hire_xform.lowering.primitives.combine_rows import combine_rows
from hire_xform.lowering.primitives.da_top_k import da_top_k
from hire_xform.lowering.primitives.products import all_products
from hire_xform.lowering.primitives.select_rows import select_rows_dot
from hire_xform.lowering.xla.huge_pages import on_huge_pages

# A function, and the operands of one or more calls.
Case = tuple[Callable[..., Any], Sequence[tuple[Any, ...]]]

_STORED = {4: jnp.float32, 2: jnp.bfloat16, 1: jnp.int8}
F32, BF16 = jnp.float32, jnp.bfloat16
# Rows are chosen anew for each of so many calls.
_CALLS = 3


@functools.cache
def _ones(shape: tuple[int, ...], dtype: Any, packed: bool = False) -> jax.Array:
    """An array that programs share; nothing is compiled to make it. :func:`forget` drops them.

    Args:
      shape, dtype: of the array.
      packed: put where packed weights are put.
    """
    one = np.ones((), dtype)
    bits = one.view(f"u{one.dtype.itemsize}")
    made = jax.device_put(np.full(shape, bits, bits.dtype).view(dtype))
    if packed:
        on_huge_pages(made)
    return made


def forget() -> None:
    """Drops the arrays that are shared."""
    _ones.cache_clear()


def nothing() -> Case:
    """What any call costs."""
    return lambda x: -x, [(_ones((1, 128), F32),)]


def sweep(size: int) -> Case:
    """Reads so many bytes."""
    columns = 1024
    return jnp.matmul, [(_ones((max(1, size // 4 // columns), columns), F32), _ones((columns,), F32))]


def dense(form: str, spelling: str, rows: int, columns: int, tokens: int) -> Case:
    """A dense product of one of a profile's ``FORMS`` and ``SPELLINGS``, of as many outputs as rows."""
    stored = _STORED[itemsize(form)]
    used = BF16 if form in ("16 bits", "16 bits to f32") else F32
    made = BF16 if form == "16 bits" else F32
    turned = spelling == "x @ w"

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        w = w.astype(used)
        if spelling == "x @ w.T":
            w = w.T
        left, right = (w, x) if spelling == "w @ x" else (x, w)
        contracted = (1,), (0 if spelling in ("x @ w", "x @ w.T") else 1,)
        return lax.dot_general(left, right, (contracted, ((), ())), preferred_element_type=made)

    shape = (columns, rows) if turned else (rows, columns)
    return product, [(_ones((tokens, columns), used), _ones(shape, stored))]


def itemsize(form: str) -> int:
    """Bytes of an entry of dense weights of one of a profile's ``FORMS``."""
    return {"f32": 4, "16": 2, "8": 1}[form.split()[0]]


def score_bytes(kind: str, rows: int, columns: int) -> int:
    """Bytes of a predictor's matrix of one of a profile's ``SCORES``."""
    bits = {"int8": 8, "int4": 4, "f32": 32, "16 bits": 16}[kind.removesuffix(" fine")]
    return rows * columns * bits // 8


def scores(kind: str, rows: int, columns: int, tokens: int) -> Case:
    """The products of a predictor's matrix."""
    x = _ones((tokens, columns), F32)
    if not kind.startswith("int"):
        dtype = F32 if kind == "f32" else BF16
        return all_products, [(_ones((tokens, columns), dtype), _ones((rows, columns), dtype, True))]
    bits, step = int(kind[3]), fine_scores if kind.endswith("fine") else quantized_scores
    q = _ones((rows, columns * bits // 8), np.int8 if bits == 8 else np.uint8, True)
    return lambda x, q, scale: step(x, q, scale, bits), [(x, q, _ones((rows,), F32))]


def rows(step: str, count: int, row_bytes: int, chosen: int, tokens: int) -> Case:
    """Products with chosen rows, or sums of them; other rows at each call."""
    dtype = F32 if step.endswith("f32") else BF16
    columns = row_bytes // jnp.dtype(dtype).itemsize
    matrix = _ones((count, columns), dtype, True)
    draws = [np.random.default_rng(seed).permutation(count)[:chosen] for seed in range(_CALLS)]
    given = _ones((tokens, columns if step.startswith("dot") else chosen), F32)
    run = select_rows_dot if step.startswith("dot") else combine_rows

    def taken(given: jax.Array, matrix: jax.Array, index: jax.Array) -> jax.Array:
        return run(given, matrix, index, preferred_element_type=F32)

    return taken, [(given, matrix, jax.device_put(draw.astype(np.int32))) for draw in draws]


def largest(count: int, chosen: int) -> Case:
    """The largest of some scores."""
    return lambda scores: da_top_k(scores, chosen), [(_values(count),)]


class _Known(Predictor):
    """A predictor whose scores cost nothing: each row's one entry that is not zero."""

    proves = True

    def pack(self, rows: jax.Array, given: Given) -> PackedArrays:
        """The entries."""
        return {"entry": rows[:, 0]}

    def scores(self, x: jax.Array, packed: PackedArrays, n: int) -> jax.Array:
        """Exact."""
        return x[:, :1] * packed["entry"]

    def bounds(self, x: jax.Array, proof: PackedArrays, input_bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A little above."""
        scores = self.scores(x, proof, 0)
        error = 1e-6 * jnp.abs(scores)
        return scores, scores + error, error


_KNOWN = _Known()
_COLUMNS = 16


def _values(count: int) -> jax.Array:
    return jax.device_put(np.random.default_rng(0).normal(size=count).astype(np.float32))


def _site(units: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A token, and rows with one entry each."""
    entries = _values(units)
    rows = np.zeros((units, _COLUMNS), np.float32)
    rows[:, 0] = entries
    return _ones((1, _COLUMNS), F32), jax.device_put(rows), entries


def _scored(units: int, candidates: int) -> Case:
    """What all sites below have in common with dense ones: the largest of their scores."""
    x, _, entries = _site(units)
    return lambda x, entry: jnp.argmax(x[:, :1] * entry, axis=-1), [(x, entries)]


def _head(units: int, candidates: int) -> Case:
    def head(x: jax.Array, rows: jax.Array, entry: jax.Array) -> jax.Array:
        logits = vocab_logits(x, rows, {"entry": entry}, _KNOWN, candidates=candidates, out_dtype=F32)
        return jnp.argmax(logits, axis=-1)

    return head, [_site(units)]


def _certified_head(units: int, candidates: int) -> Case:
    def head(x: jax.Array, rows: jax.Array, entry: jax.Array) -> jax.Array:
        logits, _ = certified_logits(
            x, rows, {"entry": entry}, _KNOWN, lambda x, rows: x @ rows.T, candidates=candidates, out_dtype=F32
        )
        return jnp.argmax(logits, axis=-1)

    return head, [_site(units)]


def _block(units: int, candidates: int) -> Case:
    def block(x: jax.Array, rows: jax.Array, entry: jax.Array) -> jax.Array:
        up = UpProduct(x=x, rows=rows, packed={"entry": entry}, spec=_KNOWN, dtype=F32)
        out, _ = ffn(
            [up],
            lambda hiddens, gather: jax.nn.relu(hiddens[0]),
            rows,
            down_norms=jnp.abs(entry),
            active=candidates,
            out_dtype=F32,
        )
        return out

    return block, [_site(units)]


# Sites whose scores cost nothing, so that what is left is what choosing and proving cost.
SITES: dict[str, Callable[[int, int], Case]] = {
    "scored": _scored,
    "head": _head,
    "certified head": _certified_head,
    "block": _block,
}
