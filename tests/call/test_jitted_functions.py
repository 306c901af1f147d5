"""Functions that are jitted already: their static and donated arguments, and all else that jit was told, hold."""

import copy
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from checks import assert_same, kinds
from jax.sharding import SingleDeviceSharding
from tied import FULL, D, inputs, make_weights, net

import hire_xform as hx


@partial(jax.jit, static_argnames="how", donate_argnames="cache")
def decode(params, how, cache, x):
    y = net(params, x)
    return (jnp.tanh(y) if how == "tanh" else y), cache.at[0].add(x[0])


def called(fun, params, how="tanh"):
    """A call, and the cache that it was given."""
    cache = jnp.zeros((4, D)) + 1
    return fun(params, how, cache, inputs()), cache


def test_static_and_donated_arguments_are_taken_over():
    step, params = hx.sparsify(decode, config=FULL), make_weights()
    (got, cache), (want, _) = called(step, params), called(decode, params)
    assert_same(got, want)
    assert cache.is_deleted()
    traced = step.trace(params, "tanh", jnp.zeros((4, D)), inputs())
    assert kinds(traced.plan) == ["ffn", "vocab"]
    # As if it had not been jitted: no call around it.
    assert traced.plan.sites[0].path == "dot_general[1]"
    packed = traced.pack(params)
    assert_same(called(step, packed, "none")[0], called(decode, params, "none")[0])


def test_what_is_stated_wins_and_static_arguments_are_those_of_both():
    step, params = hx.sparsify(decode, config=FULL, donate_argnums=()), make_weights()
    _, cache = called(step, params)
    assert not cache.is_deleted()

    @partial(jax.jit, static_argnums=1)
    def twice(params, how, times, x):
        return net(params, x) * times if how == "often" else net(params, x)

    step = hx.sparsify(twice, config=FULL, static_argnames=("times",))
    assert step.signature.static == {1, 2}
    assert_same(step(params, "often", 3, inputs()), twice(params, "often", 3, inputs()))


def test_shardings_of_results_and_compiler_options_are_taken_over():
    """JAX refuses the latter inside another jitted function."""
    device = SingleDeviceSharding(jax.devices()[0])
    told = jax.jit(net, out_shardings=device, compiler_options={"xla_embed_ir_in_executable": True})
    step, params = hx.sparsify(told, config=FULL), make_weights()
    assert step.options == {"out_shardings": device, "compiler_options": {"xla_embed_ir_in_executable": True}}
    got = step(params, inputs())
    assert_same(got, told(params, inputs()))
    assert got.committed


@dataclass(frozen=True)
class Loop:
    """A sampler as libraries write them: its own object is static, its weights come by keyword."""

    scale: float

    @partial(jax.jit, static_argnames=("self", "how"), donate_argnames="state")
    def step(self, state, how=None, *, params):
        y = net(params, state["x"]) * self.scale
        return {"x": state["x"] * 1, "y": jnp.tanh(y) if how == "tanh" else y}

    @partial(jax.jit, static_argnums=0)
    def first(self, params, x):
        return net(params, x) * self.scale


def state():
    return {"x": inputs(), "y": jnp.zeros((1, 80))}


@pytest.mark.parametrize("how", [None, "tanh"])
def test_a_jitted_method_bound_or_not(how):
    loop, params = Loop(2.0), make_weights()
    want = loop.step(state(), how, params=params)
    bound = hx.sparsify(loop.step, config=FULL, weights_argnames="params")
    given = state()
    assert_same(bound(given, how, params=params), want)
    assert given["x"].is_deleted()
    assert kinds(bound.trace(state(), how, params=params).plan) == ["ffn", "vocab"]
    free = hx.sparsify(Loop.step, config=FULL, weights_argnames="params")
    assert_same(free(loop, state(), how, params=params), want)
    packed = free.pack(loop, state(), how, params=params)
    assert_same(free(loop, state(), how, params=packed), want)
    assert_same(bound(state(), how=how, params=packed), want)


def test_a_method_is_replaced_in_its_class(monkeypatch):
    loop, params = Loop(2.0), make_weights()
    want = loop.step(state(), params=params)
    step = hx.sparsify(Loop.step, config=FULL, weights_argnames="params")
    monkeypatch.setattr(Loop, "step", step)
    packed = step.pack(loop, state(), params=params)
    assert_same(loop.step(state(), params=params), want)
    assert_same(loop.step(state(), params=packed), want)


def test_weights_are_the_first_argument_that_is_not_static():
    loop, params = Loop(3.0), make_weights()
    step = hx.sparsify(Loop.first, config=FULL)
    assert kinds(step.trace(loop, params, inputs()).plan) == ["ffn", "vocab"]
    assert_same(step(loop, params, inputs()), loop.first(params, inputs()))
    assert_same(hx.sparsify(loop.first, config=FULL)(params, inputs()), loop.first(params, inputs()))


def test_weights_that_were_donated_are_refused_and_what_to_do_is_said():
    told = jax.jit(net, donate_argnums=0)
    with pytest.raises(ValueError, match=r"argument 0 is in weights_argnums and in donate_.*; state donate_argnums"):
        hx.sparsify(told)
    step, params = hx.sparsify(told, config=FULL, donate_argnums=()), make_weights()
    assert_same(step(params, inputs()), net(params, inputs()))
    assert not params["w1"].is_deleted()


def test_copies_are_of_the_function_as_it_was_given():
    step, params = hx.sparsify(decode, config=FULL), make_weights()
    assert copy.copy(step).fun is decode
    assert_same(called(copy.copy(step), params)[0], called(step, params)[0])


def test_what_states_where_its_arguments_are_stays_jitted_inside():
    told = jax.jit(net, in_shardings=SingleDeviceSharding(jax.devices()[0]))
    step, params = hx.sparsify(told, config=FULL), make_weights()
    assert_same(step(params, inputs()), told(params, inputs()))
    assert step.trace(params, inputs()).plan.sites[0].path.startswith("jit:net[0]/")
