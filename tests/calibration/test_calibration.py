"""``hx.calibrate``: what is measured of sites, in every nesting, and what is an error."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from calibrated import FORCED, PLAIN, D, M, V, arguments, block, block_params, normal, of_kind, plainly, with_predictor
from checks import named
from jax import lax

import hire_xform as hx
from hire_xform.lowering.predict.predictors import pack_predictor, predict_scores


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
    config = with_predictor(hx.LowRank(0.25))
    calibration = plainly(lambda p, x: x @ p["head"], [(params, x)], config=config, head_kl=None)
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


@functools.cache
def measured_without_a_loop():
    """What fires in each layer, where no loop goes over them."""
    params = models.list_params()
    found = plainly(models.unrolled, [(params, *arguments(s)) for s in range(2)])
    return [s.fired for s in found.sites.values() if s.kind == "ffn"]


@pytest.mark.any_jax("cases vary nestings, which test_full_width.py runs on every JAX", every=3)
@pytest.mark.parametrize("model", models.MODELS, ids=str)
def test_every_nesting_is_measured_per_layer(model):
    params = model.make_params()
    calibration = plainly(model.step, [(params, *arguments(s)) for s in range(2)])
    kinds = [s.kind for s in calibration.sites.values()]
    assert (kinds.count("ffn"), kinds.count("vocab")) == (model.ffn, model.vocab)
    ffns = [s for s in calibration.sites.values() if s.kind == "ffn"]
    stacked = [s.stack for s in ffns]
    assert all(stack in ((), (models.L,)) for stack in stacked)
    once = not model.name.startswith("generate") and not model.name.endswith("tied") and model.name != "tied"
    if once and model.name not in ("conditional",):
        got = [layer for s in ffns for layer in (s.fired if s.stack else [s.fired])]
        np.testing.assert_array_equal(np.stack(got), np.stack(measured_without_a_loop()))
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


@pytest.mark.any_jax("cases are dtypes of one measurement", every=2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_half_precision(dtype):
    params = models.stacked_params(dtype)
    batches = [(params, *arguments(0, dtype=dtype))]
    calibration = plainly(models.scanned, batches, config=with_predictor(hx.LowRank(0.5)))
    step = hx.sparsify(models.scanned, config=with_predictor(hx.LowRank(0.5)), calibration=calibration)
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
        config = hx.Config(rules=named(hx.Vocab(candidates=k, predictor=PLAIN)))
        step = hx.sparsify(lambda p, x: x @ p["head"], config=config)
        seen = np.concatenate([step(params, one[None]) for one in x]).astype(np.float64)
        dense = np.asarray(x @ params["head"], np.float64)
        p, q = (np.asarray(jax.nn.log_softmax(jnp.asarray(a))) for a in (dense, seen))
        assert float(site.kl_at(k)) == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-3, abs=1e-6)
    with pytest.raises(ValueError, match="energy is that of feed-forward"):
        site.energy_at(1)


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
