"""Sums over all units, added up in any order and rounded as a program does: within bounds from the units' moments."""

from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.extend.core import primitives as prims

from hire_xform.lowering.prove.intervals import point
from hire_xform.lowering.prove.moment_bounds import bounded_moments, pack_bounded_moments
from hire_xform.passes.match.region import Apply, Number, Region, Total, Up
from hire_xform.passes.prove.sum_bounds import total_bounds

pytestmark = pytest.mark.any_jax("cases vary numbers of arithmetic that is our own", every=2)

D, T = 6, 64
RNG = np.random.default_rng(0)
DTYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}
NUMBER = 0.7
OPS = {
    prims.add_p: np.add,
    prims.sub_p: np.subtract,
    prims.mul_p: np.multiply,
    # As a compiler divides by a constant.
    prims.div_p: lambda a, b: a * (np.ones((), b.dtype) / b),
    prims.neg_p: np.negative,
    prims.square_p: np.square,
    prims.integer_pow_p: np.square,
    prims.copy_p: lambda a: a,
    prims.convert_element_type_p: lambda a: a,
}


def op(primitive, *operands):
    return primitive, operands


# After the product, 0, and a number, 1.
SUMMED = {
    "the units": [],
    "negated and copied": [op(prims.neg_p, 0), op(prims.copy_p, 2)],
    "converted": [op(prims.convert_element_type_p, 0)],
    "shifted": [op(prims.sub_p, 0, 1)],
    "divided": [op(prims.div_p, 0, 1)],
    "scaled": [op(prims.mul_p, 1, 0)],
    "squares": [op(prims.square_p, 0)],
    "squares by a power": [op(prims.integer_pow_p, 0)],
    "squares of distances": [op(prims.sub_p, 0, 1), op(prims.mul_p, 2, 2)],
    "a polynomial": [op(prims.square_p, 0), op(prims.mul_p, 2, 1), op(prims.add_p, 3, 0), op(prims.sub_p, 4, 1)],
}


def region_of(steps, dtype, units):
    value = SimpleNamespace(aval=SimpleNamespace(dtype=jnp.dtype(dtype)))
    exprs = [Up(SimpleNamespace(out=value, unrounded=False), ()), Number(SimpleNamespace(val=NUMBER))]
    varies = [True, False]
    for primitive, operands in steps:
        params = {"y": 2} if primitive is prims.integer_pow_p else {}
        exprs.append(Apply(SimpleNamespace(primitive=primitive, params=params, outputs=[value]), operands))
        varies.append(any(varies[o] for o in operands))
    summed = len(exprs) - 1 if steps else 0
    return Region(units, exprs, varies), Total(summed, jnp.dtype(dtype))


def computed(steps, made_of, dtype):
    """What a program has of each unit: every step rounded."""
    values = [made_of.astype(dtype), np.asarray(NUMBER, dtype)]
    for primitive, operands in steps:
        # Of one unit all of it is in these roundings.
        values.append(OPS[primitive](*(values[o] for o in operands)).astype(dtype))
    return values[-1] if steps else values[0]


def sums(values, dtype):
    """In several orders: pairwise in f32, one after the other, and each partial sum rounded."""
    wide = values.astype(np.float32)
    yield wide.sum(axis=1).astype(dtype)
    yield np.cumsum(wide, axis=1, dtype=np.float32)[:, -1].astype(dtype)
    yield np.cumsum(wide[:, np.argsort(-np.abs(wide[0]))], axis=1, dtype=np.float32)[:, -1].astype(dtype)
    total = np.zeros(len(values), dtype)
    for column in values.T:
        total = (total + column).astype(dtype)
    yield total


@pytest.mark.parametrize("units", [1, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SUMMED)
def test_what_a_program_adds_up_is_within_the_bounds(name, dtype, units):
    dtype, steps = DTYPES[dtype], SUMMED[name]
    rows = (RNG.normal(size=(units, D)) + 1.0).astype(dtype)
    x = (RNG.normal(size=(T, D)) * RNG.uniform(0.1, 2, size=(T, 1))).astype(dtype)
    region, total = region_of(steps, dtype, units)
    moments = {0: bounded_moments(jnp.asarray(x), pack_bounded_moments(jnp.asarray(rows)))}
    found = total_bounds(region, total, lambda n: point(jnp.asarray(NUMBER, dtype)), moments)
    # The same products, added up in another order.
    made_of = (x[:, ::-1].astype(np.float32) @ rows[:, ::-1].astype(np.float32).T).astype(np.float32)
    low, high = (np.asarray(end, np.float64)[:, 0] for end in found)
    # What comes near the largest number is not known.
    assert np.isfinite(low).sum() >= (T // 2 if dtype == np.float16 else T)
    for made in sums(computed(steps, made_of, dtype), dtype):
        made = made.astype(np.float64)
        assert not ((made < low) | (made > high)).any()
    if dtype == np.float32:
        # Close to each other: of a thousandth of the sum of magnitudes.
        size = np.abs(computed(steps, made_of, dtype).astype(np.float64)).sum(1)
        assert (high - low <= 1e-2 * size + 1e-3).all()


def test_what_overflows_is_not_known():
    region, total = region_of(SUMMED["squares"], np.float16, 300)
    rows = jnp.full((300, D), 10.0, jnp.float16)
    moments = {0: bounded_moments(jnp.full((1, D), 10.0, jnp.float16), pack_bounded_moments(rows))}
    found = total_bounds(region, total, lambda n: point(NUMBER), moments)
    assert np.isnan(np.asarray(found)).any()
