"""``compare`` of weights over several devices."""

import devices
import jax
import jax.numpy as jnp
import pytest
from checks import FORCE
from jax.sharding import NamedSharding, PartitionSpec

import hire_xform as hx

P = PartitionSpec
D, V = 16, 128


def check_compare():
    def step(params, token, state):
        x = params["embed"][token]
        logits = jax.nn.relu(x @ params["up"]) @ params["up"].T @ params["head"]
        return logits, state + 1

    mesh = devices.mesh_of(model=4)
    keys = jax.random.split(jax.random.key(0), 3)
    specs = {"embed": P(), "up": P(None, "model"), "head": P(None, "model")}
    shapes = {"embed": (V, D), "up": (D, 64), "head": (D, V)}
    params = {
        name: jax.device_put(jax.random.normal(key, shapes[name]), NamedSharding(mesh, specs[name]))
        for name, key in zip(specs, keys, strict=True)
    }
    state = jax.device_put(jnp.zeros(4), NamedSharding(mesh, P("model")))
    sparse = hx.sparsify(step, config=hx.approximate(rules=FORCE), donate_argnums=2)
    found = hx.compare(sparse, params, jnp.array([3]), state, repeats=1)
    assert [site.kind for site in found.sites] == ["ffn", "vocab"]
    assert found.agreement[0].argmax == 1
    assert found.agreement[1].equal == 1
    assert not state.is_deleted()
    assert (found.memory_speed, found.dense.speed, found.sparse.share) == (None, None, None)
    assert any("arguments are on 4 devices" in note for note in found.notes)


@pytest.fixture(scope="module")
def found():
    return devices.outcomes(__name__)


@pytest.mark.parametrize("name", devices.checks(__name__))
def test_on_eight_devices(found, name):
    assert found[name] == "", found[name]
