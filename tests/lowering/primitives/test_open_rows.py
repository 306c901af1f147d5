"""Which entries are not below zero."""

import jax
import jax.numpy as jnp
import numpy as np

from hire_xform.lowering.primitives.open_rows import open_rows


def test_entries_that_are_not_below_zero_in_order_and_then_zeros():
    index, count = jax.jit(open_rows)(jnp.asarray([-1.0, 3.0, -0.0, jnp.nan, -jnp.inf, jnp.inf, -1e-30]))
    assert int(count) == 4
    assert index.dtype == count.dtype == jnp.int32
    np.testing.assert_array_equal(index, [1, 2, 3, 5, 0, 0, 0])


def test_none_and_all():
    for values, want in ((-jnp.ones(3), 0), (jnp.zeros(3), 3)):
        index, count = open_rows(values)
        assert int(count) == want
        np.testing.assert_array_equal(index, np.arange(3) if want else np.zeros(3))
