"""Steps of kernels under ``vmap``, and whether kernels are wanted at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.kernels.folding import folded
from hire_xform.lowering.kernels.switch import switched_off


def product(x, rows):
    return folded(lambda x, rows: x @ rows[:, : x.shape[1]].T, x, rows)


def test_tokens_of_all_examples_are_taken_together():
    x, rows = jnp.arange(24.0).reshape(3, 2, 4), jnp.ones((5, 4))
    made = str(jax.make_jaxpr(jax.vmap(product, (0, None)))(x, rows))
    assert made.count("dot_general[") == made.count("f32[6,5] = dot_general[") == 1
    np.testing.assert_array_equal(jax.vmap(product, (0, None))(x, rows), x @ rows.T)


def test_rows_of_examples_are_taken_one_after_the_other():
    x, rows = jnp.arange(24.0).reshape(3, 2, 4), jnp.arange(60.0).reshape(3, 5, 4)
    np.testing.assert_array_equal(jax.vmap(product)(x, rows), jnp.einsum("btd,bnd->btn", x, rows))


@pytest.mark.parametrize("batched", [False, True])
def test_rows_of_integers_are_no_index(batched):
    x, rows = jnp.arange(24.0).reshape(3, 2, 4), jnp.arange(60, dtype=jnp.int8).reshape(3, 5, 4)
    scale, seen = jnp.ones(5), []

    def scores(x, rows):
        def step(x, scale, rows):
            seen.append(rows.shape)
            return x @ rows.T.astype(jnp.float32) * scale

        return folded(step, x, scale, rows)

    if batched:
        np.testing.assert_array_equal(jax.vmap(scores)(x, rows), jnp.einsum("btd,bnd->btn", x, rows))
    else:
        np.testing.assert_array_equal(jax.vmap(scores, (0, None))(x, rows[0]), x @ rows[0].T)
    assert set(seen) == {(5, 4)}


@pytest.mark.parametrize(("value", "off"), [("off", True), ("0", True), ("OFF", True), ("", False), ("on", False)])
def test_they_can_be_switched_off(monkeypatch, value, off):
    monkeypatch.setenv("HIRE_KERNELS", value)
    assert switched_off() is off
