"""``hx.calibrate``: what is measured, in every nesting; files; and how ``sparsify`` uses it."""

import dataclasses
import functools
import importlib
import json
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import FORCE, assert_same, full_width
from jax import lax

import hire_xform as hx
from hire_xform.lowering import pack_predictor, predict_scores
from hire_xform.observe import observe

D, M, V = models.D, models.M, models.V
FORCED = hx.Config(rules=FORCE)
PLAIN = hx.Quantized(8)
# One predictor, where it does not matter which: each that is measured is compiled.
plainly = functools.partial(hx.calibrate, predictors=[PLAIN])


def arguments(seed=0, batch=3, dtype=jnp.float32):
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, V, size=batch), jnp.int32)
    return models.make_cache(batch, dtype), tokens, jnp.zeros(D)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def block(params, x):
    """A block and a head on it, ``x`` [T, D]."""
    return (x + models.relu_ffn(params, x)) @ params["head"]


def block_params(seed=0):
    rng = np.random.default_rng(seed)
    return {**models.layer_weights(rng, jnp.float32), "head": models.random_array(rng, D, V)}


def of_kind(calibration, kind):
    return next(s for s in calibration.sites.values() if s.kind == kind)


def with_predictor(predictor, **config):
    return hx.Config(vocab=hx.Vocab(predictor=predictor), ffn=hx.Ffn(predictor=predictor), **config)


def skewed(seed, tokens, d=D):
    """Inputs that live near a few directions."""
    basis = np.linalg.qr(np.random.default_rng(99).normal(size=(d, d)))[0]
    sizes = 0.5 ** np.arange(d)
    return jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, d)) * sizes @ basis.T, jnp.float32)


# --- what is measured ---


def test_statistics_are_those_of_the_dense_function():
    params, batches = block_params(), [normal(s, 7, D) for s in range(3)]
    calibration = plainly(block, [(params, x) for x in batches])
    x = np.concatenate([np.asarray(b, np.float64) for b in batches])
    hidden = np.maximum(x @ params["w1"] + params["b1"], 0)
    ffn, head = of_kind(calibration, "ffn"), of_kind(calibration, "vocab")
    assert ffn.tokens == head.tokens == 21
    np.testing.assert_allclose(ffn.inputs[0].covariance, x.T @ x / 21, rtol=1e-5, atol=1e-6)
    y = x + hidden @ np.asarray(params["w2"], np.float64) + params["b2"]
    np.testing.assert_allclose(head.inputs[0].covariance, y.T @ y / 21, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ffn.firing_rate, (hidden > 0).mean(0), atol=1e-6)
    energy = (hidden**2).sum(0) * (np.asarray(params["w2"], np.float64) ** 2).sum(1)
    np.testing.assert_allclose(ffn.energy, energy, rtol=1e-5)
    assert ffn.recall_at(M) == head.recall_at(V) == 1.0
    assert ffn.energy_at(M) == pytest.approx(1.0)


def test_recall_is_counted_by_the_predictors_order():
    params, x = block_params(), normal(5, 40, D)
    calibration = plainly(lambda p, x: x @ p["head"], [(params, x)], config=with_predictor(hx.LowRank(0.25)))
    site = of_kind(calibration, "vocab")
    rows = params["head"].T
    packed = pack_predictor(rows, hx.LowRank(0.25), jnp.asarray(site.inputs[0].covariance))
    scores = np.asarray(predict_scores(x, packed, hx.LowRank(0.25), V))
    best = np.asarray(x @ params["head"]).argmax(1)
    order = np.argsort(-scores, axis=1, kind="stable")
    for k in (1, 4, 16):
        found = (order[:, :k] == best[:, None]).any(1).mean()
        assert site.recall_at(k) == pytest.approx(found, abs=1 / 40 + 1e-9)  # one near-tie may fall either way
    assert site.recall_at(int(site.sizes)) >= 0.99 > site.recall_at(int(site.sizes) - 1)


