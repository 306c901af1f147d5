"""Which units fire together, and which groups of them are kept: against plain sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.engine.top_groups import group_energy, keep_top_groups
from hire_xform.lowering.measure import cofiring as module
from hire_xform.lowering.measure.cofiring import cofiring

RNG = np.random.default_rng(0)


def test_few_units_are_counted_in_pairs():
    fires = RNG.integers(0, 2, size=(20, 6))
    np.testing.assert_array_equal(cofiring(jnp.asarray(fires)), fires.T @ fires)


def test_many_units_keep_a_sketch_of_the_same(monkeypatch):
    monkeypatch.setattr(module, "SKETCHED_FROM", 5)
    # No two tokens are the same: those have the same signs.
    fires = (RNG.integers(0, 2, size=(40, 6)) * RNG.uniform(0.5, 1, (40, 6))).astype(np.float32)
    made = np.asarray(cofiring(jnp.asarray(fires)))
    assert made.shape == (6, module.SKETCH)
    error = 4 * np.linalg.norm(fires, axis=0).max() ** 2 / module.SKETCH**0.5
    np.testing.assert_allclose(made @ made.T, fires.T @ fires, atol=error)
    # The signs hang on the token alone, so that sums of batches are sums of all.
    halves = cofiring(jnp.asarray(fires[:20])) + cofiring(jnp.asarray(fires[20:]))
    np.testing.assert_allclose(halves, made, atol=1e-5)


def test_the_groups_of_largest_energy_are_kept():
    activation = jnp.asarray([[1.0, 1, 5, 0, 3, 3], [0, 0, 1, 1, 9, 0]])
    norms = jnp.asarray([1.0, 1, 0.1, 1, 1, 1])
    np.testing.assert_allclose(group_energy(activation, norms, 2), [[2, 0.25, 18], [0, 1.01, 81]], rtol=1e-6)
    kept = keep_top_groups(activation, norms, active=2, group_size=2)
    np.testing.assert_array_equal(kept, [[1, 1, 0, 0, 3, 3], [0, 0, 1, 1, 9, 0]])
    assert keep_top_groups(activation, norms, active=3, group_size=2) is activation
    grad = jax.grad(lambda a: (keep_top_groups(a, norms, active=1, group_size=2) ** 2).sum())(activation)
    np.testing.assert_array_equal(grad, [[0, 0, 0, 0, 6, 6], [0, 0, 0, 0, 18, 0]])


def test_of_equal_groups_the_first_is_kept():
    made = keep_top_groups(jnp.ones((1, 4)), jnp.ones(4), active=1, group_size=2)
    np.testing.assert_array_equal(made, [[1, 1, 0, 0]])


@pytest.mark.parametrize(("active", "group", "words"), [(1, 3, "does not divide"), (0, 2, "active=0"), (3, 2, "<= 2")])
def test_sizes_that_do_not_fit(active, group, words):
    with pytest.raises(ValueError, match=words):
        keep_top_groups(jnp.ones((1, 4)), jnp.ones(4), active=active, group_size=group)
