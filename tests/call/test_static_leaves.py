"""Leaves that are no arrays: what never changes is a constant of the program, what hides its contents is refused."""

import dataclasses
import enum
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same

import hire_xform as hx


def scaled(params, x, extra=None):
    return x * params["w"]


class Cache:
    def __init__(self):
        self.keys = jnp.zeros(4)


class Layer(Cache):
    def __call__(self, x):
        return x + self.keys


class Slotted:
    __slots__ = ("keys",)

    def __init__(self):
        self.keys = jnp.zeros(4)


class Sentinel:
    pass


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Setting:
    width: int = 3


W, X = jnp.ones(4), jnp.arange(4.0)
OPAQUE = {"an object": Cache, "a layer": Layer, "slots": Slotted}
FIXED = {
    "function": len,
    "lambda": lambda x: x,
    "partial": functools.partial(jnp.sum, axis=0),
    "method": Layer().__call__,
    "jitted": jax.nn.relu,
    "custom derivative": jax.custom_jvp(jnp.sin),
    "ufunc": np.add,
    "jax ufunc": jnp.add,
    "class": Layer,
    "module": types,
    "string": "gelu",
    "none": None,
    "enumeration": Colour.RED,
    "dtype": np.dtype("float32"),
    "scalar type": jnp.bfloat16,
    "frozen dataclass": Setting(),
    "mesh": jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",)),
    "partition": jax.sharding.PartitionSpec("x"),
    "device": jax.devices()[0],
    "sparsified": hx.sparsify(scaled),
    "cached": functools.lru_cache(len),
}


@pytest.mark.parametrize("name", OPAQUE)
@pytest.mark.parametrize("where", ["weights", "data", "an argument"])
def test_an_object_whose_contents_are_not_seen_is_refused_before_any_work(name, where):
    ran = []

    def fun(params, x, extra):
        ran.append(True)
        return x * params["w"]

    hidden, step = OPAQUE[name](), hx.sparsify(fun)
    args = {
        "weights": ({"w": W, "cache": hidden}, X, 0),
        "data": ({"w": W}, X, [hidden]),
        "an argument": ({"w": W}, X, hidden),
    }[where]
    place = {"weights": r"params\['cache'\]", "data": r"extra\[0\]", "an argument": "extra"}[where]
    for act in (step, step.trace, step.lower, hx.topk_ffn(fun)):
        with pytest.raises(TypeError, match=rf"{place} is a {type(hidden).__name__}, .*does not see.*Register"):
            act(*args)
    assert not ran


def test_an_object_without_contents_is_refused_where_jit_refuses_it():
    step = hx.sparsify(scaled)
    assert_same(step({"w": W, "mark": Sentinel()}, X), X)
    with pytest.raises(TypeError, match="extra is a Sentinel"):
        step({"w": W}, X, Sentinel())


@pytest.mark.parametrize("name", FIXED)
def test_what_never_changes_is_a_constant(name):
    step, leaf = hx.sparsify(scaled), FIXED[name]
    assert_same(step({"w": W, "leaf": leaf}, X), X)
    assert_same(step({"w": W}, X, [leaf]), X)


def test_a_static_argument_may_be_any_object():
    step = hx.sparsify(lambda params, x, cache: x * params["w"] + len(cache.keys), static_argnums=2)
    assert_same(step({"w": W}, X, Cache()), X + 4)


WRAPS = {"float": float, "complex": lambda v: complex(1, v), "tuple": lambda v: (v, 1), "scalar": np.float32}


@pytest.mark.parametrize(
    ("place", "kind"),
    [*(("static argument", kind) for kind in WRAPS), ("setting", "float"), ("setting", "complex")],
)
def test_static_floats_are_compared_by_their_bits(place, kind):
    traced = []

    def fun(params, x, how):
        value = params["how"] if place == "setting" else how
        traced.append(True)
        last = value[0] if isinstance(value, tuple) else value
        return x * params["w"] * np.copysign(1, np.imag(last) if isinstance(last, complex) else last)

    wrap, step = WRAPS[kind], hx.sparsify(fun, static_argnums=2)

    def call(value):
        return step({"w": W, "how": wrap(value) if place == "setting" else 0.0}, X, wrap(value))

    assert_same(call(0.0), X)
    assert_same(call(-0.0), -X)
    assert_same(call(0.0), X)
    before = len(traced)
    assert_same(call(float("nan")), X)
    once = len(traced)
    assert once > before
    for _ in range(3):
        call(float("nan"))
    assert len(traced) == once


def test_a_setting_that_is_nan_packs():
    step, params = hx.sparsify(scaled), {"w": W, "rate": float("nan")}
    traced = step.trace(params, X)
    packed = traced.pack({"w": W, "rate": float("nan")})
    assert_same(step(packed, X), X)
    with pytest.raises(TypeError, match=r"rate.*expected nan"):
        traced.pack({"w": W, "rate": 0.0})
