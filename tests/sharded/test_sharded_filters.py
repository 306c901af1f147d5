"""Filters, log-probabilities and decisions over devices: proved of all logits together, or a reason why not."""

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import mesh_of
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_sharded_certified import SPECS, TOKENS, V, keys_of, lossless, tokens, weights

import hire_xform as hx

P = PartitionSpec
# Closed over, with an entry for each of all logits.
BIAS = jnp.linspace(-1.0, 1.0, V)


@pytest.fixture(scope="module")
def found():
    return devices.outcomes(__name__)


def top_p(w, x, key):
    u = x @ w["head"] + BIAS
    falling = jnp.sort(u, axis=-1)[:, ::-1]
    count = jnp.sum(jnp.cumsum(jax.nn.softmax(falling, -1), -1) < 0.8, -1, keepdims=True)
    return jax.random.categorical(key, jnp.where(u < jnp.take_along_axis(falling, count, -1), -jnp.inf, u))


def min_p(w, x, key):
    u = x @ w["head"]
    shares = jax.nn.softmax(u)
    return jax.random.categorical(key, jnp.where(shares < 0.2 * shares.max(-1, keepdims=True), -jnp.inf, u / 0.7))


def top_k(w, x, key):
    u = x @ w["head"]
    return jax.random.categorical(key, jnp.where(u < lax.top_k(u, 8)[0][:, -1:], -jnp.inf, u))


def of_the_largest(w, x, key):
    values, index = lax.top_k(x @ w["head"], 8)
    return jnp.take_along_axis(index, jax.random.categorical(key, values)[:, None], axis=1)[:, 0]


def choice(w, x, key):
    shares = jax.nn.softmax(x @ w["head"])
    return jax.vmap(lambda key, p: jax.random.choice(key, V, p=p))(jax.random.split(key, TOKENS), shares)


def scored(w, x, key):
    u = x @ w["head"]
    token = jax.random.categorical(key, u)
    return token, jnp.take_along_axis(jax.nn.log_softmax(u), token[:, None], axis=1)[:, 0]


def planned(fun, model=4, data=1, types=AxisType.Auto, head=None, **vocab):
    """A step, its weights and tokens on a mesh, and its plan."""
    mesh = mesh_of(model, data, types)
    w = {"head": jax.device_put(weights()["head"] if head is None else head, NamedSharding(mesh, SPECS["head"]))}
    x = jax.device_put(tokens(), NamedSharding(mesh, P("data") if data > 1 else P()))
    step = hx.sparsify(fun, config=lossless(**vocab))
    return step, w, x, step.trace(w, x, keys_of(1)[0])


def ran_dense(fun, model=4, n=6, head=None, x=None, **settings):
    """How many calls ran dense; tokens are the dense ones, numbers as close as is stated."""
    step, w, own, traced = planned(fun, model, head=head, **settings)
    (site,) = traced.plan.sites
    assert (site.shards, site.unproved) == (model, ())
    packed, failed, x = traced.pack(w), 0, own if x is None else jax.device_put(x, own.sharding)
    for key in keys_of(n):
        got, counts = step.with_fallbacks(packed, x, key)
        want = jax.jit(fun)({"head": weights()["head"] if head is None else head}, x, key)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=0 if a.dtype == jnp.int32 else settings["logprobs"])
        (count,) = counts.values()
        failed += int(count)
    return failed


def check_filters_draw_the_dense_tokens():
    for fun, model in ((top_p, 4), (min_p, 2), (top_k, 8), (choice, 4)):
        assert ran_dense(fun, model) <= 3, fun


def check_a_filter_of_stages():
    assert ran_dense(top_p, predictor=hx.Staged((hx.LowRank(4, bits=8), hx.Quantized(8)))) <= 3


def check_log_probabilities_and_draws_among_the_largest():
    assert ran_dense(scored, logprobs=0.2) <= 2
    assert ran_dense(of_the_largest, logprobs=0.2) <= 2


def check_hard_inputs():
    """Ties over devices, and what is not finite."""
    head = np.asarray(weights()["head"]).copy()
    for copy in (3, 17, 40, 63):
        head[:, copy] = head[:, 5]
    for fun in (top_p, choice):
        for value in (3e38, np.nan):
            ran_dense(fun, n=2, head=jnp.asarray(head), x=tokens().at[1, 3].set(value))
        ran_dense(fun, n=3, head=jnp.asarray(head))


def check_tokens_over_devices_are_refused_with_a_reason():
    for fun, settings in ((top_p, {}), (min_p, {}), (choice, {}), (scored, {"logprobs": 0.2})):
        step, w, x, traced = planned(fun, 2, 2, **settings)
        (refusal,) = traced.plan.refusals
        assert not traced.plan.sites, fun
        assert "each of which has all tokens" in refusal.reason, refusal.reason
        assert refusal.reason in traced.explain().replace("\n", " ") or "all tokens" in traced.explain()
        key = keys_of(1)[0]
        jax.tree.map(np.testing.assert_array_equal, step(w, x, key), jax.jit(fun)(w, x, key))


def check_a_draw_among_the_largest_is_told():
    """A set is proved with a few bytes a token; a draw by its logits, which round in their own way, is not."""
    (site,) = planned(of_the_largest)[-1].plan.sites
    assert "8 largest" in site.proved[0]
    assert any("proved as a set" in told for told in site.unproved)


@pytest.mark.parametrize("name", devices.checks(__name__))
def test_on_devices(found, name):
    assert not found[name], found[name]
