"""Certified sites whose weights are over devices: proved of all rows together, with a few bytes a token."""

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, named
from collectives import collectives
from devices import mesh_of
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hire_xform as hx

P = PartitionSpec
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
D, M, V, TOKENS = 16, 32, 64, 4
SPECS = {"up": P(None, "model"), "bias": P("model"), "down": P("model", None), "head": P(None, "model")}


@pytest.fixture(scope="module")
def found():
    return devices.outcomes(__name__)


def weights(bias=0.0):
    rng = np.random.default_rng(0)
    shapes = {"up": (D, M), "bias": (M,), "down": (M, D), "head": (D, V)}
    w = {name: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32) for name, shape in shapes.items()}
    return {**w, "bias": w["bias"] + bias}


def tokens(count=TOKENS):
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, D)), jnp.float32)


def placed(mesh, w=None, count=TOKENS):
    w = {k: jax.device_put(a, NamedSharding(mesh, SPECS[k])) for k, a in (w or weights()).items()}
    spec = P("data") if mesh.shape["data"] > 1 else P()
    return w, jax.device_put(tokens(count), NamedSharding(mesh, spec))


def lossless(candidates=16, active=0.5, certify=True, **vocab):
    return hx.Config(
        ffn=hx.Ffn(active=active, certify=True), rules=named(hx.Vocab(candidates=candidates, certify=certify, **vocab))
    )


def block(w, x):
    out = jax.typeof(x).sharding if jax.typeof(x).sharding.mesh.are_all_axes_explicit else None
    return jnp.matmul(jax.nn.relu(x @ w["up"] + w["bias"]), w["down"], out_sharding=out)


def logits(w, x):
    return x @ w["head"]


def best(w, x):
    return jnp.argmax(x @ w["head"], axis=-1)


def best_and_logits(w, x):
    logits = x @ w["head"]
    return jnp.argmax(logits, axis=-1), logits


def logits_and_block(w, x):
    return x @ w["head"] + block(w, x).sum()


def step(w, x):
    x = x + block(w, x)
    return jnp.argmax(x @ w["head"], axis=-1), x


def compiled(fun, *args):
    jitted, operands = fun.program(*args)
    return jitted.lower(*operands).compile()


def dense(fun, w=None, count=TOKENS):
    return jax.jit(fun)(w or weights(), tokens(count))


def check_the_dense_arg_max_and_block_on_every_mesh():
    """With few candidates and few units: what is not proved runs dense, and is counted."""
    want = dense(step, weights(bias=-0.5))
    for types, model, data, candidates in ((AUTO, 8, 1, 16), (AUTO, 4, 2, 8), (EXPLICIT, 2, 2, 32)):
        w, x = placed(mesh_of(model, data, types), weights(bias=-0.5))
        got, fallbacks = fallbacks_of(step, lossless(candidates, 0.75), w, x)
        np.testing.assert_array_equal(got[0], want[0])
        assert_same(got[1], want[1])
        assert len(fallbacks) == 2
        assert set(fallbacks) <= {0, 1}


def check_what_is_sent():
    """Of a head 16 bytes a device and token, its arg max included; of a block its one sum."""
    for types, counts in ((AUTO, (2, 4, 8)), (EXPLICIT, (8,))):
        for model in counts:
            w, x = placed(mesh_of(model, types=types))
            sent = collectives(compiled(hx.sparsify(best, config=lossless()), w, x))
            assert sum(c.sent for c in sent) <= 16 * TOKENS, sent
            sent = collectives(compiled(hx.sparsify(block, config=lossless()), w, x))
            assert [(c.op, c.sent) for c in sent] == [("all-reduce", TOKENS * D * 4)], sent
    w, x = placed(mesh_of(4))
    sent = collectives(compiled(hx.sparsify(logits, config=lossless()), w, x))
    assert sum(c.sent for c in sent) == 8 * TOKENS, sent


def check_a_head_in_stages():
    """Each device reads on where its own rows are open: the dense tokens, and no more is sent than of one stage."""
    spec = hx.Staged((hx.LowRank(4, bits=8), hx.Quantized(8)))
    config = lossless(predictor=spec)
    want = dense(best)
    for model, data in ((2, 1), (8, 1), (2, 2)):
        w, x = placed(mesh_of(model, data))
        got, (count,) = fallbacks_of(best, config, w, x)
        np.testing.assert_array_equal(got, want)
        assert count == 0, (model, data)
    w, x = placed(mesh_of(8))
    sent = collectives(compiled(hx.sparsify(best, config=config), w, x))
    assert sum(c.sent for c in sent) <= 16 * TOKENS, sent


