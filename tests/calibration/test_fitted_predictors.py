"""Predictors that are fitted to a calibration's inputs."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from calibrated import FORCED, D, arguments, block, block_params, normal, plainly, skewed, with_predictor
from checks import assert_same, full_width, named

import hire_xform as hx
from hire_xform.lowering.predict.predictors import pack_predictor, predict_scores

pytestmark = pytest.mark.any_jax("cases vary the predictor, whose fit is our own arithmetic", every=5)


def test_projected_without_a_calibration_is_refused_at_planning():
    step = hx.sparsify(block, config=with_predictor(hx.Projected(0.5)))
    plan = step.trace(block_params(), normal(0, 1, D)).plan
    assert not plan.sites
    assert all("hx.calibrate" in r.reason for r in plan.refusals if r.kind)


FITTED = [hx.LowRank(0.25), hx.LowRank(0.5, bits=8), hx.Projected(4), hx.Projected(0.5, bits=8)]


@pytest.mark.parametrize("predictor", FITTED, ids=repr)
@pytest.mark.parametrize("model", [models.MODELS[0], models.MODELS[3]], ids=str)
def test_full_width_is_dense_with_every_predictor(predictor, model):
    params = model.make_params()
    config = with_predictor(predictor)
    calibration = plainly(model.step, [(params, *arguments(s)) for s in range(3)], config=config)
    step = hx.sparsify(model.step, config=full_width(predictor), calibration=calibration)
    traced = step.trace(params, *arguments(7))
    assert len(traced.plan.sites) == model.ffn + model.vocab
    want = jax.jit(model.step)(params, *arguments(7))
    assert_same(step(params, *arguments(7)), want)
    packed = traced.pack(params)
    assert_same(step(packed, *arguments(7)), want)
    assert_same(jax.jit(step)(packed, *arguments(7)), want)


def test_fitted_predictors_beat_a_plain_svd_on_the_inputs_they_were_fitted_to():
    rows, x, unseen = normal(0, 400, D), skewed(1, 500), skewed(2, 500)
    c = (x.T @ x) / 500

    def error(spec, covariance):
        scores = predict_scores(unseen, pack_predictor(rows, spec, covariance), spec, 400)
        return float(jnp.linalg.norm(scores - unseen @ rows.T) / jnp.linalg.norm(unseen @ rows.T))

    plain = error(hx.LowRank(4), None)
    for spec in (hx.LowRank(4), hx.LowRank(4, bits=8), hx.Projected(4), hx.Projected(4, bits=8)):
        assert error(spec, c) < 0.25 * plain
    assert error(hx.LowRank(4), c) <= error(hx.Projected(4), c) * 1.05


def test_the_weighted_factors_are_the_best_of_their_rank():
    rows, c = normal(0, 60, D), np.cov(np.asarray(skewed(1, 500), np.float64).T) + 1e-3 * np.eye(D)
    packed = pack_predictor(rows, hx.LowRank(5), jnp.asarray(c, jnp.float32))
    made = np.asarray(packed["a"], np.float64) @ np.asarray(packed["basis"], np.float64).T
    values, vectors = np.linalg.eigh(c)
    root = vectors * np.sqrt(values) @ vectors.T
    w = np.asarray(rows, np.float64)
    least = np.sqrt((np.linalg.svd(w @ root, compute_uv=False)[5:] ** 2).sum())
    assert np.linalg.norm((w - made) @ root) <= 1.02 * least  # the shrinkage costs a little


@pytest.mark.parametrize("rank", [1, 3], ids=str)
def test_singular_and_zero_covariances_make_finite_predictors(rank):
    rows = normal(0, 50, D)
    one = jnp.zeros((D, D)).at[0, 0].set(1.0)
    for c in (jnp.zeros((D, D)), one, 1e20 * one, 1e-20 * one):
        for spec in (hx.LowRank(rank), hx.LowRank(rank, bits=8), hx.Projected(rank), hx.Projected(rank, bits=8)):
            scores = predict_scores(normal(1, 3, D), pack_predictor(rows, spec, c), spec, 50)
            assert jnp.isfinite(scores).all()


def test_another_calibration_is_another_packed_form():
    params, config = block_params(), with_predictor(hx.LowRank(0.25))
    made = [plainly(block, [(params, normal(s, 50, D))], config=config) for s in (0, 1, 1)]
    one, other, same = (
        hx.sparsify(block, config=config, calibration=c).trace(params, normal(0, 1, D)).pack(params).layout
        for c in made
    )
    assert one != other
    assert other == same
    assert hash(other) == hash(same)


def test_quantized_forms_do_not_hang_on_the_calibration():
    params = block_params()
    calibration = plainly(block, [(params, normal(0, 50, D))])
    used = hx.sparsify(block, config=FORCED, calibration=calibration)
    plain = hx.sparsify(block, config=hx.approximate(rules=named(hx.Vocab(certify=False))))
    keys = [s.trace(params, normal(0, 1, D)).pack(params).layout.keys for s in (used, plain)]
    assert keys[0] == keys[1]
