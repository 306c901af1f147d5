"""What `hire_xform` costs besides the model: Python per call, and the time to transform and lower.

    python benchmarks/overhead.py

A call is compared with the same program called through jax.jit directly, on a model of 200 weight leaves whose
arithmetic is negligible. Transforming is tracing, detecting, planning and lowering, compared with tracing and lowering
the dense function, for 12, 24 and 48 unrolled layers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import hire_xform as hx

EVERYWHERE = (hx.Rule("*", force=True),)


def tiny_model(layers: int, width: int = 8, hidden: int = 16, vocab: int = 64) -> tuple[Callable, Any, jax.Array]:
    """An unrolled model with five leaves a layer: function, parameters, input."""
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {
        "layers": [
            {
                "scale": matrix(width),
                "up": matrix(width, hidden),
                "up_bias": matrix(hidden),
                "down": matrix(hidden, width),
                "down_bias": matrix(width),
            }
            for _ in range(layers)
        ],
        "embedding": matrix(vocab, width),
    }

    def step(params: Any, x: jax.Array) -> jax.Array:
        for layer in params["layers"]:
            h = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * layer["scale"]
            h = jax.nn.relu(h @ layer["up"] + layer["up_bias"])
            x = x + h @ layer["down"] + layer["down_bias"]
        return x @ params["embedding"].T

    return step, params, matrix(1, width)


def per_call(call: Callable[[], Any], calls: int = 300) -> float:
    """Median seconds of a call until it returns (dispatch, not completion)."""
    jax.block_until_ready(call())
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
        jax.block_until_ready(result)
    return statistics.median(times)


def call_overhead(console: Console) -> float:
    """Seconds of Python that a call adds to the jitted function, for 40 layers of 5 leaves; prints the figures."""
    step, params, x = tiny_model(40)
    rows = []
    for name, config in (("no site", hx.Config(vocab=None, ffn=None)), ("41 sites", hx.Config(rules=EVERYWHERE))):
        sparse = hx.sparsify(step, config=config)
        traced = sparse.trace(params, x)
        packed = traced.pack(params)
        inner = jax.jit(traced.run)
        base = jax.jit(step)
        rows.append((f"jax.jit, {name}", per_call(lambda f=base: f(params, x))))
        rows.append((f"same program through jax.jit, packed, {name}", per_call(lambda f=inner, p=packed: f(p, x))))
        rows.append((f"sparsify, plain weights, {name}", per_call(lambda f=sparse: f(params, x))))
        rows.append((f"sparsify, packed weights, {name}", per_call(lambda f=sparse, p=packed: f(p, x))))
    table = Table(title="a call, 201 weight leaves", title_justify="left")
    table.add_column("")
    table.add_column("microseconds", justify="right")
    for name, seconds in rows:
        table.add_row(name, f"{seconds * 1e6:.0f}")
    console.print(table)
    return rows[-1][1] - rows[-3][1]


def transform_time(console: Console, repeats: int = 3) -> None:
    """Prints the time to trace and lower, dense and rewritten."""
    table = Table(title="trace and lower, unrolled layers", title_justify="left")
    for column in ("layers", "dense", "rewritten", "ratio", "functions dense", "functions rewritten"):
        table.add_column(column, justify="right")
    for layers in (12, 24, 48):
        dense_times, sparse_times = [], []
        for _ in range(repeats):
            step, params, x = tiny_model(layers, 64, 256, 512)
            jax.clear_caches()
            start = time.perf_counter()
            dense = jax.jit(step).trace(params, x).lower()
            dense_times.append(time.perf_counter() - start)
            step, params, x = tiny_model(layers, 64, 256, 512)
            jax.clear_caches()
            start = time.perf_counter()
            sparse = hx.sparsify(step, config=hx.Config(rules=EVERYWHERE)).trace(params, x).lower()
            sparse_times.append(time.perf_counter() - start)
        counts = [low.as_text().count("func.func") for low in (dense, sparse)]
        best = min(dense_times), min(sparse_times)
        table.add_row(
            str(layers),
            f"{best[0]:.2f} s",
            f"{best[1]:.2f} s",
            f"{best[1] / best[0]:.2f}",
            str(counts[0]),
            str(counts[1]),
        )
    console.print(table)


if __name__ == "__main__":
    output = Console()
    call_overhead(output)
    transform_time(output)
