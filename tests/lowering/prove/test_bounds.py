"""Norms, roundings and moments: what is computed in any order stays within what is said of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.prove.bounds import ScoresWithBounds, norm, product_error, slack, tiny
from hire_xform.lowering.prove.moment_bounds import bounded_moments, bounded_moments_bytes, pack_bounded_moments

pytestmark = pytest.mark.any_jax("cases vary numbers of arithmetic that is our own", every=3)

RNG = np.random.default_rng(0)


# --- norms and products ---

VECTORS = {
    "ordinary": RNG.normal(size=(5, 33)),
    "one entry": RNG.normal(size=(5, 1)),
    "huge": RNG.normal(size=(5, 8)) * 1e37,
    "small": RNG.normal(size=(5, 8)) * 1e-37,
    "far apart": 10.0 ** RNG.uniform(-30, 30, size=(5, 40)),
    "zero": np.zeros((2, 4)),
    "many": RNG.uniform(0.5, 1, size=(2, 5000)),
}


@pytest.mark.parametrize("name", VECTORS)
def test_a_norm_is_above_the_exact_one_and_hardly(name):
    values = VECTORS[name].astype(np.float32)
    exact = np.sqrt(np.sum(np.square(values.astype(np.float64)), axis=-1))
    found = np.asarray(norm(jnp.asarray(values)), np.float64)
    assert (found >= exact).all()
    assert (found <= exact * 1.001 + 2.0**-117).all()


def test_a_norm_of_what_is_not_finite_is_not():
    assert np.isnan(float(norm(jnp.asarray([1.0, np.nan]))))
    assert not np.isfinite(float(norm(jnp.asarray([1.0, np.inf]))))


@pytest.mark.parametrize("d", [1, 16, 3000])
def test_products_in_any_order_are_within_the_slack(d):
    rows, x = (RNG.normal(size=(20, d)).astype(np.float32) for _ in range(2))
    exact = np.sum(rows.astype(np.float64) * x, axis=1)
    terms = rows * x
    one_by_one = np.cumsum(terms, axis=1, dtype=np.float32)[:, -1]
    pairwise = terms.sum(axis=1, dtype=np.float32)
    off = slack(d) * np.linalg.norm(rows, axis=1) * np.linalg.norm(x, axis=1) + tiny(d)
    assert (np.abs(one_by_one - exact) <= off).all()
    assert (np.abs(pairwise - exact) <= off).all()
    size = jnp.abs(terms).sum(1)
    assert (np.abs(one_by_one - pairwise) <= np.asarray(product_error(size, d))).all()
    # All that is positive first, as large as a partial sum can be.
    rising = np.cumsum(np.sort(terms, axis=1)[:, ::-1], axis=1, dtype=np.float32)[:, -1]
    closer = np.asarray(product_error(size, d, product=pairwise), np.float64)
    assert (closer <= np.asarray(product_error(size, d))).all()
    for found in (one_by_one, pairwise, rising):
        assert (np.abs(found - exact) <= closer / 2).all()


@pytest.mark.parametrize(("bits", "dtype"), [(8, jnp.bfloat16), (11, jnp.float16)])
def test_inputs_that_are_rounded_first_are_within_the_slack_of_their_bits(bits, dtype):
    # All roundings of one sign, as bad as it gets.
    x = np.full((1, 64), 1.0 + 2.0**-bits, np.float32)
    kept = np.asarray(jnp.asarray(x).astype(dtype), np.float64)
    off = abs(np.sum(kept * kept) - np.sum(np.square(x.astype(np.float64))))
    size = float(np.linalg.norm(x) ** 2)
    assert slack(64) * size < off <= slack(64, bits) * size
    assert off <= float(product_error(jnp.float32(size), 64, bits))


def test_bounds_are_the_same_on_both_sides_of_a_score():
    scores, upper = jnp.asarray([[1.0, -3.0, 0.0]]), jnp.asarray([[1.5, -2.0, 1e-3]])
    lower = np.asarray(ScoresWithBounds(scores, upper, jnp.zeros((1, 3))).lower)
    below = np.asarray(scores) - (np.asarray(upper) - np.asarray(scores))
    assert (lower <= below).all()
    np.testing.assert_allclose(lower, below, rtol=1e-5)


# --- moments of all units ---

ROWS = {
    "one row": RNG.normal(size=(1, 4)),
    "not a power of two": RNG.normal(size=(37, 4)),
    "several levels of blocks": RNG.normal(size=(64 * 9 + 5, 3)),
    "far from zero": 1000.0 + RNG.normal(size=(50, 6)) * 1e-2,
    "of one direction": np.outer(RNG.normal(size=40), [1.0, 2.0, 3.0]),
    "large": RNG.normal(size=(20, 3)) * 1e8,
    "all the same": np.ones((16, 4)) * 0.1,
}


@pytest.mark.parametrize("name", ROWS)
def test_the_exact_mean_and_variance_are_within_their_bounds(name):
    dtype = jnp.bfloat16 if name == "of one direction" else jnp.float32
    rows = jnp.asarray(ROWS[name], dtype)
    x = jnp.asarray(RNG.normal(size=(6, rows.shape[1])) * 10.0 ** RNG.uniform(-3, 3, (6, 1)), dtype)
    found = bounded_moments(x, pack_bounded_moments(rows))
    exact = np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T
    mean, variance = exact.mean(1, keepdims=True), exact.var(1, keepdims=True)
    for interval, value in ((found.mean, mean), (found.variance, variance)):
        assert (np.asarray(interval.low, np.float64) <= value).all()
        assert (value <= np.asarray(interval.high, np.float64)).all()
    assert (np.asarray(found.variance.low) >= 0).all()
    assert (np.asarray(found.computed_variance) >= 0).all()
    computed = np.cumsum(np.asarray(x, np.float32)[:, None] * np.asarray(rows, np.float32), -1, dtype=np.float32)[
        ..., -1
    ]
    off = np.sqrt(np.mean(np.square(computed - exact), axis=1, keepdims=True))
    assert (off <= np.asarray(found.error)).all()


def test_bounds_of_moments_are_close_where_nothing_cancels():
    rows, x = jnp.asarray(ROWS["not a power of two"], jnp.float32), jnp.ones((1, 4))
    found = bounded_moments(x, pack_bounded_moments(rows))
    assert float((found.variance.high - found.variance.low)[0, 0]) < 1e-3 * float(found.variance.high[0, 0])
    assert float((found.mean.high - found.mean.low)[0, 0]) < 1e-4
    wider = bounded_moments(x, pack_bounded_moments(rows), input_bits=8)
    assert float(wider.error[0, 0]) > 50 * float(found.error[0, 0])


def test_bounds_of_moments_have_all_that_their_derivation_adds_up():
    rows, x = RNG.normal(size=(600, 5)) + 3.0, RNG.normal(size=(1, 5))
    found = bounded_moments(jnp.asarray(x, jnp.float32), pack_bounded_moments(jnp.asarray(rows, jnp.float32)))
    mean, gram, size, u = rows.mean(0), np.cov(rows.T, bias=True), np.linalg.norm(x), 2.0**-24
    off = 10 * u * np.sqrt(np.square(rows).sum(1).mean()) + slack(5) * np.linalg.norm(mean)
    assert off * size <= float((found.mean.high - found.mean.low)[0, 0]) / 2 <= 2 * off * size + 1e-6
    off = (80 + 16) * u * np.trace(gram) + slack(5) * (np.linalg.norm(gram) + np.linalg.norm(gram @ x[0]) / size)
    assert off * size**2 <= float((found.variance.high - found.variance.low)[0, 0]) / 2 <= 2 * off * size**2


def test_of_rows_that_are_not_finite_nothing_is_known():
    rows = jnp.asarray([[1.0, 2.0], [np.nan, 1.0]])
    found = bounded_moments(jnp.ones((1, 2)), pack_bounded_moments(rows))
    assert not bool(jnp.isfinite(found.mean.low).any() | jnp.isfinite(found.variance.high).any())


def test_bytes_of_bounded_moments():
    made = pack_bounded_moments(jnp.ones((5, 7)))
    assert bounded_moments_bytes(7) == sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(made))
