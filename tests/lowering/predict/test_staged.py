"""Predictors in stages: what they are made of, and what is reckoned of them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import hire_xform as hx
from hire_xform.lowering.predict.predictors import OPEN, Predictor
from hire_xform.lowering.prove.proofs import PROBED, pack_proof, proof_bytes, proof_reads, rows_of, scores_with_bounds

FIRST, SECOND = hx.LowRank(8, bits=4), hx.Quantized(8)
SPEC = hx.Staged((FIRST, SECOND))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Plain(Predictor):
    """Proves nothing."""


@pytest.mark.parametrize("stages", [(), (SECOND,), SECOND, (SECOND, Plain()), (SPEC, SECOND), (SECOND, 8)])
def test_what_is_no_sequence_of_predictors_that_prove_is_refused(stages):
    with pytest.raises(ValueError, match="expected two or more predictors that prove"):
        hx.Staged(stages)


@pytest.mark.parametrize("shares", [(), (0.5, 0.5), (1.5,), (-0.1,)])
def test_shares_are_of_each_stage_after_the_first(shares):
    with pytest.raises(ValueError, match="a share of the rows"):
        hx.Staged((FIRST, SECOND), shares=shares)


def test_what_was_measured_changes_no_program():
    measured = SPEC.measured([0.25])
    assert measured.shares == (0.25,)
    assert measured == SPEC
    assert hash(measured) == hash(SPEC)
    assert SPEC.expected == (1.0, OPEN)
    assert measured.expected == (1.0, 0.25)


def test_settings_make_it_again():
    for spec in (SPEC, SPEC.measured([0.125])):
        again = hx.Staged(**json.loads(json.dumps(spec.settings())))
        assert again == spec
        assert again.shares == spec.shares


def test_it_takes_what_its_stages_take():
    assert SPEC.takes_inputs
    assert not hx.Staged((hx.Quantized(4), SECOND)).takes_inputs
    assert hx.Staged((hx.Projected(4, bits=8), SECOND)).needs_inputs == "principal directions"


def test_bytes_are_those_of_all_rows_and_of_the_share_that_is_expected():
    n, d = 4096, 64
    first, second = (proof_bytes(n, d, stage, jnp.float32) for stage in SPEC.stages)
    probes = PROBED * d * 4
    for spec in (SPEC, SPEC.measured([0.25])):
        assert proof_bytes(n, d, spec, jnp.float32) == first + spec.expected[1] * second + probes
    # What is of the matrix as a whole is read whole, whichever rows are.
    spec = hx.Staged((SECOND, FIRST)).measured([0.0])
    read = {
        name
        for (share, _), name in zip(
            proof_reads(n, d, spec, jnp.float32), spec.proof_shapes(n, d, jnp.float32), strict=True
        )
        if share
    }
    assert {"0.q", "1.basis_q"} <= read
    assert "1.q0" not in read


def test_bounds_of_all_rows_are_the_closest_of_all_stages():
    x, rows = normal(0, 2, 32), normal(1, 200, 32)
    proof = pack_proof(rows, SPEC)
    found = scores_with_bounds(x, proof, SPEC)
    alone = [scores_with_bounds(x, SPEC.part(proof, i), stage) for i, stage in enumerate(SPEC.stages)]
    width = np.minimum(*(np.asarray(one.upper - one.scores) for one in alone))
    np.testing.assert_allclose(found.upper - found.scores, width, rtol=1e-4, atol=1e-5)
    exact = np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T
    assert ((found.lower <= exact) & (exact <= found.upper)).all()


@pytest.mark.parametrize("spec", [SECOND, hx.Quantized(4), FIRST, hx.LowRank(1.0), hx.LowRank(0.75, bits=8)], ids=str)
def test_the_proof_of_chosen_rows_bounds_them_as_that_of_all_does(spec):
    """Fewer rows than the rank, too."""
    x, rows, index = normal(0, 2, 32), normal(1, 50, 32), jnp.asarray([7, 3, 3, 49], jnp.int32)
    proof = pack_proof(rows, spec)
    whole, some = scores_with_bounds(x, proof, spec), scores_with_bounds(x, rows_of(proof, spec, index), spec)
    np.testing.assert_allclose(some.scores, whole.scores[:, index], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(some.upper, whole.upper[:, index], rtol=1e-5, atol=1e-5)


def test_blocks_and_other_products_are_not_read_in_stages():
    for settings in (hx.Ffn, hx.Dense):
        with pytest.raises(ValueError, match="expected one that is read at once"):
            settings(predictor=SPEC)
