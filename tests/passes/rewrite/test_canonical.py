"""Operands and results of products between the program's shapes and ``[T, n]``: there and back."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from laid_out import laid_out

from hire_xform.passes.rewrite.canonical import (
    dense_product,
    flat_activation,
    flat_result,
    result_shape,
    shaped_activation,
)

RNG = np.random.default_rng(0)
SPELLINGS = {
    "td,dm->tm": ((3, 4), (4, 5)),
    "td,dm->mt": ((3, 4), (4, 5)),
    "btd,dhk->bthk": ((2, 3, 4), (4, 5, 2)),
    "tkh,hdk->dt": ((3, 2, 5), (5, 4, 2)),
    "tkh,hdk->td": ((3, 2, 5), (5, 4, 2)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_product_of_flat_operands_is_the_programs(spelling):
    x, w = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in SPELLINGS[spelling])
    product = laid_out(lambda w, x: jnp.einsum(spelling, x, w), w, x).product
    flat = flat_activation(product, x)
    np.testing.assert_array_equal(shaped_activation(product, flat), x)
    result = dense_product(product, flat, product.rows_free().apply(w))
    operands = (w, x) if product.weight_left else (x, w)
    want = lax.dot_general(*operands, product.node.params["dimension_numbers"])
    np.testing.assert_allclose(result_shape(product, result), want, rtol=1e-5)
    np.testing.assert_array_equal(flat_result(product, result_shape(product, result)), result)
    again = dense_product(product, flat, product.rows_contracted().apply(w), contracted_first=True)
    np.testing.assert_allclose(again, result, rtol=1e-5)


def test_rows_that_are_stored_narrower_are_widened_and_the_result_has_its_dtype():
    w, x = jnp.ones((4, 5)), jnp.ones((3, 4))
    product = laid_out(lambda w, x: x @ w, w, x).product
    rows = jnp.ones((5, 4), jnp.bfloat16)
    assert dense_product(product, x, rows).dtype == jnp.float32
    assert dense_product(product, x, rows, dtype=jnp.bfloat16).dtype == jnp.bfloat16