def fallbacks_of(fun, config, w, x):
    certified = hx.sparsify(fun, config=config)
    got, fallbacks = certified.with_fallbacks(certified.trace(w, x).pack(w), x)
    return got, [int(count) for count in jax.tree.leaves(fallbacks)]


def check_ties_across_devices_are_broken_as_dense():
    """Equal rows on several devices, in f32, where bounds overlap, and in bf16, where all may round to one value."""
    for dtype in (jnp.float32, jnp.bfloat16):
        head = np.asarray(weights()["head"])
        best_row = int(np.argmax(np.asarray(tokens(1)) @ head))
        head = head.copy()
        for copy in (3, 17, 40, 63):
            head[:, copy] = head[:, best_row]
        w = {"head": jnp.asarray(head, dtype)}
        x = tokens(1).astype(dtype)
        want = jax.jit(lambda w, x: best(w, x))(w, x)
        assert int(want[0]) == min(3, best_row)
        for model in (2, 8):
            mesh = mesh_of(model)
            placed_w = {"head": jax.device_put(w["head"], NamedSharding(mesh, SPECS["head"]))}
            placed_x = jax.device_put(x, NamedSharding(mesh, P()))
            for fun in (best, best_and_logits):
                got, (count,) = fallbacks_of(fun, lossless(16), placed_w, placed_x)
                np.testing.assert_array_equal(jax.tree.leaves(got)[0], want)
                # Each may be the largest by a rounding: of a sum, which bf16 hides only if the compiler rounds to it.
                assert count == 1, (dtype, model, count)


def check_a_head_of_16_bits_is_proved_where_its_best_is_clear():
    head, x = np.array(weights()["head"]), tokens(1)
    best_row = int(np.argmax(np.asarray(x) @ head))
    head[:, best_row] *= 1.5
    w = {"head": jnp.asarray(head, jnp.bfloat16)}
    for model in (2, 8):
        mesh = mesh_of(model)
        placed_w = {"head": jax.device_put(w["head"], NamedSharding(mesh, SPECS["head"]))}
        placed_x = jax.device_put(x.astype(jnp.bfloat16), NamedSharding(mesh, P()))
        got, (count,) = fallbacks_of(best, lossless(16), placed_w, placed_x)
        assert int(got[0]) == best_row
        assert count == 0, model


def check_nans_and_infinities_run_dense():
    for value in (np.nan, np.inf, -np.inf):
        head = np.array(weights()["head"])
        head[2, 33] = value
        w, x = placed(mesh_of(8), {**weights(), "head": jnp.asarray(head)})
        got, (count,) = fallbacks_of(best, lossless(), w, x)
        np.testing.assert_array_equal(got, jax.jit(best)({"head": jnp.asarray(head)}, tokens()))
        assert count == 1
    up = np.array(weights()["up"])
    up[1, 30] = np.nan
    w, x = placed(mesh_of(4), {**weights(), "up": jnp.asarray(up)})
    got, (count,) = fallbacks_of(block, lossless(), w, x)
    assert_same(got, dense(block, {**weights(), "up": jnp.asarray(up)}))


def check_one_device_of_a_block_falls_back_alone():
    """The units of one device are all open: it runs dense, the others do not, and that is one fallback."""
    bias = np.full(M, -50.0, np.float32)
    w = {**weights(), "bias": jnp.asarray(bias)}
    got, (count,) = fallbacks_of(block, lossless(active=0.25), *placed(mesh_of(4), w))
    assert count == 0
    assert_same(got, dense(block, w))
    bias[:8] = 50.0
    w = {**weights(), "bias": jnp.asarray(bias)}
    got, (count,) = fallbacks_of(block, lossless(active=0.25), *placed(mesh_of(4), w))
    assert count == 1
    assert_same(got, dense(block, w))


def check_a_block_that_is_not_proved_is_short_where_a_device_is():
    """Units that fire are all of one device, which may compute a quarter of its own; or a few of each."""
    config = hx.Config(ffn=hx.Ffn(active=0.25, certify=False), rules=(hx.Rule("*", force=True),))
    for few, expected in ((slice(0, 8), 1), (slice(0, M, 4), 0)):
        bias = np.full(M, -50.0, np.float32)
        bias[few] = 50.0
        w = {**weights(), "bias": jnp.asarray(bias)}
        for types, data in ((AUTO, 1), (EXPLICIT, 1), (AUTO, 2)):
            got, (count,) = fallbacks_of(block, config, *placed(mesh_of(4, data, types), w))
            assert count == expected, (few, types, data, count)
            if not expected:
                assert_same(got, dense(block, w))


