"""A block, a head and inputs that tests of calibration share."""

import functools

import jax.numpy as jnp
import models
import numpy as np
from checks import named

import hire_xform as hx

D, M, V = models.D, models.M, models.V
# All that a calibration is asked for: the head returns its logits, and nothing else says what they are.
FORCED = hx.Config(rules=named(hx.Vocab()))
PLAIN = hx.Quantized(8)
# One predictor, where it does not matter which: each that is measured is compiled.
plainly = functools.partial(hx.calibrate, predictors=[PLAIN], config=FORCED)


def arguments(seed=0, batch=3, dtype=jnp.float32):
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, V, size=batch), jnp.int32)
    return models.make_cache(batch, dtype), tokens, jnp.zeros(D)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def block(params, x):
    """A block and a head on it, ``x`` [T, D]."""
    return (x + models.relu_ffn(params, x)) @ params["head"]


def block_params(seed=0):
    rng = np.random.default_rng(seed)
    return {**models.layer_weights(rng, jnp.float32), "head": models.random_array(rng, D, V)}


def of_kind(calibration, kind):
    return next(s for s in calibration.sites.values() if s.kind == kind)


def with_predictor(predictor):
    return hx.Config(ffn=hx.Ffn(predictor=predictor), rules=named(hx.Vocab(predictor=predictor)))


def skewed(seed, tokens, d=D):
    """Inputs that live near a few directions."""
    basis = np.linalg.qr(np.random.default_rng(99).normal(size=(d, d)))[0]
    sizes = 0.5 ** np.arange(d)
    return jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, d)) * sizes @ basis.T, jnp.float32)
