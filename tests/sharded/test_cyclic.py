"""Rows of a vocabulary distributed cyclically over devices: only where nothing that reads the logits can tell."""

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width, named
from collectives import collectives, largest_array
from devices import mesh_of
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hire_xform as hx
from hire_xform.lowering.engine.cyclic_rows import from_cyclic, to_cyclic
from hire_xform.lowering.xla.devices import Devices

pytestmark = pytest.mark.any_jax("which row lies where is our own arithmetic; test_sharded.py splits rows on every JAX")

P = PartitionSpec
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# 10 rows on each of 4 devices, which 4 does not divide; 5 on each of 8.
D, V, TOKENS, K = 8, 40, 4, 3


@pytest.fixture(scope="module")
def found():
    return devices.outcomes(__name__)


def weights(vocab=V):
    return {"head": jnp.asarray(np.random.default_rng(0).normal(size=(D, vocab)), jnp.float32)}


def tokens(count=TOKENS):
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, D)), jnp.float32)


def placed(mesh, w=None, count=TOKENS):
    w = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(None, "model"))), w or weights())
    spec = P("data") if mesh.shape["data"] > 1 else P()
    return w, jax.device_put(tokens(count), NamedSharding(mesh, spec))


def compiled(step, *args):
    jitted, operands = step.program(*args)
    return jitted.lower(*operands).compile()


def best(w, x):
    return jnp.argmax(x @ w["head"], axis=-1)


def best_few(w, x):
    logits = jnp.tanh(x @ w["head"] / 3.0)
    return lax.top_k(jax.nn.log_softmax(logits[None] / jnp.full((1, TOKENS, 1), 0.7)), K)


def moments(w, x):
    logits = (x @ w["head"]).astype(jnp.float32)
    return logits.max(-1), jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits.reshape(2, -1, V), 2)


def every_logit(w, x):
    return x @ w["head"]


def masked(w, x):
    return jnp.argmax(jnp.where(jnp.arange(V) % 2 == 0, x @ w["head"], -jnp.inf), axis=-1)


def drawn(w, x):
    return jax.random.categorical(jax.random.key(0), x @ w["head"])


def layout(plan):
    (site,) = plan.sites
    return site.rows


def narrow(candidates=16, **vocab):
    return hx.Config(rules=named(hx.Vocab(candidates=candidates, **vocab)))


def check_rows_go_round_and_come_back():
    for model, data, rows in ((4, 1, 8), (4, 1, 10), (8, 1, 5), (2, 4, 3)):
        mesh = mesh_of(model, data)
        for names in (("model",), ("data", "model")):
            shards = model if len(names) == 1 else model * data
            given, along = jnp.arange(rows * shards), Devices(names, shards)
            dealt, back = jax.jit(
                jax.shard_map(
                    lambda own, along=along: (
                        to_cyclic(own, along),
                        from_cyclic(to_cyclic(own[None], along, axis=1), along, axis=1)[0],
                    ),
                    mesh=mesh,
                    in_specs=P(names),
                    out_specs=P(names),
                )
            )(given)
            np.testing.assert_array_equal(dealt.reshape(shards, rows).T.reshape(-1), given)
            np.testing.assert_array_equal(back, given)


def check_what_selects_gets_the_dense_result():
    for types, sizes in ((AUTO, ((4, 1), (8, 1), (4, 2))), (EXPLICIT, ((4, 2),))):
        for model, data in sizes:
            w, x = placed(mesh_of(model, data, types))
            for fun in (best, moments) if types is EXPLICIT else (best, best_few, moments):
                step = hx.sparsify(fun, config=full_width())
                traced = step.trace(w, x)
                assert layout(traced.plan) == f"rows distributed cyclically: row i on device i % {model}"
                assert_same(step(traced.pack(w), x), jax.jit(fun)(weights(), tokens()))


def check_an_arg_max_sends_eight_bytes_and_a_top_k_eight_each():
    for types in (AUTO, EXPLICIT):
        for model in (2, 4, 8):
            w, x = placed(mesh_of(model, types=types))
            sent = collectives(compiled(hx.sparsify(best, config=narrow()), w, x))
            assert sum(c.sent for c in sent) == 8 * TOKENS, sent
    w, x = placed(mesh_of(4))
    sent = collectives(compiled(hx.sparsify(lambda w, x: lax.top_k(x @ w["head"], K), config=narrow()), w, x))
    assert sum(c.sent for c in sent) == 8 * K * TOKENS, sent


