"""Puts one decode function of a stack through the library: what was found, and whether it is equal."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from checks import FORCE, full_width, kinds
from stack import Run, Stack

import hire_xform as hx


@dataclass(frozen=True)
class Checked:
    """What came of a decode function.

    Attributes:
      case, run: the function.
      ffn, vocab: sites found.
      gap: largest difference of any float result at full width, plain and packed weights, over the largest entry.
      proved: sites that lossless settings rewrite.
      same_tokens: whether these decode the tokens that the dense function does; None where it decodes none.
      why: what is rewritten and what is not, as text.
    """

    case: Stack
    run: Run
    ffn: int
    vocab: int
    gap: float
    proved: int
    same_tokens: bool | None
    why: str


def checked(case: Stack) -> Checked:
    """Runs a function dense, at full width with plain and packed weights, and losslessly.

    Raises:
      AssertionError: what is not a float differs at full width, or structure or shapes do.
    """
    run = case.build()
    args, kwargs = run.call()
    want = run.dense(*args, **kwargs)
    step = run.sparse(full_width(stated=False))
    args, kwargs = run.call()
    traced = step.trace(*args, **kwargs)
    found = kinds(traced.plan)
    made = step.pack(*args, **kwargs)
    gaps = [gap(step(*args, **kwargs), want)]
    args, kwargs = run.call()
    args, held = list(args), made if len(run.weights) > 1 else (made,)
    for key, packed in zip(run.weights, held, strict=True):
        if isinstance(key, int):
            args[key] = packed
        else:
            kwargs[key] = packed
    gaps.append(gap(step(*args, **kwargs), want))
    args, kwargs = run.call()
    lossless = run.sparse(hx.lossless(rules=FORCE))
    proved = len(lossless.trace(*args, **kwargs).plan.sites)
    same = None
    if run.tokens is not None:
        same = bool(np.array_equal(run.tokens(lossless(*args, **kwargs)), run.tokens(want)))
    return Checked(case, run, found.count("ffn"), found.count("vocab"), max(gaps), proved, same, traced.explain())


def gap(got, want) -> float:
    """The largest difference of any float, over the largest of its array; all else is equal."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    found = 0.0
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (np.shape(one), one.dtype) == (np.shape(other), other.dtype)
        if not jnp.issubdtype(one.dtype, jnp.inexact):
            assert bool(jnp.all(one == other))
            continue
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        scale = max(1e-6, np.abs(other[np.isfinite(other)]).max(initial=0.0))
        np.testing.assert_array_equal(np.isfinite(one), np.isfinite(other))
        found = max(found, float(np.abs(one - other)[np.isfinite(other)].max(initial=0.0) / scale))
    return found
