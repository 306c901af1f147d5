"""``hx.Dense``: weight products outside of sites read compressed, the predictor's scores being the result."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, Everything, assert_same, assert_says, compressed, kinds

import hire_xform as hx
from hire_xform.call.trial import LeavingDense
from hire_xform.dump.dump import dump
from hire_xform.lowering.predict.predictors import pack_predictor

D, HEADS, K, M, V, LAYERS = 16, 2, 8, 40, 96, 2
INT8 = compressed(hx.Quantized(8))


def array(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 4, dtype)


def attention(params, x):
    """Self-attention of a layer, in the spellings of models: heads split off by the weight, and put together by it."""
    q, k, v = (jnp.einsum("td,dhk->thk", x, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k))
    return x + jnp.einsum("hts,shk,hkd->td", weights, v, params["o"]) + params["bias"]


def layer_params(*lead, dtype=jnp.float32):
    names = {name: array(*lead, D, HEADS, K, seed=i, dtype=dtype) for i, name in enumerate("qkv")}
    return {**names, "o": array(*lead, HEADS, K, D, seed=3, dtype=dtype), "bias": array(*lead, D, seed=4, dtype=dtype)}


def quantised(x):
    """Each row of a matrix as the integers and the scale that int8 has of it, by NumPy."""
    x = np.asarray(x, np.float32)
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    steps = x / scale
    assert np.abs(np.abs(steps - np.round(steps)) - 0.5).min() > 1e-5, "a tie, which may be rounded either way"
    return np.clip(np.round(steps), -127, 127), scale


def int8_product(x, rows):
    """What an int8 product of tokens with packed rows is, in double precision."""
    packed = pack_predictor(rows, hx.Quantized(8))
    weight = np.asarray(packed["q"], np.float64) * np.asarray(packed["scale"], np.float64)[:, None]
    integers, scale = quantised(x)
    return (integers.astype(np.float64) * scale) @ weight.T


def test_it_is_off_by_default():
    params, x = layer_params(), array(2, D, seed=9)
    for config in (hx.Config(rules=FORCE), hx.lossless(rules=FORCE), hx.approximate(rules=FORCE)):
        assert config.dense is None
        plan = hx.sparsify(attention, config=config).trace(params, x).plan
        assert not plan.sites
        assert len(plan.refusals) == 4
        assert not any("kind 'dense'" in refusal.reason for refusal in plan.refusals)


@pytest.mark.parametrize(
    ("wrong", "patterns"),
    [
        (lambda: hx.Dense(predictor=8), ["Dense\\(predictor=8\\)", "hx.Quantized"]),
        (lambda: hx.Dense(max_tokens=0), ["Dense\\(max_tokens=0\\)", "at least 1"]),
        (lambda: hx.Dense(predictor=hx.Projected(4)), ["Projected\\(", "needs no principal directions"]),
        (lambda: hx.Config(dense=hx.Ffn()), ["Config\\(dense=Ffn", "hx.Dense\\(...\\) or None"]),
        (lambda: hx.Rule("*", dense=True), ["Rule\\(dense=True\\)", "hx.Dense\\(...\\) or None"]),
    ],
)
def test_wrong_values_are_refused_where_they_are_given(wrong, patterns):
    assert_says(wrong, ValueError, patterns)


def test_it_has_nothing_to_prove():
    with pytest.raises(TypeError, match="certify"):
        hx.Dense(certify=True)
    assert [f.name for f in dataclasses.fields(hx.Dense)] == ["predictor", "max_tokens"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_every_product_of_attention_is_what_its_packed_arrays_say(dtype):
    params, x = layer_params(dtype=dtype), array(2, D, seed=21, dtype=dtype)
    step = hx.sparsify(lambda p, x: jnp.einsum("td,dhk->thk", x, p["q"]), config=INT8)
    want = int8_product(x, params["q"].reshape(D, HEADS * K).T).reshape(2, HEADS, K)
    got = step(params, x)
    assert (got.shape, got.dtype) == ((2, HEADS, K), dtype)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-6 if dtype == jnp.float32 else 4e-3)

    # The way out contracts two axes at once.
    out = hx.sparsify(lambda p, m: jnp.einsum("thk,hkd->td", m, p["o"]), config=INT8)
    mixed = array(3, HEADS, K, seed=20, dtype=dtype)
    want = int8_product(mixed.reshape(3, HEADS * K), params["o"].reshape(HEADS * K, D).T)
    np.testing.assert_allclose(
        np.asarray(out(params, mixed), np.float64), want, rtol=1e-6, atol=2e-3 if dtype != jnp.float32 else 1e-6
    )


def test_it_is_as_far_from_dense_as_int8_may_be():
    w, x = array(64, 48, seed=1), array(5, 64, seed=2)
    got = hx.sparsify(lambda w, x: x @ w, config=INT8)(w, x)
    packed = pack_predictor(w.T, hx.Quantized(8))
    kept = np.asarray(packed["q"], np.float64) * np.asarray(packed["scale"], np.float64)[:, None]
    integers, scale = quantised(x)
    lost = np.linalg.norm(np.asarray(w.T) - kept, axis=1), np.linalg.norm(np.asarray(x) - integers * scale, axis=1)
    # |w . x - q . y| <= |w - q| |x| + |q| |x - y|
    bound = lost[0] * np.linalg.norm(x, axis=1)[:, None] + np.linalg.norm(kept, axis=1) * lost[1][:, None]
    error = np.abs(np.asarray(got, np.float64) - np.asarray(x, np.float64) @ np.asarray(w, np.float64))
    assert (error <= bound + 1e-5).all()
    assert 0 < error.max() < 0.02 * np.abs(x @ w).max()


SPELLINGS = {
    "rows": (lambda w, x: w @ x.T, (12, D)),
    "columns": (lambda w, x: x @ w, (D, 12)),
    "transposed": (lambda w, x: x @ w.T, (12, D)),
    "batched tokens": (lambda w, x: jnp.einsum("btd,dn->btn", x.reshape(1, 2, D), w), (D, 12)),
    "out first": (lambda w, x: jnp.einsum("td,hdk->htk", x, w), (3, D, 4)),
    "fused and cut": (lambda w, x: jnp.split(x @ w, 3, axis=-1), (D, 12)),
    "part": (lambda w, x: x @ w[:, 2:9], (D, 12)),
    "one of a stack": (lambda w, x: x @ w[1], (3, D, 12)),
    "bias and cast": (lambda w, x: (x @ w + 1).astype(jnp.bfloat16), (D, 12)),
    "twice": (lambda w, x: (x @ w, (2 * x) @ w), (D, 12)),
    "both ways": (lambda w, x: jnp.tanh(x @ w) @ w.T, (D, 12)),
    "loop": (lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], (3, D, D)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_with_all_of_the_matrix_it_is_the_dense_product_in_any_spelling(name):
    fun, shape = SPELLINGS[name]
    w, x = array(*shape, seed=1), array(2, D, seed=2)
    step = hx.sparsify(fun, config=compressed())
    traced = step.trace(w, x)
    assert set(kinds(traced.plan)) == {"dense"}
    assert not traced.plan.refusals
    assert_same(step(traced.pack(w), x), fun(w, x), 1e-2 if "cast" in name else 2e-5)


def test_full_rank_is_the_dense_product_to_rounding():
    params, x = layer_params(LAYERS), array(2, D, seed=9)

    def layers(params, x):
        return jax.lax.scan(lambda x, own: (attention(own, x), None), x, params)[0]

    step = hx.sparsify(layers, config=compressed(hx.LowRank(1.0)))
    traced = step.trace(params, x)
    assert len(traced.plan.sites) == 4
    assert all(site.path.startswith("scan[0]/") for site in traced.plan.sites)
    assert_same(step(traced.pack(params), x), layers(params, x), 1e-4)


def decode(params, token):
    """A step with an embedding, attention, a ReLU block, a SiLU block and the embedding as a head."""
    x = attention(params, params["embed"][token])
    x = x + jax.nn.relu(x @ params["relu"]["up"]) @ params["relu"]["down"]
    x = x + jax.nn.silu(x @ params["silu"]["up"]) @ params["silu"]["down"]
    return x @ params["embed"].T


def decode_params():
    blocks = {
        name: {"up": array(D, M, seed=5 + i), "down": array(M, D, seed=7 + i)}
        for i, name in enumerate(["relu", "silu"])
    }
    return {**layer_params(), **blocks, "embed": array(V, D, seed=6)}


TOKEN = jnp.array([3])


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        # Blocks and heads come first. What they refuse, here the SiLU block, is read compressed.
        ({"vocab": hx.Vocab(), "ffn": hx.Ffn()}, ["dense"] * 4 + ["ffn"] + ["dense"] * 2 + ["vocab"]),
        ({"vocab": hx.Vocab(), "ffn": hx.Ffn(activations="any")}, ["dense"] * 4 + ["ffn"] * 2 + ["vocab"]),
        ({"vocab": None, "ffn": hx.Ffn()}, ["dense"] * 4 + ["ffn"] + ["dense"] * 3),
        ({"vocab": None, "ffn": None}, ["dense"] * 9),
    ],
)
def test_what_blocks_and_heads_leave_is_read_compressed(settings, wanted):
    step = hx.sparsify(decode, config=compressed(**settings))
    plan = step.trace(decode_params(), TOKEN).plan
    assert kinds(plan) == wanted
    assert not plan.refusals


def test_rules_say_where():
    params = decode_params()

    def planned(*rules, dense=None):
        config = hx.Config(vocab=None, ffn=None, dense=dense, rules=(*FORCE, *rules))
        return hx.sparsify(decode, config=config).trace(params, TOKEN).plan

    (query, *others) = [site.path for site in planned(dense=hx.Dense()).sites]
    (site,) = planned(hx.Rule(query, dense=hx.Dense(predictor=hx.Quantized(4)))).sites
    assert (site.path, site.settings.spec) == (query, hx.Quantized(4))
    assert [s.path for s in planned(hx.Rule(query, skip=True), dense=hx.Dense()).sites] == others
    # Later rules win: skipped, then asked for again.
    back = planned(hx.Rule("*", skip=True), hx.Rule(query, force=True, dense=hx.Dense()))
    assert [s.path for s in back.sites] == [query]


def test_a_rule_for_a_product_that_stays_dense_matches_it():
    config = hx.Config(dense=hx.Dense(), rules=(hx.Rule("dot_general[0]", skip=True), hx.Rule("nothing[1]")))
    with pytest.warns(hx.HireWarning, match=r"no other product: 'nothing\[1\]'.* Paths there are: dot_general\[0\]"):
        plan = hx.sparsify(decode, config=config).trace(decode_params(), TOKEN).plan
    assert plan.unmatched_rules == ("nothing[1]",)


def test_a_site_that_is_skipped_is_dense_with_all_its_products():
    config = hx.Config(vocab=None, dense=hx.Dense(), rules=FORCE)
    params = decode_params()
    plan = hx.sparsify(decode, config=config).trace(params, TOKEN).plan
    (block,) = (site for site in plan.sites if site.kind == "ffn")
    skipped = dataclasses.replace(config, rules=(*FORCE, hx.Rule(block.path, skip=True)))
    left = hx.sparsify(decode, config=skipped).trace(params, TOKEN).plan
    assert kinds(left) == ["dense"] * 7
    assert [r.weights for r in left.refusals] == [("params['relu']['up']",), ("params['relu']['down']",)]
    # So is one that failed its trial.
    reasons = LeavingDense(config, {("ffn", block.path): "it failed"})
    assert reasons.choose("ffn", block.path).final
    assert not config.choose("ffn", block.path).final


def test_what_is_too_small_to_gain_stays_dense_unless_forced():
    params, x = {"router": array(512, 8), "query": array(1024, 1024)}, array(1, 1024)

    def fun(params, x):
        return x[:, :512] @ params["router"], jnp.cumsum(x @ params["query"], axis=-1)

    plan = hx.sparsify(fun, config=hx.Config(dense=hx.Dense())).trace(params, x).plan
    (site,), (refusal,) = plan.sites, plan.refusals
    assert (site.weights, site.dense_bytes, site.sparse_bytes) == (("params['query']",), 4 << 20, (1 << 20) + 4096)
    assert (site.computed, site.units, site.inputs) == (0, 1024, 1024)
    assert refusal.weights == ("params['router']",)
    assert "nor is it a site of kind 'dense': it reads 16,384 bytes dense and 4,128 sparse" in refusal.reason
    forced = hx.Config(dense=hx.Dense(), rules=FORCE)
    assert len(hx.sparsify(fun, config=forced).trace(params, x).plan.sites) == 2


def mixed(x, w):
    """A product of two dtypes."""
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


REFUSED = {
    "experts": (lambda w, x: jnp.einsum("ed,edn->en", x, w), (2, D, 12), "one product for each"),
    "prefill": (lambda w, x: jnp.repeat(x, 5, axis=0) @ w, (D, 12), "10 tokens in one call, more than max_tokens=8"),
    "tokens of integers": (lambda w, x: mixed(jnp.round(x).astype(int), w), (D, 12), "it multiplies int32 and gives"),
    "integers": (lambda w, x: x @ w, (D, 12), "its weights are int32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_product_of_one_matrix_says_so(name):
    fun, shape, words = REFUSED[name]
    w, x = array(*shape), array(2, D)
    if name == "integers":
        w, fun = w.astype(jnp.int32), lambda w, x: mixed(x, w)
    step = hx.sparsify(fun, config=compressed(max_tokens=8))
    (refusal,) = step.trace(w, x).plan.refusals
    assert words in refusal.reason
    assert refusal.reason.count("one product for each") < 2
    assert_same(step(w, x), fun(w, x), 0.0)


def test_a_matrix_is_held_compressed_alone_where_nothing_else_reads_it():
    params = decode_params()
    step = hx.sparsify(decode, config=INT8)
    traced = step.trace(params, TOKEN)
    packed = traced.pack(params)
    floats = [a.shape for a in jax.tree.leaves(packed) if a.dtype == jnp.float32 and a.ndim > 1]
    # The embedding, which is looked up in as well.
    assert floats == [(V, D)]
    others = [a for path, a in jax.tree_util.tree_leaves_with_path(params) if a.ndim > 1]
    assert sum(a.size for a in jax.tree.leaves(packed) if a.dtype == jnp.int8) == sum(a.size for a in others)
    assert_same(step(packed, TOKEN), step(params, TOKEN), 0.0)


def test_a_prefill_reads_the_matrix_where_it_is_packed_for_that_as_well():
    w, x, prompt = array(D, D), array(1, D), array(20, D, seed=1)
    step = hx.sparsify(lambda w, x: jnp.cumsum(x @ w, axis=1), config=compressed(hx.Quantized(8), max_tokens=8))
    alone = step.trace(w, x).pack(w)
    with pytest.raises(hx.PackedMismatchError, match="which this call reads whole"):
        step(alone, prompt)
    both = hx.pack(w, [step.trace(w, x), step.trace(w, prompt)])
    assert_same(step(both, prompt), jnp.cumsum(prompt @ w, axis=1), 1e-6)
    assert_same(step(both, x), step(alone, x), 0.0)


def test_a_weight_used_twice_is_packed_once():
    w, x = array(D, 12), array(1, D)
    traced = hx.sparsify(SPELLINGS["twice"][0], config=INT8).trace(w, x)
    assert len(traced.plan.sites) == 2
    assert [a.shape for a in jax.tree.leaves(traced.pack(w))] == [(12, D), (12,)]


def test_its_derivative_is_that_of_what_is_predicted():
    w, x = array(D, 12, seed=1), array(2, D, seed=2)
    packed = pack_predictor(w.T, hx.Quantized(8))
    kept = (packed["q"] * packed["scale"][:, None]).T
    step = hx.sparsify(lambda w, x: jnp.cumsum(x @ w, axis=1), config=INT8)
    held = step.trace(w, x).pack(w)
    got = jax.grad(lambda x: jnp.sum(step(held, x) * array(2, 12, seed=3)))(x)
    want = jax.grad(lambda x: jnp.sum(jnp.cumsum(x @ kept, axis=1) * array(2, 12, seed=3)))(x)
    assert_same(got, want)


def test_under_vmap_and_jit():
    params, x = layer_params(), array(3, 2, D, seed=9)
    step = hx.sparsify(attention, config=INT8)
    packed = step.trace(params, x[0]).pack(params)
    got = jax.jit(jax.vmap(step, in_axes=(None, 0)))(packed, x)
    assert_same(got, jnp.stack([step(packed, one) for one in x]), 1e-5)


def test_reports():
    params = decode_params()
    step = hx.sparsify(decode, config=compressed(hx.Quantized(4), vocab=hx.Vocab(candidates=8)))
    traced = step.trace(params, TOKEN)
    text = traced.explain()
    assert "  dense  dot_general[0]" in text
    assert "1.0 kB -> 192 B (19%); 1 token: 16 outputs as predicted, none exact" in text
    assert "Quantized(bits=4)" in text
    assert "may change that" not in text
    proved = dataclasses.replace(step.config, vocab=hx.Vocab())
    text = hx.sparsify(decode, config=proved).trace(params, TOKEN).explain()
    assert "What is proved is so of what sites are given; 8 products read compressed may change that." in text
    assert "@@ dense 1  dot_general[0]  1.0 kB -> 192 B" in dump(traced, show="diff")
    assert "16 outputs as predicted, none exact" in dump(traced, format="html")
    assert json.loads(dump(traced, format="json"))["plan"]["sites"][0]["kind"] == "dense"
    sites = json.loads(traced.plan.to_json())["sites"]
    assert sites[0]["settings"] == {"predictor": "Quantized(bits=4)", "max_tokens": 64}
    assert (sites[0]["kind"], sites[0]["computed"]) == ("dense", 0)


def test_compare_tells_what_it_costs():
    """Logits are told of whether they are computed exactly or not: what they are computed from is not exact."""
    for vocab, head in ((None, "dense"), (hx.Vocab(candidates=8, certify=False), "vocab")):
        step = hx.sparsify(decode, config=compressed(hx.Quantized(8), vocab=vocab))
        found = hx.compare(step, decode_params(), TOKEN, repeats=1)
        assert [site.kind for site in found.sites] == ["dense"] * 8 + [head]
        (logits,) = found.agreement
        assert 0 < logits.relative < 0.1
        assert logits.argmax == 1
        assert 0 < logits.kl < 0.01


def test_calibrations_measure_the_model_as_it_is():
    params = decode_params()
    config = hx.Config(dense=hx.Dense(), rules=(hx.Rule("*", dense=hx.Dense()),))
    found = hx.calibrate(decode, [(params, jnp.arange(64))], config=config, predictors=[hx.Quantized(8)])
    plain = hx.calibrate(decode, [(params, jnp.arange(64))], predictors=[hx.Quantized(8)])
    assert sorted(site.kind for site in found.sites.values()) == ["ffn", "vocab"]
    for path, site in found.sites.items():
        np.testing.assert_array_equal(site.sizes, plain.sites[path].sizes)
    step = hx.sparsify(decode, config=compressed(vocab=hx.Vocab(), ffn=hx.Ffn()), calibration=found)
    plan = step.trace(params, TOKEN).plan
    assert kinds(plan).count("dense") == 6
    assert all(bool(site.calibrated) == (site.kind != "dense") for site in plan.sites)


def test_what_is_stored_in_8_bits_has_nothing_to_gain():
    w = array(1024, 1024, seed=1)
    scale = jnp.max(jnp.abs(w), axis=0) / 127
    params, x = {"q": jnp.round(w / scale).astype(jnp.int8), "scale": scale}, array(2, 1024, seed=2)

    def fun(params, x):
        return jnp.cumsum(x @ (params["q"].astype(jnp.float32) * params["scale"]), axis=1)

    plan = hx.sparsify(fun, config=hx.Config(dense=hx.Dense(predictor=hx.LowRank(1.0)))).trace(params, x).plan
    assert "would not be faster" in plan.refusals[0].reason
    step = hx.sparsify(fun, config=compressed())
    assert_same(step(step.trace(params, x).pack(params), x), fun(params, x), 1e-4)


def test_a_predictor_of_ones_own():
    params, x = layer_params(), array(2, D, seed=9)
    step = hx.sparsify(attention, config=compressed(Everything()))
    assert_same(step(params, x), attention(params, x))
