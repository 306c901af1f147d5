"""What ``hx.calibrate`` chooses, and how ``sparsify`` uses it."""

import functools
import json

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from calibrated import FORCED, D, M, V, arguments, block, block_params, normal, of_kind, plainly, skewed
from checks import FORCE, assert_same, named

import hire_xform as hx

pytestmark = pytest.mark.any_jax("what is chosen of what was measured; test_calibration.py measures on every JAX")

SEVERAL = [hx.Quantized(4), hx.LowRank(0.25, bits=8), hx.Projected(0.5, bits=8), hx.Quantized(8)]


@functools.cache
def chosen():
    params = block_params()
    batches = [(params, skewed(s, 60)) for s in range(2)]
    return params, hx.calibrate(block, batches, predictors=SEVERAL, recall=0.99, config=FORCED)


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
    given = {"predictors": [hx.LowRank(3)], "config": hx.Config(ffn=None, rules=FORCED.rules)}
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
    config = hx.Config(rules=named(hx.Vocab(predictor=hx.Quantized(4))))
    calibration = hx.calibrate(block, [(params, normal(0, 5, D))], config=config, predictors=SEVERAL)
    assert list(of_kind(calibration, "vocab").curves) == [hx.Quantized(4)]
    assert list(of_kind(calibration, "ffn").curves) == SEVERAL
    with pytest.raises(ValueError, match=r"Quantized\(bits=8\) was not measured; expected one of"):
        of_kind(calibration, "vocab").recall_at(1, hx.Quantized(8))


@pytest.mark.parametrize("certified", ["vocab", "ffn"])
def test_what_a_rule_certifies_is_measured_with_the_predictors_for_that_and_the_rest_with_the_others(
    monkeypatch, certified
):
    from hire_xform.calibrating import run

    lists = {False: (hx.Quantized(4), hx.LowRank(0.25, bits=8), hx.Quantized(8)), True: (hx.Quantized(8),)}
    monkeypatch.setattr(run, "PREDICTORS", lists[False])
    monkeypatch.setattr(run, "CERTIFIED_PREDICTORS", lists[True])
    certify = {"vocab": hx.Vocab(certify=True), "ffn": hx.Ffn(certify=True)}[certified]
    config = hx.Config(rules=(*named(hx.Vocab()), hx.Rule("*", **{certified: certify})))
    params = block_params()
    found = hx.calibrate(block, [(params, skewed(s, 60)) for s in range(2)], config=config, progress=False)
    for kind in ("vocab", "ffn"):
        assert tuple(of_kind(found, kind).curves) == lists[kind == certified]
        assert of_kind(found, kind).criterion.startswith("proved") == (kind == certified)


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


NAMES = ("unrolled", "scanned_tied", "while_indexed", "conditional", "generate")
ORACLE = [model for model in models.MODELS if str(model) in NAMES]


@pytest.mark.parametrize("model", ORACLE, ids=str)
def test_with_a_recall_of_one_the_tokens_it_was_measured_on_come_out_dense(model):
    """Every unit that is not zero is computed, and every arg max a candidate: fewer rows, the same result."""
    assert len(ORACLE) == len(NAMES)
    params = model.make_params()
    batches = [(params, *arguments(s, batch=1)) for s in range(4)]
    calibration = plainly(model.step, batches, recall=1.0, head_kl=None)
    step = hx.sparsify(model.step, config=FORCED, calibration=calibration)
    assert any(s.computed < s.units for s in step.trace(*batches[0]).plan.sites)
    for batch in batches:
        (logits, *rest), (want, *others) = step(*batch), jax.jit(model.step)(*batch)
        assert_same(rest, others)
        if jnp.issubdtype(want.dtype, jnp.floating):
            best = want.argmax(-1)
            np.testing.assert_array_equal(logits.argmax(-1), best)
            logits, want = (jnp.take_along_axis(a, best[..., None], -1) for a in (logits, want))
        assert_same(logits, want)


def test_values_given_win_and_defaults_stay_without_a_calibration():
    params, x = block_params(), normal(0, 1, D)
    calibration = plainly(block, [(params, normal(1, 50, D))])
    config = hx.Config(ffn=hx.Ffn(active=0.5), rules=named(hx.Vocab(candidates=5)))
    ffn, head = hx.sparsify(block, config=config, calibration=calibration).trace(params, x).plan.sites
    assert (ffn.computed, head.computed) == (M // 2, 5)
    assert "active=0.5 is given" in ffn.calibrated
    approximate = hx.approximate(rules=named(hx.Vocab(certify=False)))
    for config, certified in ((FORCED, True), (approximate, False)):
        ffn, head = hx.sparsify(block, config=config).trace(params, x).plan.sites
        assert (ffn.computed, head.computed, ffn.calibrated) == (M // 4, V, "")
        assert [ffn.settings.certify, head.settings.certify] == [certified] * 2
    used = hx.sparsify(block, config=FORCED, calibration=calibration).trace(params, x).plan.sites
    assert [site.settings.certify for site in used] == [False, False]  # as it was measured
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
    config = hx.lossless(rules=named(hx.Vocab(certify=True)))
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
        ffn=hx.Ffn(certify=True, active=few / m, predictor=block.settings.predictor),
        rules=named(hx.Vocab(certify=True, candidates=fewer, predictor=head.settings.predictor)),
    )
    assert min(run(hx.sparsify(step, config=narrow, calibration=cal))) >= 1


def test_what_was_measured_without_certification_gives_no_certified_size():
    p = {"head": jnp.asarray(np.random.default_rng(0).normal(size=(16, 512)), jnp.float32)}
    x = jnp.ones((4, 16))
    fun = lambda p, x: x @ p["head"]  # noqa: E731
    plain = plainly(fun, [(p, x)])
    site = hx.sparsify(fun, config=hx.lossless(rules=FORCE), calibration=plain).trace(p, x[:1]).plan.sites[0]
    assert site.calibrated.startswith("calibrated uncertified")
    with pytest.raises(ValueError, match="max_kl with certify=True"):
        hx.calibrate(fun, [(p, x)], config=hx.lossless(), max_kl=0.1)
