"""Weights in few bits that are over several devices: they stay dense, and the refusal says so."""

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width
from devices import mesh_of
from jax.sharding import NamedSharding, PartitionSpec

import hire_xform as hx

P = PartitionSpec
D, V, T = 16, 64, 2


@pytest.fixture(scope="module")
def found():
    return devices.outcomes(__name__)


def head_and_tokens():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.integers(-127, 128, size=(D, V)), jnp.int8)
    head = {"q": q, "s": jnp.asarray(rng.uniform(0.5, 1.5, V) / 400, jnp.float32)}
    return head, jnp.asarray(rng.normal(size=(T, D)), jnp.float32)


def scaled(w):
    return w["q"].astype(jnp.float32) * w["s"]


def refusal_of(fun, *args):
    step = hx.sparsify(fun, config=full_width())
    (refusal,) = step.trace(*args).plan.refusals
    assert_same(step(*args), jax.jit(fun)(*args))
    return refusal.reason


def check_placed_integers_stay_dense():
    head, x = head_and_tokens()
    mesh = mesh_of(4)
    for spec in ((None, "model"), (None, None)):
        for names in (("q", "s"), ("q",), ("s",)):
            own = {
                name: jax.device_put(leaf, NamedSharding(mesh, P(*spec[-leaf.ndim :]) if name in names else P()))
                for name, leaf in head.items()
            }
            reason = refusal_of(lambda w, x: jnp.argmax(x @ scaled(w), -1), own, x)
            assert "its weight is stored in few bits and scaled, over several devices" in reason, reason


def check_what_a_shard_map_cuts_stays_dense():
    head, x = head_and_tokens()
    mesh = mesh_of(4)

    def inside(w, x):
        part = lambda q, s, x: x @ (q.astype(jnp.float32) * s)  # noqa: E731
        cut = P(None, "model"), P("model"), P()
        return jnp.argmax(jax.shard_map(part, mesh=mesh, in_specs=cut, out_specs=P(None, "model"))(*w.values(), x), -1)

    def outside(w, x):
        cut = P(None, "model"), P()
        part = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=cut, out_specs=P(None, "model"))
        return jnp.argmax(part(scaled(w), x), -1)

    for fun in (inside, outside):
        reason = refusal_of(fun, head, x)
        assert "its weight is computed inside the program" in reason, reason


@pytest.mark.parametrize("name", devices.checks(__name__))
def test_on_eight_devices(found, name):
    assert not found[name], found[name]
