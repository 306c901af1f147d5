"""NaNs among so many values that XLA's CPU backend splits a reduction, whose maximum then passes over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same

import hire_xform as hx
from hire_xform.lowering.engine.certified_ffn import largest_norm
from hire_xform.lowering.predict.predictors import pack_predictor
from hire_xform.lowering.predict.quantized import Quantized
from hire_xform.lowering.xla.nan_max import largest_or_nan

pytestmark = pytest.mark.any_jax("cases vary numbers, dtypes and predictors of arithmetic that is our own", every=3)

D, M = 4, 8192


@pytest.mark.parametrize(("shape", "axis"), [((M,), None), ((4, M), 1), ((2, M, 8), -1), ((3,), 0)])
def test_a_nan_is_kept(shape, axis):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    run = jax.jit(lambda v: largest_or_nan(v, axis))
    np.testing.assert_array_equal(run(values), values.max(axis=axis))
    values[tuple(n // 2 for n in shape)] = np.nan
    np.testing.assert_array_equal(run(values), values.max(axis=axis))  # NumPy keeps it


def test_packed_forms_of_a_row_with_a_nan():
    rows = np.random.default_rng(0).normal(size=(M, D)).astype(np.float32)
    rows[5000, 2] = np.nan
    assert np.isnan(jax.jit(largest_norm)(rows))
    scales = jax.jit(lambda r: pack_predictor(r, Quantized(8)))(rows)["scale"]
    assert np.flatnonzero(np.isnan(np.asarray(scales, np.float32).reshape(M, -1)).any(axis=1)).tolist() == [5000]


def scaled(w, x):
    return (jax.nn.relu(x @ w["up"] + w["bias"]) * w["scale"]) @ w["down"]


@pytest.mark.parametrize("group_size", [1, 8])
@pytest.mark.parametrize("broken", ["x", "up", "bias", "scale", "down"])
def test_a_certified_block_returns_the_nans_of_the_dense_one(broken, group_size):
    """Of a unit that is zero by far: what it is multiplied with is NaN, or it is itself."""
    rng = np.random.default_rng(0)
    w = {"up": rng.normal(size=(D, M)) * 0.1, "bias": np.full(M, -9.0), "scale": np.ones(M)}
    w = {name: a.astype(np.float32) for name, a in (*w.items(), ("down", rng.normal(size=(M, D))))}
    x = rng.normal(size=(1, D)).astype(np.float32)
    array = {**w, "x": x}[broken]
    array.reshape(-1)[array.size // 2 + 1] = np.nan
    step = hx.sparsify(
        scaled, config=hx.Config(ffn=hx.Ffn(certify=True, active=0.125, group_size=group_size), rules=FORCE)
    )
    want = jax.jit(scaled)(w, x)
    assert np.isnan(want).any()
    assert_same(step(jax.tree.map(jnp.asarray, w), x), want)
