"""What `hire_xform` costs besides the model: Python per call, and the time to transform and lower.

    python benchmarks/overhead.py

A call is compared with the jitted function that it runs, on a model of 201 weight leaves with negligible arithmetic.
Transforming is tracing, detecting, planning and lowering, compared with tracing and lowering the dense function, for
12, 24 and 48 unrolled layers, in CPU time: it is one thread's, and others may be at work.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import hire_xform as hx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))
import tiny_lm

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


def per_call(*calls: Callable[[], Any], rounds: int = 500) -> list[float]:
    """Median seconds of each call until it returns (dispatch, not completion); the calls are timed in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        jax.block_until_ready(call())
    for _ in range(rounds):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            result = call()
            own.append(time.perf_counter() - start)
            jax.block_until_ready(result)
    return [statistics.median(own) for own in times]


def call_overhead(console: Console) -> None:
    """Prints what Python of a call adds to the jitted function it runs, for 40 layers of 5 leaves."""
    step, params, x = tiny_model(40)
    sparse = hx.sparsify(step, config=hx.Config(rules=EVERYWHERE))
    packed = sparse.trace(params, x).pack(params)
    table = Table(title="a call, 201 weight leaves, 41 sites, microseconds", title_justify="left")
    for column in ("", "the call", "its jitted function", "Python above it"):
        table.add_column(column, justify="right" if column else "left")
    for name, weights in (("plain weights", params), ("packed weights", packed)):
        jitted, operands = sparse.program(weights, x)
        inner, whole = per_call(lambda f=jitted, o=operands: f(*o), lambda w=weights: sparse(w, x))
        table.add_row(name, f"{whole * 1e6:.0f}", f"{inner * 1e6:.0f}", f"{(whole - inner) * 1e6:.0f}")
    dense = jax.jit(step)
    table.add_row("dense, jax.jit", f"{per_call(lambda: dense(params, x))[0] * 1e6:.0f}", "", "")
    console.print(table)


def bundled(layers: int) -> tuple[Callable, tuple[Any, ...]]:
    """The bundled model's decode step, unedited, at another depth and width: function and argument shapes."""
    config = tiny_lm.Config(num_layers=layers, d_model=1024, d_ff=4096, num_heads=8)
    params = jax.eval_shape(lambda: tiny_lm.init(config, jax.random.key(0)))
    cache = jax.eval_shape(lambda: tiny_lm.init_cache(config, 1, 128))
    return (lambda p, c, t: tiny_lm.decode_step(p, c, t)), (params, cache, jax.ShapeDtypeStruct((1,), jnp.int32))


def transform_time(console: Console, repeats: int = 7) -> None:
    """Prints the CPU time to trace and lower, dense and rewritten; the two in turn, the fastest of each."""
    table = Table(title="trace and lower the bundled model's step, deeper, unrolled: CPU time", title_justify="left")
    for column in ("layers", "dense", "rewritten", "ratio", "functions dense", "functions rewritten"):
        table.add_column(column, justify="right")
    for layers in (12, 24, 48):
        dense_times, sparse_times = [], []
        for _ in range(repeats):
            step, shapes = bundled(layers)
            jax.clear_caches()
            start = time.process_time()
            dense = jax.jit(step).trace(*shapes).lower()
            dense_times.append(time.process_time() - start)
            step, shapes = bundled(layers)
            jax.clear_caches()
            start = time.process_time()
            sparse = hx.sparsify(step).trace(*shapes).lower()
            sparse_times.append(time.process_time() - start)
        counts = [low.as_text().count("func.func") for low in (dense, sparse)]
        best = min(dense_times), min(sparse_times)
        row = (str(layers), f"{best[0]:.2f} s", f"{best[1]:.2f} s", f"{best[1] / best[0]:.2f}")
        table.add_row(*row, str(counts[0]), str(counts[1]))
    console.print(table)


if __name__ == "__main__":
    output = Console()
    call_overhead(output)
    transform_time(output)
