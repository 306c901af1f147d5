"""Groups of units that fire together: how they are found, and that packing by them changes no result."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import FORCE, assert_same, full_width, named

import hire_xform as hx
from hire_xform.calibrating.grouping import grouped_order
from hire_xform.lowering.measure.cofiring import SKETCH, cofiring

D, M = models.D, models.M
G = 4
GROUPED = hx.Config(ffn=hx.Ffn(group_size=G), vocab=None, rules=FORCE)


def planted(tokens, units, group_size, seed=0):
    """Units that fire in groups, and the groups, of units that are no neighbours."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(units).reshape(-1, group_size)
    fires = rng.random((tokens, len(groups))) < rng.uniform(0.05, 0.5, len(groups))
    weights = np.zeros((tokens, units), np.float32)
    for i, group in enumerate(groups):
        weights[:, group] = fires[:, i : i + 1]
    return weights, {frozenset(g.tolist()) for g in groups}


def test_planted_groups_are_found():
    weights, groups = planted(300, 48, G)
    order = grouped_order(np.asarray(cofiring(jnp.asarray(weights))), G)
    assert sorted(order) == list(range(48))
    assert {frozenset(g.tolist()) for g in order.reshape(-1, G)} == groups


def test_a_sketch_finds_them_as_well(monkeypatch):
    monkeypatch.setattr(importlib.import_module("hire_xform.lowering.measure.cofiring"), "SKETCHED_FROM", 10)
    weights, groups = planted(3000, 1200, G)
    weights = weights * np.random.default_rng(1).uniform(0.5, 1.5, weights.shape).astype(np.float32)
    sketch = np.asarray(cofiring(jnp.asarray(weights)))
    assert sketch.shape == (1200, SKETCH)
    found = {frozenset(g.tolist()) for g in grouped_order(sketch, G).reshape(-1, G)}
    assert len(found & groups) >= 0.9 * len(groups)


