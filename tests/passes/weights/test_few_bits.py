"""Weights that are stored in few bits: integers times scales are weights, whose rows are read as they are stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width, kinds, named
from collectives import arrays_written
from jax import lax

import hire_xform as hx

D, M, V, LAYERS, G = 32, 64, 96, 2, 8


def repeated(scale, axis=-2):
    return jnp.repeat(scale, G, axis=axis)


def grouped(q, scale, dtype=jnp.float32):
    parts = q.reshape(q.shape[0] // G, G, q.shape[1]).astype(dtype)
    return (parts * scale[:, None]).reshape(q.shape)


# Of a matrix of inputs and outputs, q [n, m], with s: the shape of s, the dtype of q, and the weight.
SPELLINGS = {
    "per output": ((0, 1), "int8", lambda q, s, z: q.astype(jnp.float32) * s),
    "per output, times q": ((0, 1), "int8", lambda q, s, z: s[None] * q),
    "per input": ((1, 0), "int8", lambda q, s, z: q.astype(jnp.float32) * s[:, None]),
    "one for all": ((0, 0), "int8", lambda q, s, z: q.astype(jnp.float32) * s),
    "groups of inputs": ((G, 1), "int8", lambda q, s, z: grouped(q, s)),
    "groups of inputs, repeated": ((G, 1), "int8", lambda q, s, z: q * repeated(s)),
    "groups of outputs": ((1, G), "int8", lambda q, s, z: q * repeated(s, -1)),
    "four bits": ((0, 1), "int4", lambda q, s, z: q.astype(jnp.float32) * s),
    "four bits, groups": ((G, 1), "int4", lambda q, s, z: grouped(q, s)),
    "zero point": ((0, 1), "uint8", lambda q, s, z: (q.astype(jnp.float32) - z.astype(jnp.float32)) * s),
    "zero point in integers": (
        *((0, 1), "uint8"),
        lambda q, s, z: (q.astype(jnp.int32) - z.astype(jnp.int32)).astype(jnp.float32) * s,
    ),
    "a number off": ((0, 1), "uint4", lambda q, s, z: (q.astype(jnp.float32) - 8.0) * s),
    "divided": ((0, 1), "int8", lambda q, s, z: q / s),
    "over a number": ((0, 1), "int8", lambda q, s, z: q.astype(jnp.float32) / 127 * s),
    "plus an offset": ((0, 1), "uint8", lambda q, s, z: q * s + z.astype(jnp.float32)),
    "narrow floats": ((0, 1), "float8_e4m3fn", lambda q, s, z: q.astype(jnp.float32) * s),
    "in bfloat16": ((0, 1), "int8", lambda q, s, z: q.astype(jnp.bfloat16) * s.astype(jnp.bfloat16)),
    "rounded after": ((0, 1), "int8", lambda q, s, z: (q.astype(jnp.float32) * s).astype(jnp.bfloat16)),
    "in a jit": ((0, 1), "int8", lambda q, s, z: jax.jit(lambda q, s: q.astype(jnp.float32) * s)(q, s)),
    "transposed after": ((0, 1), "int8", lambda q, s, z: (q.T.astype(jnp.float32) * s[:, None]).T),
    "scales in bfloat16": ((0, 1), "int8", lambda q, s, z: q.astype(jnp.float32) * s.astype(jnp.bfloat16)),
}
SHAPES = {"up": (D, M), "gate": (D, M), "down": (M, D), "head": (D, V)}


def stored_weights(name, lead=(), seed=0):
    """For each matrix its integers, scales and zero points."""
    (rows, columns), dtype, _ = SPELLINGS[name]
    rng, weights = np.random.default_rng(seed), {}
    for which, (n, m) in SHAPES.items():
        stack = () if which == "head" else lead
        wide = (
            rng.normal(size=(*stack, n, m)) * 40
            if dtype.startswith("float")
            else rng.integers(jnp.iinfo(dtype).min, int(jnp.iinfo(dtype).max) + 1, size=(*stack, n, m))
        )
        shape = [size // by for size, by in ((n, rows), (m, columns)) if by]
        top = float(np.abs(wide).max())
        scale = rng.uniform(0.5, 1.5, size=(*stack, *shape)) * 0.4 / top
        zero = rng.integers(96, 160, size=(*stack, *shape)) if dtype == "uint8" else np.zeros((*stack, *shape))
        weights[which] = {
            "q": jnp.asarray(wide, jnp.float32 if dtype.startswith("float") else None).astype(dtype),
            "s": jnp.asarray(scale, jnp.float32),
            "z": jnp.asarray(zero if name != "plus an offset" else -zero * 1e-4).astype(
                jnp.float32 if name == "plus an offset" else jnp.uint8
            ),
        }
    return weights


def used(name, w):
    return SPELLINGS[name][2](w["q"], w["s"], w["z"])


def layer_of(name):
    def layer(x, w):
        up, gate, down = (used(name, w[which]) for which in ("up", "gate", "down"))
        x = x.astype(up.dtype)
        return x + (jax.nn.relu(x @ gate) * (x @ up)) @ down, None

    return layer


def net_of(name, how="one"):
    layer = layer_of(name)

    def net(params, x):
        stack = {which: params[which] for which in ("up", "gate", "down")}
        if how == "one":
            x, _ = layer(x, stack)
        elif how == "scanned":
            x, _ = lax.scan(lambda x, w: (layer(x, w)[0].astype(x.dtype), None), x, stack)
        else:
            for i in range(LAYERS):
                x, _ = layer(x, jax.tree.map(lambda leaf: leaf[i], stack))  # noqa: B023 - used before i moves on
        head = used(name, params["head"])
        return x.astype(head.dtype) @ head

    return net


def tokens(count=2):
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, D)), jnp.float32)


def limit_of(value):
    return 2e-5 if value.dtype == jnp.float32 else 6e-2


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_is_stored_in_few_bits_is_a_weight_and_gives_the_dense_result(name, evaluated):
    net, params, x = net_of(name), stored_weights(name), tokens()
    step = hx.sparsify(net, config=full_width())
    traced = step.trace(params, x)
    assert kinds(traced.plan) == ["ffn", "vocab"], [r.reason for r in traced.plan.refusals]
    bits = jnp.dtype(SPELLINGS[name][1]).name
    for site in traced.plan.sites:
        assert site.stored.startswith(bits), site.stored
    assert "stored as " + bits in traced.explain()
    if not evaluated:
        return
    want = jax.jit(net)(params, x)
    packed = traced.pack(params)
    for got in (step(params, x), step(packed, x)):
        assert_same(got, want, limit_of(want))


@pytest.mark.parametrize("how", ["scanned", "unrolled"])
@pytest.mark.parametrize(
    "name", ["per output", "per input", "groups of inputs", "zero point in integers", "one for all"]
)
def test_layers_of_a_stack_give_the_dense_result(name, how, evaluated):
    net, params, x = net_of(name, how), stored_weights(name, (LAYERS,)), tokens()
    step = hx.sparsify(net, config=full_width())
    traced = step.trace(params, x)
    assert kinds(traced.plan) == (["ffn", "vocab"] if how == "scanned" else ["ffn"] * LAYERS + ["vocab"])
    if not evaluated:
        return
    want = jax.jit(net)(params, x)
    for got in (step(params, x), step(traced.pack(params), x)):
        assert_same(got, want, 1e-4)


# --- as they are stored ---


def stored_bytes(params):
    """Bytes of integers, scales and zero points, four bits being half a byte; those that nothing uses are left out."""
    sizes = {"int4": 0.5, "uint4": 0.5}
    return sum(a.size * sizes.get(a.dtype.name, a.dtype.itemsize) for a in jax.tree.leaves(params))


@pytest.mark.parametrize("how", ["one", "scanned"])
@pytest.mark.parametrize("name", ["per output", "per input", "groups of inputs", "four bits, groups", "zero point"])
def test_bytes_are_those_that_are_stored_and_each_array_is_held_once(name, how):
    net, params = net_of(name, how), stored_weights(name, () if how == "one" else (LAYERS,))
    step = hx.sparsify(net, config=full_width(hx.LowRank(4)))
    traced = step.trace(params, tokens(1))
    sites = len(traced.plan.sites)
    assert sites == 2
    names = ("q", "s", "z") if name == "zero point" else ("q", "s")
    kept = {which: {k: w[k] for k in names} for which, w in params.items()}
    assert traced.plan.dense_bytes == stored_bytes(kept)
    packed = traced.pack(params)
    whole = [a for a in jax.tree.leaves(packed) if jnp.issubdtype(a.dtype, jnp.integer) and a.size >= D * M]
    whole = [a for a in whole if a.dtype.name == SPELLINGS[name][1]]
    assert sorted(a.size for a in whole) == sorted(w["q"].size for w in kept.values())
    others = [a for a in jax.tree.leaves(packed) if a.dtype == jnp.float32]
    assert sum(a.size for a in others if a.size == kept["head"]["s"].size) >= 1
    # Full width reads every row as it is stored, and the predictors of three matrices; blocks read norms, too.
    layers = 1 if how == "one" else LAYERS
    predicted = 4 * 4 * (2 * layers * (D + M) + D + V) + 4 * layers * M
    assert abs(traced.plan.sparse_bytes - traced.plan.dense_bytes - predicted) <= 4 * (layers * M + V)


def test_integers_that_a_lookup_reads_are_held_as_they_are():
    """Rows that lie as they are stored are not packed at all; a lookup scales the one it takes."""

    def net(params, token):
        x = params["q"][token].astype(jnp.float32) * params["s"][token][:, None]
        return x @ (params["q"].astype(jnp.float32) * params["s"][:, None]).T

    head = stored_weights("per output")["head"]
    params, token = {"q": head["q"].T, "s": head["s"]}, jnp.asarray([5, 7])
    step = hx.sparsify(net, config=full_width(hx.LowRank(4)))
    traced = step.trace(params, token)
    packed = traced.pack(params)
    held = [leaf for leaf in packed.leaves if leaf.size == V * D]
    assert len(held) == 1
    assert held[0].unsafe_buffer_pointer() == params["q"].unsafe_buffer_pointer()
    for given in (params, packed):
        assert_same(step(given, token), jax.jit(net)(params, token))


def test_a_second_dense_use_of_packed_rows_scales_them():
    """A product that stays dense reads the packed integers and scales: nothing is held twice."""

    def net(params, x, many):
        w = {which: used("per output", params[which]) for which in ("up", "down", "head")}
        logits = (x + jax.nn.relu(x @ w["up"]) @ w["down"]) @ w["head"]
        return logits, many @ w["head"], many @ w["up"]

    params, x, many = stored_weights("per output"), tokens(1), tokens(9)
    step = hx.sparsify(net, config=full_width(max_tokens=4))
    traced = step.trace(params, x, many)
    assert kinds(traced.plan) == ["ffn", "vocab"]
    packed = traced.pack(params)
    whole = [a for a in jax.tree.leaves(packed) if a.dtype == jnp.int8 and a.size in (D * M, D * V)]
    predictors = 2
    assert len(whole) == 3 + predictors
    for given in (params, packed):
        assert_same(step(given, x, many), jax.jit(net)(params, x, many))


@pytest.mark.parametrize("how", ["one", "scanned"])
@pytest.mark.parametrize("name", ["per output", "groups of inputs", "zero point in integers"])
def test_the_compiled_step_makes_no_whole_weight(name, how):
    """Nothing of the size of a weight is written in the dtype it is used in."""
    net, params, x = net_of(name, how), stored_weights(name, () if how == "one" else (LAYERS,)), tokens(1)
    config = hx.Config(ffn=hx.Ffn(active=8 / M), rules=named(hx.Vocab(candidates=8)))
    step = hx.sparsify(net, config=config)
    packed = step.trace(params, x).pack(params)
    assert max(arrays_written(step.trace(packed, x).lower().compile())) <= D * V
    # XLA of jaxlib 0.9 makes them as it reads them for one token, not for several.
    assert max(arrays_written(jax.jit(net).lower(params, tokens(4)).compile())) >= 4 * D * M


# --- around them ---


def test_scales_that_change_are_packed_again():
    net, params, x = net_of("per output"), stored_weights("per output"), tokens()
    step = hx.sparsify(net, config=full_width())
    step(params, x)
    other = {which: {**w, "s": w["s"] * 2} for which, w in params.items()}
    assert_same(step(other, x), jax.jit(net)(other, x))


def test_closed_over_integers_and_scales_are_weights():
    params, x = stored_weights("groups of inputs"), tokens()
    net = net_of("groups of inputs")
    step = hx.sparsify(lambda x: net(params, x), config=full_width(), weights_argnums=())
    assert kinds(step.trace(x).plan) == ["ffn", "vocab"]
    assert_same(step(x), jax.jit(net)(params, x))


def test_integers_and_scales_in_several_arguments_are_refused():
    def net(q, s, x):
        return x @ (q.astype(jnp.float32) * s)

    head, x = stored_weights("per output")["head"], tokens()
    step = hx.sparsify(net, config=full_width(), weights_argnums=(0, 1))
    (refusal,) = step.trace(head["q"], head["s"], x).plan.refusals
    assert "its scales are in another argument than it is" in refusal.reason
    assert set(refusal.weights) == {"q", "s"}


@pytest.mark.parametrize("other", [lambda i: i + 1, lambda i: 1 - i])
def test_scales_of_another_layer_are_refused(other):
    def net(params, i, x):
        take = lambda a, i: lax.dynamic_index_in_dim(a, i, 0, keepdims=False)  # noqa: E731
        return x @ (take(params["q"], i).astype(jnp.float32) * take(params["s"], other(i)))

    up, x = stored_weights("per output", (LAYERS,))["up"], tokens()
    step = hx.sparsify(net, config=full_width())
    (refusal,) = step.trace(up, 0, x).plan.refusals
    assert "not taken from a stack as it is, by the same index" in refusal.reason
    assert_same(step(up, 0, x), jax.jit(net)(up, 0, x))


def test_scales_of_more_layers_than_there_are_integers_are_refused():
    """An index beyond the integers' last layer is that layer's for them, and another's for the scales."""

    def net(params, i, x):
        return x @ (params["q"][i].astype(jnp.float32) * params["s"][i])

    up, x = stored_weights("per output", (LAYERS,))["up"], tokens()
    up["s"] = jnp.concatenate([up["s"], up["s"]])
    (refusal,) = hx.sparsify(net, config=full_width()).trace(up, 0, x).plan.refusals
    assert "not taken from a stack as it is, by the same index" in refusal.reason


