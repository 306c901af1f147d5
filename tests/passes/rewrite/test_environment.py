"""Views of packed arrays: one matrix of a stack, by its indices, in range or not."""

import jax.numpy as jnp
import numpy as np
import pytest
from laid_out import laid_out

from hire_xform.passes.rewrite.environment import PackedView, read
from hire_xform.passes.weights.recipe import Recipe, Root, Stack, Transpose

ARRAY = jnp.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)


def test_a_view_takes_one_matrix_and_its_rows_where_they_lie():
    view = PackedView(ARRAY).at(1).at(2)
    np.testing.assert_array_equal(view.whole(), ARRAY[1, 2])
    rows, first = view.rows()
    assert rows.shape == (24, 5)
    np.testing.assert_array_equal(rows[first : first + 4], ARRAY[1, 2])
    whole, zero = PackedView(ARRAY[0, 0]).rows()
    assert whole is not None
    assert zero == 0


@pytest.mark.parametrize(("index", "taken"), [(-1, 0), (0, 0), (1, 1), (2, 1)])
def test_out_of_range_is_the_nearest_or_nan(index, taken):
    near = PackedView(ARRAY).at(index)
    np.testing.assert_array_equal(near.whole(), ARRAY[taken])
    assert near.at(0).rows()[1] == 12 * taken
    assert near.filled(jnp.ones(2)).tolist() == [1, 1]
    filled = PackedView(ARRAY).at(index, fills=True).at(0, fills=True)
    assert bool(jnp.isnan(filled.filled(jnp.ones(2))).all()) is (index != taken)


def test_a_leaf_as_it_is_makes_its_matrix():
    view = PackedView(ARRAY, recipe=Recipe(Root.of(0, 0), (Stack(2), Stack(3), Transpose((1, 0)))))
    np.testing.assert_array_equal(view.at(1).at(5).matrix(), ARRAY[1, 2].T)


def test_what_is_read_is_there_or_it_is_said_what_is_missing():
    found = laid_out(lambda w, x: jnp.sin(x @ w) + 2.0, jnp.ones((4, 5)), jnp.ones((3, 4)))
    product, add = found.product, found.output.node
    assert read({product.out: 7}, product.out) == 7
    assert read({}, add.inputs[1]) == 2.0
    assert read({}, product.out, missing_ok=True) is None
    with pytest.raises(AssertionError, match=r"dot_general\[0\], which was dropped"):
        read({}, product.out)
