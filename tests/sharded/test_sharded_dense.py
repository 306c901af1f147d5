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


def check_devices_sum_up_their_parts():
    """As of attention's last product, whose weight is sharded along what it contracts."""
    w, m = array(HEADS, K, D), array(TOKENS, HEADS, K, seed=1)
    for model, data in ((4, 1), (2, 2)):
        mesh = mesh_of(model, data)
        own, mixed = placed(mesh, P("model"), w), placed(mesh, P("data", "model"), m)
        step = hx.sparsify(mix, config=compressed())
        traced = step.trace(own, mixed)
        (site,) = traced.plan.sites
        assert (site.shards, site.units, site.inputs) == (model, D, HEADS * K)
        packed = traced.pack(own)
        for one in jax.tree.leaves(packed):
            assert one.addressable_shards[0].data.size * model == one.size
        for got in (step(own, mixed), step(packed, mixed)):
            assert_same(got, mix(w, m))
        # Each device's rows and tokens have scales of their own, so it is nearer than in one piece.
        near = hx.sparsify(mix, config=compressed(INT8))(own, mixed)
        np.testing.assert_allclose(near, mix(w, m), atol=0.02)
        assert np.abs(near - mix(w, m)).max() > 0


def check_parts_are_summed_up_under_explicit_axes():
    mesh = mesh_of(4, 2, AxisType.Explicit)
    w, x = array(D, 12), array(TOKENS, D, seed=1)
    own, tokens = placed(mesh, P("model"), w), placed(mesh, P("data", "model"), x)

    def product(w, x):
        return jnp.tanh(jnp.matmul(x, w, out_sharding=NamedSharding(mesh, P("data"))))

    step = hx.sparsify(product, config=compressed())
    traced = step.trace(own, tokens)
    assert kinds(traced.plan) == ["dense"], traced.explain()
    got = step(traced.pack(own), tokens)
    assert_same(got, jnp.tanh(x @ w))
    assert got.sharding.is_equivalent_to(jax.jit(product)(own, tokens).sharding, 2)


def check_what_is_sent_is_what_the_dense_product_sends():
    mesh = mesh_of(4)
    w, m = placed(mesh, P("model"), array(HEADS, K, D)), placed(mesh, P(None, "model"), array(1, HEADS, K, seed=1))
    step = hx.sparsify(mix, config=compressed(INT8))
    traced = step.trace(w, m)
    (site,) = traced.plan.sites
    # An entry of 8 bits each, and on every device a scale for each output.
    assert site.sparse_bytes == HEADS * K * D + 4 * 4 * D
    jitted, operands = step.program(traced.pack(w), m)
    dense = jax.jit(mix).lower(w, m).compile()
    assert collectives(jitted.lower(*operands).compile()) == collectives(dense)


def check_a_stack_that_is_sharded_either_way():
    """The layers of a loop, each with a product whose outputs are split and one that contracts them."""
    mesh = mesh_of(4)
    w = {"in": array(2, D, HEADS, K), "out": array(2, HEADS, K, D, seed=1)}
    x = array(TOKENS, D, seed=2)

    def layers(w, x):
        def layer(x, own):
            heads = jax.nn.softmax(jnp.einsum("td,dhk->thk", x, own["in"]), axis=-1)
            return x + mix(own["out"], heads), None

        return jax.lax.scan(layer, x, w)[0]

    specs = {"in": P(None, None, "model"), "out": P(None, "model")}
    own = {name: placed(mesh, specs[name], value) for name, value in w.items()}
    step = hx.sparsify(layers, config=compressed())
    traced = step.trace(own, placed(mesh, P(), x))
    assert kinds(traced.plan) == ["dense", "dense"], traced.explain()
    assert_same(step(traced.pack(own), x), layers(w, x))


def check_what_is_sharded_within_a_head_stays_dense():
    mesh = mesh_of(4)
    w = placed(mesh, P(None, "model"), array(HEADS, K, D))
    m = placed(mesh, P(), array(TOKENS, HEADS, K, seed=1))
    step = hx.sparsify(mix, config=compressed(INT8))
    (refusal,) = step.trace(w, m).plan.refusals
    assert "a reshape mixes its sharded axis with others" in refusal.reason
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
