"""What steps are given of a platform's functions on arrays."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from hire_xform.lowering.kernels.rules import Rules


def select_rows_dot(x, rows, index, group, magnitudes=False, scale=None):
    assert (group, magnitudes) == (1, False)
    return x @ (rows[index] if scale is None else rows[index] * scale[index]).T


def test_results_are_of_the_dtype_that_a_step_asks_for():
    asked = []
    rules = Rules(lambda module: asked.append(module) or SimpleNamespace(select_rows_dot=select_rows_dot))
    assert not asked
    x, rows, index, scale = jnp.ones((1, 4)), jnp.ones((6, 4)), jnp.asarray([2, 0]), jnp.full((6, 1), 2.0)
    settings = {"group_size": 1, "out_dtype": jnp.bfloat16, "magnitudes": False}
    plain = rules.select_rows_dot(x, rows, index, **settings)
    scaled = rules.select_stored_rows_dot(x, index, rows, scale, **settings, operations=(), shared=())
    assert plain.dtype == scaled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(scaled.astype(jnp.float32), 2.0 * plain.astype(jnp.float32))
    assert asked == ["rows", "rows"]