def test_an_index_made_twice_alike_is_one():
    def net(params, i, x):
        return x @ (params["q"][i + 1].astype(jnp.float32) * params["s"][i + 1])

    up, x = stored_weights("per output", (LAYERS,))["up"], tokens()
    step = hx.sparsify(net, config=full_width())
    assert kinds(step.trace(up, 0, x).plan) == ["vocab"]
    for i in (0, 7, -2):
        assert_same(step(up, i, x), jax.jit(net)(up, i, x))


@pytest.mark.any_jax("cases vary the scales of one program", every=2)
@pytest.mark.parametrize("name", ["per output", "groups of inputs"])
def test_derivatives_and_batches_are_those_of_the_dense_function(name):
    net, params, x = net_of(name, "scanned"), stored_weights(name, (LAYERS,)), tokens(3)
    step = hx.sparsify(net, config=full_width())
    packed = step.trace(params, x).pack(params)
    loss = lambda of, p: lambda x: jnp.square(of(p, x)).mean()  # noqa: E731
    want = jax.grad(loss(jax.jit(net), params))(x)
    assert_same(jax.grad(loss(step, packed))(x), want, 1e-4)
    each = [jax.vmap(lambda x, f=f, p=p: f(p, x[None]))(x) for f, p in ((step, packed), (jax.jit(net), params))]
    assert_same(*each, 1e-4)


