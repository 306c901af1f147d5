"""``da_top_k`` over devices: what is picked stays where it is, and nothing is moved to pick it."""

from functools import partial

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hire_xform.lowering.primitives.da_top_k import da_top_k

N, K, TOKENS = 64, 12, 8


@pytest.fixture(scope="module")
def found():
    return devices.outcomes(__name__)


def scores():
    return np.random.default_rng(0).permutation(TOKENS * N).reshape(TOKENS, N).astype(np.float32)


def placed(count, spec, types, data=1):
    sizes = (data, count) if data > 1 else (count,)
    names = ("data", "model")[-len(sizes) :]
    mesh = jax.make_mesh(sizes, names, axis_types=(types,) * len(sizes), devices=jax.devices()[: count * data])
    return jax.device_put(scores(), NamedSharding(mesh, spec))


def same(got, shards):
    for a, b in zip(got, da_top_k(jnp.asarray(scores()), K, shards), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def check_moves_nothing_on_2_4_and_8_devices():
    for types in (AxisType.Auto, AxisType.Explicit):
        for count in (2, 4, 8):
            step = jax.jit(partial(da_top_k, k=K, shards=count))
            given = placed(count, PartitionSpec(None, "model"), types)
            assert collectives(step.lower(given).compile()) == []
            got = step(given)
            assert got[0].sharding.is_equivalent_to(given.sharding, 2), got[0].sharding
            same(got, count)


def check_top_k_in_its_place_moves_every_score():
    given = placed(4, PartitionSpec(None, "model"), AxisType.Auto)
    moved = collectives(jax.jit(lambda s: lax.top_k(s, K)).lower(given).compile())
    assert sum(c.sent for c in moved) >= TOKENS * N * 4 // 4


def check_data_and_model_axes_together():
    for types in (AxisType.Auto, AxisType.Explicit):
        given = placed(4, PartitionSpec("data", "model"), types, data=2)
        step = jax.jit(partial(da_top_k, k=K, shards=4))
        assert collectives(step.lower(given).compile()) == []
        same(step(given), 4)


def check_lowered_ahead_for_devices_that_no_operand_names():
    """The partition rule is not told of which mesh it is then; what is picked stays what it is."""
    given = jnp.asarray(scores())
    with jax.set_mesh(jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))):
        for shards in (1, 8):
            for spec in (PartitionSpec(), PartitionSpec(None, "model")):

                def step(scores, spec=spec, shards=shards):
                    return da_top_k(lax.with_sharding_constraint(scores, spec), K, shards)

                same(jax.jit(step).lower(jax.typeof(given)).compile()(given), shards)


def check_under_a_mesh_of_explicit_axes_that_is_set():
    with jax.set_mesh(jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])):
        step = jax.jit(partial(da_top_k, k=K, shards=4))
        for spec in (PartitionSpec(), PartitionSpec(None, "model")):
            same(step(placed(4, spec, AxisType.Explicit)), 4)
        same(step(jnp.asarray(scores())), 4)


def check_one_axis_over_two_mesh_axes():
    for types in (AxisType.Auto, AxisType.Explicit):
        given = placed(4, PartitionSpec(None, ("data", "model")), types, data=2)
        step = jax.jit(partial(da_top_k, k=K, shards=8))
        assert collectives(step.lower(given).compile()) == []
        same(step(given), 8)


def check_more_shards_than_devices():
    for types in (AxisType.Auto, AxisType.Explicit):
        given = placed(2, PartitionSpec(None, "model"), types)
        step = jax.jit(partial(da_top_k, k=K, shards=8))
        assert collectives(step.lower(given).compile()) == []
        same(step(given), 8)


def check_fewer_shards_than_devices_is_refused_where_the_type_says_so():
    given = placed(8, PartitionSpec(None, "model"), AxisType.Explicit)
    with pytest.raises(ValueError, match="shards=4, but the last axis is sharded over 8 devices"):
        da_top_k(given, K, 4)


