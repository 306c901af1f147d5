"""Shared inputs of the lowering tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.predict.low_rank import LowRank
from hire_xform.lowering.predict.quantized import Quantized

SPECS = [Quantized(8), Quantized(4), LowRank(0.5), LowRank(5), LowRank(0.5, bits=8)]


@pytest.fixture(params=SPECS, ids=str)
def spec(request):
    return request.param


@pytest.fixture
def normal():
    """`normal(shape, dtype, seed)`: Gaussian arrays."""

    def make(shape, dtype=jnp.float32, seed=0) -> jax.Array:
        return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)

    return make
