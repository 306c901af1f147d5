"""How fast memory is read: a streaming product with a matrix far above the cache, by XLA and by the native kernel."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.cases import Weights
from benchmarks.speed.peers import BF16, Kernel, Settings
from hire_xform.lowering.primitives.products import all_products
from hire_xform.lowering.xla.huge_pages import on_huge_pages

WIDTH = 1024


def missing() -> str | None:
    """Nothing: it is JAX."""
    return None


def kernels(weights: Weights, settings: Settings) -> Iterator[Kernel]:
    """Both; what they give is no result of the case, so nothing is compared with NumPy."""
    rows = max(settings.apart // (4 * WIDTH), 64)
    matrix = jax.random.uniform(jax.random.key(0), (rows, WIDTH))
    on_huge_pages(matrix)
    inputs = [jax.random.normal(jax.random.key(i), (1, WIDTH)) for i in range(4)]
    for name, product in (("XLA, f32 product", lambda x, w: x @ w.T), ("native kernel, f32 product", all_products)):
        jitted = jax.jit(lambda x, w, product=product: jnp.max(product(x, w)))

        def call(i: int, jitted=jitted) -> np.ndarray:
            return np.asarray(jitted(inputs[i % len(inputs)], matrix))

        expected = float(np.max(np.asarray(inputs[0]) @ np.asarray(matrix).T))
        if abs(float(call(0)) - expected) > BF16 * abs(expected):
            raise AssertionError(f"memory's {name} gives {float(call(0))} where NumPy gives {expected}")
        yield Kernel(name, matrix.nbytes, matrix.nbytes, call, float("inf"))
