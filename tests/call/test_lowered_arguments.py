"""``trace(...).lower()`` and ``sparse_jaxpr`` of calls with static and donated arguments, however these are stated."""

import jax.numpy as jnp
import pytest
from checks import assert_same, kinds
from tied import FULL, D, inputs, make_weights, net

import hire_xform as hx


def decode(params, cache, x, how, *, times=1):
    y = net(params, x) * times
    return jnp.tanh(y) if how == "tanh" else y, cache.at[0].add(x[0])


STATED = {
    "argnums": {"static_argnums": 3, "static_argnames": "times", "donate_argnums": 1},
    "argnames": {"static_argnames": ("how", "times"), "donate_argnames": "cache"},
}


@pytest.mark.parametrize("stated", STATED)
@pytest.mark.parametrize("given", ["by position", "static by keyword", "by keyword"])
def test_what_is_lowered_keeps_static_and_donated_arguments(stated, given):
    step, params = hx.sparsify(decode, config=FULL, **STATED[stated]), make_weights()

    def call(cache, static):
        """Arguments after the weights, with or without the static ones."""
        if given == "by keyword":
            return (), {"cache": cache, "x": inputs(), **({"how": "tanh", "times": 3} if static else {})}
        if given == "static by keyword":
            return (cache, inputs()), {"how": "tanh", "times": 3} if static else {}
        return (cache, inputs(), *(["tanh"] if static else [])), {"times": 3} if static else {}

    args, kwargs = call(jnp.zeros((4, D)), static=True)
    traced = step.trace(params, *args, **kwargs)
    assert kinds(traced.plan) == ["ffn", "vocab"]
    packed = traced.pack(params)
    assert len(traced.sparse_jaxpr.jaxpr.invars) == len(packed.leaves) + 2
    cache = jnp.zeros((4, D))
    args, kwargs = call(cache, static=False)
    got = traced.lower().compile()(packed, *args, **kwargs)
    assert_same(got, decode(params, jnp.zeros((4, D)), inputs(), "tanh", times=3))
    assert cache.is_deleted()
    assert not any(leaf.is_deleted() for leaf in packed.leaves)


def test_a_static_argument_before_the_weights_is_no_operand():
    def fun(how, params, x):
        return net(params, x) * (2 if how == "twice" else 1)

    params = make_weights()
    step = hx.sparsify(fun, config=FULL, weights_argnums=1, static_argnums=0)
    traced = step.trace("twice", params, inputs())
    assert_same(traced.lower().compile()(traced.pack(params), inputs()), 2 * net(params, inputs()))


def test_leaves_that_are_no_arrays_are_no_operands():
    """What is static without having been stated: as an argument, and inside one."""

    def fun(params, x, how, more):
        return net(params, x) * (2 if how == "twice" else 1) + more["bias"] * (1 if more["how"] == "add" else 0)

    step, params = hx.sparsify(fun, config=FULL), make_weights()
    more = {"bias": jnp.ones(()), "how": "add"}
    traced = step.trace(params, inputs(), "twice", more)
    assert len(traced.sparse_jaxpr.jaxpr.invars) == len(traced.pack(params).leaves) + 2
    assert_same(step(params, inputs(), "twice", more), 2 * net(params, inputs()) + 1)
