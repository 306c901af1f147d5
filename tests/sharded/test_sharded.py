"""Weights placed over devices: every device reads its own rows, and what travels is what the dense program sends."""

from functools import partial

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width, kinds, named
from collectives import collectives, largest_array
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hire_xform as hx

P = PartitionSpec
D, M, V, LAYERS, TOKENS = 16, 64, 128, 3, 8
SPECS = {
    "up": P(None, None, "model"),
    "down": P(None, "model", None),
    "bias": P(None, "model"),
    "head": P(None, "model"),
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.fixture(scope="module")
def found():
    return devices.outcomes(__name__)


def mesh_of(model, data=1, types=AUTO):
    if data == 1:
        return jax.make_mesh((model,), ("model",), axis_types=(types,), devices=jax.devices()[:model])
    return jax.make_mesh(
        (data, model), ("data", "model"), axis_types=(types,) * 2, devices=jax.devices()[: data * model]
    )


def weights():
    rng = np.random.default_rng(0)
    shapes = {"up": (LAYERS, D, M), "down": (LAYERS, M, D), "bias": (LAYERS, M), "head": (D, V)}
    return {name: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32) for name, shape in shapes.items()}


def tokens(count=TOKENS):
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, D)), jnp.float32)


def placed(mesh, specs=SPECS, x_spec=None, count=TOKENS):
    w = {name: jax.device_put(a, NamedSharding(mesh, specs[name])) for name, a in weights().items()}
    x_spec = x_spec if x_spec is not None else P("data") if "data" in mesh.axis_names else P()
    return w, jax.device_put(tokens(count), NamedSharding(mesh, x_spec))


def decode(w, x):
    """Written for automatic axes, or for none."""

    def layer(x, slices):
        return x + jax.nn.relu(x @ slices["up"] + slices["bias"]) @ slices["down"], None

    x, _ = lax.scan(layer, x, {name: w[name] for name in ("up", "down", "bias")})
    return x @ w["head"]


def explicit_decode(w, x):
    """The same for explicit axes, where a contraction over devices states its result."""
    out = jax.typeof(x).sharding

    def layer(x, slices):
        hidden = jax.nn.relu(x @ slices["up"] + slices["bias"])
        return x + jnp.matmul(hidden, slices["down"], out_sharding=out), None

    x, _ = lax.scan(layer, x, {name: w[name] for name in ("up", "down", "bias")})
    return x @ w["head"]


def block(w, x):
    return jax.nn.relu(x @ w["up"][0] + w["bias"][0]) @ w["down"][0]


def narrow(active=0.25, candidates=16, **vocab):
    return hx.Config(ffn=hx.Ffn(active=active), rules=named(hx.Vocab(candidates=candidates, **vocab)))


def compiled(step, *args):
    jitted, operands = step.program(*args)
    return jitted.lower(*operands).compile()


def shards_of(plan):
    return [site.shards for site in plan.sites]


def check_full_width_is_dense_on_every_mesh():
    want = decode(weights(), tokens())
    for types, fun in ((AUTO, decode), (EXPLICIT, explicit_decode)):
        for model, data in ((2, 1), (4, 1), (8, 1), (4, 2), (2, 4)):
            w, x = placed(mesh_of(model, data, types))
            dense = jax.jit(fun)(w, x)
            step = hx.sparsify(fun, config=full_width())
            traced = step.trace(w, x)
            assert kinds(traced.plan) == ["ffn", "vocab"], traced.explain()
            assert shards_of(traced.plan) == [model, model]
            for got in (step(w, x), step(traced.pack(w), x)):
                assert_same(got, want)
                assert got.sharding.is_equivalent_to(dense.sharding, 2), (got.sharding, dense.sharding)


def check_every_predictor_in_every_packed_form():
    w, x = placed(mesh_of(4))
    for predictor in (hx.Quantized(8), hx.Quantized(4), hx.LowRank(0.5), hx.LowRank(0.5, bits=8)):
        step = hx.sparsify(decode, config=full_width(predictor))
        packed = step.trace(w, x).pack(w)
        assert_same(step(packed, x), decode(weights(), tokens()))
        for leaf in jax.tree.leaves(packed):
            assert max(s.data.size for s in leaf.addressable_shards) * 4 == leaf.size, leaf.sharding


