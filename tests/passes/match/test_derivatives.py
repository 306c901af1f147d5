"""Where a custom derivative is in or around a site: which one it has, and that explain() says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same, kinds
from models import custom_jvp_ffn, custom_vjp_ffn, relu_ffn

import hire_xform as hx

D, M = 16, 64
CONFIG = hx.Config(vocab=None, ffn=hx.Ffn(active=1.0, certify=False), rules=FORCE)


@jax.custom_jvp
def leaky_back(x):
    """A ReLU whose stated derivative is never zero."""
    return jnp.maximum(x, 0.0)


leaky_back.defjvps(lambda t, out, x: jnp.where(x > 0, 1.0, 0.25) * t)


def weights():
    rng = np.random.default_rng(0)
    shapes = {"w1": (D, M), "b1": (M,), "w2": (M, D), "b2": (D,)}
    return {name: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32) for name, shape in shapes.items()}


X = jnp.asarray(np.random.default_rng(1).normal(size=(2, D)), jnp.float32)
PLAIN = {
    "relu": relu_ffn,
    "relu jitted": jax.jit(relu_ffn),
    "maximum": lambda w, x: jnp.maximum(x @ w["w1"], 0) @ w["w2"],
}
STATED = {
    "around, jvp": (custom_jvp_ffn, "the one that the custom_jvp at"),
    "around, vjp": (custom_vjp_ffn, "the one that the custom_vjp at"),
    "inside": (lambda w, x: leaky_back(x @ w["w1"]) @ w["w2"], "that of the body of the custom_jvp at"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_is_told_where_nothing_is_stated(name):
    traced = hx.sparsify(PLAIN[name], config=CONFIG).trace(weights(), X)
    assert [s.derivative for s in traced.plan.sites] == [""]
    assert "derivative:" not in traced.explain()


@pytest.mark.parametrize("name", STATED)
def test_explain_says_which_derivative_a_site_has(name):
    fun, told = STATED[name]
    step, w = hx.sparsify(fun, config=CONFIG), weights()
    traced = step.trace(w, X)
    assert kinds(traced.plan) == ["ffn"]
    assert f"derivative: {told}" in traced.explain()
    assert told in traced.plan.to_json()
    packed = traced.pack(w)
    assert_same(step(packed, X), fun(w, X))

    def slope(f, p):
        return jax.grad(lambda x: jnp.sin(f(p, x)).sum())(X)

    got, stated = slope(step, packed), slope(fun, w)
    if name == "inside":
        body = slope(lambda w, x: jax.nn.relu(x @ w["w1"]) @ w["w2"], w)
        assert_same(got, body, 1e-4)
        assert np.abs(np.asarray(got - stated)).max() > 0.01
    else:
        assert_same(got, stated, 1e-4)