def check_ties_and_nans_are_broken_as_dense():
    """Columns that are equal on several devices; a NaN in one of them; everything NaN."""
    head = np.tile(np.asarray(weights()["head"])[:, :5], (1, 8))
    one, all_of_them = head.copy(), np.full_like(head, np.nan)
    one[0, 23] = np.nan
    for values in (head, one, all_of_them, np.zeros_like(head)):
        w = {"head": jnp.asarray(values)}
        placed_w, x = placed(mesh_of(4), w)
        for fun in (best, lambda w, x: lax.top_k(x @ w["head"], 12)[1]):
            got = hx.sparsify(fun, config=full_width())(placed_w, x)
            np.testing.assert_array_equal(got, jax.jit(fun)(w, tokens()))


def check_a_padded_vocabulary_is_cut_to_its_true_size():
    """Its end, which holds the largest logits, is never chosen; NaNs of either sign are as dense."""
    size = 33
    head = np.array(weights()["head"])
    head[:, size:] *= 9.0
    broken = head.copy()
    broken[0, 3:] = -np.nan
    mesh = mesh_of(4)

    def cut_best(w, x):
        return jnp.argmax((x @ w["head"])[:, :size], -1), lax.top_k(jnp.tanh(x @ w["head"])[:, :size], K)

    def returned_too(w, x):
        return lax.top_k((x @ w["head"])[:, :size], K), x @ w["head"]

    for values in (head, broken):
        w, x = placed(mesh, {"head": jnp.asarray(values)})
        for fun, how in ((cut_best, "cyclically"), (returned_too, "contiguous")):
            step = hx.sparsify(fun, config=full_width())
            assert [how in site.rows for site in step.trace(w, x).plan.sites] == [True, True]
            assert_same(step(w, x), jax.jit(fun)({"head": jnp.asarray(values)}, tokens()))
    w, x = placed(mesh)
    step = hx.sparsify(lambda w, x: jnp.argmax((x @ w["head"])[:, :size], -1), config=narrow())
    assert sum(c.sent for c in collectives(compiled(step, w, x))) == 8 * TOKENS


def check_a_skewed_vocabulary_needs_no_more_candidates():
    """The sixteen largest logits all have the lowest ids: contiguous, one device would have them all."""
    head = np.asarray(weights()["head"]) * 0.01
    head[:, :16] += 1.0
    w, x = placed(mesh_of(8), {"head": jnp.asarray(head)}, count=1)
    x = jnp.abs(x)
    top = hx.sparsify(lambda w, x: lax.top_k(x @ w["head"], 16), config=narrow(16, fill="-inf"))
    assert np.sort(np.asarray(top(w, x)[1])[0]).tolist() == list(range(16))
    assert np.isfinite(np.asarray(top(w, x)[0])).all()
    fewer = hx.sparsify(best, config=narrow(3)).trace(w, x)
    assert fewer.plan.sites[0].computed == 8  # fewer candidates than devices: one of each


def check_candidates_go_back_to_their_places_where_all_others_are_minus_infinity():
    for types in (AUTO, EXPLICIT):
        for model, data in ((8, 1), (4, 2)):
            w, x = placed(mesh_of(model, data, types))
            dense = np.asarray(every_logit(weights(), tokens()))
            whole = hx.Config(rules=named(hx.Vocab(candidates=V, fill="-inf")))
            assert_same(hx.sparsify(every_logit, config=whole)(w, x), dense)
            for fun in (masked, drawn) if types is AUTO else (masked,):
                assert_same(hx.sparsify(fun, config=whole)(w, x), jax.jit(fun)(weights(), tokens()))
            step = hx.sparsify(every_logit, config=narrow(8, fill="-inf", max_tokens=4))
            assert "its candidates are sent back" in layout(step.trace(w, x).plan)
            logits = np.asarray(step(w, x))
            finite = np.isfinite(logits)
            assert finite.sum() >= 8
            np.testing.assert_allclose(logits[finite], dense[finite], rtol=1e-5, atol=1e-6)
    w, x = placed(mesh_of(4), count=1)
    sent = collectives(compiled(hx.sparsify(every_logit, config=narrow(8, fill="-inf")), w, x))
    assert sum(c.sent for c in sent) == 2 * 8, sent  # two candidates of each device


