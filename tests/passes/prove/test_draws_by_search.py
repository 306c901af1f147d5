"""Draws that search running sums for a number, such as ``jax.random.choice``: the dense place, proved, or a reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from laid_out import laid_out
from test_sampling_spellings import K, T, V, W, compared, draws, hard, near_and_equal, step_of

from hire_xform.passes.match.output_axis import follow
from hire_xform.passes.prove.logits import Logits
from hire_xform.passes.prove.searches import is_search, search_of


def choice(u, key):
    shares = jax.nn.softmax(u / 0.7, axis=-1)
    return jax.vmap(lambda p, key: jax.random.choice(key, V, p=p))(shares, jax.random.split(key, T))


def choice_of_one_row(u, key):
    return jax.random.choice(key, V, p=jax.nn.softmax(u, axis=-1)[0])


def several_of_each(u, key):
    shares = jax.nn.softmax(u, axis=-1)
    return jax.vmap(lambda p, key: jax.random.choice(key, V, (3,), p=p))(shares, jax.random.split(key, T))


def choice_of_the_largest(u, key):
    """Of shares of the k largest, made one again; the token by its place."""
    shares, index = lax.top_k(jax.nn.softmax(u[0]), K)
    return jax.random.choice(key, index, p=shares / jnp.sum(shares))


def by_hand(u, key):
    return jnp.searchsorted(jnp.cumsum(jnp.exp(u[0] - jnp.max(u[0]))), 3.0 * jax.random.uniform(key), side="right")


def in_parts(u, key):
    """As ``choice`` has it, spelled out."""
    sums = jnp.cumsum(jax.nn.softmax(u, axis=-1), axis=-1)
    sought = jax.random.uniform(key, (T,)) * sums[:, -1]
    return jax.vmap(jnp.searchsorted)(sums, sought)


SEARCHES = {
    f.__name__: f for f in (choice, choice_of_one_row, several_of_each, choice_of_the_largest, by_hand, in_parts)
}


@pytest.mark.parametrize("name", SEARCHES)
def test_the_place_is_proved_and_nothing_else_is_said_to_be_read(name):
    (site,) = step_of(SEARCHES[name]).trace(W, *draws(2)).plan.sites
    said = "what is drawn (gather" if name == "choice_of_the_largest" else "the place that is found"
    assert [said in told for told in site.proved] == [True]
    assert site.unproved == ()


@pytest.mark.any_jax("cases are spellings of one search", every=2)
@pytest.mark.parametrize("name", SEARCHES)
def test_places_are_the_dense_ones_and_most_are_proved(name):
    assert compared(SEARCHES[name], W, *draws(64)) >= {"several_of_each": 40, "choice_of_the_largest": 40}.get(name, 56)


@pytest.mark.parametrize("name", ["choice", "by_hand"])
def test_hard_inputs(name):
    """Ties, norms of all sizes, and numbers that are not finite."""
    compared(SEARCHES[name], near_and_equal(), *hard())


@pytest.mark.any_jax("cases are dtypes of one proof", every=2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_16_bits_that_are_widened(dtype):
    xs, keys = draws(32)
    proved = compared(lambda u, key: choice(u.astype(jnp.float32), key), W.astype(dtype), xs.astype(dtype), keys)
    assert proved >= 16


def test_few_candidates_prove_less():
    """The terms that are not candidates are in the sums, with all the width of their bounds."""
    proved = [compared(choice, W, *draws(48, scale=0.5), candidates=candidates) for candidates in (2, 90)]
    assert proved[0] < proved[1]


def a_loop_of_ones_own(u, key):
    shares = jax.nn.softmax(u, axis=-1)

    def body(i, at):
        return jnp.where(jnp.sum(shares[0, :5]) * i < 0.3, at + 1, at)

    return lax.fori_loop(0, 3, body, 0)


def another_search(u, key):
    """The state begins elsewhere than JAX has it, so that it is not taken for a search."""
    return lax.while_loop(lambda at: jnp.cumsum(jax.nn.softmax(u[0]))[at] < 0.5, lambda at: at + 1, 0)


@pytest.mark.parametrize("draw", [a_loop_of_ones_own, another_search])
def test_other_loops_are_said_not_to_be_proved_with_what_to_do(draw):
    (site,) = step_of(draw).trace(W, *draws(2)).plan.sites
    assert site.proved == ()
    assert any("loops and branches" in told and "jax.random.categorical" in told for told in site.unproved)


def test_a_place_that_is_not_the_search_itself_is_followed_no_further():
    """What is made of a place is the dense one where the place is."""

    def embedded(u, key):
        return jnp.take(jnp.arange(V) % 7, choice(u, key))

    (site,) = step_of(embedded).trace(W, *draws(2)).plan.sites
    assert (len(site.proved), site.unproved) == (1, ())
    got = step_of(embedded)(W, *draws(16))
    np.testing.assert_array_equal(got, jnp.arange(V)[step_of(choice)(W, *draws(16))] % 7)


# --- what is searched for ---


def of_quotients(make):
    """A search among the running sums of what is made of logits, for a share of their total."""

    def read(u):
        sums = jnp.cumsum(make(u), axis=-1)
        return jnp.searchsorted(sums, sums[-1] * 0.5) if sums.ndim == 1 else per_row(sums, sums[:, -1] * 0.5)

    return read


def per_row(sums, sought):
    return jax.vmap(jnp.searchsorted)(sums, sought)


def of_sums(seek):
    """A search among the running sums of each row of a softmax, for what is made of these sums."""

    def read(u):
        sums = jnp.cumsum(jax.nn.softmax(u), axis=-1)
        return per_row(sums, seek(sums))

    return read


def divided_twice(u):
    shares = jax.nn.softmax(u)
    return shares / jnp.sum(shares, axis=-1, keepdims=True)


# How many divisors a share has, or None where it is a search like any other.
SOUGHT = {
    "a softmax": (of_quotients(jax.nn.softmax), 1),
    "a row of it": (of_quotients(lambda u: jax.nn.softmax(u[:1])[0]), 1),
    "exponentials": (of_quotients(jnp.exp), 0),
    "shares made one again": (of_quotients(divided_twice), 2),
    "divided by each its own": (of_quotients(lambda u: jnp.exp(u) / jnp.abs(u)), 0),
    "the total from the left": (of_sums(lambda sums: 0.5 * sums[:, -1]), 1),
    "not the last": (of_sums(lambda sums: sums[:, -2] * 0.5), None),
    "the rows turned round": (of_sums(lambda sums: sums[::-1, -1] * 0.5), None),
    "the total of another row": (of_sums(lambda sums: jnp.broadcast_to(sums[:, -1], (2, 2)) * 0.5), None),
    "a share that hangs on the logits": (of_sums(lambda sums: sums[:, -1] * sums[:, 0]), None),
    "a number": (of_sums(lambda sums: jnp.full(2, 0.5)), None),
    "sums from behind": (
        lambda u: per_row(sums := lax.cumsum(jnp.exp(u), axis=1, reverse=True), sums[:, -1] * 0.5),
        None,
    ),
    "in 16 bits": (of_quotients(lambda u: jax.nn.softmax(u.astype(jnp.bfloat16))), None),
}


@pytest.mark.parametrize("name", SOUGHT)
def test_what_is_searched_for(name):
    read, divisors = SOUGHT[name]
    found = laid_out(lambda w, x: read(x @ w), jnp.ones((4, 16)), jnp.ones((2, 4)))
    logits = Logits(found.product, follow(found.product, narrow=False))
    (node,) = (n for n in found.graph.program_order() if is_search(n))
    (search,) = (s for s in (search_of(node, at, logits) for at in range(len(node.outputs))) if s is not None)
    assert (search.share, len(search.inputs)) == (divisors is not None, 2 + (divisors or 0))