# --- scaled after the product ---


AFTER = {
    "converted": lambda w, x: (x @ w["q"].astype(jnp.float32)) * w["s"],
    "multiplied as it is": lambda w, x: (x @ w["q"]) * w["s"],
    "in bfloat16": lambda w, x: (x.astype(jnp.bfloat16) @ w["q"].astype(jnp.bfloat16)).astype(jnp.float32) * w["s"],
}


@pytest.mark.any_jax("cases vary the scales of one product", every=2)
@pytest.mark.parametrize("certify", [False, True], ids=["approximate", "certified"])
@pytest.mark.parametrize("name", AFTER)
def test_scales_after_the_product_are_the_programs_own(name, certify):
    """Candidates are chosen by scaled logits, and proved of them; units by their scaled activation."""

    def net(params, x):
        product = AFTER[name]
        x = x + product(params["down"], jax.nn.relu(product(params["up"], x)))
        return jnp.argmax(product(params["head"], x), -1), x

    params, x = stored_weights("per output"), tokens(3)
    params["head"]["s"] = params["head"]["s"] * jnp.exp2(jnp.arange(V) % 7)
    config = full_width()
    if certify:
        config = hx.Config(ffn=hx.Ffn(certify=True), rules=named(hx.Vocab(candidates=24, certify=True)))
    step = hx.sparsify(net, config=config)
    traced = step.trace(params, x)
    assert kinds(traced.plan) == ["ffn", "vocab"], traced.explain()
    assert all(site.stored == "int8" for site in traced.plan.sites)
    want = jax.jit(net)(params, x)
    for given in (params, traced.pack(params)):
        assert_same(step(given, x), want, 2e-5 if name != "in bfloat16" else 6e-2)


