"""Which sites can be certified where, and how many bits of their inputs a platform keeps."""

import jax
import jax.numpy as jnp
import pytest
from jax.lax import Precision
from laid_out import laid_out

from hire_xform.passes.match.detect import detect
from hire_xform.passes.prove.certifiable import input_bits, not_certifiable, platforms_proved


def match_of(fun, weights, x):
    found = laid_out(fun, weights, x)
    (match,) = detect(found.graph, found.provenance).matches
    return match


def head(precision=None, dtype=jnp.float32):
    x, w = jnp.ones((3, 4), dtype), jnp.ones((4, 16), dtype)
    return match_of(lambda w, x: jnp.dot(x, w, precision=precision), w, x)


# Precision, dtype; bits that are sure to be kept of inputs on cpu, gpu and tpu: 24 where sums round to nearest, 23
# where they may be cut off, one less than are kept where the rest may be cut off.
BITS = {
    "default": (None, jnp.float32, (24, 10, 7)),
    "high": (Precision.HIGH, jnp.float32, (24, 10, 15)),
    "highest": (Precision.HIGHEST, jnp.float32, (23, 23, 23)),
    "bfloat16": (None, jnp.bfloat16, (23, 23, 23)),
    "float16": (None, jnp.float16, (24, 23, 7)),
    "an algorithm": ("BF16_BF16_F32", jnp.float32, (None, None, None)),
}


@pytest.mark.parametrize("name", BITS)
def test_bits_that_products_keep(name):
    precision, dtype, bits = BITS[name]
    match = head(precision, dtype)
    assert tuple(input_bits(match, platform) for platform in ("cpu", "gpu", "tpu")) == bits
    for platform, kept in zip(("cpu", "gpu", "tpu"), bits, strict=True):
        assert (not_certifiable(match, platform) is None) is (kept is not None)
        assert (platform in platforms_proved(match, 16)) is ((kept or 0) >= 16)


def block(act, weights=2):
    def fun(w, x):
        hidden = act(x @ w[0])
        return (hidden * (x @ w[1]) if weights == 3 else hidden) @ w[-1]

    return match_of(fun, [*[jnp.ones((4, 32))] * (weights - 1), jnp.ones((32, 4))], jnp.ones((3, 4)))


def test_zeros_of_a_gate_are_proved_and_of_nothing_else():
    for act in (jax.nn.relu, lambda h: jnp.square(jax.nn.relu(h))):
        for weights in (2, 3):
            assert not_certifiable(block(act, weights), "cpu") is None
    assert "not of this activation" in not_certifiable(block(jax.nn.gelu), "cpu")
