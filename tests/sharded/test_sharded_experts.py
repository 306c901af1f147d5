"""Blocks of experts over several devices stay dense, compute what they did, and say why."""

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_xform as hx

E, D, M, T = 4, 12, 40, 3
SPECS = {
    "experts": {"up": P("model"), "down": P("model"), "router": P()},
    "units": {"up": P(None, None, "model"), "down": P(None, "model"), "router": P()},
    "on each": {"up": P(), "down": P(), "router": P()},
}


def weights():
    rng = np.random.default_rng(0)
    shapes = {"up": (E, D, M), "down": (E, M, D), "router": (D, E)}
    return {name: jnp.asarray(rng.normal(size=s) / 3, jnp.float32) for name, s in shapes.items()}


def all_of_them(p, x):
    u = jax.nn.relu(jnp.einsum("td,edm->tem", x, p["up"]))
    return jnp.einsum("tem,emd,te->td", u, p["down"], jax.nn.softmax(x @ p["router"]))


def mapped(p, x):
    each = jax.vmap(lambda up, down: jax.nn.relu(x @ up) @ down)(p["up"], p["down"])
    return jnp.einsum("etd,te->td", each, jax.nn.softmax(x @ p["router"]))


def best_two(p, x):
    shares, index = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    u = jax.nn.relu(jnp.einsum("td,tkdm->tkm", x, p["up"][index]))
    return jnp.einsum("tkm,tkmd,tk->td", u, p["down"][index], shares)


def ragged(p, x):
    index = jnp.argmax(x @ p["router"], axis=-1)
    order = jnp.argsort(index)
    sizes = jnp.bincount(index, length=E)
    u = jax.nn.relu(jax.lax.ragged_dot(x[order], p["up"], sizes))
    return jax.lax.ragged_dot(u, p["down"], sizes)[jnp.argsort(order)]


def check_experts_over_devices_are_dense_and_say_why():
    p, x = weights(), jnp.asarray(np.random.default_rng(1).normal(size=(T, D)), jnp.float32)
    for fun in (all_of_them, mapped, best_two, ragged):
        step = hx.sparsify(fun, config=full_width())
        assert step.trace(p, x).plan.sites, "on one device there is a site"
        want = fun(p, x)
        for types in (AxisType.Auto, AxisType.Explicit):
            mesh = devices.mesh_of(2, types=types)
            for name, specs in SPECS.items():
                if types is AxisType.Explicit and (fun in (best_two, ragged) or name == "units"):
                    continue  # JAX itself asks where the results of these are to lie
                placed = {n: jax.device_put(w, NamedSharding(mesh, specs[n])) for n, w in p.items()}
                traced = step.trace(placed, x)
                assert not traced.plan.sites
                told = [r.reason for r in traced.plan.refusals]
                assert any("over devices, {'data': 1, 'model': 2}" in reason for reason in told), told
                assert_same(np.asarray(step(placed, x)), np.asarray(want))


@pytest.fixture(scope="module")
def outcomes():
    return devices.outcomes(__name__)


@pytest.mark.parametrize("name", devices.checks(__name__))
def test(outcomes, name):
    assert not outcomes[name], outcomes[name]