def check_what_minds_the_order_keeps_rows_where_they_are_and_says_so():
    @jax.custom_jvp
    def own_rule(logits):
        return jnp.tanh(logits)

    own_rule.defjvp(lambda primals, tangents: (own_rule(*primals), tangents[0]))
    cases = {
        "its logits are returned": every_logit,
        "select_n at": lambda w, x: jnp.argmax(jnp.where(jnp.arange(V) % 2 == 0, x @ w["head"], 0.0), -1),
        "joins its logits with what differs along the vocabulary": drawn,
        "sort at": lambda w, x: jnp.sort(x @ w["head"], axis=-1)[:, -K:],
        "a derivative rule of its own": lambda w, x: jnp.argmax(own_rule(x @ w["head"]), -1),
        "leave a scan": lambda w, x: lax.scan(lambda c, v: (c, v @ w["head"]), 0, x)[1].argmax(-1),
        "is read elsewhere as well": lambda w, x: (jnp.argmax(x @ w["head"], -1), w["head"][:, 3]),
        "gather at": lambda w, x: (x @ w["head"])[:, jnp.array([3, 5])],
        "not the last axis": lambda w, x: jnp.argmax(jnp.einsum("td,dv->vt", x, w["head"]), 0),
    }
    w, x = placed(mesh_of(4))
    for words, fun in cases.items():
        step = hx.sparsify(fun, config=full_width())
        told = layout(step.trace(w, x).plan)
        assert told.startswith("rows in contiguous blocks: "), told
        assert words in told, told
        assert_same(step(w, x), jax.jit(fun)(weights(), tokens()))
    assert (
        "rows in contiguous blocks: its logits are returned"
        in hx.sparsify(every_logit, config=full_width()).trace(w, x).explain()
    )


def check_packing_holds_no_whole_matrix_anywhere():
    from hire_xform.passes.pack.packers import packed_spec, shard_packer

    w = {"head": jnp.asarray(np.random.default_rng(0).normal(size=(64, 320)), jnp.float32)}
    w = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh_of(8), P(None, "model"))), w)
    traced = hx.sparsify(best, config=full_width()).trace(w, jnp.ones((1, 64)))
    leaf = w["head"]
    for key in dict.fromkeys(n.key for d in traced.plan.decisions for n in d.needs):
        packer = shard_packer(key.recipe.steps, key.form, mesh_of(8), packed_spec(leaf.sharding, leaf.shape, key))
        program = packer.lower(leaf).compile()
        assert [c.op for c in collectives(program)] == ["all-to-all"], key
        assert largest_array(program) <= leaf.nbytes // 8, key
    packed = traced.pack(w)
    for array in jax.tree.leaves(packed):
        assert max(s.data.size for s in array.addressable_shards) * 8 == array.size


def check_packed_weights_serve_programs_that_want_them_otherwise():
    """Packed for an arg max, read by a function that returns logits, and by a prefill; and the other way round."""

    def either(w, x, greedy):
        logits = x @ w["head"]
        return jnp.argmax(logits, axis=-1) if greedy else logits

    many = jnp.tile(tokens(), (20, 1))
    for types, fills in ((AUTO, ("predicted", "-inf")), (EXPLICIT, ("predicted",))):
        w, x = placed(mesh_of(4, types=types))
        for fill in fills:
            config = hx.Config(rules=named(hx.Vocab(candidates=V, fill=fill)))
            step = hx.sparsify(either, config=config, static_argnums=2)
            for packed_for in (True, False):
                packed = step.trace(w, x, packed_for).pack(w)
                assert packed.nbytes < 2 * w["head"].nbytes
                for greedy in (True, False):
                    assert_same(step(packed, x, greedy), jax.jit(either, static_argnums=2)(weights(), tokens(), greedy))
                    assert_same(step(packed, many, greedy), jax.jit(either, static_argnums=2)(weights(), many, greedy))
            packed = step.trace(w, x, True).pack(w)
            logits = step.trace(packed, x, False).lower().compile()
            assert largest_array(logits) < w["head"].nbytes  # what travels is no weight


def check_programs_that_share_packed_weights_hold_each_matrix_once():
    """The head of one is read whole, or looked up, by another: its rows then stay where they are."""
    mesh = mesh_of(4)
    w, x = placed(mesh)
    dense = hx.Config(vocab=None, ffn=None)
    greedy = hx.sparsify(best, config=narrow(V))
    assert "cyclically" in layout(greedy.trace(w, x).plan)
    others = {
        "whole": (hx.sparsify(every_logit, config=dense), x),
        "looked up": (hx.sparsify(lambda w, i: w["head"].T[i], config=dense), jnp.array([3, 1])),
        "its logits": (hx.sparsify(every_logit, config=narrow(V)), x),
    }
    for other, data in others.values():
        packed = hx.pack(w, [greedy.trace(w, x), other.trace(w, data)])
        held = [leaf for leaf in packed.leaves if leaf.size == V * D and leaf.dtype != jnp.int8]
        assert len(held) == 1
        assert_same(greedy(packed, x), best(weights(), tokens()))
        assert_same(other(packed, data), jax.jit(other.signature.fun)(weights(), data))
        assert "all-to-all" not in {c.op for c in collectives(compiled(other, packed, data))}
    alone = hx.pack(w, [greedy.trace(w, x), greedy.trace(w, x)])
    assert alone.layout == greedy.trace(w, x).pack(w).layout