def check_narrow_is_the_same_as_each_device_picking_its_share():
    """Each of four devices chooses four of its rows, row i being on device i % 4: checked on the head's candidates."""
    w, x = placed(mesh_of(4))
    step = hx.sparsify(decode, config=hx.Config(ffn=None, rules=named(hx.Vocab(candidates=16, fill="-inf"))))
    logits = np.asarray(step(w, x[:1]))
    assert np.isfinite(logits).reshape(V // 4, 4).sum(axis=0).tolist() == [4] * 4
    dense = np.asarray(decode(weights(), tokens()[:1]))
    np.testing.assert_allclose(logits[np.isfinite(logits)], dense[np.isfinite(logits)], rtol=1e-4, atol=1e-5)
    best = np.sort(dense.reshape(V // 4, 4), axis=0)[-3:]
    assert np.isin(best.round(4), logits.round(4)).mean() > 0.9


def check_a_block_has_exactly_one_all_reduce():
    for types in (AUTO, EXPLICIT):
        for model in (2, 4, 8):
            w, x = placed(mesh_of(model, types=types), count=1)
            fun = block if types is AUTO else explicit_block
            sent = collectives(compiled(hx.sparsify(fun, config=narrow()), w, x))
            assert [c.op for c in sent] == ["all-reduce"], sent
            assert sent == collectives(jax.jit(fun).lower(w, x).compile())
            assert sent[0].sent == D * 4


def explicit_block(w, x):
    hidden = jax.nn.relu(x @ w["up"][0] + w["bias"][0])
    return jnp.matmul(hidden, w["down"][0], out_sharding=jax.typeof(x).sharding)


def logits(w, x):
    return x @ w["head"]


def best(w, x):
    return jnp.argmax(x @ w["head"], axis=-1)


def drawn(w, x):
    return jax.random.categorical(jax.random.key(0), x @ w["head"])


def best_few(w, x, k=5):
    return lax.top_k(jax.nn.log_softmax(jnp.tanh(x @ w["head"])[None]), k)


def check_logits_move_nothing_and_their_arg_max_sixteen_bytes():
    for types in (AUTO, EXPLICIT):
        for model in (2, 4, 8):
            w, x = placed(mesh_of(model, types=types))
            assert collectives(compiled(hx.sparsify(logits, config=narrow()), w, x)) == []
            for token in (best, drawn):
                sent = collectives(compiled(hx.sparsify(token, config=narrow()), w, x))
                assert 0 < sum(c.sent for c in sent) <= 16 * TOKENS, sent


def check_a_top_k_of_logits_moves_its_own_few():
    for model, data in ((2, 1), (4, 1), (8, 1), (4, 2)):
        w, x = placed(mesh_of(model, data))
        step = hx.sparsify(best_few, config=full_width())
        assert_same(step(w, x), jax.jit(best_few)(weights(), tokens()))
        sent = [c for c in collectives(compiled(step, w, x)) if c.op == "all-gather"]
        assert sum(c.sent for c in sent) == 8 * 5 * TOKENS // data, sent
    moved = collectives(jax.jit(best_few).lower(w, x).compile())
    assert sum(c.sent for c in moved) > TOKENS // data * V // model * 4
    tied = jnp.zeros((D, V)).at[:, ::3].set(1.0)
    w, x = placed(mesh_of(8))
    ties = {"head": jax.device_put(tied, w["head"].sharding)}
    got = hx.sparsify(lambda w, x: lax.top_k(x @ w["head"], 40), config=full_width())(ties, x)
    for one, other in zip(got, jax.jit(lambda w, x: lax.top_k(x @ w, 40))(tied, tokens()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def check_a_shard_map_body_with_its_own_psum():
    """The step is the body: it sees one device's weights, packs them there, and adds its part up itself."""
    mesh = mesh_of(4)
    w, x = placed(mesh)

    def own(w, x):
        hidden = jax.nn.relu(x @ w["up"][0] + w["bias"][0])
        x = x + lax.psum(hidden @ w["down"][0], "model")
        return x, x @ w["head"]

    step = hx.sparsify(own, config=full_width())
    pack = jax.shard_map(
        lambda w, x: step.trace(w, x).pack(w), mesh=mesh, in_specs=(SPECS, P()), out_specs=P("model"), check_vma=False
    )
    packed = jax.jit(pack)(w, x)
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P("model"), P()), out_specs=(P(), P(None, "model"))))
    want = tokens() + block(weights(), tokens())
    assert_same(mapped(packed, x), (want, want @ weights()["head"]))
    sent = collectives(mapped.lower(packed, x).compile())
    assert [c.op for c in sent] == ["all-reduce"], sent


def check_sharded_weights_that_a_shard_map_has_whole_on_every_device():
    mesh = mesh_of(4)
    w, x = placed(mesh)
    fun = jax.shard_map(
        lambda w, x: (block(w, x), x @ w["head"]), mesh=mesh, in_specs=(P(), P("model")), out_specs=P("model")
    )
    step = hx.sparsify(fun, config=full_width())
    traced = step.trace(w, x)
    assert kinds(traced.plan) == ["ffn", "vocab"]
    for got in (step(w, x), step(traced.pack(w), x)):
        assert_same(got, (block(weights(), tokens()), tokens() @ weights()["head"]))


def check_all_logits_on_all_devices_move_what_dense_moves():
    mesh = mesh_of(4)
    w, x = placed(mesh)
    everywhere = NamedSharding(mesh, P())
    step = hx.sparsify(logits, config=narrow(), out_shardings=everywhere)
    dense = jax.jit(logits, out_shardings=everywhere).lower(w, x).compile()
    sent = sum(c.sent for c in collectives(compiled(step, w, x)))
    assert 0 < sent <= sum(c.sent for c in collectives(dense))


def check_data_and_model_axes_together():
    for types, fun in ((AUTO, block), (EXPLICIT, data_block)):
        w, x = placed(mesh_of(4, 2, types))
        step = hx.sparsify(fun, config=narrow())
        sent = collectives(compiled(step, w, x))
        assert [c.op for c in sent] == ["all-reduce"], sent
        assert sent[0].sent == TOKENS // 2 * D * 4
        assert_same(hx.sparsify(fun, config=full_width())(w, x), jax.jit(block)(weights(), tokens()))


def data_block(w, x):
    hidden = jax.nn.relu(x @ w["up"][0] + w["bias"][0])
    return jnp.matmul(hidden, w["down"][0], out_sharding=jax.typeof(x).sharding)


def check_packing_holds_no_whole_matrix_anywhere():
    from hire_xform.passes.pack.packers import packed_spec, shard_packer
    from hire_xform.passes.plan.placement import as_automatic

    w, x = placed(mesh_of(8))
    for predictor in (hx.Quantized(8), hx.LowRank(2, bits=8)):
        traced = hx.sparsify(decode, config=full_width(predictor)).trace(w, x)
        leaves = jax.tree.leaves(w)
        for key in dict.fromkeys(n.key for d in traced.plan.decisions for n in d.needs):
            leaf = leaves[key.recipe.root.index]
            mesh = as_automatic(leaf.sharding.mesh)
            leaf = jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))
            packer = shard_packer(key.recipe.steps, key.form, mesh, packed_spec(leaf.sharding, leaf.shape, key))
            program = packer.lower(leaf).compile()
            assert collectives(program) == [], key
            assert largest_array(program) <= max(leaf.nbytes // 8, LAYERS * D * D * 4), key


def check_grad_vmap_scan_and_a_jit_around():
    for types, fun in ((AUTO, decode), (EXPLICIT, explicit_decode)):
        w, x = placed(mesh_of(4, types=types))
        step = hx.sparsify(fun, config=full_width())
        packed = step.trace(w, x).pack(w)

        def total(run, w, x):
            return jnp.sum(jnp.sin(run(w, x)))

        want = jax.grad(total, argnums=2)(decode, weights(), tokens())
        assert_same(jax.jit(jax.grad(total, argnums=2), static_argnums=0)(step, packed, x), want, 1e-4)
        assert_same(jax.jit(step)(packed, x), decode(weights(), tokens()))
        steps = jax.jit(partial(twice, step))(packed, x)
        assert_same(steps[1], decode(weights(), tokens()))
        each = jax.jit(jax.vmap(partial(single, step), in_axes=(None, 0)))
        assert_same(each(packed, x), decode(weights(), tokens()))
        w, x = placed(mesh_of(4, 2, types=types))
        packed = step.trace(w, jax.device_put(tokens()[:1], NamedSharding(w["head"].sharding.mesh, P()))).pack(w)
        got = each(packed, x)
        assert_same(got, decode(weights(), tokens()))
        if types is EXPLICIT:
            assert got.sharding.spec == P("data", "model")
            continue
        # Told over which axis the batch is, each device has its own part of it, and of weights, alone.
        each = jax.jit(jax.vmap(partial(single, step), in_axes=(None, 0), spmd_axis_name="data"))
        assert_same(each(packed, x), decode(weights(), tokens()))
        assert {c.op for c in collectives(each.lower(packed, x).compile())} == {"all-reduce"}


def twice(step, packed, x):
    return lax.scan(lambda c, _: (c, step(packed, c)), x, None, length=2)[1]


def single(step, packed, x):
    return step(packed, x[None])[0]


def check_shapes_with_shardings_trace_and_lower():
    for types, fun in ((AUTO, decode), (EXPLICIT, explicit_decode)):
        # Along an axis of the tokens that no part of the program would split by itself.
        w, x = placed(mesh_of(4, 2, types), x_spec=P(None, "data"))
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), (w, x))
        step = hx.sparsify(fun, config=full_width())
        traced = step.trace(*shapes)
        assert shards_of(traced.plan) == [4, 4]
        program = traced.lower().compile()
        assert program.input_shardings[0][-1].is_equivalent_to(x.sharding, 2)
        assert_same(program(traced.pack(w), x), decode(weights(), tokens()))
        with pytest.raises(ValueError, match="is placed as one device's; expected"):
            traced.pack(weights())