@pytest.mark.parametrize("model", models.MODELS, ids=str)
def test_every_nesting_is_measured_per_layer(model):
    params = model.make_params()
    calibration = plainly(model.step, [(params, *arguments(s)) for s in range(2)])
    kinds = [s.kind for s in calibration.sites.values()]
    assert (kinds.count("ffn"), kinds.count("vocab")) == (model.ffn, model.vocab)
    plain = plainly(models.unrolled, [(models.list_params(), *arguments(s)) for s in range(2)])
    ffns = [s for s in calibration.sites.values() if s.kind == "ffn"]
    stacked = [s.stack for s in ffns]
    assert all(stack in ((), (models.L,)) for stack in stacked)
    once = not model.name.startswith("generate") and not model.name.endswith("tied") and model.name != "tied"
    if once and model.name not in ("conditional",):
        want = [s.fired for s in plain.sites.values() if s.kind == "ffn"]
        got = [layer for s in ffns for layer in (s.fired if s.stack else [s.fired])]
        np.testing.assert_array_equal(np.stack(got), np.stack(want))
    if model.name == "conditional":
        assert sorted(int(s.tokens) for s in ffns) == [0, 0, 6, 6]  # the branch that is not taken has none
        used = hx.sparsify(model.step, config=FORCED, calibration=calibration).trace(params, *arguments())
        assert sum("no token" in s.calibrated for s in used.plan.sites) == 2


def test_a_scan_over_tokens_takes_the_memory_of_one():
    params = models.stacked_params()

    def decode(params, xs):
        def token(x, given):
            x, _ = lax.scan(lambda x, w: (x + models.relu_ffn(w, x + given), None), x, params["layers"])
            return x, None

        return lax.scan(token, jnp.zeros((2, D)), xs)[0]

    site = of_kind(plainly(decode, [(params, normal(0, 5, 2, D))]), "ffn")
    assert site.stack == (models.L,)
    assert site.inputs[0].covariance.shape == (models.L, D, D)
    np.testing.assert_array_equal(site.tokens, [10, 10])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_half_precision(dtype):
    params = models.stacked_params(dtype)
    batches = [(params, *arguments(0, dtype=dtype))]
    calibration = plainly(models.scanned, batches, config=with_predictor(hx.LowRank(0.5)))
    step = hx.sparsify(models.scanned, config=with_predictor(hx.LowRank(0.5), rules=FORCE), calibration=calibration)
    logits, _ = step(*batches[0])
    assert jnp.isfinite(logits).all()


def test_numpy_weights_and_closed_over_ones():
    params, x = block_params(), normal(0, 6, D)
    want = plainly(block, [(params, x)])
    numpy = plainly(block, [(jax.tree.map(np.asarray, params), np.asarray(x))])
    closed = plainly(lambda x: block(params, x), [(x,)], weights_argnums=())
    for other in (numpy, closed):
        for one, two in zip(want.sites.values(), other.sites.values(), strict=True):
            np.testing.assert_array_equal(one.inputs[0].covariance, two.inputs[0].covariance)
            np.testing.assert_array_equal(one.curve().wanted, two.curve().wanted)
    step = hx.sparsify(lambda x: block(params, x), weights_argnums=(), config=FORCED, calibration=closed)
    assert all("calibrated" in s.calibrated for s in step.trace(x[:1]).plan.sites)


def test_batches_of_different_shapes_and_a_prefill():
    params = block_params()
    batches = [(params, normal(0, 3, D)), (params, normal(1, 500, D)), (params, normal(2, 1, D))]
    assert of_kind(plainly(block, iter(batches)), "ffn").tokens == 504


