"""Log-probabilities of tokens that are chosen: within what is stated of the dense ones, proved, or computed dense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampling_spellings import ROWS, K, T, V, W, drawn, draws, hard, near_and_equal, of, run, step_of

import hire_xform as hx

WITHIN = 0.25


def picked(values, token):
    return jnp.take_along_axis(values, token[:, None], axis=-1)[:, 0]


def beside_a_draw(u, key):
    token = drawn(u / 0.7, key)
    return token, picked(jax.nn.log_softmax(u), token)


def by_two_columns(u, key):
    token = drawn(u, key)
    return token, jax.nn.log_softmax(u)[jnp.arange(T), token]


def of_each(u, key):
    def one(u, key):
        token = jax.random.categorical(key, u)
        return token, jax.nn.log_softmax(u)[token]

    return jax.vmap(one)(u, jax.random.split(key, T))


def of_one_row(u, key):
    """Of one token alone, by its number: a slice of one entry."""
    token = jax.random.categorical(key, u[:1])
    return token[0], jax.nn.log_softmax(u[:1])[0, token[0]]


def by_one_hot(u, key):
    token = jnp.argmax(u, -1)
    return token, jnp.sum(jax.nn.log_softmax(u) * jax.nn.one_hot(token, V), axis=-1)


def less_the_sum(u, key):
    token = drawn(u, key)
    return token, picked(u, token) - jax.nn.logsumexp(u, axis=-1)


def largest(u, key):
    return jnp.argmax(u, -1), jnp.max(jax.nn.log_softmax(u / 0.7), axis=-1)


def probability(u, key):
    token = drawn(u, key)
    return token, picked(jax.nn.softmax(u), token)


def added_up(u, key):
    token = drawn(u, key)
    return token, jnp.sum(picked(jax.nn.log_softmax(u), token)) / T


def of_those_that_are_kept(u, key):
    values, index = jax.lax.top_k(u, K)
    place = drawn(values, key)
    return of(index, place), picked(jax.nn.log_softmax(values), place)


def of_given_tokens(u, key):
    return jax.nn.log_softmax(u)[ROWS[:, 0], jnp.array([3, 90])]


SPELLINGS = {
    f.__name__: f
    for f in (
        *(beside_a_draw, by_two_columns, of_each, by_one_hot, less_the_sum, largest, probability, added_up),
        *(of_those_that_are_kept, of_given_tokens, of_one_row),
    )
}


def compared(fun, w, xs, keys, within=WITHIN, **vocab):
    """How many steps were proved: whole numbers are the dense ones, others as close as is stated."""
    got, counts = step_of(fun, logprobs=within, **vocab).with_fallbacks(w, xs, keys)
    want = jax.jit(functools.partial(run, fun))(w, xs, keys)
    for own, dense in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if own.dtype == jnp.int32:
            np.testing.assert_array_equal(own, dense)
        else:
            np.testing.assert_allclose(np.float32(own), np.float32(dense), rtol=0, atol=within)
    (failed,) = counts.values()
    return len(xs) - int(failed)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_number_is_proved_and_nothing_else_is_said_to_be_read(name):
    (site,) = step_of(SPELLINGS[name], logprobs=WITHIN).trace(W, *draws(2)).plan.sites
    assert sum("number" in told for told in site.proved) == 1
    assert site.unproved == ()


# XLA compiles this one for half a minute where it is to compile quickly.
SLOW = [pytest.param(name, marks=[pytest.mark.slow] * (name == "less_the_sum")) for name in SPELLINGS]


@pytest.mark.any_jax("cases are spellings of one number", every=3)
@pytest.mark.parametrize("name", SLOW)
def test_numbers_are_as_close_as_is_stated_and_most_are_proved(name):
    assert compared(SPELLINGS[name], W, *draws(24)) >= 20


def test_what_is_not_asked_for_is_said_not_to_be_proved():
    (site,) = step_of(beside_a_draw).trace(W, *draws(2)).plan.sites
    assert len(site.proved) == 1
    assert any("softmax" in told for told in site.unproved)


def test_a_closer_bound_runs_more_dense_and_more_candidates_prove_more():
    given = draws(24)
    wide, close, closest, few = (
        compared(beside_a_draw, W, *given, **settings)
        for settings in ({}, {"within": 1e-3}, {"within": 1e-9}, {"within": 1e-3, "candidates": 8})
    )
    assert wide > close > few >= closest == 0


@pytest.mark.parametrize("fun", [beside_a_draw, largest])
def test_stages_read_the_rows_that_have_mass(fun):
    """Few rows can be what is chosen; many more have a share of the sum, and are read in eight bits for it."""
    spec = hx.Staged((hx.LowRank(4, bits=4), hx.Quantized(8)))
    proved = [compared(fun, W, *draws(24), within=0.3, candidates=4, predictor=p) for p in (spec, hx.Quantized(8))]
    assert proved[0] >= proved[1] - 2 >= 10


@pytest.mark.any_jax("cases are spellings of one number", every=2)
@pytest.mark.parametrize("name", ["beside_a_draw", "by_one_hot"])
def test_hard_inputs(name):
    """Ties, norms of all sizes, and numbers that are not finite."""
    compared(SPELLINGS[name], near_and_equal(), *hard())


@pytest.mark.any_jax("cases are dtypes of one proof", every=2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_16_bits_that_are_widened(dtype):
    xs, keys = draws(24)
    fun = lambda u, key: beside_a_draw(u.astype(jnp.float32), key)  # noqa: E731
    assert compared(fun, W.astype(dtype), xs.astype(dtype), keys, within=0.5) >= 12


def test_the_bound_is_of_the_predicted_logits_that_the_program_reads():
    """Two candidates of 97: nearly all of the sum is predicted, and the bound still holds."""
    assert compared(beside_a_draw, W, *draws(24, scale=0.5), within=0.3, candidates=2) >= 1


def test_a_number_that_is_not_followed_is_refused():
    def odd(u, key):
        token = drawn(u, key)
        return token, jax.lax.lgamma(-picked(jax.nn.log_softmax(u), token))

    plan = step_of(odd, logprobs=WITHIN).trace(W, *draws(2)).plan
    assert not plan.sites
    assert any("lgamma" in r.reason and "logprobs=" in r.reason for r in plan.refusals)


@pytest.mark.parametrize(
    "settings", [{"logprobs": 0}, {"logprobs": True}, {"logprobs": "close"}, {"logprobs": 0.1, "fill": "-inf"}]
)
def test_bounds_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="logprobs"):
        hx.Vocab(certify=True, **settings)