# --- certified ---


@pytest.mark.any_jax("cases vary the scales of one proof", every=3)
@pytest.mark.parametrize("how", ["one", "scanned"])
@pytest.mark.parametrize("name", ["per output", "per input", "groups of inputs", "zero point", "four bits, groups"])
def test_what_is_proved_holds_of_scaled_rows(name, how):
    """The arg max is the dense one, and every unit left out is zero."""
    net = net_of(name, how)

    def step_of(params, x):
        logits = net(params, x)
        return jnp.argmax(logits, -1), jnp.max(logits, -1)

    params = stored_weights(name, () if how == "one" else (LAYERS,))
    config = hx.Config(ffn=hx.Ffn(certify=True), rules=named(hx.Vocab(candidates=24, certify=True)))
    step = hx.sparsify(step_of, config=config)
    traced = step.trace(params, tokens(2))
    assert kinds(traced.plan) == ["ffn", "vocab"], [r.reason for r in traced.plan.refusals]
    packed = traced.pack(params)
    for seed in range(5):
        x = jnp.asarray(np.random.default_rng(seed).normal(size=(2, D)), jnp.float32)
        assert_same(step(packed, x), jax.jit(step_of)(params, x), 1e-4)


UNSURE = {
    "in bfloat16": "of scales in bfloat16",
    "divided": "by a division",
    "over a number": "by a division",
    "plus an offset": "by an addition to a product",
    "rounded after": "of scales in bfloat16",
}


