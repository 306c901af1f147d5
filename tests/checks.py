"""What several test files assert with."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_xform as hx

FORCE = (hx.Rule("*", force=True),)


def named(vocab: hx.Vocab) -> tuple[hx.Rule, ...]:
    """Every site forced, and every wide product said to be a vocabulary, whatever reads it."""
    return (hx.Rule("*", force=True, vocab=vocab),)


def full_width(predictor=None, *, activations="any", max_tokens=64, stated=True, **ffn) -> hx.Config:
    """Every logit and every unit exact, at every site whatever its size.

    Args:
      stated: say that every wide product is a vocabulary; False leaves that to what the program does with it.
    """
    predictor = predictor or hx.Quantized(8)
    vocab = hx.Vocab(candidates=1 << 20, predictor=predictor, max_tokens=max_tokens)
    return hx.Config(
        vocab=vocab,
        ffn=hx.Ffn(active=1.0, predictor=predictor, activations=activations, max_tokens=max_tokens, **ffn),
        rules=named(vocab) if stated else FORCE,
    )


def narrow(active=0.1, candidates=4, **ffn) -> hx.Config:
    """Few units and few candidates, at every site whatever its size."""
    return hx.Config(ffn=hx.Ffn(active=active, **ffn), rules=named(hx.Vocab(candidates=candidates)))


@dataclass(frozen=True)
class Everything(hx.Predictor):
    """All of a matrix: its scores are the products."""

    def pack(self, rows, given):
        return {"rows": rows}

    def scores(self, x, packed, n):
        return x.astype(jnp.float32) @ packed["rows"].astype(jnp.float32).T


def compressed(predictor=None, *, max_tokens=64, **sites) -> hx.Config:
    """Every product of one matrix read from a predictor, by default one that is exact."""
    dense = hx.Dense(predictor=predictor or Everything(), max_tokens=max_tokens)
    return hx.Config(**{"vocab": None, "ffn": None, **sites}, dense=dense, rules=FORCE)


def kinds(plan) -> list[str]:
    return [site.kind for site in plan.sites]


def tolerance(*dtypes) -> float:
    return 4e-2 if any(d in (jnp.bfloat16, jnp.float16) for d in dtypes) else 2e-5


def assert_same(got, want, limit=2e-5) -> None:
    """Same structure, shapes and dtypes; floats within ``limit`` of the largest entry, the rest equal."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = jnp.asarray(one), jnp.asarray(other)
        assert (one.shape, one.dtype, one.weak_type) == (other.shape, other.dtype, other.weak_type)
        if not jnp.issubdtype(one.dtype, jnp.inexact):
            np.testing.assert_array_equal(one, other)
            continue
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        scale = max(1e-6, np.abs(other[np.isfinite(other)]).max(initial=0.0))
        np.testing.assert_allclose(one, other, rtol=limit, atol=limit * scale)


def assert_refused(fun, p, x, words, count, test_file) -> None:
    """No site, ``count`` refusals of which one has the words, all from ``test_file``, and the result unchanged."""
    step = hx.sparsify(fun, config=full_width())
    plan = step.trace(p, x).plan
    assert not plan.sites, plan.sites
    reasons = [r.reason for r in plan.refusals]
    assert len(reasons) == count, reasons
    assert any(words in reason for reason in reasons), reasons
    assert all(r.path and test_file in r.source for r in plan.refusals)
    assert_same(step(p, x), jax.jit(fun)(p, x), 0.0)


def assert_says(wrong, error, patterns) -> None:
    """Calling ``wrong`` raises ``error``, whose message has all ``patterns``."""
    with pytest.raises(error) as raised:
        wrong()
    for pattern in patterns:
        assert raised.match(pattern)


def primitives_of(jaxpr) -> list:
    """All primitives of a jaxpr, those inside others included."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    found = []
    for eqn in inner.eqns:
        found.append(eqn.primitive)
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                    found += primitives_of(sub)
    return found
