"""Times one token through weights stored in 8 or 16 bits: ours, dense as written, dense f32, and the strongest peer.

    python benchmarks/narrow.py             # about 4 GB of memory, a minute on two cores

Sixteen ReLU blocks in a ``lax.scan`` and a head, random weights, f32 activations. A model that stores its weights in
bfloat16 and computes in f32 widens them in the program. On CPU XLA does so with whole matrices, and of bfloat16 and
float8 with all layers ahead of the loop: then a dense step is faster with weights that were widened beforehand. All are
compared with that one. Memory is of the weights that a step holds, bytes are what it reads of them. Every step takes in
what the one before gave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from billion import chained, int8_product, median_time, quantized
from jax import lax
from rich.console import Console
from rich.table import Table

import hire_xform as hx

LAYERS, WIDTH, HIDDEN, VOCAB = 16, 1024, 4096, 65536
STORED = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn)
ACTIVE = 0.125


def make_params(dtype: Any) -> dict[str, Any]:
    """Random weights in a dtype."""
    shapes = {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH), "head": (VOCAB, WIDTH)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: (jax.random.normal(key, shape) * shape[-1] ** -0.5).astype(dtype)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def step(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Blocks and head of one token ``[1, WIDTH]``, on weights of any dtype; the next input."""

    def block(x: jax.Array, layer: dict[str, Any]) -> tuple[jax.Array, None]:
        up, down = (layer[name].astype(jnp.float32) for name in ("up", "down"))
        return norm(x + jax.nn.relu(x @ up) @ down), None

    x, _ = lax.scan(block, x, {name: params[name] for name in ("up", "down")})
    return turned(x, x @ params["head"].astype(jnp.float32).T)


def by_rows_step(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """The same for ``up`` stored a row for each unit."""
    return step({**params, "up": jnp.swapaxes(params["up"], 1, 2)}, x)


def int8_step(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """The same with every product in 8 bits, activations too."""

    def block(x: jax.Array, layer: dict[str, Any]) -> tuple[jax.Array, None]:
        return norm(x + int8_product(jax.nn.relu(int8_product(x, layer["up"])), layer["down"])), None

    x, _ = lax.scan(block, x, {name: params[name] for name in ("up", "down")})
    return turned(x, int8_product(x, params["head"]))


def norm(x: jax.Array) -> jax.Array:
    """RMS norm without a scale."""
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def turned(x: jax.Array, logits: jax.Array) -> jax.Array:
    """Another input for the next call, which depends on the token."""
    return norm(jnp.roll(x, jnp.argmax(logits)) + 1e-3)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def main() -> None:
    """Measures and prints one table."""
    console, start = Console(), norm(jax.random.normal(jax.random.key(1), (1, WIDTH)))
    rows: list[tuple[str, int, int, float]] = []

    def measure(name: str, call: Callable, weights: Any, read: int) -> None:
        with console.status(name):
            seconds = median_time(chained(lambda w, x: (call(w, x),), weights, (start,)), 15)
        rows.append((name, nbytes(weights), read, seconds))

    params = make_params(jnp.float32)
    dense = nbytes(params)
    measure("dense, stored in f32", jax.jit(step), params, dense)
    by_rows = {**params, "up": jnp.swapaxes(params["up"], 1, 2)}
    measure("dense, stored in f32", jax.jit(by_rows_step), by_rows, dense)
    rows.remove(max(rows, key=lambda row: row[3]))  # the faster layout is the one to beat
    by_rows["down"] = jnp.swapaxes(params["down"], 1, 2)
    pack = {"up": jax.vmap(quantized), "down": jax.vmap(quantized), "head": quantized}
    eight = {name: jax.block_until_ready(pack[name](matrix)) for name, matrix in by_rows.items()}
    measure("peer: int8 x int8 everywhere, nothing exact", jax.jit(int8_step), eight, nbytes(eight))
    del by_rows, eight
    predictors = {"int8": hx.Quantized(8), "low rank d/4 in 8 bits": hx.LowRank(0.25, bits=8)}
    for stored in STORED:
        name, params = jnp.dtype(stored).name, make_params(stored)
        if stored is not jnp.float32:
            measure(f"dense, stored in {name}, widened by the program", jax.jit(step), params, nbytes(params))
        for label, predictor in predictors.items():
            config = hx.Config(
                vocab=hx.Vocab(predictor=predictor, certify=False),
                ffn=hx.Ffn(active=ACTIVE, predictor=predictor),
                rules=(hx.Rule("*", force=True),),
            )
            ours = hx.sparsify(step, config=config)
            traced = ours.trace(params, start)
            measure(f"ours, stored in {name}, {label}", ours, traced.pack(params), traced.plan.sparse_bytes)
    table = Table(title="blocks and head, one token", title_justify="left")
    for column in ("", "weights", "read", "of f32", "time", "speed-up"):
        table.add_column(column, justify="left" if not column else "right")
    for name, held, read, seconds in rows:
        table.add_row(
            name,
            f"{held / 1e6:,.0f} MB",
            f"{read / 1e6:,.0f} MB",
            f"{read / dense:.0%}",
            f"{seconds * 1e3:,.2f} ms",
            f"{rows[0][3] / seconds:.2f}x",
        )
    console.print(table)
    console.print(f"{ACTIVE:.1%} of the hidden units. Random weights: nothing is said here about quality.")


if __name__ == "__main__":
    main()