def check_an_embedding_that_is_the_head_too_is_held_once():
    """It is looked up by id, in range or not, where its rows have been put."""

    def tied(w, token):
        table = w["table"].astype(jnp.float32)
        x = table[token] + jnp.take(w["table"], token + 1, axis=0, mode="clip") + w["table"][token[0]]
        x = x + jnp.take(w["table"], token * 20, axis=0, fill_value=0.25)
        return jnp.argmax(jnp.tanh(0.02 * (x @ table.T)), axis=-1), x

    token = jnp.array([0, 7, V - 1, -3])
    mesh = mesh_of(4)
    for dtype in (jnp.float32, jnp.bfloat16):
        plain = {"table": weights()["head"].T.astype(dtype)}
        w = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P("model", None))), plain)
        step = hx.sparsify(tied, config=full_width())
        traced = step.trace(w, token)
        assert "cyclically" in layout(traced.plan)
        packed = traced.pack(w)
        held = [leaf for leaf in packed.leaves if leaf.size == V * D and leaf.dtype != jnp.int8]
        assert [leaf.dtype for leaf in held] == [dtype]
        want = jax.jit(tied)(plain, token)
        for got in (step(packed, token), step(w, token), jax.jit(step)(packed, token)):
            assert_same(got, want)
        ops = {c.op for c in collectives(jax.jit(step).lower(packed, token).compile())}
        assert ops <= {"all-reduce", "all-gather"}  # what the rows would be put back by is an all-to-all
        assert_same(step(packed, jnp.tile(token, 20)), jax.jit(tied)(plain, jnp.tile(token, 20)))
        summed = hx.sparsify(lambda w, token: (tied(w, token)[0], w["table"].sum()), config=full_width())
        assert "is read elsewhere as well" in layout(summed.trace(w, token).plan)


def check_a_lookup_that_fills_with_what_narrow_rows_do_not_have_keeps_them_where_they_are():
    def tied(w, token):
        table = w["table"].astype(jnp.float32)
        x = jnp.take(table, token, axis=0, fill_value=0.1)
        return jnp.argmax(x @ table.T, axis=-1), x

    token, plain = jnp.array([0, 7, V + 3]), {"table": weights()["head"].T.astype(jnp.bfloat16)}
    w = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh_of(4), P("model", None))), plain)
    step = hx.sparsify(tied, config=full_width())
    traced = step.trace(w, token)
    assert "is read elsewhere as well" in layout(traced.plan)
    want = jax.jit(tied)(plain, token)
    assert want[1][2, 0] == jnp.float32(0.1)
    assert_same(step(traced.pack(w), token), want)


def check_under_scan_vmap_grad_and_jit():
    w, x = placed(mesh_of(4))

    def greedy(w, x):
        return lax.scan(lambda c, _: (c + 1.0, jnp.argmax(c @ w["head"], axis=-1)), x, None, length=3)[1]

    step = hx.sparsify(greedy, config=full_width())
    assert "cyclically" in layout(step.trace(w, x).plan)
    assert_same(step(w, x), jax.jit(greedy)(weights(), tokens()))
    one = hx.sparsify(lambda w, x: best(w, x[None])[0], config=full_width())
    packed = one.trace(w, x[0]).pack(w)
    assert_same(jax.jit(jax.vmap(one, (None, 0)))(packed, x), best(weights(), tokens()))

    def total(run, w, x):
        return jnp.sum(jnp.sin(run(w, x)[0])) + jnp.sum(run(w, x)[0] ** 2)

    step = hx.sparsify(best_few, config=full_width())
    packed = step.trace(w, x).pack(w)
    want = jax.grad(total, argnums=2)(best_few, weights(), tokens())
    assert_same(jax.jit(jax.grad(total, argnums=2), static_argnums=0)(step, packed, x), want, 1e-4)


def check_a_top_k_under_explicit_axes_is_merged_before_the_logits_move():
    mesh = mesh_of(4, types=EXPLICIT)
    w, x = placed(mesh)
    whole = NamedSharding(mesh, P())

    def moved(w, x):
        return lax.top_k(jax.sharding.reshard(jnp.tanh(x @ w["head"]), whole), K)

    def with_logits(w, x):
        logits = x @ w["head"]
        return lax.top_k(jax.sharding.reshard(logits, whole), K), logits

    plain = {False: lambda w, x: lax.top_k(jnp.tanh(x @ w["head"]), K)}
    plain[True] = lambda w, x: (lax.top_k(x @ w["head"], K), x @ w["head"])
    for returned, fun in enumerate((moved, with_logits)):
        step = hx.sparsify(fun, config=full_width())
        assert ("cyclically" in layout(step.trace(w, x).plan)) is not bool(returned)
        assert_same(step(w, x), plain[bool(returned)](weights(), tokens()))
        sent = collectives(compiled(step, w, x))
        assert sum(c.sent for c in sent) == 8 * K * TOKENS, sent


@pytest.mark.parametrize("name", devices.checks(__name__))
def test_on_devices(found, name):
    assert not found[name], found[name]