def check_weights_sharded_otherwise_stay_dense_and_say_why():
    mesh = mesh_of(4)
    cases = {
        "input axis": {"up": P(None, "model", None), "head": P("model", None)},
        "output axis": {"down": P(None, None, "model")},
        "differently along the hidden units": {"down": P()},
    }
    for words, changed in cases.items():
        w, x = placed(mesh, {**SPECS, **changed})
        step = hx.sparsify(decode, config=full_width())
        plan = step.trace(w, x).plan
        assert any(words in r.reason for r in plan.refusals), [r.reason for r in plan.refusals]
        assert_same(step(w, x), decode(weights(), tokens()))
    w, x = placed(mesh)
    plan = hx.sparsify(decode, config=full_width(group_size=32)).trace(w, x).plan
    assert any("does not divide the 16 hidden units of each device" in r.reason for r in plan.refusals)


def check_replicated_weights_stay_whole():
    for types, fun in ((AUTO, decode), (EXPLICIT, explicit_decode)):
        w, x = placed(mesh_of(4, 2, types), {name: P() for name in SPECS})
        step = hx.sparsify(fun, config=full_width())
        traced = step.trace(w, x)
        assert shards_of(traced.plan) == [1, 1]
        assert_same(step(w, x), decode(weights(), tokens()))
        assert_same(step(traced.pack(w), x), decode(weights(), tokens()))