def check_top_sets_and_nuclei():
    k = 5
    w, x = placed(mesh_of(4))
    top = hx.TopSet(k)
    got, (few,) = fallbacks_of(logits, lossless(24, certify=top), w, x)
    want = dense(logits)
    rows = np.arange(TOKENS)[:, None]
    chosen, wanted = (np.asarray(lax.top_k(part, k)[1]) for part in (got, want))
    np.testing.assert_array_equal(np.sort(chosen), np.sort(wanted))
    np.testing.assert_allclose(np.asarray(got)[rows, wanted], np.asarray(want)[rows, wanted], rtol=1e-5, atol=1e-6)
    assert few == 0
    _, (count,) = fallbacks_of(logits, lossless(8, certify=hx.TopSet(8)), w, x)
    assert count == 1
    sent = collectives(compiled(hx.sparsify(logits, config=lossless(24, certify=top)), w, x))
    assert sum(c.sent for c in sent) == (4 * k + 4) * TOKENS, sent
    for eps, candidates in ((0.3, 48), (1e-6, 8)):
        got, (count,) = fallbacks_of(logits, lossless(candidates, certify=hx.Nucleus(eps), fill="-inf"), w, x)
        held = np.where(np.isfinite(got), jax.nn.softmax(want), 0.0).sum(axis=-1)
        assert (held >= 1.0 - eps).all()
        assert count == (0 if eps == 0.3 else 1)


def check_all_rows_selected_is_the_dense_result():
    for types in (AUTO, EXPLICIT):
        w, x = placed(mesh_of(4, types=types))
        for certify in (True, hx.Nucleus(0.01)) if types is AUTO else (hx.TopSet(3),):
            whole = lossless(V, 1.0, certify)
            assert_same(hx.sparsify(logits, config=whole)(w, x), dense(logits))
        assert_same(hx.sparsify(block, config=whole)(w, x), dense(block))


def check_what_moves_along_the_vocabulary_is_refused():
    """Each device knows its own logits only: what of them is read, and with what, must be there for its own part."""
    over = jnp.arange(V, dtype=jnp.float32)
    forms = {
        "cut": lambda w, x: jnp.argmax((x @ w["head"])[:, : V - 4], axis=-1),
        "bias_vocabulary_first": lambda w, x: jnp.argmax(w["head"].T @ x.T + over[:, None], axis=0),
        "signs": lambda w, x: (lambda u: jnp.argmax(jnp.where(jnp.signbit(u), -u, u), axis=-1))(x @ w["head"]),
    }
    w, x = placed(mesh_of(4))
    for name, fun in forms.items():
        certified = hx.sparsify(fun, config=lossless())
        (refusal,) = certified.trace(w, x).plan.refusals
        assert "proved on one device only" in refusal.reason, (name, refusal.reason)
        np.testing.assert_array_equal(certified(w, x), dense(fun))
    kept = lambda w, x: jnp.argmax(30.0 * jnp.tanh(x @ w["head"] / 30.0), axis=-1)  # noqa: E731
    certified = hx.sparsify(kept, config=lossless())
    assert [site.kind for site in certified.trace(w, x).plan.sites] == ["vocab"]
    np.testing.assert_array_equal(certified(w, x), dense(kept))


def check_under_jit_scan_vmap_and_grad():
    w, x = placed(mesh_of(4), weights(bias=-0.5))

    def greedy(w, x):
        return lax.scan(lambda c, _: (step(w, c)[1], step(w, c)[0]), x, None, length=2)[1]

    want = dense(greedy, weights(bias=-0.5))
    certified = hx.sparsify(greedy, config=lossless())
    np.testing.assert_array_equal(jax.jit(certified)(certified.trace(w, x).pack(w), x), want)
    one = hx.sparsify(lambda w, x: step(w, x[None])[1][0], config=lossless())
    packed = one.trace(w, x[0]).pack(w)
    want = dense(lambda w, x: step(w, x)[1], weights(bias=-0.5))
    assert_same(jax.jit(jax.vmap(one, (None, 0)))(packed, x), want)
    both = hx.sparsify(logits_and_block, config=lossless(V))
    packed = both.trace(w, x).pack(w)

    def total(run, w, x):
        return jnp.sum(jnp.sin(run(w, x)))

    want = jax.grad(total, argnums=2)(logits_and_block, weights(bias=-0.5), tokens())
    assert_same(jax.jit(jax.grad(total, argnums=2), static_argnums=0)(both, packed, x), want, 1e-4)


# --- draws ---


