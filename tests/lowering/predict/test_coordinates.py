"""Rows in other coordinates: a dense product, in any order of its sum, is within the bounds of the scores."""

import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.predict.coordinates import _rounded_up, coordinate_scores, coordinate_shapes, pack_coordinates
from hire_xform.lowering.predict.factors import (
    factor_dtype,
    leading_directions,
    principal_directions,
    shrunk,
    weighted_factors,
)

RNG = np.random.default_rng(0)
N, D, T = 60, 32, 5


def directions(gram):
    """The principal ones of the rows."""
    basis = principal_directions(gram, D)[:, ::-1]
    return basis, jnp.maximum(jnp.sum(basis * (gram @ basis), axis=0), 1e-6)


def decaying(n):
    return RNG.normal(size=(n, D)) * 0.8 ** np.arange(D)


ROWS = {
    "ordinary": RNG.normal(size=(N, D)),
    "near few directions": decaying(N),
    "around a common row": 50 + decaying(N),
    "large": decaying(N) * 1e15,
    "small": decaying(N) * 1e-15,
    "of very different sizes": decaying(N) * 10.0 ** RNG.uniform(-6, 6, (N, 1)),
    "zero": np.zeros((N, D)),
}
FORMS = [(8, 8), (24, 4), (6, 4), (8, None), (D, 8), (1, 8)]


@pytest.mark.any_jax("cases vary numbers of arithmetic that is our own", every=3)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("rank", "bits"), FORMS[:4])
def test_dense_products_are_within_the_bounds(name, rank, bits):
    rows = jnp.asarray(ROWS[name], jnp.float32)
    x = jnp.asarray(decaying(T) * [[1], [1e3], [1e-3], [1], [30]], jnp.float32)
    packed = pack_coordinates(rows, rank, bits, directions)
    scores, upper, exact_error = (
        np.asarray(v, np.float64) for v in coordinate_scores(x, packed, rank, bits, input_bits=24)
    )
    exact = np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T
    terms = np.asarray(x)[:, None] * np.asarray(rows)
    one_by_one = np.cumsum(terms, -1, dtype=np.float32)[..., -1].astype(np.float64)
    backwards = np.cumsum(terms[..., ::-1], -1, dtype=np.float32)[..., -1].astype(np.float64)
    bound = upper - scores
    for made in (exact, one_by_one, backwards):
        assert (made <= upper).all()
        assert (made >= scores - bound * (1 + 1e-6) - 1e-6 * np.abs(scores) - 1e-30).all()
    assert (np.abs(one_by_one - backwards) <= exact_error).all()
    if name == "near few directions" and bits != 4:
        # Of what is kept hardly anything is lost.
        size = np.linalg.norm(rows, axis=1) * np.linalg.norm(x, axis=1)[:, None]
        assert np.median(bound / size) < 0.2


@pytest.mark.parametrize(("rank", "bits"), FORMS)
def test_shapes_are_as_announced(rank, bits):
    for dtype in (jnp.float32, jnp.bfloat16):
        rows = jnp.asarray(ROWS["ordinary"], dtype)
        made = pack_coordinates(rows, rank, bits, directions)
        told = coordinate_shapes(N, D, rank, bits, dtype)
        assert {k: (v.shape, v.dtype) for k, v in made.items()} == {k: (v.shape, v.dtype) for k, v in told.items()}


def test_all_coordinates_leave_little():
    rows, x = jnp.asarray(ROWS["ordinary"], jnp.float32), jnp.asarray(RNG.normal(size=(1, D)), jnp.float32)
    bounds = {}
    for rank in (4, 16, D):
        packed = pack_coordinates(rows, rank, 8, directions)
        scores, upper, _ = coordinate_scores(x, packed, rank, 8, input_bits=24)
        bounds[rank] = float(jnp.mean(upper - scores))
    assert bounds[4] > bounds[16] > 10 * bounds[D]


def test_fewer_bits_of_inputs_widen_the_bounds():
    rows, x = jnp.asarray(ROWS["ordinary"], jnp.float32), jnp.ones((1, D))
    packed = pack_coordinates(rows, 8, 8, directions)
    (_, plain, error), (_, wide, wider) = (coordinate_scores(x, packed, 8, 8, input_bits=b) for b in (24, 8))
    assert (wide > plain).all()
    assert (wider > 100 * error).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_has_no_bound_and_leaves_others_as_they_are(bad):
    rows = np.array(ROWS["near few directions"], np.float32)
    x = jnp.asarray(decaying(2), jnp.float32)
    rows[7, 3] = bad
    _, upper, _ = coordinate_scores(x, pack_coordinates(jnp.asarray(rows), 8, 8, directions), 8, 8, input_bits=24)
    assert np.isnan(upper[:, 7]).all()
    assert np.isfinite(np.delete(upper, 7, 1)).all()


def test_norms_are_rounded_up():
    values = np.concatenate([10.0 ** RNG.uniform(-30, 30, 500), [0, 1, 2.0**-126]]).astype(np.float32)
    found = np.asarray(_rounded_up(jnp.asarray(values)), np.float32)
    assert (found >= values).all()
    assert (found <= values * 1.01).all()
    assert np.isnan(np.asarray(_rounded_up(jnp.asarray([np.nan])), np.float32)).all()


# --- factors ---


def test_factors_in_the_norm_of_the_inputs_are_the_best():
    w, root = decaying(N), np.diag(np.linspace(0.1, 3, D))
    e, d = (np.asarray(f, np.float64) for f in weighted_factors(jnp.asarray(w.T @ w), jnp.asarray(root @ root), 5))
    left = np.linalg.norm((w - w @ e @ d.T) @ root)
    best = np.sqrt(np.sum(np.linalg.svd(w @ root, compute_uv=False)[5:] ** 2))
    assert best * 0.999 <= left <= best * 1.05
    plain = np.linalg.svd(w)[2][:5]
    assert left < np.linalg.norm((w - w @ plain.T @ plain) @ root)


def test_second_moments_are_shrunk_to_mean_one():
    made = np.asarray(shrunk(jnp.diag(jnp.arange(4.0) * 7)))
    assert np.trace(made) == pytest.approx(4, rel=1e-5)
    assert made[0, 0] > 0
    np.testing.assert_array_equal(shrunk(jnp.zeros((3, 3))), np.eye(3))


def test_small_things():
    assert factor_dtype(jnp.float16) == jnp.bfloat16
    assert factor_dtype(jnp.float32) == jnp.float32
    assert leading_directions(32) == 4
    basis = np.asarray(principal_directions(jnp.diag(jnp.asarray([1.0, 5.0, 3.0])), 2))
    np.testing.assert_allclose(np.abs(basis), [[0, 0], [0, 1], [1, 0]], atol=1e-6)
