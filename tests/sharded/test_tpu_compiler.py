"""What the TPU's own compiler makes of a rewritten program, ahead of time and without a TPU.

Programs are lowered from shapes that are placed on the devices of a described topology: v5e, four chips or one.
"""

from functools import partial

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, named
from collectives import arrays_written, collectives
from described_tpus import ENVIRONMENT, chips, compiled, on_one_chip
from extras import why_missing
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from test_sharded import (
    SPECS,
    TOKENS,
    D,
    best,
    best_few,
    block,
    data_block,
    decode,
    drawn,
    explicit_block,
    explicit_decode,
    logits,
    narrow,
    weights,
)

import hire_xform as hx
from hire_xform.lowering.primitives.da_top_k import da_top_k

pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow]

P = PartitionSpec
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.fixture(scope="module")
def found():
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        pytest.skip(why_missing("tpu-aot", error))
    return devices.outcomes(__name__, ENVIRONMENT)


def mesh_of(model, data=1, types=AUTO):
    if data == 1:
        return Mesh(np.array(chips()[:model]), ("model",), axis_types=(types,))
    return Mesh(np.array(chips()[: data * model]).reshape(data, model), ("data", "model"), axis_types=(types,) * 2)


def on(mesh, shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def placed(mesh, count=TOKENS):
    """The weights and tokens of tests/sharded/test_sharded.py, as shapes on a mesh."""
    w = {name: on(mesh, a.shape, *SPECS[name]) for name, a in jax.eval_shape(weights).items()}
    return w, on(mesh, (count, D), "data" if "data" in mesh.axis_names else None)


def sparse(fun, *shapes, config=None, **options):
    traced = hx.sparsify(fun, config=config or narrow(), **options).trace(*shapes)
    assert traced.plan.platform == "tpu"
    assert traced.plan.sites, traced.explain()
    return compiled(traced.lower())


def dense(fun, *shapes, **options):
    return compiled(jax.jit(fun, **options).trace(*shapes).lower())


def bytes_sent(program):
    return sum(c.sent for c in collectives(program))


def check_a_block_has_exactly_one_all_reduce():
    for types, fun in ((AUTO, block), (EXPLICIT, explicit_block)):
        for model in (2, 4):
            shapes = placed(mesh_of(model, types=types), count=1)
            sent = collectives(sparse(fun, *shapes))
            assert [c.op for c in sent] == ["all-reduce"], sent
            assert sent[0].sent == D * 4
            assert sent == collectives(dense(fun, *shapes))


def check_a_loop_over_layers_has_one_all_reduce_in_its_body():
    for types, fun in ((AUTO, decode), (EXPLICIT, explicit_decode)):
        sent = collectives(sparse(fun, *placed(mesh_of(4, types=types))))
        assert [(c.op, c.sent) for c in sent] == [("all-reduce", TOKENS * D * 4)], sent


def check_data_and_model_axes_together():
    for types, fun in ((AUTO, block), (EXPLICIT, data_block)):
        sent = collectives(sparse(fun, *placed(mesh_of(2, 2, types))))
        assert [(c.op, c.sent) for c in sent] == [("all-reduce", TOKENS // 2 * D * 4)], sent


def check_logits_move_nothing_and_their_arg_max_sixteen_bytes():
    for types in (AUTO, EXPLICIT):
        shapes = placed(mesh_of(4, types=types))
        assert collectives(sparse(logits, *shapes)) == []
        for token in (best, drawn):
            assert 0 < bytes_sent(sparse(token, *shapes)) <= 16 * TOKENS


def check_all_logits_on_all_devices_move_what_dense_moves():
    mesh = mesh_of(4)
    everywhere = {"out_shardings": NamedSharding(mesh, P())}
    sent = bytes_sent(sparse(logits, *placed(mesh), **everywhere))
    assert 0 < sent <= bytes_sent(dense(logits, *placed(mesh), **everywhere))


def check_a_top_k_of_logits_moves_its_own_few():
    shapes = placed(mesh_of(4))
    sent = [c for c in collectives(sparse(best_few, *shapes)) if c.op == "all-gather"]
    assert sum(c.sent for c in sent) == 8 * 5 * TOKENS, sent


def check_da_top_k_moves_nothing():
    for types in (AUTO, EXPLICIT):
        four, two_by_two = mesh_of(4, types=types), mesh_of(2, 2, types)
        for mesh, spec, shards in (
            (four, (None, "model"), 4),
            (four, (None, "model"), 8),
            (two_by_two, ("data", "model"), 4),
            (two_by_two, (None, ("data", "model")), 4),
        ):
            scores = on(mesh, (TOKENS, 512), *spec)
            assert collectives(dense(partial(da_top_k, k=12, shards=shards), scores)) == [], (types, spec, shards)
    assert bytes_sent(dense(lambda s: lax.top_k(s, 12), on(mesh_of(4), (TOKENS, 512), None, "model"))) > 0


def check_a_shard_map_body_with_its_own_psum():
    mesh = mesh_of(4)

    def own(w, x):
        hidden = jax.nn.relu(x @ w["up"][0] + w["bias"][0])
        return lax.psum(hidden @ w["down"][0], "model")

    step = hx.sparsify(own, config=narrow())
    pack = jax.shard_map(
        lambda w, x: step.trace(w, x).pack(w), mesh=mesh, in_specs=(SPECS, P()), out_specs=P("model"), check_vma=False
    )
    w, x = placed(mesh)
    packed = jax.tree.map(lambda a: on(mesh, a.shape, "model", dtype=a.dtype), jax.eval_shape(pack, w, x))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P("model"), P()), out_specs=P())
    sent = collectives(dense(mapped, packed, x))
    assert [(c.op, c.sent) for c in sent] == [("all-reduce", TOKENS * D * 4)], sent


def layer(w, x):
    return x + jax.nn.relu(x @ w["up"]) @ w["down"]


def check_a_loop_over_layers_reads_rows_where_they_lie():
    layers, d, m = 4, 512, 4096
    w, x = on_one_chip(up=(layers, d, m), down=(layers, m, d)), on_one_chip(x=(1, d))["x"]
    step = sparse(lambda w, x: lax.scan(lambda x, w: (layer(w, x), None), x, w)[0], w, x, config=a_sixteenth())
    assert max(arrays_written(step)) < m * d
    assert step.memory_analysis().temp_size_in_bytes < m * d


def check_layers_one_after_the_other_read_rows_where_they_lie():
    """No matrix is fetched whole, ahead of the few of its rows that are read; the predictors, which are, may be."""
    d, m = 512, 4096
    w, x = [on_one_chip(up=(d, m), down=(m, d)) for _ in range(2)], on_one_chip(x=(1, d))["x"]
    step = sparse(lambda w, x: layer(w[1], layer(w[0], x)), w, x, config=a_sixteenth())
    assert max(arrays_written(step)) <= m * d
    assert step.memory_analysis().temp_size_in_bytes < m * d


def check_a_head_reads_rows_where_they_lie():
    d, vocab = 512, 32768
    step = sparse(best, on_one_chip(head=(d, vocab)), on_one_chip(x=(1, d))["x"])
    assert max(arrays_written(step)) <= vocab * d
    assert step.memory_analysis().temp_size_in_bytes < vocab * d


def a_sixteenth():
    return hx.Config(ffn=hx.Ffn(active=1 / 16), rules=FORCE)


def check_a_certified_head_is_bounded_for_products_of_one_bf16_pass():
    w, x = on_one_chip(dtype=jnp.float32, w=(D, 128), x=(1, D)).values()
    config = hx.Config(rules=named(hx.Vocab(candidates=16, certify=True)))
    step = hx.sparsify(lambda w, x: x @ w, config=config).trace(w, x)
    assert [d.input_bits for d in step.plan.decisions] == [7]
    compiled(step.lower())


@pytest.mark.parametrize("name", devices.checks(__name__))
def test_on_a_described_tpu(found, name):
    assert not found[name], found[name]
