"""Arguments as ``jax.jit`` takes them: static, donated, by keyword, and of any structure."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, kinds
from tied import FULL, D, inputs, make_weights, net

import hire_xform as hx


def test_weights_may_come_by_keyword():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    want = net(params, inputs())
    assert_same(step(params=params, x=inputs()), want)
    assert_same(step(x=inputs(), params=params), want)
    traced = step.trace(params=params, x=inputs())
    assert kinds(traced.plan) == ["ffn", "vocab"]
    assert_same(step(params=traced.pack(params), x=inputs()), want)
    assert_same(step(traced.pack(params), x=inputs()), want)


def test_two_weights_arguments_are_packed_apart():
    def two(body, x, head):
        return jax.nn.relu(x @ body["w1"]) @ body["w2"] @ head.T

    params = make_weights()
    step = hx.sparsify(two, config=FULL, weights_argnums=(0, 2))
    traced = step.trace(params, inputs(), params["embed"])
    assert kinds(traced.plan) == ["ffn", "vocab"]
    assert [site.weights for site in traced.plan.sites] == [("body['w1']", "body['w2']"), ("head",)]
    body, head = traced.pack(params, params["embed"])
    want = two(params, inputs(), params["embed"])
    assert_same(step(body, inputs(), head), want)
    assert_same(step(params, inputs(), head), want)
    assert_same(step(body, inputs(), params["embed"]), want)


def test_static_arguments_by_number_and_name():
    def scaled(params, x, how, *, times=1):
        y = net(params, x) * times
        return jnp.tanh(y) if how == "tanh" else y

    params = make_weights()
    step = hx.sparsify(scaled, config=FULL, static_argnums=2, static_argnames="times")
    for how, times in (("tanh", 1), ("none", 1), ("none", 3), ("tanh", 1)):
        assert_same(step(params, inputs(), how, times=times), scaled(params, inputs(), how, times=times))
        packed = step.trace(params, inputs(), how, times=times).pack(params)
        assert_same(step(packed, inputs(), how, times=times), scaled(params, inputs(), how, times=times))
    assert_same(step(params, inputs(), how="tanh"), scaled(params, inputs(), "tanh"))


def test_static_values_of_other_types_are_other_values():
    step = hx.sparsify(lambda x, how: x + 1 if isinstance(how, float) else x, weights_argnums=(), static_argnums=1)
    assert_same(step(inputs(), 1), inputs())
    assert_same(step(inputs(), 1.0), inputs() + 1)
    assert_same(step(inputs(), True), inputs())


def test_the_cache_is_donated():
    def decode(params, cache, x):
        return net(params, x), cache.at[0].add(x[0])

    params = make_weights()
    step = hx.sparsify(decode, config=FULL, donate_argnums=1)
    for weights in (params, step.trace(params, jnp.zeros((4, D)), inputs()).pack(params)):
        cache = jnp.zeros((4, D))
        want = decode(params, jnp.zeros((4, D)), inputs())
        assert_same(step(weights, cache, inputs()), want)
        assert cache.is_deleted()
    assert not any(a.is_deleted() for a in params.values())


def test_the_cache_is_donated_by_name():
    def decode(params, x, cache):
        return net(params, x), cache + 1

    step, params = hx.sparsify(decode, config=FULL, donate_argnames="cache"), make_weights()
    cache = jnp.zeros(8)
    step(params, inputs(), cache=cache)
    assert cache.is_deleted()


@pytest.mark.parametrize(
    "options",
    [
        {"keep_unused": True},
        {"out_shardings": jax.sharding.SingleDeviceSharding(jax.devices()[0])},
        {"inline": True},
        {"compiler_options": {"xla_cpu_enable_fast_math": False}},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_of_jit_are_passed_on(options):
    step, params = hx.sparsify(net, config=FULL, **options), make_weights()
    assert_same(step(params, inputs()), net(params, inputs()))
    traced = step.trace(params, inputs())
    assert_same(traced.lower().compile()(traced.pack(params), inputs()), net(params, inputs()))


@jax.tree_util.register_pytree_node_class
class Module:
    """A module as Equinox makes them: arrays and functions among the leaves."""

    def __init__(self, weights, act):
        self.weights, self.act = weights, act

    def tree_flatten(self):
        return (self.weights["w1"], self.act, self.weights["w2"], "a name", None), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls({"w1": children[0], "w2": children[2]}, children[1])

    def __call__(self, x):
        return self.act(x @ self.weights["w1"]) @ self.weights["w2"]


@pytest.mark.filterwarnings("ignore::hire_xform.HireWarning")
def test_leaves_that_are_not_arrays_are_static():
    step = hx.sparsify(lambda module, x: module(x), config=FULL)
    for act in (jax.nn.relu, jnp.tanh, jax.nn.relu):
        module = Module(make_weights(), act)
        traced = step.trace(module, inputs())
        assert kinds(traced.plan) == ["ffn"]
        assert_same(step(module, inputs()), module(inputs()))
        assert_same(step(traced.pack(module), inputs()), module(inputs()))


@pytest.mark.filterwarnings("ignore::hire_xform.HireWarning")
def test_numbers_inside_weights_are_settings_that_a_model_may_branch_on():
    def fun(params, x):
        if not params["inference"] or not isinstance(params["rate"], float):
            raise ValueError("dropout needs a key")
        return net(params["weights"], x) * params["times"]

    step, weights = hx.sparsify(fun, config=FULL), make_weights()
    for times in (1, 2, True, 1.0):
        params = {"weights": weights, "inference": True, "rate": 0.1, "times": times}
        traced = step.trace(params, inputs())
        packed = traced.pack(params)
        want = fun(params, inputs())
        assert_same(step(params, inputs()), want)
        assert_same(step(packed, inputs()), want)
        assert_same(jax.jit(step)(packed, inputs()), want)
        assert_same(traced.lower().compile()(packed, inputs()), want)
        assert jax.tree.leaves(packed) == packed.leaves
        with pytest.raises(TypeError, match=r"inference.*expected True as traced"):
            traced.pack({**params, "inference": False})
    # By itself a number is data: a token id, or the argument of a function that closes over its weights.
    alone = hx.sparsify(lambda x: x * 2)
    assert alone.trace(3).call.avals == alone.trace(4).call.avals
    assert len(alone.trace(3).call.avals) == 1


def test_python_numbers_are_data():
    step, params = hx.sparsify(lambda p, x, s: net(p, x) * s, config=FULL), make_weights()
    for scale in (2, 2.5, np.float32(3), True):
        assert_same(step(params, inputs(), scale), jax.jit(lambda p, x, s: net(p, x) * s)(params, inputs(), scale))


def test_a_method_and_a_partial_can_be_sparsified():
    class Model:
        def step(self, params, x):
            return net(params, x)

    params = make_weights()
    want = net(params, inputs())
    assert_same(hx.sparsify(Model().step, config=FULL)(params, inputs()), want)
    assert_same(hx.sparsify(partial(net, params), config=FULL)(inputs()), want)
    assert_same(hx.sparsify(partial(net, x=inputs()), config=FULL)(params), want)
    assert_same(hx.sparsify(jax.jit(net), config=FULL)(params, inputs()), want)


def test_a_method_is_decorated_like_a_function():
    class Model(Module):
        @hx.sparsify(config=FULL)
        def step(self, x):
            return self(x)

    jax.tree_util.register_pytree_node(Model, Model.tree_flatten, Model.tree_unflatten)
    model = Model(make_weights(), jax.nn.relu)
    assert_same(model.step(inputs()), model(inputs()))
    assert kinds(Model.step.trace(model, inputs()).plan) == ["ffn"]


def test_weights_changed_in_place_are_told_when_the_change_is_lost():
    def fun(params, x, returns):
        params["count"] = params["count"] + 1
        params["stack"] = jax.lax.scan(lambda carry, w: (carry, w), 0, params["stack"])[1]
        params["cache"] = params["cache"] + x
        logits = jax.jit(net)(params, x)
        return (logits, params["cache"]) if returns else logits

    params = {**make_weights(), "cache": inputs(), "count": jnp.int32(0), "stack": jnp.ones((2, D))}
    step = hx.sparsify(fun, config=FULL, static_argnums=2)
    with pytest.warns(hx.HireWarning, match=r"params\['cache'\] changed in place but not returned"):
        logits = step(params, inputs(), False)
    assert_same(logits, net(params, inputs()))
    assert kinds(step.trace(params, inputs(), False).plan) == ["ffn", "vocab"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(step(params, inputs(), True), (logits, 2 * inputs()))


def test_empty_and_none_arguments_pass():
    def fun(params, x, extra, nothing):
        assert nothing is None
        return net(params, x), extra

    step, params = hx.sparsify(fun, config=FULL), make_weights()
    assert_same(step(params, inputs(), (), None), fun(params, inputs(), (), None))


def test_outputs_keep_structure_none_and_python_values():
    def fun(params, x):
        return {"logits": net(params, x), "none": None, "x": x, "one": 1.0, "again": (x, x)}

    step, params = hx.sparsify(fun, config=FULL), make_weights()
    assert_same(step(params, inputs()), jax.jit(fun)(params, inputs()))


def test_both_decorator_forms():
    @hx.sparsify
    def plain(params, x):
        """Says something."""
        return net(params, x)

    @hx.sparsify(config=FULL, weights_argnums=1)
    def configured(x, params):
        return net(params, x)

    params = make_weights()
    assert plain.__doc__ == "Says something."
    assert plain.__name__ == "plain"
    assert "plain" in repr(plain)
    assert_same(plain(params, inputs()), net(params, inputs()))
    assert kinds(configured.trace(inputs(), params).plan) == ["ffn", "vocab"]
    assert_same(configured(inputs(), params), net(params, inputs()))
