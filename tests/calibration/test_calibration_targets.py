"""``hx.calibrate(max_kl=...)`` and ``max_loss_increase``: what is measured is what the sparse function does."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import FORCE, named
from jax import lax

import hire_xform as hx

pytestmark = pytest.mark.any_jax("what is chosen of what was measured; test_calibration.py measures on every JAX")

D, M, V = models.D, models.M, models.V
FORCED = hx.Config(rules=named(hx.Vocab()))
SEVERAL = [hx.Quantized(4), hx.LowRank(0.25, bits=8), hx.Quantized(8)]


def model(params, x):
    """Two blocks in a scan and a head, ``x`` [T, D]."""
    x, _ = lax.scan(lambda x, w: (x + models.relu_ffn(w, x), None), x, params["layers"])
    return x @ params["head"]


def batches(count=2):
    params = {**models.stacked_params(), "head": models.random_array(np.random.default_rng(3), D, V)}
    rng = np.random.default_rng(7)
    return params, [(params, jnp.asarray(rng.normal(size=(20, D)), jnp.float32)) for _ in range(count)]


def one_by_one(step, params, x):
    return jnp.concatenate([step(params, one[None]) for one in x])


def divergence(dense, sparse):
    p, q = jax.nn.log_softmax(dense), jax.nn.log_softmax(sparse)
    return float((jnp.exp(p) * (p - q)).sum(1).mean())


@pytest.mark.parametrize("limit", [0.03, 0.001])
def test_the_divergence_of_the_sparse_function_is_within_the_limit(limit):
    params, given = batches()
    calibration = hx.calibrate(model, given, max_kl=limit, predictors=SEVERAL, config=FORCED)
    step = hx.sparsify(model, config=FORCED, calibration=calibration)
    found = np.mean([divergence(model(*batch), one_by_one(step, *batch)) for batch in given])
    assert 0 < found <= limit * 1.01
    sites = step.trace(params, given[0][1][:1]).plan.sites
    assert all(f"max_kl {limit:g}" in site.calibrated for site in sites)
    assert [s.settings.predictor for s in sites] == [s.predictor for s in calibration.sites.values()]
    assert any(s.computed < s.units for s in sites)
    other = hx.Config(ffn=hx.Ffn(predictor=hx.LowRank(0.5)), rules=FORCE)
    told = hx.sparsify(model, config=other, calibration=calibration).trace(params, given[0][1][:1]).plan.sites[0]
    assert "not calibrated with this predictor" in told.calibrated


def test_a_stricter_limit_reads_more():
    _, given = batches()
    found = [hx.calibrate(model, given, max_kl=limit, predictors=SEVERAL, config=FORCED) for limit in (0.3, 0.001)]
    read = [
        sum(s.curve().predictor_bytes * s.sizes.size + s.row_bytes * int(s.sizes.sum()) for s in c.sites.values())
        for c in found
    ]
    assert read[0] < read[1]


def test_the_loss_of_the_sparse_function_is_within_the_limit():
    params, given = batches()
    wanted = [jnp.argmax(model(*batch), axis=1) for batch in given]

    def loss(logits, labels):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()

    labelled = [(*batch, labels) for batch, labels in zip(given, wanted, strict=True)]
    whole = hx.calibrate(
        lambda p, x, labels: loss(model(p, x), labels),
        labelled,
        max_loss_increase=0.01,
        predictors=SEVERAL,
        config=FORCED,
    )
    made = hx.calibrate(
        lambda p, x, labels: model(p, x),
        labelled,
        max_loss_increase=0.01,
        loss=lambda logits, p, x, labels: loss(logits, labels),
        predictors=SEVERAL,
        config=FORCED,
    )
    for one, other in zip(whole.sites.values(), made.sites.values(), strict=True):
        np.testing.assert_array_equal(one.sizes, other.sizes)
    step = hx.sparsify(model, config=FORCED, calibration=made)
    added = [loss(one_by_one(step, *b), y) - loss(model(*b), y) for b, y in zip(given, wanted, strict=True)]
    assert float(np.mean(added)) <= 0.0101
    assert any(int(s.sizes.max()) < s.units for s in made.sites.values())
    assert params is given[0][0]


def test_a_projection_in_a_loop_over_tokens():
    def decode(params, xs):
        return lax.scan(lambda carry, x: (carry, model(params, x[None])), 0, xs)[1]

    params, given = batches(1)
    looped = hx.calibrate(decode, given, max_kl=0.01, predictors=SEVERAL[:1], config=FORCED)
    plain = hx.calibrate(model, given, max_kl=0.01, predictors=SEVERAL[:1], config=FORCED)
    for one, other in zip(looped.sites.values(), plain.sites.values(), strict=True):
        np.testing.assert_array_equal(one.sizes, other.sizes)

    def until(params, xs):
        def turn(state):
            i, total = state
            return i + 1, total + model(params, lax.dynamic_slice_in_dim(xs, i, 1)).sum()

        return lax.while_loop(lambda s: s[0] < 5, turn, (0, 0.0))[1]

    with pytest.raises(ValueError, match="in a loop whose turns are not known"):
        hx.calibrate(until, [(params, given[0][1])], max_kl=0.01, predictors=SEVERAL[:1], config=FORCED)


def test_a_models_own_top_k_is_rehearsed():
    def own(params, x):
        hidden = jax.nn.relu(x @ params["w1"])
        kept = hidden >= lax.top_k(hidden, 6)[0][..., -1:]
        return (x + jnp.where(kept, hidden, 0) @ params["w2"]) @ params["head"]

    _, given = batches(1)
    params = {**models.layer_weights(np.random.default_rng(0), jnp.float32), "head": given[0][0]["head"]}
    x = given[0][1]
    calibration = hx.calibrate(own, [(params, x)], max_kl=0.01, predictors=SEVERAL, config=FORCED)
    step = hx.sparsify(own, config=FORCED, calibration=calibration)
    assert divergence(own(params, x), one_by_one(step, params, x)) <= 0.0101


def test_wrong_targets_are_named():
    _, given = batches(1)
    headless = [({"w1": given[0][0]["layers"]["w1"][0], "w2": given[0][0]["layers"]["w2"][0]}, given[0][1])]

    def block(params, x):
        return jax.nn.relu(x @ params["w1"]) @ params["w2"]

    cut = hx.Config(vocab=hx.Vocab(fill="-inf"))
    cases = [
        (lambda: hx.calibrate(model, given, max_kl=0), ValueError, "max_kl=0; expected a number, more than 0"),
        (lambda: hx.calibrate(model, given, max_kl=0.1, recall=0.9), TypeError, "recall and max_kl are given"),
        (lambda: hx.calibrate(model, given, max_kl=0.1, loss=max), TypeError, "max_loss_increase with it"),
        (lambda: hx.calibrate(model, given, max_loss_increase=0.1, loss=3), TypeError, "loss=3"),
        (lambda: hx.calibrate(model, given, max_kl=0.1, config=cut), ValueError, "-inf"),
        (lambda: hx.calibrate(model, iter(given), max_kl=0.1), ValueError, "max_kl takes several passes"),
        (lambda: hx.calibrate(block, headless, max_kl=0.1, predictors=SEVERAL[:1]), ValueError, "no vocabulary"),
        (
            lambda: hx.calibrate(model, given, max_loss_increase=0.1, predictors=SEVERAL[:1]),
            ValueError,
            "loss of batch 0",
        ),
    ]
    for call, kind, match in cases:
        with pytest.raises(kind, match=match):
            call()
