"""Stages read the rows that are open and no others, and their bounds hold for all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.engine import narrowing
from hire_xform.lowering.engine.narrowing import narrowed
from hire_xform.lowering.predict.low_rank import LowRank
from hire_xform.lowering.predict.quantized import Quantized
from hire_xform.lowering.predict.staged import Staged
from hire_xform.lowering.prove.bounds import ScoresWithBounds
from hire_xform.lowering.prove.proofs import pack_proof, scores_with_bounds

pytestmark = pytest.mark.any_jax("cases vary numbers of arithmetic that is our own", every=2)

V, D = 1300, 32
SPEC = Staged((Quantized(4), Quantized(8)))
THREE = Staged((LowRank(8, bits=8), Quantized(4), Quantized(8)))


def tokens_and_rows(tokens=1, seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((tokens, D), (V, D)))


def above(floor):
    """What is not below a number is open, for any token."""
    return lambda known: jnp.max(known.upper - floor, axis=0)


def run(x, rows, opened, spec=SPEC, **more):
    def step(x, proof):
        found, counts = narrowed(x, proof, spec, opened, **more)
        return (found.scores, found.upper, found.exact_error), counts

    found, counts = jax.jit(step)(x, pack_proof(rows, spec))
    return ScoresWithBounds(*found), counts


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("floor", [-1e9, 0.0, 8.0, 1e9])
def test_the_rows_that_are_open_get_the_next_stage_and_no_others(tokens, floor):
    x, rows = tokens_and_rows(tokens)
    first, second = (
        scores_with_bounds(x, SPEC.part(pack_proof(rows, SPEC), i), stage) for i, stage in enumerate(SPEC.stages)
    )
    found, (count,) = run(x, rows, above(floor))
    open_here = np.asarray(jnp.max(first.upper, axis=0) >= floor)
    assert int(count) == open_here.sum()
    assert {-1e9: V, 1e9: 0}.get(floor, count) == count
    # Each row has the bounds of the stage that read it last; but row zero, which fills a block up, may have either.
    want = np.where(open_here, second.upper, first.upper)
    np.testing.assert_allclose(found.upper[:, 1:], want[:, 1:], rtol=1e-5, atol=1e-5)
    want = np.where(open_here, second.scores, first.scores)
    np.testing.assert_allclose(found.scores[:, 1:], want[:, 1:], rtol=1e-5, atol=1e-5)
    exact = np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T
    assert (exact <= np.asarray(found.upper, np.float64)).all()
    assert (exact >= np.asarray(found.lower, np.float64)).all()


def test_each_stage_reads_what_the_one_before_left_open():
    x, rows = tokens_and_rows()
    found, (second, third) = run(x, rows, above(6.0), THREE)
    assert V > int(second) > int(third) > 0
    assert int(third) >= int(jnp.sum(found.upper >= 6.0))


def test_few_open_rows_are_not_worth_a_stage():
    x, rows = tokens_and_rows()
    _, (count,) = run(x, rows, above(8.0))
    assert int(run(x, rows, above(8.0), few=int(count))[1][0]) == 0
    assert int(run(x, rows, above(8.0), few=int(count) - 1)[1][0]) == int(count)


def test_rows_of_which_nothing_is_known_are_open_and_stay_so():
    x, rows = tokens_and_rows()
    rows = rows.at[7].set(jnp.nan).at[1290].set(jnp.inf)
    found, (count,) = run(x, rows, lambda known: jnp.max(known.upper, axis=0) - 8.0)
    assert np.isnan(np.asarray(found.upper)[0, [7, 1290]]).all()
    assert np.isfinite(np.asarray(found.upper)).sum() == V - 2
    assert int(count) < V


def test_no_more_rows_are_read_than_are_open(monkeypatch):
    """Counted where rows are read: as many blocks as the open rows fill."""
    monkeypatch.setattr(narrowing, "TOGETHER", 100)
    read = []
    taken = narrowing.rows_of

    def counted(proof, stage, index):
        jax.debug.callback(lambda index: read.append(np.asarray(index)), index)
        return taken(proof, stage, index)

    monkeypatch.setattr(narrowing, "rows_of", counted)
    x, rows = tokens_and_rows()
    _, (count,) = run(x, rows, above(4.0))
    jax.effects_barrier()
    assert len(read) == -(-int(count) // 100) > 1
    assert len({int(i) for block in read for i in block} - {0}) <= int(count)


def test_one_stage_is_what_it_bounds():
    x, rows = tokens_and_rows()
    found, counts = run(x, rows, above(0.0), Quantized(8))
    alone = scores_with_bounds(x, pack_proof(rows, Quantized(8)), Quantized(8))
    assert list(counts) == []
    np.testing.assert_allclose(found.upper, alone.upper, rtol=1e-5, atol=1e-5)
