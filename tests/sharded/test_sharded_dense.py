"""Products read compressed whose weights are over several devices: each device has its outputs, or they stay dense."""

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import Everything, assert_same, compressed, kinds
from collectives import collectives
from devices import mesh_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hire_xform as hx

P = PartitionSpec
D, HEADS, K, TOKENS = 16, 4, 8, 4
INT8 = hx.Quantized(8)


@pytest.fixture(scope="module")
def found():
    return devices.outcomes(__name__)


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 4, jnp.float32)


def placed(mesh, spec, value):
    return jax.device_put(value, NamedSharding(mesh, spec))


def queries(w, x):
    return jnp.tanh(jnp.einsum("td,dhk->thk", x, w))


def mix(w, m):
    return jnp.einsum("thk,hkd->td", m, w)


def check_each_device_has_its_outputs():
    w, x = array(D, HEADS, K), array(TOKENS, D, seed=1)
    want = {Everything(): queries(w, x), INT8: hx.sparsify(queries, config=compressed(INT8))(w, x)}
    for types in (AxisType.Auto, AxisType.Explicit):
        for model, data in ((4, 1), (2, 2)):
            mesh = mesh_of(model, data, types)
            own, tokens = placed(mesh, P(None, "model"), w), placed(mesh, P("data"), x)
            dense = jax.jit(queries)(own, tokens)
            for predictor, value in want.items():
                step = hx.sparsify(queries, config=compressed(predictor))
                traced = step.trace(own, tokens)
                assert kinds(traced.plan) == ["dense"], traced.explain()
                (site,) = traced.plan.sites
                assert site.shards == model
                assert f"each of {model} devices along 'model' its own share" in traced.explain()
                for got in (step(own, tokens), step(traced.pack(own), tokens)):
                    assert_same(got, value)
                    assert got.sharding.is_equivalent_to(dense.sharding, 3), (got.sharding, dense.sharding)


def check_nothing_travels_and_each_device_keeps_its_part():
    mesh = mesh_of(4)
    w, x = placed(mesh, P(None, "model"), array(D, HEADS, K)), placed(mesh, P(), array(1, D, seed=1))
    step = hx.sparsify(queries, config=compressed(INT8))
    traced = step.trace(w, x)
    (site,) = traced.plan.sites
    assert site.sparse_bytes == D * HEADS * K + 4 * HEADS * K
    packed = traced.pack(w)
    for one in jax.tree.leaves(packed):
        assert one.addressable_shards[0].data.size * 4 == one.size
    jitted, operands = step.program(packed, x)
    assert not collectives(jitted.lower(*operands).compile())


def check_what_is_sharded_along_its_input_stays_dense():
    mesh = mesh_of(4)
    w, m = placed(mesh, P("model"), array(HEADS, K, D)), placed(mesh, P(None, "model"), array(TOKENS, HEADS, K, seed=1))
    step = hx.sparsify(mix, config=compressed(INT8))
    (refusal,) = step.trace(w, m).plan.refusals
    assert "sharded along its input axis, over model" in refusal.reason
    assert_same(step(w, m), mix(w, m))


def check_a_whole_weight_needs_no_help():
    mesh = mesh_of(4)
    w, x = placed(mesh, P(), array(D, HEADS, K)), placed(mesh, P("model"), array(TOKENS, D, seed=1))
    step = hx.sparsify(queries, config=compressed(INT8))
    (site,) = step.trace(w, x).plan.sites
    assert site.shards == 1
    assert_same(step(w, x), hx.sparsify(queries, config=compressed(INT8))(array(D, HEADS, K), array(TOKENS, D, seed=1)))


def check_a_choice_among_its_outputs_is_that_of_all():
    """As many are looked for along one of two output axes: not a vocabulary's, whose top-k is merged over devices."""
    mesh = mesh_of(4)
    w, x = placed(mesh, P(None, "model"), array(D, HEADS, K)), placed(mesh, P(), array(TOKENS, D, seed=1))
    step = hx.sparsify(lambda w, x: jax.lax.top_k(queries(w, x), 2), config=compressed())
    assert kinds(step.trace(w, x).plan) == ["dense"]
    assert_same(step(w, x), jax.lax.top_k(queries(w, x), 2))


def check_in_the_programs_own_shard_map():
    """Cut along its outputs, or along its input with a sum over devices."""
    mesh = mesh_of(4)
    w, x = array(D, 24), array(TOKENS, D, seed=1)
    across = {"in_specs": (P(None, "model"), P()), "out_specs": P(None, "model")}
    along = {"in_specs": (P("model"), P(None, "model")), "out_specs": P()}

    def product(w, x):
        return jnp.cumsum(x @ w, axis=0)

    def summed(w, x):
        return jax.lax.psum(jnp.cumsum(x @ w, axis=0), "model")

    for body, specs in ((product, across), (summed, along)):
        fun = jax.shard_map(body, mesh=mesh, **specs)
        own, tokens = (placed(mesh, spec, value) for spec, value in zip(specs["in_specs"], (w, x), strict=True))
        step = hx.sparsify(fun, config=compressed())
        traced = step.trace(own, tokens)
        assert kinds(traced.plan) == ["dense"], traced.explain()
        assert_same(step(traced.pack(own), tokens), fun(own, tokens))


@pytest.mark.parametrize("name", devices.checks(__name__))
def test_on_eight_devices(found, name):
    assert not found[name], found[name]