def drawn(w, x, key):
    """A bias, a cap, ids that are masked, a temperature for each token, and noise."""
    u = x @ w["head"] + jnp.linspace(-1.0, 1.0, V)
    u = jnp.where(jnp.arange(V) % 7 == 3, -jnp.inf, 5.0 * jnp.tanh(u / 5.0))
    return jax.random.categorical(key, u / jnp.linspace(0.5, 1.5, len(x))[:, None])


def at(temperature):
    return lambda w, x, key: jax.random.categorical(key, (x @ w["head"]).astype(jnp.float32) / temperature)


def draws_compared(fun, w, x, keys, model=8, data=1, types=AUTO, config=None):
    """How many of the draws with some keys ran dense; each is the dense one."""
    mesh = mesh_of(model, data, types)
    placed_w = {"head": jax.device_put(w["head"], NamedSharding(mesh, SPECS["head"]))}
    placed_x = jax.device_put(x, NamedSharding(mesh, P("data") if data > 1 else P()))
    step, dense_step = hx.sparsify(fun, config=config or lossless()), jax.jit(fun)
    (site,) = step.trace(placed_w, placed_x, keys[0]).plan.sites
    assert site.shards == model
    assert "arg max" in site.proved[0], site.proved
    packed, failed = step.trace(placed_w, placed_x, keys[0]).pack(placed_w), 0
    for key in keys:
        got, counts = step.with_fallbacks(packed, placed_x, key)
        np.testing.assert_array_equal(got, dense_step({"head": w["head"]}, x, key))
        (count,) = counts.values()
        failed += int(count)
    return failed


def keys_of(n):
    return jax.random.split(jax.random.key(0), n)


def check_draws_are_the_dense_ones_on_every_mesh():
    staged = lossless(predictor=hx.Staged((hx.LowRank(4, bits=8), hx.Quantized(8))))
    for model, data, types, config in (
        (8, 1, AUTO, None),
        (4, 2, AUTO, None),
        (2, 1, EXPLICIT, None),
        (4, 1, AUTO, staged),
    ):
        for fun in (drawn, at(0.7)):
            failed = draws_compared(fun, weights(), tokens(), keys_of(8), model, data, types, config)
            assert failed <= 1, (model, data, failed)


def check_what_draws_send():
    """16 bytes a device and token, the arg max of noisy logits included, as for the greedy token."""
    w, x = placed(mesh_of(8))
    sent = collectives(compiled(hx.sparsify(at(0.7), config=lossless()), w, x, jax.random.key(0)))
    assert sum(c.sent for c in sent) <= 16 * TOKENS, sent


def check_draws_from_hard_inputs():
    """Ties, huge and tiny norms, what is not finite, 16 bits, temperatures of nothing and of nearly everything."""
    head = np.asarray(weights()["head"]).copy()
    for copy in (3, 17, 40, 63):
        head[:, copy] = head[:, 5]
    head[:, 20:30] *= np.float32(1.0 + 1e-6)
    tied, plain, x = {"head": jnp.asarray(head)}, weights(), tokens()
    for scale in (1e-30, 1e-3, 1e3, 1e30):
        draws_compared(at(1.0), tied, x * scale, keys_of(2))
    for value in (0.0, np.nan, np.inf, -np.inf, 3e38):
        failed = draws_compared(at(1.0), tied, x.at[1, 3].set(value), keys_of(2))
        assert failed == 2 or np.isfinite(value)
    for temperature in (0.0, 1e-30, 1e-6, 1e6, 1e30, np.inf):
        draws_compared(at(temperature), plain, x, keys_of(2))
    for dtype in (jnp.bfloat16, jnp.float16):
        draws_compared(at(1.0), {"head": tied["head"].astype(dtype)}, x.astype(dtype), keys_of(3))
        proved = draws_compared(at(1.0), {"head": plain["head"].astype(dtype)}, x.astype(dtype), keys_of(4), 4)
        assert proved <= 2


def check_all_ids_masked_on_most_devices():
    def masked(w, x, key):
        return jax.random.categorical(key, jnp.where(jnp.arange(V) < 5, x @ w["head"], -jnp.inf))

    assert draws_compared(masked, weights(), tokens(), keys_of(4)) <= 1

    def all_masked(w, x, key):
        return jax.random.categorical(key, jnp.where(jnp.arange(V) < 0, x @ w["head"], -jnp.inf))

    assert draws_compared(all_masked, weights(), tokens(), keys_of(2)) == 2


@pytest.mark.parametrize("name", devices.checks(__name__))
def test_on_devices(found, name):
    assert not found[name], found[name]
