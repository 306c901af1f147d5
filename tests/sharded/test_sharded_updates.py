"""Blocks with low-rank updates over devices: each device's part of both contracting products in one sum."""

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same, full_width, kinds
from collectives import collectives
from devices import mesh_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hire_xform as hx

P = PartitionSpec
D, M, R = 16, 64, 2
SPECS = {"up": P(None, "model"), "up_a": P(), "up_b": P(None, "model")}
SPECS |= {"down": P("model", None), "down_a": P("model", None), "down_b": P()}


def weights():
    rng = np.random.default_rng(0)
    shapes = {"up": (D, M), "up_a": (D, R), "up_b": (R, M), "down": (M, D), "down_a": (M, R), "down_b": (R, D)}
    return {name: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32) for name, shape in shapes.items()}


def block(w, x):
    hidden = jax.nn.relu(x @ w["up"] + (x @ w["up_a"]) @ w["up_b"])
    return hidden @ w["down"] + (hidden @ w["down_a"]) @ w["down_b"]


def check_what_is_computed_and_sent():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, D)), jnp.float32)
    want = block(weights(), x)
    for model, data in ((4, 1), (2, 2)):
        mesh = mesh_of(model, data, AxisType.Auto)
        w = {name: jax.device_put(a, NamedSharding(mesh, SPECS[name])) for name, a in weights().items()}
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        for config in (full_width(), hx.lossless(rules=(*FORCE, hx.Rule("*", ffn=hx.Ffn(active=0.9, certify=True))))):
            step = hx.sparsify(block, config=config)
            assert kinds(step.trace(w, placed).plan) == ["ffn"]
            assert_same(step(w, placed), want)
            packed = step.pack(w, placed)
            assert_same(step(packed, placed), want)
            made = collectives(step.trace(w, placed).lower().compile())
            assert [one.op for one in made] == ["all-reduce"], made


@pytest.fixture(scope="module")
def found():
    return devices.outcomes(__name__)


@pytest.mark.parametrize("name", devices.checks(__name__))
def test_on_devices(found, name):
    assert not found[name], found[name]
