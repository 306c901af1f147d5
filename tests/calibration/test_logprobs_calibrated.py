"""Candidates that a calibration finds for log-probabilities within a bound, beside those for the token alone."""

import jax
import jax.numpy as jnp
import numpy as np
from checks import named

import hire_xform as hx

V, D, TOKENS = 300, 16, 64
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(V, D)) * 0.6, jnp.float32)
XS = jnp.asarray(RNG.normal(size=(TOKENS, D)), jnp.float32)


def scored(w, x):
    logits = x @ w.T
    token = jnp.argmax(logits, axis=-1)
    return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]


def calibrated(**vocab):
    config = hx.Config(ffn=None, rules=named(hx.Vocab(certify=True, **vocab)))
    cal = hx.calibrate(scored, [(W, XS)], config=config, predictors=[hx.Quantized(8)])
    return config, cal


def test_the_sizes_prove_what_is_asked_for_and_are_no_larger_than_that():
    computed = []
    for within in (0.1, 0.01, 2e-3):
        config, cal = calibrated(logprobs=within)
        step = hx.sparsify(scored, config=config, calibration=cal)
        traced = step.trace(W, XS[:1])
        packed, failed = traced.pack(W), 0
        for x in XS[:24]:
            got, counts = step.with_fallbacks(packed, x[None])
            want = scored(W, x[None])
            assert int(got[0][0]) == int(want[0][0])
            assert abs(float(got[1][0] - want[1][0])) <= within
            failed += sum(map(int, counts.values()))
        assert failed <= 1
        computed.append(traced.plan.sites[0].computed)
    assert computed == sorted(computed)
    assert computed[0] < computed[-1] <= V


def test_what_was_calibrated_for_another_bound_is_said_and_not_used():
    _, cal = calibrated(logprobs=0.1)
    other = hx.Config(ffn=None, rules=named(hx.Vocab(certify=True)))
    told = hx.sparsify(scored, config=other, calibration=cal).trace(W, XS[:1]).plan.sites[0].calibrated
    assert "logprobs=0.1" in told
