"""Settings of JAX that users debug with change neither what is rewritten nor what comes out."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import assert_same, kinds, named
from jax import lax

import hire_xform as hx

SETTINGS = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "disable_jit": jax.disable_jit,
    "enable_checks": lambda: jax.enable_checks(True),
    "checking_leaks": jax.checking_leaks,
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "transfer guard": lambda: jax.transfer_guard("disallow"),
    "x64": lambda: jax.enable_x64(True),
    "default device": lambda: jax.default_device(jax.devices("cpu")[0]),
}
CONFIGS = {
    "predicted": hx.approximate(rules=named(hx.Vocab(predictor=hx.LowRank(0.5, bits=4), certify=False))),
    "lossless": hx.lossless(rules=named(hx.Vocab(certify=True))),
}


def net(params, x):
    """A ReLU block, one that keeps its own top-k, and a head, spelled so that every setting takes it."""
    hidden = jnp.maximum(x @ params["w1"] + lax.broadcast_in_dim(params["b1"], (x.shape[0], models.M), (1,)), 0)
    x = x + hidden @ params["w2"]
    hidden = jnp.abs(x @ params["w1"])
    least = lax.top_k(hidden, 8)[0][:, -1:]
    x = x + jnp.where(hidden >= least, hidden, jnp.zeros_like(hidden)) @ params["w2"]
    return x @ params["head"]


def given():
    rng = np.random.default_rng(0)
    params = {name: a for name, a in models.layer_weights(rng, jnp.float32).items() if name in ("w1", "b1", "w2")}
    x = jnp.asarray(rng.normal(size=(1, models.D)), jnp.float32)
    return {**params, "head": models.random_array(rng, models.D, 300)}, x


# Made before anything is set.
kept = functools.cache(given)


@functools.cache
def as_usual(run, *arguments):
    """What a function gives where nothing is set: the same for every setting."""
    return run(*arguments)


def found_in_one_call(config):
    params, x = given()
    plain = hx.sparsify(net, config=CONFIGS[config])
    return plain(params, x), plain.trace(params, x).plan


@pytest.mark.any_jax("settings of JAX against settings of ours", every=2)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_found_and_what_comes_out_is_the_same(setting, config):
    params, x = given()
    want, told = as_usual(found_in_one_call, config)
    with SETTINGS[setting]():
        step = hx.sparsify(net, config=CONFIGS[config])
        traced = step.trace(params, x)
        packed = traced.pack(params)
        got = [step(params, x), jax.jit(step)(packed, x)]
    assert kinds(traced.plan) == kinds(told)
    assert [s.own for s in traced.plan.sites] == [s.own for s in told.sites]
    for one in got:
        assert one.dtype == want.dtype
        assert_same(one, want)


@functools.cache
def packed_for(config):
    params, x = kept()
    return hx.sparsify(net, config=CONFIGS[config]).trace(params, x).pack(params)


def derivative_and_batch(config):
    (_, x), packed = kept(), packed_for(config)
    called = jax.jit(hx.sparsify(net, config=CONFIGS[config]))
    slope = jax.grad(lambda x: called(packed, x).max())(x)
    many = jax.vmap(called, in_axes=(None, 0))(packed, jnp.stack([x, 2 * x]))
    return slope, many


@pytest.mark.any_jax("settings of JAX against settings of ours", every=2)
@pytest.mark.parametrize("setting", ["strict promotion", "no rank promotion", "debug_nans", "disable_jit"])
@pytest.mark.parametrize("config", CONFIGS)
def test_derivatives_and_batches_are_the_same(setting, config):
    """Rules of derivatives and batching run when the rewritten program is transformed, out of the rewriter's sight."""
    want = as_usual(derivative_and_batch, config)
    with SETTINGS[setting]():
        got = derivative_and_batch(config)
    for one, other in zip(got, want, strict=True):
        assert_same(one, other)


def test_nans_are_found_where_they_are_made():
    params, x = given()
    step = hx.sparsify(net, config=CONFIGS["predicted"])
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        step(params, x.at[0, 0].set(jnp.inf) - jnp.inf)


@functools.cache
def batches():
    params, x = given()
    return [(params, x), (params, 2 * x)]


def chosen():
    options = {"config": hx.Config(rules=named(hx.Vocab())), "predictors": [hx.LowRank(0.5, bits=4)], "head_kl": None}
    found = hx.calibrate(net, batches(), **options)
    return [(s.path, s.predictor, int(s.sizes)) for s in found.sites.values()]


@pytest.mark.any_jax("settings of JAX against settings of ours", every=2)
@pytest.mark.parametrize("setting", ["debug_nans", "strict promotion", "no rank promotion", "transfer guard"])
def test_what_is_calibrated_is_the_same(setting):
    want = as_usual(chosen)
    with SETTINGS[setting]():
        assert chosen() == want


def trained():
    loss = hx.topk_ffn(lambda params, x: jnp.square(net(params, x)).sum(), active=0.25, group_size=8)
    return jax.value_and_grad(loss)(*kept())


@pytest.mark.filterwarnings("ignore:topk_ffn:hire_xform.HireWarning")
@pytest.mark.parametrize("setting", ["debug_nans", "disable_jit", "strict promotion", "no rank promotion"])
def test_training_with_a_top_k_is_the_same(setting):
    want = as_usual(trained)
    with SETTINGS[setting]():
        assert_same(trained(), want)