@pytest.mark.parametrize("name", UNSURE)
def test_what_is_not_known_to_the_last_bit_is_not_certified(name):
    params, x = stored_weights(name), tokens()
    step = hx.sparsify(net_of(name), config=hx.lossless(rules=named(hx.Vocab(certify=True))))
    plan = step.trace(params, x).plan
    assert not plan.sites
    told = [
        r.reason
        for r in plan.refusals
        if f"certify=True is not proved of weights that are made {UNSURE[name]}" in r.reason
    ]
    assert len(told) == 4
    assert all("hx.approximate()" in reason for reason in told)


# --- what it costs ---


@pytest.mark.parametrize(("platform", "predictor", "sites"), [
    ("gpu", hx.Quantized(8), 0), ("tpu", hx.Quantized(8), 0), ("gpu", hx.LowRank(0.125, bits=8), 1)
])  # fmt: skip
def test_a_copy_of_what_is_stored_predicts_for_nothing(platform, predictor, sites):
    """Rows of eight bits beside rows of eight bits are as much to read as the dense product; fewer are less."""

    def head(params, x):
        return jnp.argmax(x @ (params["q"].astype(jnp.float32) * params["s"]), -1)

    params = {"q": jax.ShapeDtypeStruct((1024, 131072), jnp.int8), "s": jax.ShapeDtypeStruct((131072,), jnp.float32)}
    step = hx.sparsify(head, backend=platform, config=hx.Config(vocab=hx.Vocab(predictor=predictor, candidates=256)))
    traced = step.trace(params, jax.ShapeDtypeStruct((1, 1024), jnp.float32))
    assert len(traced.plan.sites) == sites
    assert ("which would not be faster" in traced.explain()) != bool(sites)
    assert [r.dense_bytes for r in (*traced.plan.sites, *traced.plan.refusals)] == [131072 * (1024 + 4)]