def check_the_same_step_for_weights_that_move():
    step = hx.sparsify(decode, config=full_width())
    want = decode(weights(), tokens())
    assert_same(step(weights(), tokens()), want)
    for model in (2, 4):
        assert_same(step(*placed(mesh_of(model))), want)
    assert_same(step(weights(), tokens()), want)


def check_under_a_mesh_that_is_set():
    for types, fun in ((AUTO, decode), (EXPLICIT, explicit_decode)):
        mesh = mesh_of(4, 2, types)
        w, x = placed(mesh)
        step = hx.sparsify(fun, config=full_width())
        with jax.set_mesh(mesh):
            assert_same(step(w, x), decode(weights(), tokens()))
            assert_same(step(step.trace(w, x).pack(w), x), decode(weights(), tokens()))
        assert_same(step(w, x), decode(weights(), tokens()))
        # What is on one device, or said of none, runs as it does without a mesh.
        step, own, x = hx.sparsify(decode, config=full_width()), weights(), tokens()
        with jax.set_mesh(mesh):
            packed = step.trace(own, x).pack(own)
            assert_same(step(packed, x), decode(own, x))
            assert_same(step.trace(own, x).lower().compile()(packed, x), decode(own, x))


def check_training_with_the_top_k_over_devices():
    """The groups that are kept, and what they are trained by, do not depend on where units and tokens are."""

    def loss_of(fun):
        return lambda w, x: jnp.square(hx.topk_ffn(fun, active=0.25)(w, x)).sum()

    want = jax.grad(loss_of(decode))(weights(), tokens())
    for types, fun in ((AUTO, decode), (EXPLICIT, explicit_decode)):
        mesh = mesh_of(4, 2, types)
        w, x = placed(mesh)
        got = jax.jit(jax.grad(loss_of(fun)))(w, x)
        assert_same(got, want)
        for name, gradient in got.items():
            assert gradient.sharding.is_equivalent_to(w[name].sharding, gradient.ndim), name
        with jax.set_mesh(mesh):
            assert_same(jax.grad(loss_of(fun))(w, x), want)


def check_explain_says_over_how_many_devices():
    w, x = placed(mesh_of(4))
    text = hx.sparsify(decode, config=narrow()).trace(w, x).explain()
    assert "each of 4 devices along 'model' its own share" in text
    whole = {name: P() for name in SPECS}
    for fun, types, specs, spec in (
        (decode, AUTO, SPECS, P("data")),
        (explicit_decode, EXPLICIT, whole, P("data")),
        (explicit_decode, EXPLICIT, whole, P()),
    ):
        w, x = placed(mesh_of(1, 4, types), specs, spec)
        text = hx.sparsify(fun, config=narrow()).trace(w, x).explain()
        where = "4 devices along 'data'" if spec else "the devices"
        assert f"each of {where} all of it, for the tokens that it has" in text, text
        assert "1 devices" not in text


@pytest.mark.parametrize("name", devices.checks(__name__))
def test_on_devices(found, name):
    assert not found[name], found[name]
