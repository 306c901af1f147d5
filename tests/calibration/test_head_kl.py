"""``hx.calibrate(head_kl=...)``: with a recall, a head's softmax is as close to the dense one as was asked for."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrated import normal, of_kind
from checks import FORCE, named

import hire_xform as hx

pytestmark = pytest.mark.any_jax("what is chosen of what was measured; test_calibration.py measures on every JAX")

D, V, TOKENS = 16, 300, 40
# The same whatever it is fitted to, so that what was measured is what the sparse function does on the same tokens.
COARSE, FINE = hx.Quantized(4), hx.Quantized(8)
HEAD = hx.Config(rules=named(hx.Vocab()))


def head(params, x):
    return x @ params["head"]


def given(seed=0):
    return {"head": normal(seed, D, V)}, 0.7 * normal(seed + 1, TOKENS, D)


def calibrated(config=HEAD, **options):
    params, x = given()
    return hx.calibrate(head, [(params, x)], config=config, **{"predictors": [COARSE, FINE], **options})


def logits_of(calibration, **vocab):
    """The sparse logits of each token by itself, and the site."""
    params, x = given()
    step = hx.sparsify(head, config=hx.Config(rules=named(hx.Vocab(**vocab))), calibration=calibration)
    (site,) = step.trace(params, x[:1]).plan.sites
    return jnp.concatenate([step(params, one[None]) for one in x]), site


def divergence(logits):
    """What a sampler loses, nats a token."""
    params, x = given()
    p, q = jax.nn.log_softmax(head(params, x)), jax.nn.log_softmax(logits)
    if jnp.isneginf(logits).any():
        return float(jnp.where(jnp.isneginf(q), 0.0, jnp.exp(q) * (q - p)).sum(1).mean())
    return float((jnp.exp(p) * (p - q)).sum(1).mean())


@pytest.mark.parametrize("fill", ["predicted", "-inf"])
@pytest.mark.parametrize("limit", [0.02, 0.0005])
def test_the_logits_are_within_the_limit_with_the_fewest_candidates(limit, fill):
    calibration = calibrated(hx.Config(rules=named(hx.Vocab(fill=fill))), head_kl=limit)
    site = of_kind(calibration, "vocab")
    logits, planned = logits_of(calibration, fill=fill)
    found, size = divergence(logits), int(site.sizes)
    assert planned.computed == size
    assert found <= limit * 1.01
    assert float(site.kl_at(size)) == pytest.approx(found, rel=0.02, abs=1e-6)
    params, x = given()
    best = jnp.argmax(head(params, x), 1)
    assert float((jnp.argmax(logits, 1) == best).mean()) >= 0.99
    if size > 1:
        fewer, _ = logits_of(calibration, fill=fill, candidates=size - 1, predictor=site.predictor)
        kept = float((jnp.argmax(fewer, 1) == best).mean())
        assert divergence(fewer) > limit * 0.99 or kept < 0.99
    assert f"at most {limit:g} nats" in planned.calibrated


def test_any_divergence_will_do_where_none_is_asked_for():
    """Recall alone takes fewer bytes, and further from dense, than recall and closeness."""
    greedy, close = (calibrated(head_kl=limit) for limit in (None, 1e-4))
    sites = [of_kind(c, "vocab") for c in (greedy, close)]
    assert sites[0].target == "recall 0.99 (argmax)"
    assert sites[0].predictor == COARSE
    assert sites[0].recall_at(int(sites[0].sizes) - 1) < 0.99 <= sites[0].recall_at(int(sites[0].sizes))
    assert divergence(logits_of(greedy)[0]) > 1e-3 > 1e-4 * 1.01 >= divergence(logits_of(close)[0])
    read = [s.bytes_at(int(s.sizes)) for s in sites]
    assert read[0] < read[1]


def test_where_no_predictor_is_within_it_recall_decides_and_a_warning_says_so():
    rng = np.random.default_rng(0)
    params = {"head": jnp.asarray(rng.normal(size=(D, 2000)), jnp.float32)}
    x = jnp.asarray(0.2 * rng.normal(size=(TOKENS, D)), jnp.float32)
    only = {"predictors": [hx.LowRank(1)], "config": HEAD}
    with pytest.warns(
        hx.HireWarning, match=r"params\['head'\].*head_kl=0.01 nats.*LowRank\(rank=1, bits=None\) and \d+ cand"
    ):
        found = hx.calibrate(head, [(params, x)], **only)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        greedy = hx.calibrate(head, [(params, x)], head_kl=None, **only)
        hx.calibrate(head, [(params, x)], **{**only, "predictors": [*only["predictors"], FINE]})
    sites = [of_kind(c, "vocab") for c in (found, greedy)]
    assert sites[0].sizes == sites[1].sizes
    assert [s.beyond_head_kl for s in sites] == [True, False]
    step = hx.sparsify(head, config=hx.Config(rules=FORCE), calibration=found)
    assert "nats a token from the dense ones" in step.trace(params, x[:1]).plan.sites[0].calibrated


def test_what_is_stated_wins_and_the_rest_is_within_the_limit():
    calibration = calibrated(head_kl=0.001)
    for predictor in (COARSE, FINE):
        logits, planned = logits_of(calibration, predictor=predictor)
        assert planned.settings.predictor == predictor
        assert divergence(logits) <= 0.001 * 1.01
    site = of_kind(calibration, "vocab")
    enough = next(k for k in range(1, V) if site.recall_at(k, COARSE) >= 0.99)
    assert site.kl_at(enough, COARSE) > 0.001
    assert logits_of(calibration, candidates=enough)[1].settings.predictor == FINE
    assert logits_of(calibration, candidates=V)[1].settings.predictor == COARSE


def test_another_fill_than_was_measured_is_told():
    calibration = calibrated(head_kl=0.01)
    assert "nats of fill='predicted', with which it was measured" in logits_of(calibration, fill="-inf")[1].calibrated
    assert "with which" not in logits_of(calibration)[1].calibrated


def test_it_is_kept_in_the_file(tmp_path):
    calibration = calibrated(head_kl=0.001)
    calibration.save(tmp_path / "c")
    loaded = hx.Calibration.load(tmp_path / "c")
    assert of_kind(loaded, "vocab").head_kl == 0.001
    for predictor in (COARSE, FINE):
        planned = [logits_of(c, predictor=predictor)[1].computed for c in (calibration, loaded)]
        assert planned[0] == planned[1]


def test_certified_heads_and_blocks_have_none():
    config = hx.Config(rules=named(hx.Vocab(certify=True)))
    assert of_kind(calibrated(config, predictors=[FINE], head_kl=1e-9), "vocab").head_kl is None

    def block(params, x):
        return jax.nn.relu(x @ params["head"]) @ params["head"].T

    params, x = given()
    (site,) = hx.calibrate(block, [(params, x)], predictors=[FINE], head_kl=1e-9).sites.values()
    assert (site.kind, site.head_kl, site.target) == ("ffn", None, "recall 0.99 (units)")


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "0.1"], ids=str)
def test_a_limit_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"calibrate: head_kl=.*; expected a number, more than 0"):
        calibrated(head_kl=value)


def test_a_loss_sees_what_stands_for_the_others():
    """With minus infinity a loss that reads other logits is not finite, where predicted ones were close."""
    params, x = given()
    config = hx.Config(rules=named(hx.Vocab(fill="-inf")))

    def right(logits, params, x):
        return -jnp.mean(jnp.argmax(logits, 1) == jnp.argmax(head(params, x), 1))

    found = hx.calibrate(head, [(params, x)], config=config, predictors=[FINE], max_loss_increase=0.01, loss=right)
    assert float(found.sites[next(iter(found.sites))].recall_at(int(of_kind(found, "vocab").sizes))) >= 0.98

    def lowest(logits, params, x):
        return jnp.mean(jnp.min(logits, 1))

    with pytest.raises(ValueError, match=r"the loss of batch 0 is array\(-inf, .*; expected a finite number"):
        hx.calibrate(head, [(params, x)], config=config, predictors=[FINE], max_loss_increase=0.01, loss=lowest)
