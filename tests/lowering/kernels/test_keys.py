"""Scores as integers of the same order."""

import jax
import jax.numpy as jnp
import numpy as np

from hire_xform.lowering.kernels.keys import LOWEST, turned


def test_they_are_in_the_order_of_scores_and_turn_back():
    scores = jnp.array([-jnp.inf, -3e38, -1.5, -1e-30, -0.0, 0.0, 1e-30, 2.0, jnp.inf, jnp.nan], jnp.float32)
    raw = jax.lax.bitcast_convert_type(scores, jnp.int32)
    keys = np.asarray(turned(raw), np.int64)
    assert keys[0] > LOWEST
    assert np.all(np.diff(keys) > 0)
    np.testing.assert_array_equal(turned(turned(raw)), raw)