def cofiring_params(seed=0):
    """A block whose units copy each other in groups that are not neighbours."""
    rng = np.random.default_rng(seed)
    copies = np.argsort(rng.permutation(M)) % (M // G)
    w1 = rng.normal(size=(D, M // G))[:, copies] + 0.05 * rng.normal(size=(D, M))
    b1 = -1.0 + 0.1 * rng.normal(size=M)
    made = {"w1": w1, "b1": b1, "v": rng.normal(size=(D, M)), "w2": rng.normal(size=(M, D))}
    return {name: jnp.asarray(value, jnp.float32) for name, value in made.items()}


def gated(p, x):
    return x + (jax.nn.relu(x @ p["w1"] + p["b1"]) * (x @ p["v"])) @ p["w2"]


def stacked_params():
    layers = [cofiring_params(seed) for seed in range(3)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def looped(params, x):
    return jax.lax.scan(lambda x, p: (gated(p, x) / 8, None), x, params)[0]


def batches(params, count=2):
    return [(params, jnp.asarray(np.random.default_rng(s).normal(size=(60, D)), jnp.float32)) for s in range(count)]


@pytest.mark.any_jax("units in another order are the same units", every=2)
@pytest.mark.parametrize("fun", [gated, looped])
@pytest.mark.parametrize("predictor", [hx.Quantized(8), hx.LowRank(0.5, bits=8)], ids=repr)
def test_full_width_is_dense_in_another_order(fun, predictor):
    params = cofiring_params() if fun is gated else stacked_params()
    given = batches(params)
    calibration = hx.calibrate(fun, given, config=GROUPED, predictors=[predictor])
    config = full_width(predictor, group_size=G)
    step = hx.sparsify(fun, config=config, calibration=calibration)
    x = given[0][1][:1]
    traced = step.trace(params, x)
    (site,) = traced.plan.sites
    assert "units that fire together are neighbours" in site.calibrated
    want = jax.jit(fun)(params, x)
    assert_same(step(params, x), want)
    assert_same(step(traced.pack(params), x), want)
    assert_same(
        jax.vmap(lambda one: step(traced.pack(params), one[None]))(given[0][1][:3])[:, 0], fun(params, given[0][1][:3])
    )


def test_fewer_groups_are_touched_and_the_same_units_computed_as_with_weights_in_that_order():
    params = cofiring_params()
    given = batches(params)
    calibration = hx.calibrate(gated, given, config=GROUPED, predictors=[hx.Quantized(8)], recall=0.9)
    (site,) = calibration.sites.values()
    before, after = site.touched
    assert after < 0.7 * before
    x = np.concatenate([np.asarray(b[1]) for b in given])
    fired = np.asarray(jax.nn.relu(x @ params["w1"] + params["b1"]) * (x @ params["v"])) != 0
    np.testing.assert_array_equal(site.fired, fired.sum(0))
    assert before == pytest.approx(fired.reshape(-1, M // G, G).any(2).mean())
    assert after == pytest.approx(fired[:, site.order].reshape(-1, M // G, G).any(2).mean())
    laid = {n: v[site.order] if n in ("w2", "b1") else v[:, site.order] for n, v in params.items()}
    active = hx.Config(ffn=hx.Ffn(group_size=G, active=int(site.sizes) * G / M), vocab=None, rules=FORCE)
    for one in given[0][1][:5]:
        got = hx.sparsify(gated, config=GROUPED, calibration=calibration)(params, one[None])
        assert_same(got, hx.sparsify(gated, config=active)(laid, one[None]))


def test_the_order_is_kept_in_the_file_and_is_for_its_groups_only(tmp_path):
    params = cofiring_params()
    calibration = hx.calibrate(gated, batches(params), config=GROUPED, predictors=[hx.Quantized(8)])
    calibration.save(tmp_path / "c")
    (one,), (other,) = (c.sites.values() for c in (calibration, hx.Calibration.load(tmp_path / "c")))
    np.testing.assert_array_equal(one.order, other.order)
    np.testing.assert_array_equal(one.touched, other.touched)
    single = dataclasses.replace(GROUPED, ffn=hx.Ffn())
    site = hx.sparsify(gated, config=single, calibration=calibration).trace(*batches(params)[0]).plan
    assert not site.sites or "neighbours" not in site.sites[0].calibrated
    plain = hx.calibrate(gated, batches(params), config=single, predictors=[hx.Quantized(8)])
    assert next(iter(plain.sites.values())).order is None
    once = hx.calibrate(gated, iter(batches(params)), config=GROUPED, predictors=[hx.Quantized(8)])
    assert next(iter(once.sites.values())).order is None


@pytest.mark.any_jax("units in another order are the same units", every=2)
@pytest.mark.parametrize("predictor", [hx.Quantized(8), hx.LowRank(0.5, bits=8)])
def test_groups_may_stay_as_they_are(predictor):
    params = cofiring_params()
    given = batches(params)
    asked = {"config": GROUPED, "predictors": [predictor], "recall": 0.9}
    moved, kept = (hx.calibrate(gated, given, regroup=regroup, **asked) for regroup in (True, False))
    (site,) = kept.sites.values()
    assert site.order is None
    assert site.touched[0] == site.touched[1] == next(iter(moved.sites.values())).touched[0]
    active = hx.Config(ffn=hx.Ffn(group_size=G, active=int(site.sizes) * G / M, predictor=predictor), rules=FORCE)
    for one in given[0][1][:3]:
        got = hx.sparsify(gated, config=GROUPED, calibration=kept)(params, one[None])
        assert_same(got, hx.sparsify(gated, config=active, calibration=kept)(params, one[None]))
    again = hx.calibrate(gated, given, fitted=moved, regroup=False, **asked)
    assert next(iter(again.sites.values())).order is None


def test_regroup_is_a_flag():
    with pytest.raises(TypeError, match="calibrate: regroup='no'; expected True or False"):
        hx.calibrate(gated, batches(cofiring_params()), config=GROUPED, regroup="no")


def test_quality_is_rehearsed_in_that_order():
    params = {**cofiring_params(), "head": models.random_array(np.random.default_rng(3), D, models.V)}

    def model(p, x):
        return gated(p, x) @ p["head"]

    given = batches(params, 1)
    config = hx.Config(ffn=hx.Ffn(group_size=G), rules=named(hx.Vocab()))
    calibration = hx.calibrate(model, given, config=config, predictors=[hx.Quantized(8)], max_kl=0.01)
    step = hx.sparsify(model, config=config, calibration=calibration)
    p, q = (
        jax.nn.log_softmax(a) for a in (model(*given[0]), jnp.concatenate([step(params, o[None]) for o in given[0][1]]))
    )
    assert float((jnp.exp(p) * (p - q)).sum(1).mean()) <= 0.0101
