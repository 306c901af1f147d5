"""Which numbers and decisions are found behind logits, each where it is made."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from laid_out import laid_out

from hire_xform.passes.match.output_axis import follow
from hire_xform.passes.prove.numbers import numbers_of

W, X = jnp.ones((4, 16)), jnp.ones((3, 4))
TOKENS = jnp.array([1, 2, 3])
ROWS = jnp.arange(3)
# What `jnp.searchsorted` is up to 0.11, and from 0.12.
SEARCH = "scan" if jax.__version_info__ < (0, 12) else "call_hi_primitive"


def beside_a_loop(u):
    lp = jax.nn.log_softmax(u)[ROWS, TOKENS]
    return lax.fori_loop(0, 2, lambda i, s: s + i, lp)


def counted_in_a_loop(u):
    lp = jax.nn.log_softmax(u)[ROWS, TOKENS]
    return lax.fori_loop(0, 2, lambda i, at: jnp.where(lp > 0.5, at + 1, at), TOKENS)


FOUND = {
    "a log-probability": (lambda u: jax.nn.log_softmax(u)[ROWS, TOKENS], ["number gather"]),
    "of each, turned round": (lambda u: -jnp.sum(u * 2.0, axis=1), ["number neg"]),
    "a token alone": (lambda u: jnp.argmax(u, -1), []),
    "what is made of a token": (lambda u: W[0][jnp.argmax(u, -1)] * 2.0, []),
    "a softmax": (jax.nn.softmax, []),
    "what a loop takes": (beside_a_loop, ["number gather"]),
    "what a loop decides": (counted_in_a_loop, ["decision scan", "number gather"]),
    "a search": (lambda u: jnp.searchsorted(jnp.cumsum(jax.nn.softmax(u[0])), 0.5), [f"decision {SEARCH}"]),
    "what is decided": (lambda u: jnp.sum(jax.nn.softmax(u)[ROWS, TOKENS] > 0.5), ["decision gt"]),
    "how many are above": (lambda u: jnp.sum(u > 1.0, axis=1), ["decision reduce_sum"]),
    "what is made of what is decided": (
        lambda u: W[0][jnp.where(u[ROWS, TOKENS] > 0.5, 1, 2)],
        ["decision gt"],
    ),
    "a number and what it decides": (
        lambda u: (jnp.max(u, 1), jnp.max(u, 1) > 0.0),
        ["decision gt", "number reduce_max"],
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found(name):
    read, want = FOUND[name]
    found = laid_out(lambda w, x: read(x @ w), W, X)
    readers = numbers_of(found.product, follow(found.product, narrow=False), ())
    assert sorted(f"{r.kind} {r.node.primitive}" for r in readers) == want


def test_what_is_proved_already_is_not_looked_at():
    found = laid_out(lambda w, x: -jnp.max(x @ w, axis=1), W, X)
    fate = follow(found.product, narrow=False)
    (node,) = (n for n in found.graph.program_order() if n.primitive.name == "reduce_max")
    assert numbers_of(found.product, fate, {node}) == []