def check_fewer_shards_than_devices_under_automatic_axes():
    """No device holds a whole block: scores are gathered until some do, along no more axes than that takes."""
    cases = [(4, 2, ("data", "model"), 2), (4, 2, ("model", "data"), 4)]
    if not jax.__version__.startswith("0.9."):  # it has no name for how XLA leaves the results of four on eight devices
        cases.append((8, 1, "model", 4))
    for count, data, axes, shards in cases:
        given = placed(count, PartitionSpec(None, axes), AxisType.Auto, data=data)
        step = jax.jit(partial(da_top_k, k=K, shards=shards))
        same(step(given), shards)
        gathered = [c for c in collectives(step.lower(given).compile()) if c.sent > TOKENS * K]
        assert [c.sent for c in gathered] == [TOKENS * N // 8 * 4], gathered


def check_uneven_blocks_of_what_is_cut_from_an_even_axis():
    given = placed(8, PartitionSpec(None, "model"), AxisType.Auto)
    cut = jax.jit(lambda s: da_top_k(s[:, : N - 3], K, 8))
    assert collectives(cut.lower(given).compile()) == []
    for a, b in zip(cut(given), da_top_k(jnp.asarray(scores())[:, : N - 3], K, 8), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert np.asarray(cut(given)[1]).max() < N


def check_jax_places_no_array_unevenly():
    """So a site's weights always have as many rows on each device, and nothing here has to do with others."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    uneven, spec = jnp.zeros((3, 7)), PartitionSpec(None, "model")
    with pytest.raises(ValueError, match="evenly divi"):
        jax.device_put(uneven, NamedSharding(mesh, spec))
    with pytest.raises(ValueError, match="evenly divi"):
        jax.shard_map(lambda s: s, mesh=mesh, in_specs=spec, out_specs=spec)(uneven)


def check_replicated_scores_and_eager_calls():
    for types in (AxisType.Auto, AxisType.Explicit):
        for spec in (PartitionSpec(), PartitionSpec("model")):
            given = placed(4, spec, types)
            assert collectives(jax.jit(partial(da_top_k, k=K)).lower(given).compile()) == []
            same(da_top_k(given, K), 1)
        same(da_top_k(placed(4, PartitionSpec(None, "model"), types), K, 4), 4)


def check_under_vmap_grad_and_scan():
    for types in (AxisType.Auto, AxisType.Explicit):
        given = placed(4, PartitionSpec(None, "model"), types)
        step = jax.jit(jax.vmap(lambda s: da_top_k(s, K, 4)))
        assert collectives(step.lower(given).compile()) == []
        same(step(given), 4)
        same(jax.jit(lambda s: lax.scan(lambda c, row: (c, da_top_k(row, K, 4)), None, s)[1])(given), 4)
    given = placed(4, PartitionSpec(None, "model"), AxisType.Auto)
    gradient = jax.jit(jax.grad(lambda s: da_top_k(s, K, 4)[0].sum()))(given)
    expected = np.zeros((TOKENS, N), np.float32)
    np.put_along_axis(expected, np.asarray(da_top_k(jnp.asarray(scores()), K, 4)[1]), 1.0, -1)
    np.testing.assert_array_equal(gradient, expected)


def in_a_shard_map(mesh, **options):
    """Each of four devices along "model" takes its quarter."""
    spec = PartitionSpec(None, "model")
    return jax.jit(jax.shard_map(lambda s: da_top_k(s, K // 4), mesh=mesh, in_specs=spec, out_specs=spec, **options))


def check_the_rule_is_not_used_inside_a_manual_shard_map():
    given = placed(4, PartitionSpec(None, "model"), AxisType.Auto)
    mapped = in_a_shard_map(given.sharding.mesh)
    lowered = mapped.lower(given)
    assert "CustomSPMDPartitioning" not in lowered.as_text()
    assert collectives(lowered.compile()) == []
    np.testing.assert_array_equal(mapped(given)[0], da_top_k(jnp.asarray(scores()), K, 4)[0])
    partitioned = jax.jit(partial(da_top_k, k=K, shards=4)).lower(given).as_text()
    assert "CustomSPMDPartitioning" in partitioned


def check_a_shard_map_of_one_axis_of_two():
    given = placed(4, PartitionSpec("data", "model"), AxisType.Auto, data=2)
    mapped = in_a_shard_map(given.sharding.mesh, axis_names={"model"})
    np.testing.assert_array_equal(mapped(given)[0], da_top_k(jnp.asarray(scores()), K, 4)[0])


def test_the_rule_is_not_used_on_one_device():
    text = jax.jit(partial(da_top_k, k=K, shards=4)).lower(scores()).as_text()
    assert "CustomSPMDPartitioning" not in text
    assert "sharding" not in text.replace("mhlo.num_partitions", "")


def test_dead_code():
    """Unused, it is gone; with one of its results used, it is still there."""

    def text(number):
        return str(jax.make_jaxpr(jax.jit(lambda s: da_top_k(s, K, 4)[number] if number < 2 else s * 2))(scores()))

    lowered = jax.jit(lambda s: (da_top_k(s, K, 4), s * 2)[1]).lower(scores()).as_text()
    assert "top_k" not in lowered
    assert "da_top_k" in text(0)
    assert "da_top_k" in text(1)


@pytest.mark.parametrize("name", devices.checks(__name__))
def test_on_devices(found, name):
    assert not found[name], found[name]
