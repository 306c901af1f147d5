"""Puts one model through the library: what was found, whether it is equal at full width, and what that took."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass

import jax
import numpy as np
from case import Case
from checks import full_width, kinds

import hire_xform as hx


@dataclass(frozen=True)
class Row:
    """What came of one model.

    Attributes:
      case: the model.
      ffn, vocab: sites found.
      reasons: refusals, by reason.
      gap: largest difference of any float result at full width, plain and packed weights, over the largest entry.
      same_rest: True when structure, shapes, dtypes and all that is not a float are equal.
      dense_functions, sparse_functions: functions in the lowered modules.
      dense_seconds, sparse_seconds: time to trace and lower, without and with the rewriting.
    """

    case: Case
    ffn: int
    vocab: int
    reasons: Counter[str]
    gap: float
    same_rest: bool
    dense_functions: int
    sparse_functions: int
    dense_seconds: float
    sparse_seconds: float


def measure(case: Case) -> Row:
    """Runs a case at full width."""
    fun, args = case.build()
    options = dict(case.options)
    step = hx.sparsify(fun, config=full_width(stated=False), weights_argnums=case.weights, **options)
    start = time.perf_counter()
    traced = step.trace(*args)
    sparse_text = traced.lower().as_text()
    sparse_seconds = time.perf_counter() - start
    numbers = (case.weights,) if isinstance(case.weights, int) else tuple(case.weights)
    packed = traced.pack(*(args[i] for i in numbers))
    held = list(args)
    for i, one in zip(numbers, packed if len(numbers) != 1 else (packed,), strict=True):
        held[i] = one

    plain = jax.jit(_leaves_of(fun, args))
    arrays = [a for a in jax.tree.leaves(args) if _is_array(a)]
    start = time.perf_counter()
    dense_text = plain.lower(arrays).as_text()
    dense_seconds = time.perf_counter() - start
    want = plain(arrays)
    gaps, same = [], []
    for got in (step(*args), step(*held)):
        gap, rest = _difference(jax.tree.leaves(got), want)
        gaps.append(gap)
        same.append(rest)
    found = Counter(kinds(traced.plan))
    return Row(
        case=case,
        ffn=found["ffn"],
        vocab=found["vocab"],
        reasons=Counter(r.reason for r in traced.plan.refusals),
        gap=max(gaps),
        same_rest=all(same),
        dense_functions=_functions(dense_text),
        sparse_functions=_functions(sparse_text),
        dense_seconds=dense_seconds,
        sparse_seconds=sparse_seconds,
    )


def _is_array(leaf) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray))


def _leaves_of(fun, args):
    """``fun`` as a function of the array leaves of its arguments, returning its leaves: what ``jax.jit`` can take."""
    leaves, treedef = jax.tree.flatten(args)

    def flat(arrays):
        given = iter(arrays)
        merged = [next(given) if _is_array(leaf) else leaf for leaf in leaves]
        return jax.tree.leaves(fun(*treedef.unflatten(merged)))

    return flat


def _difference(got, want) -> tuple[float, bool]:
    got = [g for g in got if _is_array(g)]
    want = [w for w in want if _is_array(w)]
    if [(g.shape, g.dtype) for g in got] != [(w.shape, w.dtype) for w in want]:
        return float("inf"), False
    gap, same = 0.0, True
    for one, other in zip(got, want, strict=True):
        if not jax.numpy.issubdtype(one.dtype, jax.numpy.inexact):
            same = same and bool((one == other).all())
            continue
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        same = same and bool((np.isfinite(one) == np.isfinite(other)).all())
        finite = np.isfinite(other) & np.isfinite(one)
        scale = max(1e-6, np.abs(other[finite]).max(initial=0.0))
        gap = max(gap, float(np.abs(one - other)[finite].max(initial=0.0)) / scale)
    return gap, same


def _functions(text: str) -> int:
    return len(re.findall(r"func\.func", text))
