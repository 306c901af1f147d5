"""What a calibration measures of a predictor in stages, and what a plan makes of it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from calibrated import FORCED, D, normal
from checks import named

import hire_xform as hx
from hire_xform.lowering.prove.proofs import proof_bytes

V = 2048
SPEC = hx.Staged((hx.LowRank(0.5, bits=4), hx.Quantized(8)))
CONFIG = dataclasses.replace(FORCED, vocab=hx.Vocab(certify=True), rules=named(hx.Vocab(certify=True)))


def head(w, x):
    return x @ w.T


@pytest.fixture(scope="module")
def measured():
    w, x = normal(0, V, D), [normal(1 + i, 50, D) for i in range(2)]
    return w, x, hx.calibrate(head, [(w, one) for one in x], predictors=[SPEC], config=CONFIG, progress=False)


def test_the_share_of_the_rows_that_a_stage_leaves_open_is_measured_and_told(measured):
    w, x, calibration = measured
    (site,) = calibration.sites.values()
    (known,) = site.curves
    (share,) = known.shares
    assert 0.001 < share < 0.9
    assert site.curves[known].predictor_bytes == proof_bytes(V, D, known, jnp.float32)
    for settings in (CONFIG, dataclasses.replace(CONFIG, rules=named(hx.Vocab(certify=True, predictor=SPEC)))):
        plan = hx.sparsify(head, config=settings, calibration=calibration).trace(w, x[0][:1]).plan
        assert plan.sites[0].settings.spec.shares == known.shares
        assert f"Quantized(bits=8) of {share:.2%} of the rows, those still open, measured" in plan.sites[0].stages
    guessed = hx.sparsify(head, config=settings).trace(w, x[0][:1])
    assert "in stages: LowRank(rank=0.5, bits=4) of all rows" in guessed.explain()
    assert "a guess" in guessed.explain()


def test_the_measured_share_is_that_of_the_rows_read(measured):
    """Rows whose first bounds reach the dense arg max, counted here."""
    from hire_xform.lowering.prove.proofs import pack_proof, scores_with_bounds

    w, x, calibration = measured
    (site,) = calibration.sites.values()
    (known,) = site.curves
    counted = []
    # Each half of the batches is measured as fitted to the other.
    for own, other in ((x[0], x[1]), (x[1], x[0])):
        proof = pack_proof(w, SPEC, other.T @ other / len(other))
        upper = scores_with_bounds(own, SPEC.part(proof, 0), SPEC.stages[0]).upper
        counted.append(np.mean(np.asarray(upper) >= np.max(np.asarray(own @ w.T), axis=1, keepdims=True)))
    np.testing.assert_allclose(known.shares[0], np.mean(counted), rtol=0.02)


def test_a_file_keeps_it(measured, tmp_path):
    _, _, calibration = measured
    calibration.save(tmp_path / "c.npz")
    (again,) = hx.Calibration.load(tmp_path / "c.npz").sites.values()
    assert again.predictor == SPEC
    assert again.predictor.shares == next(iter(calibration.sites.values())).predictor.shares
