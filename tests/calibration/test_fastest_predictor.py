"""Of the predictors that a calibration found to do, the planner takes the fastest by the machine's profile."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE

import hire_xform as hx
from hire_xform.passes.plan.machine import BUILT_IN
from hire_xform.tuning import keeping

D, V = 64, 4096
INT8, LOW_RANK, LOW_RANK8 = hx.Quantized(8), hx.LowRank(0.5), hx.LowRank(0.5, bits=8)
CONFIG = hx.approximate(rules=FORCE)
LONG = 1e-3


def head(w, x):
    return jnp.argmax(x @ w, axis=-1)


def machine(**slow):
    """A machine of which nothing but scores takes time: those that are named take long."""
    base = BUILT_IN["avx512_vnni"]
    scores = {kind: ((1, slow.get(kind.replace(" ", "_"), 1e-12)),) for kind in base.scores}
    rows = {step: dataclasses.replace(times, points=((1 << 20, 1e-9),)) for step, times in base.rows.items()}
    return dataclasses.replace(base, scores=scores, rows=rows, fixed=0.0, choosing=0.0, bounding=0.0)


@pytest.fixture
def plan_on(monkeypatch, tmp_path):
    def plan(profile, calibration, config=CONFIG):
        # A file is read once in a process.
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        keeping.keep(profile, path)
        monkeypatch.setenv(keeping.VARIABLE, str(path))
        return hx.sparsify(head, config=config, calibration=calibration).trace(*SHAPES).plan.sites[0]

    yield plan
    keeping._named.cache_clear()


SHAPES = jax.ShapeDtypeStruct((D, V), jnp.float32), jax.ShapeDtypeStruct((1, D), jnp.float32)


@pytest.fixture(scope="module")
def calibration():
    rng = np.random.default_rng(0)
    low = rng.normal(size=(D, D // 4)) @ rng.normal(size=(D // 4, V))
    w = jnp.asarray(low + 0.01 * rng.normal(size=(D, V)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(200, D)), jnp.float32)
    return hx.calibrate(
        head, [(w, x)], recall=0.95, head_kl=None, predictors=[INT8, LOW_RANK, LOW_RANK8], config=CONFIG
    )


def test_the_fastest_of_those_that_do_is_taken(plan_on, calibration):
    (measured,) = calibration.sites.values()
    assert measured.predictor == LOW_RANK8
    for slow, want in (
        ({"f32": LONG}, LOW_RANK8),
        ({"f32": LONG, "int8_fine": LONG}, INT8),
        ({"int8": LONG, "int8_fine": LONG}, LOW_RANK),
    ):
        site = plan_on(machine(**slow), calibration)
        assert site.settings.predictor == want
        # At the size that reaches the recall with it.
        assert site.computed == int(measured.sizes_for(0.95, want).max())
        instead = f"{want} is predicted to be faster here than {LOW_RANK8}, which reads fewer bytes"
        assert (instead in site.calibrated) == (want != LOW_RANK8)


def test_one_that_is_stated_stays(plan_on, calibration):
    profile = machine(int8=LONG, int8_fine=LONG)
    stated = hx.Config(vocab=hx.Vocab(predictor=INT8, certify=False), rules=FORCE)
    assert plan_on(profile, calibration, stated).settings.predictor == INT8
    # So does a size, which the predictor has to do at.
    (measured,) = calibration.sites.values()
    few = hx.Config(vocab=hx.Vocab(candidates=V // 2), rules=FORCE)
    site = plan_on(profile, calibration, few)
    assert (site.settings.predictor, site.computed) == (LOW_RANK, V // 2)
    assert measured.recall_at(V // 2, LOW_RANK).min() >= 0.95


def test_where_it_hardly_matters_the_fewest_bytes_stay(plan_on, calibration):
    profile = dataclasses.replace(machine(int8=2e-12, int8_fine=2e-12), fixed=1e-3)
    assert plan_on(profile, calibration).settings.predictor == LOW_RANK8


def test_those_chosen_for_a_cost_were_weighed_together_and_stay(plan_on, calibration):
    (path, measured), *_ = calibration.sites.items()
    sites = {path: dataclasses.replace(measured, recall=None, target="max_kl 0.1")}
    chosen = hx.Calibration(sites, "max_kl 0.1", calibration.batches)
    assert plan_on(machine(int8=LONG, int8_fine=LONG), chosen).settings.predictor == LOW_RANK8
