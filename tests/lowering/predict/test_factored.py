"""Rows and tokens on few directions, which a subclass names: here, the first columns."""

import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.predict.factored import Factored
from hire_xform.lowering.predict.predictors import Given

pytestmark = pytest.mark.any_jax("cases vary numbers of arithmetic that is our own", every=3)

N, D = 20, 32
RNG = np.random.default_rng(0)
ROWS = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(3, D)), jnp.float32)


class Leading(Factored):
    """The first columns; the leading one is told last."""

    def maps(self, gram, inputs, rank):
        np.testing.assert_allclose(gram, ROWS.T @ ROWS, rtol=1e-4, atol=1e-4)
        return (jnp.eye(D)[:, :rank][:, ::-1],) * 2


def scores(spec, rows=ROWS):
    packed = spec.pack(rows, Given(None, {}, np.arange(N)))
    told = spec.shapes(N, D, rows.dtype)
    assert {k: (v.shape, v.dtype) for k, v in packed.items()} == {k: (v.shape, v.dtype) for k, v in told.items()}
    return spec.scores(X, packed, N)


@pytest.mark.parametrize(("bits", "limit"), [(None, 1e-5), (8, 0.02), (4, 0.2)])
@pytest.mark.parametrize("rank", [1, 8, 24, D])
def test_scores_are_products_on_these_directions(rank, bits, limit):
    want = X[:, :rank] @ ROWS[:, :rank].T
    got = scores(Leading(rank, bits=bits))
    assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)


def test_a_fraction_of_the_columns():
    assert [Leading(r).rank_for(N, D) for r in (0.5, 0.26, 1.0, 99, 3)] == [16, 9, D, D, 3]
    assert scores(Leading(0.5)).shape == (3, N)


def test_leading_directions_are_kept_in_more_bits():
    told = Leading(24, bits=4).shapes(N, D, jnp.float32)
    assert told["lead_q"].shape == (N, 3)
    assert told["q"].shape == (N, 11)
    assert "lead_q" not in Leading(7, bits=4).shapes(N, D, jnp.float32)
    assert "lead_q" not in Leading(24, bits=8).shapes(N, D, jnp.float32)


def test_a_subclass_that_says_nothing_is_no_predictor():
    with pytest.raises(NotImplementedError):
        Factored(2).maps(None, None, 2)
    with pytest.raises(NotImplementedError):
        Factored(2).coordinates(None, None)
    with pytest.raises(ValueError, match="Leading: rank=0"):
        Leading(0)
