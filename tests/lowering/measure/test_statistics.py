"""The divergence that is measured of a head, against its definition in 64 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from hire_xform.lowering.measure.statistics import KL_SIZES, vocab_ranks

pytestmark = pytest.mark.any_jax("cases vary numbers, dtypes and predictors of arithmetic that is our own", every=5)

TOKENS = 5


def defined(logits, scores):
    """``KL(softmax of logits | softmax of what a sampler sees)`` for 1, 2, ... candidates, summed over tokens."""
    logits, scores = np.asarray(logits, np.float64), np.asarray(scores, np.float64)
    sizes, found = min(logits.shape[1], KL_SIZES), []
    order = np.argsort(-scores, axis=1, kind="stable")
    seen = scores.copy()
    logp = logits - logsumexp(logits, axis=1, keepdims=True)
    for size in range(sizes):
        at = np.arange(len(seen)), order[:, size]
        seen[at] = logits[at]
        logq = seen - logsumexp(seen, axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            found.append(np.where(np.exp(logp) > 0, np.exp(logp) * (logp - logq), 0.0).sum())
    return np.array(found)


@pytest.mark.parametrize("vocab", [1, 50, KL_SIZES + 200])
@pytest.mark.parametrize(
    ("scale", "error", "offset"),
    [(1.0, 0.1, 0.0), (5.0, 2.0, 0.0), (1.0, 0.1, 300.0), (1.0, 0.1, -300.0), (3000.0, 500.0, 0.0), (3e4, 3e4, 0.0)],
)
def test_divergence_of_every_number_of_candidates(vocab, scale, error, offset):
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(TOKENS, vocab))).astype(np.float32)
    scores = (logits + error * rng.normal(size=logits.shape) + offset).astype(np.float32)
    got = vocab_ranks(jnp.asarray(logits), jnp.asarray(scores))["kl"]
    want = defined(logits, scores)
    # What rounding to f32 makes of numbers of this size.
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=TOKENS * 1e-6 * (10 + scale + error + abs(offset)))


def test_divergence_where_the_model_rules_tokens_out():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(TOKENS, 40)).astype(np.float32)
    logits[:, 30:] = -np.inf
    scores = jnp.asarray(rng.normal(size=logits.shape), jnp.float32)
    got = vocab_ranks(jnp.asarray(logits), scores)["kl"]
    assert jnp.isfinite(got).all()
    np.testing.assert_allclose(got, defined(logits, scores), rtol=1e-4, atol=1e-4)


def test_a_predictor_that_is_far_off_does_not_stop_a_calibration():
    """Logits so large that those of a poor predictor are out of sight of them."""
    import hire_xform as hx

    rng = np.random.default_rng(0)
    params = {"head": jnp.asarray(rng.normal(size=(16, 200)) * 1e3, jnp.float32)}
    x = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    config = hx.Config(rules=(hx.Rule("*", force=True, vocab=hx.Vocab()),))
    predictors = [hx.LowRank(0.25), hx.Quantized(8)]
    found = hx.calibrate(lambda p, x: x @ p["head"], [(params, x)], config=config, predictors=predictors)
    (site,) = found.sites.values()
    assert isinstance(site.predictor, hx.Quantized)
    assert all(np.isfinite(curve.kl).all() for curve in site.curves.values())
    step = hx.sparsify(lambda p, x: x @ p["head"], config=config, calibration=found)
    best = jax.vmap(lambda one: jnp.argmax(step(params, one[None])[0]))(x)
    assert (best == jnp.argmax(x @ params["head"], 1)).mean() >= 0.95