def test_a_model_whose_own_top_k_chooses():
    def own(params, x):
        hidden = jax.nn.relu(x @ params["w1"])
        kept = hidden >= lax.top_k(hidden, 4)[0][..., -1:]
        return jnp.where(kept, hidden, 0) @ params["w2"]

    params = block_params()
    site = of_kind(plainly(own, [(params, normal(0, 30, D))]), "ffn")
    assert site.firing_rate.sum() <= 4
    assert site.curve().wanted[: M // 2].sum() / site.curve().wanted.sum() > 0.9


def test_units_that_are_never_zero_are_measured_by_energy():
    def silu(params, x):
        return jax.nn.silu(x @ params["w1"]) @ params["w2"]

    batches = [(block_params(), normal(0, 30, D))]
    site = of_kind(plainly(silu, batches, config=hx.Config(ffn=hx.Ffn(activations="any"))), "ffn")
    assert site.criterion == "energy"
    assert site.recall_at(int(site.sizes)) == site.energy_at(int(site.sizes)) >= 0.99
    with pytest.raises(ValueError, match=r"no site(.|\n)*activations=\"any\""):
        plainly(silu, batches)


def test_the_divergence_is_that_of_what_a_sampler_sees():
    params, x = block_params(), normal(5, 9, D)
    site = of_kind(plainly(lambda p, x: x @ p["head"], [(params, x)]), "vocab")
    for k in (1, 3, V // 2, V):
        config = hx.Config(vocab=hx.Vocab(candidates=k, predictor=PLAIN), rules=FORCE)
        step = hx.sparsify(lambda p, x: x @ p["head"], config=config)
        seen = np.concatenate([step(params, one[None]) for one in x]).astype(np.float64)
        dense = np.asarray(x @ params["head"], np.float64)
        p, q = (np.asarray(jax.nn.log_softmax(jnp.asarray(a))) for a in (dense, seen))
        assert float(site.kl_at(k)) == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-3, abs=1e-6)
    with pytest.raises(ValueError, match="energy is that of feed-forward"):
        site.energy_at(1)


# --- what is chosen ---

SEVERAL = [hx.Quantized(4), hx.LowRank(0.25, bits=8), hx.Projected(0.5, bits=8), hx.Quantized(8)]


@functools.cache
def chosen():
    params = block_params()
    return params, hx.calibrate(block, [(params, skewed(s, 60)) for s in range(2)], predictors=SEVERAL, recall=0.99)


def test_each_site_gets_the_predictor_and_size_that_reach_the_recall_at_the_fewest_bytes():
    params, calibration = chosen()
    sites = hx.sparsify(block, config=FORCED, calibration=calibration).trace(params, normal(0, 1, D)).plan.sites
    for site, planned in zip(calibration.sites.values(), sites, strict=True):
        assert list(site.curves) == SEVERAL
        read = {}
        for predictor in SEVERAL:
            size = next(k for k in range(1, site.units + 1) if site.recall_at(k, predictor) >= 0.99)
            given = {"candidates": size} if site.kind == "vocab" else {"active": size / site.units}
            settings = (hx.Vocab if site.kind == "vocab" else hx.Ffn)(predictor=predictor, **given)
            config = hx.Config(**{site.kind: settings}, rules=FORCE)
            plan = hx.sparsify(block, config=config, calibration=calibration).trace(params, normal(0, 1, D)).plan
            read[predictor] = next(s.sparse_bytes for s in plan.sites if s.kind == site.kind)
            assert site.bytes_at(size, predictor) == read[predictor]
        assert planned.settings.predictor == site.predictor == min(read, key=read.get)
        assert planned.sparse_bytes == min(read.values())


def test_no_predictor_is_measured_on_the_inputs_it_was_fitted_to():
    params = block_params()
    first, second = ([(params, skewed(s, 40))] for s in (0, 1))
    given = {"predictors": [hx.LowRank(3)], "config": hx.Config(ffn=None)}
    (both,) = hx.calibrate(block, first + second, **given).sites.values()
    fits = [hx.calibrate(block, one, **given) for one in (first, second)]
    halves = [hx.calibrate(block, one, fitted=fit, **given) for one, fit in ((first, fits[1]), (second, fits[0]))]
    want = sum(next(iter(h.sites.values())).curve().wanted for h in halves)
    np.testing.assert_array_equal(both.curve().wanted, want)
    covariances = [next(iter(f.sites.values())).covariances[0] for f in fits]
    np.testing.assert_allclose(both.covariances[0], (covariances[0] + covariances[1]) / 2, rtol=1e-5, atol=1e-6)


def test_what_is_stated_wins_and_the_rest_is_chosen_for_it():
    params, calibration = chosen()
    ffn, head = (of_kind(calibration, kind) for kind in ("ffn", "vocab"))

    def planned(**config):
        step = hx.sparsify(block, config=hx.Config(**config, rules=FORCE), calibration=calibration)
        return step.trace(params, normal(0, 1, D)).plan.sites

    for predictor in SEVERAL:
        used = planned(ffn=hx.Ffn(predictor=predictor), vocab=hx.Vocab(predictor=predictor))
        assert [s.settings.predictor for s in used] == [predictor] * 2
        assert used[0].computed == int(ffn.sizes_for(0.99, predictor))
        assert used[1].computed == int(head.sizes_for(0.99, predictor))
    ample = planned(vocab=hx.Vocab(candidates=V))[1]
    assert ample.computed == V
    assert ample.settings.predictor == min(SEVERAL, key=lambda p: head.curves[p].predictor_bytes)
    scarce = planned(vocab=hx.Vocab(candidates=1))[1].settings.predictor
    assert head.recall_at(1, scarce) == max(head.recall_at(1, p) for p in SEVERAL)
    unknown = planned(ffn=hx.Ffn(predictor=hx.LowRank(3)))[0]
    assert unknown.computed == M // 4
    assert "not calibrated with this predictor" in unknown.calibrated
    certified = planned(ffn=hx.Ffn(certify=True))[0]
    assert certified.settings.predictor == hx.Quantized(8)


def test_a_stated_predictor_is_the_only_one_measured():
    params = block_params()
    config = hx.Config(vocab=hx.Vocab(predictor=hx.Quantized(4)))
    calibration = hx.calibrate(block, [(params, normal(0, 5, D))], config=config, predictors=SEVERAL)
    assert list(of_kind(calibration, "vocab").curves) == [hx.Quantized(4)]
    assert list(of_kind(calibration, "ffn").curves) == SEVERAL
    with pytest.raises(ValueError, match=r"Quantized\(bits=8\) was not measured; expected one of"):
        of_kind(calibration, "vocab").recall_at(1, hx.Quantized(8))


# --- how it is used ---


def test_sizes_are_the_least_that_reach_the_recall_and_layers_share_the_largest():
    params = models.stacked_params()
    batches = [(params, *arguments(s)) for s in range(3)]
    calibration = plainly(models.scanned, batches, recall=0.9)
    site = of_kind(calibration, "ffn")
    size = int(site.sizes.max())
    assert (site.recall_at(size) >= 0.9).all()
    assert (site.recall_at(size - 1) < 0.9).any()
    traced = hx.sparsify(models.scanned, config=FORCED, calibration=calibration).trace(params, *arguments(batch=1))
    ffn, head = traced.plan.sites
    assert ffn.computed == size
    assert head.computed == int(of_kind(calibration, "vocab").sizes)
    assert f"calibrated: {size} units for recall 0.9 (units), 9 tokens" in traced.explain()
    assert json.loads(traced.plan.to_json())["sites"][0]["calibrated"] == ffn.calibrated


def test_values_given_win_and_defaults_stay_without_a_calibration():
    params, x = block_params(), normal(0, 1, D)
    calibration = plainly(block, [(params, normal(1, 50, D))])
    config = hx.Config(vocab=hx.Vocab(candidates=5), ffn=hx.Ffn(active=0.5), rules=FORCE)
    ffn, head = hx.sparsify(block, config=config, calibration=calibration).trace(params, x).plan.sites
    assert (ffn.computed, head.computed) == (M // 2, 5)
    assert "active=0.5 is given" in ffn.calibrated
    ffn, head = hx.sparsify(block, config=FORCED).trace(params, x).plan.sites
    assert (ffn.computed, head.computed, ffn.calibrated) == (M // 4, V, "")
    assert hx.Vocab().candidates is None
    assert hx.Vocab().candidates_of(1000) == 256


def test_other_predictors_groups_and_certified_sites_keep_their_defaults_and_say_so():
    params, x = block_params(), normal(0, 1, D)
    calibration = plainly(block, [(params, normal(1, 50, D))])

    def told(**ffn):
        config = hx.Config(vocab=None, ffn=hx.Ffn(**ffn), rules=FORCE)
        site = hx.sparsify(block, config=config, calibration=calibration).trace(params, x).plan.sites[0]
        assert site.computed == M // 4
        return site.calibrated

    assert "not calibrated with this predictor" in told(predictor=hx.Quantized(4))
    assert "groups of 1" in told(group_size=2)
    assert "calibrated uncertified" in told(certify=True)


def test_another_function_of_the_same_model_knows_its_sites_by_their_weights():
    params = models.list_params()

    def first_layer_and_head(weights, x):
        return (x + models.relu_ffn(weights["layers"][1], x)) @ weights["head"]

    calibration = plainly(models.unrolled, [(params, *arguments())])
    used = hx.sparsify(first_layer_and_head, config=FORCED, calibration=calibration).trace(params, normal(0, 1, D))
    second = [s for s in calibration.sites.values() if s.kind == "ffn"][1]
    assert used.plan.sites[0].computed == int(second.sizes)


def test_another_model_is_refused():
    calibration = plainly(block, [(block_params(), normal(0, 9, D))])

    def other(params, x):
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    wide = {"up": normal(0, D, 2 * M), "down": normal(1, 2 * M, D)}
    with pytest.raises(ValueError, match="of another model"):
        hx.sparsify(other, calibration=calibration).trace(wide, normal(0, 1, D))
    named = {"up": normal(0, D, M), "down": normal(1, M, D)}
    with pytest.raises(ValueError, match=r"none of the program's sites.*another model"):
        hx.sparsify(lambda p, x: other(p, x) + 1, calibration=calibration).trace(named, normal(0, 1, D))


# --- predictors ---


def test_projected_without_a_calibration_is_refused_at_planning():
    step = hx.sparsify(block, config=with_predictor(hx.Projected(0.5), rules=FORCE))
    plan = step.trace(block_params(), normal(0, 1, D)).plan
    assert not plan.sites
    assert all("hx.calibrate" in r.reason for r in plan.refusals if r.kind)


FITTED = [hx.LowRank(0.25), hx.LowRank(0.5, bits=8), hx.Projected(4), hx.Projected(0.5, bits=8)]


@pytest.mark.parametrize("predictor", FITTED, ids=repr)
@pytest.mark.parametrize("model", [models.MODELS[0], models.MODELS[3]], ids=str)
def test_full_width_is_dense_with_every_predictor(predictor, model):
    params = model.make_params()
    config = with_predictor(predictor)
    calibration = plainly(model.step, [(params, *arguments(s)) for s in range(3)], config=config)
    step = hx.sparsify(model.step, config=full_width(predictor), calibration=calibration)
    traced = step.trace(params, *arguments(7))
    assert len(traced.plan.sites) == model.ffn + model.vocab
    want = jax.jit(model.step)(params, *arguments(7))
    assert_same(step(params, *arguments(7)), want)
    packed = traced.pack(params)
    assert_same(step(packed, *arguments(7)), want)
    assert_same(jax.jit(step)(packed, *arguments(7)), want)


def test_fitted_predictors_beat_a_plain_svd_on_the_inputs_they_were_fitted_to():
    rows, x, unseen = normal(0, 400, D), skewed(1, 500), skewed(2, 500)
    c = (x.T @ x) / 500

    def error(spec, covariance):
        scores = predict_scores(unseen, pack_predictor(rows, spec, covariance), spec, 400)
        return float(jnp.linalg.norm(scores - unseen @ rows.T) / jnp.linalg.norm(unseen @ rows.T))

    plain = error(hx.LowRank(4), None)
    for spec in (hx.LowRank(4), hx.LowRank(4, bits=8), hx.Projected(4), hx.Projected(4, bits=8)):
        assert error(spec, c) < 0.25 * plain
    assert error(hx.LowRank(4), c) <= error(hx.Projected(4), c) * 1.05


def test_the_weighted_factors_are_the_best_of_their_rank():
    rows, c = normal(0, 60, D), np.cov(np.asarray(skewed(1, 500), np.float64).T) + 1e-3 * np.eye(D)
    packed = pack_predictor(rows, hx.LowRank(5), jnp.asarray(c, jnp.float32))
    made = np.asarray(packed["a"], np.float64) @ np.asarray(packed["basis"], np.float64).T
    values, vectors = np.linalg.eigh(c)
    root = vectors * np.sqrt(values) @ vectors.T
    w = np.asarray(rows, np.float64)
    least = np.sqrt((np.linalg.svd(w @ root, compute_uv=False)[5:] ** 2).sum())
    assert np.linalg.norm((w - made) @ root) <= 1.02 * least  # the shrinkage costs a little


@pytest.mark.parametrize("rank", [1, 3], ids=str)
def test_singular_and_zero_covariances_make_finite_predictors(rank):
    rows = normal(0, 50, D)
    one = jnp.zeros((D, D)).at[0, 0].set(1.0)
    for c in (jnp.zeros((D, D)), one, 1e20 * one, 1e-20 * one):
        for spec in (hx.LowRank(rank), hx.LowRank(rank, bits=8), hx.Projected(rank), hx.Projected(rank, bits=8)):
            scores = predict_scores(normal(1, 3, D), pack_predictor(rows, spec, c), spec, 50)
            assert jnp.isfinite(scores).all()


def test_another_calibration_is_another_packed_form():
    params, config = block_params(), with_predictor(hx.LowRank(0.25), rules=FORCE)
    made = [plainly(block, [(params, normal(s, 50, D))], config=config) for s in (0, 1, 1)]
    one, other, same = (
        hx.sparsify(block, config=config, calibration=c).trace(params, normal(0, 1, D)).pack(params).layout
        for c in made
    )
    assert one != other
    assert other == same
    assert hash(other) == hash(same)


def test_quantized_forms_do_not_hang_on_the_calibration():
    params = block_params()
    calibration = plainly(block, [(params, normal(0, 50, D))])
    used = hx.sparsify(block, config=FORCED, calibration=calibration)
    plain = hx.sparsify(block, config=FORCED)
    keys = [s.trace(params, normal(0, 1, D)).pack(params).layout.keys for s in (used, plain)]
    assert keys[0] == keys[1]


# --- files ---


@pytest.fixture(scope="module")
def made():
    params = models.stacked_params()
    config = with_predictor(hx.Projected(0.5, bits=8))
    return plainly(models.scanned, [(params, *arguments())], recall=0.9, config=config)


def test_a_saved_calibration_is_the_same_when_loaded(made, tmp_path):
    path = tmp_path / "model.calibration"
    made.save(path)
    loaded = hx.Calibration.load(path)
    assert (loaded.target, loaded.batches, list(loaded.sites)) == (made.target, made.batches, list(made.sites))
    for one, other in zip(made.sites.values(), loaded.sites.values(), strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert type(a) is type(b), field.name
            if field.name == "curves":
                assert list(a) == list(b)
                a = tuple(v for c in a.values() for v in (c.wanted, c.wanted_energy, c.kl, c.predictor_bytes))
                b = tuple(v for c in b.values() for v in (c.wanted, c.wanted_energy, c.kl, c.predictor_bytes))
            for x, y in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
                np.testing.assert_array_equal(x, y)
        assert one.inputs == other.inputs
    assert str(loaded) == str(made)
    assert [p.name for p in tmp_path.iterdir()] == ["model.calibration"]


def test_repr_is_short_and_the_table_has_a_line_for_each_layer(made):
    assert repr(made) == "Calibration(2 sites, recall 0.9, 3 tokens)"
    lines = made.table().splitlines()
    assert len(lines) == 1 + models.L + 1
    assert lines[0].split()[:5] == ["site", "kind", "layer", "tokens", "size"]


def test_files_that_can_not_be_used_are_refused_with_the_reason(made, tmp_path):
    path = tmp_path / "c"
    made.save(path)
    content = path.read_bytes()

    def refused(data, match):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=match):
            hx.Calibration.load(path)

    refused(content[:-7], "truncated")
    refused(content[:3], "truncated")
    refused(b"", "truncated")
    refused(content.replace(b'"version":"4"', b'"version":"2"'), "format version 2.*reads 4")
    refused(content.replace(b"hire_xform.calibration", b"another_xx.calibration"), "no calibration")
    refused(content.replace(b"criterion", b"critorion"), "damaged")
    length = struct.unpack("<Q", content[:8])[0]
    refused(content[: 8 + length // 2], "truncated")
    with pytest.raises(FileNotFoundError, match="no file at"):
        hx.Calibration.load(tmp_path / "none")


# --- errors ---


def test_wrong_arguments_are_named():
    params, x = block_params(), normal(0, 3, D)
    ok = [(params, x)]
    nan = x.at[1, 2].set(jnp.nan)
    generator = (batch for batch in ok)
    cases = [
        (lambda: hx.calibrate(3, ok), TypeError, "calibrate: fun=3"),
        (lambda: hx.calibrate(block, []), ValueError, "batches is empty"),
        (lambda: hx.calibrate(block, 7), TypeError, "batches is a int"),
        (lambda: hx.calibrate(block, x), TypeError, "batches is a .*Array"),
        (lambda: hx.calibrate(block, ok[0]), TypeError, "batch 0 is a dict"),
        (lambda: hx.calibrate(block, [*ok, (params, nan)]), ValueError, r"batch 1: .*'w1'.*NaN"),
        (lambda: hx.calibrate(block, [(params, jnp.inf * x)]), ValueError, "batch 0: .*NaN or infinity"),
        (lambda: hx.calibrate(block, [(params, jax.typeof(x))]), TypeError, "batch 0 holds a ShapedArray"),
        (lambda: hx.calibrate(block, ok, recall=1.5), ValueError, "recall=1.5"),
        (lambda: hx.calibrate(block, ok, recall=0), ValueError, "recall=0"),
        (lambda: hx.calibrate(block, ok, config=hx.Vocab()), TypeError, "config=Vocab"),
        (lambda: hx.calibrate(block, ok, predictors=[]), TypeError, r"predictors=\[\]"),
        (lambda: hx.calibrate(block, ok, predictors=[8]), ValueError, r"calibrate\(predictor=8\)"),
        (lambda: hx.calibrate(block, ok, fitted=3), TypeError, "fitted=3"),
        (lambda: hx.calibrate(block, generator), ValueError, "read once"),
        (lambda: hx.calibrate(block, ok, progress=1), TypeError, "progress=1"),
        (lambda: hx.calibrate(block, ok, max_cost=0.1), TypeError, "unknown option 'max_cost'"),
        (lambda: hx.calibrate(block, generator, config=with_predictor(hx.LowRank(0.5))), ValueError, "read once"),
        (lambda: hx.calibrate(lambda p, x: x + 1, ok), ValueError, "no site"),
        (lambda: hx.sparsify(block, calibration={}), TypeError, r"calibration=\{\}; expected what hx.calibrate"),
        (lambda: hx.Projected(1.5), ValueError, "Projected: rank=1.5"),
    ]  # fmt: skip
    for call, kind, match in cases:
        with pytest.raises(kind, match=match):
            call()
    packed = hx.sparsify(block, config=FORCED).trace(params, x).pack(params)
    with pytest.raises(TypeError, match="batch 0 has Packed"):
        hx.calibrate(block, [(packed, x)])
    with pytest.raises(TypeError, match=r"batch 0 holds a .*Tracer"):
        jax.jit(lambda x: hx.calibrate(block, [(params, x)]) and x)(x)


def test_the_progress_bar_is_written_to_stderr(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    hx.calibrate(block, [(block_params(), normal(0, 3, D))], progress=True)
    said = capsys.readouterr()
    assert not said.out
    assert "calibrating" in said.err


# --- the bundled model ---


@functools.cache
def tiny():
    examples = Path(__file__).resolve().parents[1] / "examples"
    sys.path.insert(0, str(examples))
    tiny_lm = importlib.import_module("tiny_lm")
    params = tiny_lm.load(examples / "tiny_lm" / "weights.safetensors")
    text = np.load(examples / "tiny_lm" / "heldout.npy").astype(np.int32)
    windows = [jnp.asarray(text[i * 512 : (i + 1) * 512])[None] for i in range(24)]
    return tiny_lm, params, windows


@pytest.mark.slow
def test_recall_holds_on_text_that_was_not_seen():
    tiny_lm, params, windows = tiny()
    config = hx.Config(vocab=hx.Vocab(predictor=hx.LowRank(0.25)))
    one = hx.calibrate(tiny_lm.forward, [(params, w) for w in windows[::2]], config=config, predictors=[PLAIN])
    unseen = [(params, w) for w in windows[1::2]]
    other = hx.calibrate(tiny_lm.forward, unseen, config=config, predictors=[PLAIN], fitted=one)
    for site in one.sites.values():
        assert other.sites[site.path].recall_at(int(site.sizes)) == pytest.approx(0.99, abs=0.005), site.path
    cache = tiny_lm.init_cache(tiny_lm.config_of(params), 1, 512)
    step = hx.sparsify(tiny_lm.decode_step, config=dataclasses.replace(config, rules=FORCE), calibration=one)
    plan = step.trace(params, cache, jnp.zeros(1, jnp.int32)).plan
    assert [s.computed for s in plan.sites] == [int(s.sizes) for s in one.sites.values()]


@pytest.mark.slow
def test_fitting_to_the_inputs_finds_the_arg_max_where_the_plain_svd_does_not():
    tiny_lm, params, windows = tiny()
    spec = hx.LowRank(0.25)
    config = hx.Config(vocab=hx.Vocab(predictor=spec), ffn=None)
    site = of_kind(hx.calibrate(tiny_lm.forward, [(params, w) for w in windows[::2]], config=config), "vocab")
    program = jax.make_jaxpr(tiny_lm.forward)(params, windows[0])

    @jax.jit
    def unseen(window):
        _, seen = observe(program, jax.tree.leaves((params, window)), lambda path, eqn: path == site.path)
        return seen[0][0][0].reshape(-1, site.width)

    x = jnp.concatenate([unseen(w) for w in windows[1::2]])
    best = jnp.argmax(x @ params["embedding"].T, axis=1)

    def in_64(covariance):
        packed = pack_predictor(params["embedding"], spec, covariance)
        chosen = lax.top_k(predict_scores(x, packed, spec, site.units), 64)[1]
        return float((chosen == best[:, None]).any(1).mean())

    # At an eighth of the columns: 95.2 % and 76.9 %, which is what exact arithmetic gives, too.
    assert in_64(jnp.asarray(site.inputs[0].covariance)) >= 0.99
    assert in_64(None) < 0.92


def test_a_certified_site_gets_the_size_that_proves_what_was_asked_for():
    """Sizes of blocks and head from the calibration: no token of it runs dense, and one fewer would."""
    rng = np.random.default_rng(0)
    d, m, v = 24, 96, 512
    p = {
        "up": jnp.asarray(rng.normal(size=(d, m)) * 0.3, jnp.float32),
        "bias": jnp.asarray(rng.normal(size=m) * 0.3 - 1.0, jnp.float32),
        "down": jnp.asarray(rng.normal(size=(m, d)) * 0.3, jnp.float32),
        "head": jnp.asarray(rng.normal(size=(d, v)), jnp.float32),
    }

    def step(p, x):
        return (x + jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]) @ p["head"]

    tokens = [jnp.asarray(rng.normal(size=(1, d)), jnp.float32) for _ in range(40)]
    config = hx.lossless(rules=(hx.Rule("*", force=True),))
    cal = hx.calibrate(step, [(p, jnp.concatenate(tokens))], config=config)
    assert {site.criterion for site in cal.sites.values()} == {"proved"}
    sparse = hx.sparsify(step, config=config, calibration=cal)
    traced = sparse.trace(p, tokens[0])
    assert [site.computed for site in traced.plan.sites] == [int(s.sizes) for s in cal.sites.values()]
    assert all(site.computed < site.units // 2 for site in traced.plan.sites)
    dense = jax.jit(step)

    def run(step):
        packed = step.trace(p, tokens[0]).pack(p)
        found = [step.with_fallbacks(packed, x) for x in tokens]
        for (logits, _), x in zip(found, tokens, strict=True):
            assert int(logits.argmax()) == int(dense(p, x).argmax())
        return [sum(int(counts[s.path]) for _, counts in found) for s in traced.plan.sites]

    assert run(sparse) == [0, 0]
    (block, head), (few, fewer) = traced.plan.sites, (int(s.sizes) - 1 for s in cal.sites.values())
    narrow = hx.Config(
        vocab=hx.Vocab(certify=True, candidates=fewer, predictor=head.settings.predictor),
        ffn=hx.Ffn(certify=True, active=few / m, predictor=block.settings.predictor),
        rules=config.rules,
    )
    assert min(run(hx.sparsify(step, config=narrow, calibration=cal))) >= 1


def test_what_was_measured_without_certification_gives_no_certified_size():
    p = {"head": jnp.asarray(np.random.default_rng(0).normal(size=(16, 512)), jnp.float32)}
    x = jnp.ones((4, 16))
    fun = lambda p, x: x @ p["head"]  # noqa: E731
    force = (hx.Rule("*", force=True),)
    plain = hx.calibrate(fun, [(p, x)], config=hx.Config(rules=force), predictors=[hx.Quantized(8)])
    site = hx.sparsify(fun, config=hx.lossless(rules=force), calibration=plain).trace(p, x[:1]).plan.sites[0]
    assert site.calibrated.startswith("calibrated uncertified")
    with pytest.raises(ValueError, match="max_kl with certify=True"):
        hx.calibrate(fun, [(p, x)], config=hx.lossless(), max_kl=0.1)
