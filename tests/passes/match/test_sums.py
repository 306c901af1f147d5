"""Sums over units of polynomials in one product, from its mean and variance."""

from types import SimpleNamespace

import numpy as np
import pytest
from jax.extend.core import primitives as prims

from hire_xform.passes.match.region import Apply, Number, Up
from hire_xform.passes.match.sums import NoPolynomialError, product_summed, total

H = np.random.default_rng(0).normal(3.0, 2.0, size=40)
PARAMS = {prims.integer_pow_p: {"y": 2}}
OPS = {
    prims.add_p: np.add,
    prims.sub_p: np.subtract,
    prims.mul_p: np.multiply,
    prims.div_p: np.divide,
    prims.neg_p: np.negative,
    prims.square_p: np.square,
    prims.integer_pow_p: np.square,
    prims.copy_p: np.positive,
}
up, two = Up(None, ()), Number(2.0)


def evaluated(exprs, units=H):
    values = []
    for expr in exprs:
        if isinstance(expr, Apply):
            values.append(OPS[expr.node.primitive](*(values[o] for o in expr.operands)))
        else:
            values.append(units if isinstance(expr, Up) else 2.0)
    return values


def varying(exprs):
    """Which expressions differ by unit."""
    found = []
    for expr in exprs:
        found.append(isinstance(expr, Up) or (isinstance(expr, Apply) and any(found[o] for o in expr.operands)))
    return found


def op(primitive, *operands):
    return Apply(SimpleNamespace(primitive=primitive, params=PARAMS.get(primitive, {})), operands)


POLYNOMIALS = {
    "product": [up],
    "copied": [up, op(prims.copy_p, 0)],
    "negated": [up, op(prims.neg_p, 0)],
    "shifted": [up, two, op(prims.add_p, 0, 1)],
    "subtracted": [up, two, op(prims.sub_p, 1, 0)],
    "scaled": [up, two, op(prims.mul_p, 1, 0)],
    "divided": [up, two, op(prims.div_p, 0, 1)],
    "squared": [up, op(prims.square_p, 0)],
    "to the power of two": [up, op(prims.integer_pow_p, 0)],
    "distance squared": [up, two, op(prims.sub_p, 0, 1), op(prims.square_p, 2)],
    "times itself shifted": [up, two, op(prims.add_p, 0, 1), op(prims.mul_p, 0, 2)],
    "square and itself": [up, op(prims.square_p, 0), op(prims.sub_p, 1, 0)],
    "a number": [two],
}


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_the_sum_over_units_is_that_of_mean_and_variance(name):
    exprs = POLYNOMIALS[name]
    values, last = evaluated(exprs), len(exprs) - 1
    got = total(exprs, varying(exprs), last, lambda n: values[n], lambda n: H.mean(), H.var(), len(H))
    np.testing.assert_allclose(got, np.sum(np.broadcast_to(values[-1], H.shape)), rtol=1e-12)
    if name != "a number":
        assert product_summed(exprs, varying(exprs), last) == 0


NONE = {
    "cubed": [up, op(prims.square_p, 0), op(prims.mul_p, 0, 1)],
    "square of a square": [up, op(prims.square_p, 0), op(prims.square_p, 1)],
    "divided by it": [up, two, op(prims.div_p, 1, 0)],
    "absolute": [up, op(prims.abs_p, 0)],
    "of two products": [up, up, op(prims.add_p, 0, 1)],
    "of no product": [two],
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_polynomial_of_one_product_is_told(name):
    exprs = NONE[name]
    with pytest.raises(NoPolynomialError):
        product_summed(exprs, varying(exprs), len(exprs) - 1)
