"""Traces, and what they report."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import FORCE, assert_same, kinds, named, narrow, primitives_of
from tied import FULL, D, M, V, inputs, make_weights, net

import hire_xform as hx
from hire_xform.lowering.primitives.da_top_k import da_top_k_p


def test_tracing_shapes_computes_nothing(packs):
    struct = jax.ShapeDtypeStruct
    shapes = {
        "w1": struct((4096, 1 << 20), jnp.float32),
        "b1": struct((1 << 20,), jnp.float32),
        "w2": struct((1 << 20, 4096), jnp.float32),
        "embed": struct((1 << 20, 4096), jnp.float32),
    }
    config = hx.approximate(rules=(hx.Rule("*", vocab=hx.Vocab(certify=False)),))
    traced = hx.sparsify(net, config=config).trace(shapes, struct((1, 4096), jnp.float32))
    assert kinds(traced.plan) == ["ffn", "vocab"]
    assert da_top_k_p in primitives_of(traced.sparse_jaxpr)
    assert "module" in traced.lower().as_text()
    assert not packs


def test_a_trace_is_made_once():
    count = []

    def counted(params, x):
        count.append(1)
        return net(params, x)

    step, params = hx.sparsify(counted, config=FULL), make_weights()
    assert step.trace(params, inputs()) is step.trace(params, inputs(seed=4))
    for seed in range(3):
        step(params, inputs(seed=seed))
    assert len(count) == 1


def test_lower_gives_what_jax_gives():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    traced = step.trace(params, inputs())
    compiled = traced.lower().compile()
    assert_same(compiled(traced.pack(params), inputs()), net(params, inputs()))
    assert "stablehlo" in step.lower(params, inputs()).as_text()
    assert "stablehlo" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_without_sites_it_is_the_function_jax_runs():
    step, params = hx.sparsify(net), make_weights()
    traced = step.trace(params, inputs())
    assert not traced.plan.sites
    assert str(traced.sparse_jaxpr).count("dot_general") == str(traced.jaxpr).count("dot_general") == 3
    got, want = step(params, inputs()), jax.jit(net)(params, inputs())
    np.testing.assert_array_equal(got, want)
    assert_same(jax.jit(step)(params, inputs()), want)  # nothing is packed, so tracers may come
    assert_same(jax.grad(lambda p: step(p, inputs()).sum())(params), jax.grad(lambda p: net(p, inputs()).sum())(params))


def test_a_function_without_weights_or_products_passes():
    step = hx.sparsify(lambda x: jnp.sin(x) + 1)
    assert_same(step(inputs()), jnp.sin(inputs()) + 1)
    assert hx.sparsify(lambda: jnp.ones(3))().shape == (3,)


def test_explain_says_where_weights_were_looked_for():
    step = hx.sparsify(lambda graph, params, x: net(params, x))
    assert "in weights_argnums=(0,) and those that are closed over: none here" in (
        step.trace((), make_weights(), inputs()).explain()
    )


def test_explain_names_paths_weights_sources_and_reasons():
    def step(params, x):
        x = jax.nn.silu(x @ params["w1"]) @ params["w2"]
        return x @ params["embed"].T

    config = hx.approximate(rules=named(hx.Vocab(certify=False)))
    traced = hx.sparsify(step, config=config).trace(make_weights(), inputs())
    text = traced.explain()
    for part in (
        "dot_general[2]",
        "params['embed']",
        "test_stages.py",
        "vocab",
        "dot_general[0]",
        "exact zeros",
        "forced",
    ):
        assert part in text, text
    for refusal in traced.plan.refusals:
        assert refusal.reason in text


def test_every_weight_product_is_a_site_or_a_refusal():
    def many(params, x):
        a = jax.nn.relu(x @ params["w1"]) @ params["w2"]
        b = jax.nn.softmax(a @ params["w1"]) @ params["w2"]
        return b @ params["embed"].T, jnp.cumsum(b @ params["w1"], -1)

    traced = hx.sparsify(many, config=FULL).trace(make_weights(), inputs())
    products = sum(len(site.weights) for site in traced.plan.sites) + len(traced.plan.refusals)
    assert products == str(traced.jaxpr).count("dot_general[") == 6
    assert all(r.source != "unknown" for r in traced.plan.refusals)


def test_the_plan_is_json():
    traced = hx.sparsify(net, config=narrow()).trace(make_weights(), inputs())
    found = json.loads(traced.plan.to_json())
    assert [s["kind"] for s in found["sites"]] == ["ffn", "vocab"]
    assert found["platform"] == jax.default_backend()
    assert found["sites"][0]["path"] == traced.plan.sites[0].path
    assert found["sites"][0]["settings"]["active"] == 0.1
    assert found["sites"][0]["sparse_bytes"] < found["sites"][0]["dense_bytes"] * 2


def test_sites_are_in_program_order_and_scans_count_iterations():
    def stacked(params, x):
        def body(x, w):
            return x + jax.nn.relu(x @ w["w1"]) @ w["w2"], None

        x, _ = jax.lax.scan(body, x, params["stack"])
        return x @ params["embed"].T

    params = make_weights()
    params["stack"] = {name: jnp.stack([params[name]] * 3) for name in ("w1", "w2")}
    plan = hx.sparsify(stacked, config=FULL).trace(params, inputs()).plan
    assert kinds(plan) == ["ffn", "vocab"]
    assert plan.sites[0].path.startswith("scan[0]/")
    assert plan.sites[0].dense_bytes == 3 * 2 * D * M * 4


def test_later_rules_win():
    rules = (hx.Rule("*", force=True), hx.Rule("*", skip=True), hx.Rule("dot_general[2]", force=True, vocab=hx.Vocab()))
    plan = hx.sparsify(net, config=hx.Config(rules=rules)).trace(make_weights(), inputs()).plan
    assert kinds(plan) == ["vocab"]
    assert any("skip=True" in r.reason for r in plan.refusals)


def test_settings_of_a_rule_apply_where_it_matches():
    rules = (*named(hx.Vocab()), hx.Rule("dot_general[1]", ffn=hx.Ffn(active=0.5)))
    plan = hx.sparsify(net, config=hx.Config(rules=rules)).trace(make_weights(), inputs()).plan
    assert plan.sites[0].computed == M // 2
    assert plan.sites[1].computed == V  # candidates=256 are more than there are


def test_rules_that_match_nothing_are_told_once_and_listed():
    rules = (*FORCE, hx.Rule("scan[7]/*", skip=True), hx.Rule("dot_general[1]"), hx.Rule("jit:mlp*"))
    step = hx.sparsify(models.relu_ffn, config=hx.Config(rules=rules))
    w, x = models.list_params()["layers"][0], jnp.ones((1, models.D))
    where = r"'scan\[7\]/\*', 'jit:mlp\*'\. .*Paths there are: dot_general\[1\]"

    def run():
        step(w, x)
        step.trace(w, jnp.ones((2, models.D)))
        return step.trace(w, x)

    with pytest.warns(hx.HireWarning, match=where) as told:
        traced = run()
    assert len(told) == 1
    assert traced.plan.unmatched_rules == ("scan[7]/*", "jit:mlp*")
    assert "Rules that match nothing here: 'scan[7]/*', 'jit:mlp*'" in traced.explain()
    assert '"unmatched_rules"' in traced.plan.to_json()


@pytest.mark.parametrize("glob", ["*w2*", "params['w1']", "*embed*"])
def test_rules_match_names_of_weights(glob):
    whole = hx.sparsify(net, config=FULL).trace(make_weights(), inputs()).plan
    rules = *FULL.rules, hx.Rule(glob, skip=True), hx.Rule("*w3*")
    step = hx.sparsify(net, config=dataclasses.replace(FULL, rules=rules))
    with pytest.warns(hx.HireWarning, match=r"'\*w3\*'"):
        plan = step.trace(make_weights(), inputs()).plan
    kept = [site for site in whole.sites if not any(hx.Rule(glob).matches(name) for name in site.weights)]
    assert [site.path for site in plan.sites] == [site.path for site in kept]
    assert len(kept) == 1
    assert any(repr(glob) in refusal.reason for refusal in plan.refusals)
    assert plan.unmatched_rules == ("*w3*",)


def test_a_rule_for_everything_need_not_match(recwarn):
    step = hx.sparsify(lambda w, x: x, config=hx.Config(rules=FORCE))
    step(jnp.ones(2), jnp.ones(2))
    assert not recwarn


def test_debug_callbacks_run_once_a_call():
    seen = []

    def loud(params, x):
        jax.debug.callback(lambda v: seen.append(float(v)), x.sum())
        return net(params, x)

    step, params = hx.sparsify(loud, config=FULL), make_weights()
    step(params, inputs())
    step(params, inputs())
    jax.effects_barrier()
    assert len(seen) == 2


def test_x64_inputs_keep_their_dtypes():
    with jax.enable_x64(True):
        params = {name: jnp.asarray(np.asarray(value), jnp.float64) for name, value in make_weights().items()}
        x = jnp.asarray(np.asarray(inputs()), jnp.float64)
        step = hx.sparsify(net, config=FULL)
        got = step(params, x)
        assert got.dtype == jnp.float64
        assert_same(got, net(params, x), 1e-12)


def test_matmul_precision_is_part_of_the_trace():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    step(params, inputs())
    with jax.default_matmul_precision("highest"):
        assert_same(step(params, inputs()), net(params, inputs()))


def test_functools_wraps_around_it():
    step, params = hx.sparsify(net, config=FULL), make_weights()

    @functools.wraps(step)
    def wrapped(*args):
        return step(*args)

    assert_same(wrapped(params, inputs()), net(params, inputs()))


@pytest.mark.parametrize(
    ("stored", "used", "itemsize"),
    [
        ("bfloat16", "float32", 2),
        ("float32", "bfloat16", 2),
        ("float8_e4m3fn", "bfloat16", 1),
        ("float32", "float32", 4),
    ],
)
@pytest.mark.parametrize("scanned", [False, True], ids=["one", "scanned"])
def test_dense_bytes_are_those_of_the_weights_as_they_are_stored(stored, used, itemsize, scanned):
    """A product that widens what is stored reads what is stored; no bytes are made up to look better against."""
    layers = 3

    def block(w, x):
        up, down = (w[name].astype(used) for name in ("w1", "w2"))
        return x + jax.nn.relu(x @ up) @ down

    def deep(params, x):
        if not scanned:
            return block(params, x)
        return jax.lax.scan(lambda x, w: (block(w, x), None), x, params)[0]

    lead = (layers,) if scanned else ()
    params = {"w1": jax.ShapeDtypeStruct((*lead, D, M), stored), "w2": jax.ShapeDtypeStruct((*lead, M, D), stored)}
    plan = hx.sparsify(deep, config=hx.Config(rules=FORCE)).trace(params, jax.ShapeDtypeStruct((1, D), used)).plan
    assert kinds(plan) == ["ffn"]
    assert plan.dense_bytes == 2 * D * M * itemsize * (layers if scanned else 1)


def test_explain_says_what_a_certified_site_proves_and_what_its_bytes_are():
    params, x = make_weights(), inputs()

    def told(vocab, ffn):
        return hx.sparsify(net, config=hx.Config(ffn=ffn, rules=named(vocab))).trace(params, x).explain()

    unproved = "; a call that is not proved runs dense; the bytes are those of calls that are proved"
    both = told(hx.Vocab(certify=True), hx.Ffn(certify=True))
    assert f"proved for every call: the arg max of what is returned is that of the dense logits{unproved}" in both
    assert f"proved for every call: every unit left out is zero{unproved}" in both
    assert "Quantized(bits=8), fill='predicted', certify=True" in both
    top, mass = (told(hx.Vocab(certify=goal), hx.Ffn()) for goal in (hx.TopSet(5), hx.Nucleus(0.01)))
    assert f"the 5 largest logits are the dense ones{unproved}" in top
    assert f"the candidates hold all but 0.01 of the dense softmax{unproved}" in mass
    assert told(hx.Vocab(), hx.Ffn()) == both
    assert "proved" not in told(hx.Vocab(certify=False), hx.Ffn(certify=False))
    config = hx.lossless(rules=named(hx.Vocab(certify=True)))
    calibration = hx.calibrate(net, [(params, inputs(30))], config=config)
    chosen = hx.sparsify(net, config=config, calibration=calibration).trace(params, x).explain()
    assert (
        "the arg max of what is returned is that of the dense logits; a call that is not proved runs dense\n" in chosen
    )
    assert "with the share of calls expected" in chosen


@pytest.mark.parametrize(("platform", "sites"), [("cpu", 1), ("gpu", 0), ("tpu", 0)])
def test_where_weights_are_widened_before_the_product_that_counts(platform, sites):
    """An int8 predictor and six rows of ten are more than float8 weights, but less than a product has widened first."""

    def block(params, x):
        up, down = (params[name].astype(jnp.bfloat16) for name in ("up", "down"))
        return jax.nn.relu(x @ up) @ down

    narrow, shapes = jnp.float8_e4m3fn, {"up": (2048, 8192), "down": (8192, 2048)}
    params = {name: jax.ShapeDtypeStruct(shape, narrow) for name, shape in shapes.items()}
    config = hx.Config(ffn=hx.Ffn(active=0.6))
    step = hx.sparsify(block, backend=platform, config=config)
    traced = step.trace(params, jax.ShapeDtypeStruct((1, 2048), jnp.bfloat16))
    assert [s.widened for s in traced.plan.sites] == [True] * sites
    assert ("is widened before" in traced.explain()) == bool(sites)
    assert ("which would not be faster" in traced.explain()) != bool(sites)