# --- measured, and laid out otherwise ---


@pytest.mark.any_jax("cases vary the scales of one program", every=3)
@pytest.mark.parametrize(
    ("name", "reordered"), [("per output", True), ("per input", True), ("groups of inputs", False)]
)
def test_a_calibration_measures_scaled_rows_and_reorders_them_with_their_scales(name, reordered):
    """Units that fire together are made neighbours, but for rows that share a scale, which stay."""
    net, params = net_of(name, "scanned"), stored_weights(name, (LAYERS,))
    batches = [(params, tokens(4) * (1 + seed)) for seed in range(2)]
    config = hx.Config(ffn=hx.Ffn(group_size=4, active=1.0), rules=named(hx.Vocab(candidates=V)))
    found = hx.calibrate(net, batches, predictors=[hx.Quantized(8)], config=config)
    step = hx.sparsify(net, config=config, calibration=found)
    x = tokens()
    traced = step.trace(params, x)
    assert kinds(traced.plan) == ["ffn", "vocab"], traced.explain()
    assert ("fire together" in traced.explain()) == reordered
    packed = traced.pack(params)
    assert {a.dtype.name for a in packed.leaves if a.size == LAYERS * M * D} == {"int8"}
    assert_same(step(packed, x), jax.jit(net)(params, x), 1e-4)


def test_other_weight_products_are_read_compressed_where_asked_for():
    def net(params, x):
        return jnp.tanh(x @ used("per output", params["up"])) @ used("per output", params["down"]), 1.0

    params, x = stored_weights("per output"), tokens()
    config = hx.Config(
        ffn=None, vocab=None, dense=hx.Dense(predictor=hx.Quantized(8)), rules=(hx.Rule("*", force=True),)
    )
    step = hx.sparsify(net, config=config)
    traced = step.trace(params, x)
    assert kinds(traced.plan) == ["dense", "dense"], traced.explain()
    assert_same(step(traced.pack(params), x), jax.jit(net)(params, x), 2e-2)
