"""Times one decode step at the shape of a 1B-parameter model: ours, the best dense form, and the strongest peer.

    python benchmarks/billion.py            # about 13 GB of memory, two minutes on two cores
    python benchmarks/billion.py --layers 4 # a smaller stack, for a machine with less memory

The weights are random: the speed does not depend on their values, and nothing is said here about quality. All figures
come from one run. Every step takes the token that the step before chose. Bytes are weight bytes read per step; GB/s is
those bytes over the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import hire_xform as hx

WIDTH, HIDDEN, VOCAB, HEADS, CONTEXT = 2048, 8192, 131072, 16, 256


def make_params(layers: int) -> dict[str, Any]:
    """Random f32 weights, each matrix in memory of its own."""
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return (rng.random(shape, np.float32) - np.float32(0.5)) * np.float32(2.0 / shape[0] ** 0.5)

    up, down, attention = matrix(WIDTH, HIDDEN), matrix(HIDDEN, WIDTH), matrix(4, WIDTH, WIDTH)

    def layer(i: int) -> dict[str, Any]:
        sign = np.float32(1.0 - 0.01 * i)
        names = dict(zip("qkvo", attention * sign, strict=True))
        return {
            **{f"w_{n}": jnp.asarray(w) for n, w in names.items()},
            "up": jnp.asarray(up * sign),
            "down": jnp.asarray(down * sign),
        }

    return {"embedding": jnp.asarray(matrix(VOCAB, WIDTH)), "layers": [layer(i) for i in range(layers)]}


def make_cache(layers: int) -> dict[str, Any]:
    """An empty key-value cache."""
    shape = (CONTEXT, HEADS, WIDTH // HEADS)
    return {"position": jnp.int32(0), "kv": [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(layers)]}


def norm(x: jax.Array) -> jax.Array:
    """RMS norm without a scale."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def projected(layer: dict[str, Any], name: str, x: jax.Array) -> jax.Array:
    """A product of attention."""
    return x @ layer[f"w_{name}"]


def attention(layer: dict[str, Any], x: jax.Array, kv: Any, position: jax.Array) -> tuple[jax.Array, Any]:
    """One token's attention over the cache."""
    q, k, v = (projected(layer, n, x).reshape(HEADS, -1) for n in "qkv")
    keys = jax.lax.dynamic_update_slice(kv[0], k[None], (position, 0, 0))
    values = jax.lax.dynamic_update_slice(kv[1], v[None], (position, 0, 0))
    scores = jnp.einsum("hk,thk->ht", q, keys) / (WIDTH // HEADS) ** 0.5
    weights = jax.nn.softmax(jnp.where(jnp.arange(CONTEXT) <= position, scores, -1e30))
    mixed = jnp.einsum("ht,thk->hk", weights, values).reshape(1, WIDTH)
    return projected(layer, "o", mixed), (keys, values)


def ffn(layer: dict[str, Any], x: jax.Array) -> jax.Array:
    """A ReLU block."""
    return jax.nn.relu(x @ layer["up"]) @ layer["down"]


def head(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """The token of the largest logit."""
    return jnp.argmax(x @ params["embedding"].T, axis=-1)


def decode_step(params: dict[str, Any], cache: dict[str, Any], token: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """One greedy step: token ``[1]`` to the next token ``[1]``."""
    x = params["embedding"][token]
    kv = []
    for layer, pair in zip(params["layers"], cache["kv"], strict=True):
        mixed, pair = attention(layer, norm(x), pair, cache["position"])
        x = x + mixed
        x = x + ffn(layer, norm(x))
        kv.append(pair)
    return head(params, norm(x)), {"position": cache["position"] + 1, "kv": kv}


def ffn_stack(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """All blocks, one after the other."""
    for layer in params["layers"]:
        x = x + ffn(layer, norm(x))
    return x


# The other dense layout: the matrix into the hidden units stored a row for each unit.
def by_rows(function: Callable) -> Callable:
    """The same function for weights whose ``up`` is ``[HIDDEN, WIDTH]``."""

    def turned(params: dict[str, Any], *rest: Any) -> Any:
        layers = [{**layer, "up": layer["up"].T} for layer in params["layers"]]
        return function({**params, "layers": layers}, *rest)

    return turned


# The peer: every product of FFN and head in 8 bits, and of attention where it says so; activations too. The fastest
# form XLA has for it on a CPU (two rows, the weight on the left); weight-only forms are slower than f32 there.
def quantized(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of a matrix in 8 bits, and their scales."""
    scale = jnp.max(jnp.abs(w), axis=1) / 127.0
    return jnp.round(w / scale[:, None]).astype(jnp.int8), scale


def int8_product(x: jax.Array, weight: tuple[jax.Array, jax.Array]) -> jax.Array:
    """``[1, d]`` times rows in 8 bits: ``[1, n]``."""
    rows, scale = weight
    size = jnp.max(jnp.abs(x)) / 127.0
    q = jnp.round(x / size).astype(jnp.int8)
    two = jnp.concatenate([q, jnp.zeros_like(q)])
    sums = jax.lax.dot_general(rows, two, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return (sums[:, 0].astype(jnp.float32) * scale * size)[None]


def int8_ffn(layer: dict[str, Any], x: jax.Array) -> jax.Array:
    """The ReLU block on 8-bit weights."""
    return int8_product(jax.nn.relu(int8_product(x, layer["up"])), layer["down"])


def int8_params(params: dict[str, Any]) -> dict[str, Any]:
    """The peer's weights. Attention's are there in f32 as well, for the step that leaves them so."""
    pack = jax.jit(quantized)
    layers = [
        layer | {f"int8_{n}": pack(layer[f"w_{n}"].T) for n in "qkvo"} | {n: pack(layer[n].T) for n in ("up", "down")}
        for layer in params["layers"]
    ]
    return {"embedding": params["embedding"], "head": pack(params["embedding"]), "layers": layers}


def int8_form(function: Callable, with_attention: bool = False) -> Callable:
    """A function of this file with the peer's products in it."""

    def run(params: dict[str, Any], *rest: Any) -> Any:
        names = {"ffn": int8_ffn, "head": lambda p, x: jnp.argmax(int8_product(x, p["head"]), axis=-1)}
        if with_attention:
            names["projected"] = lambda layer, name, x: int8_product(x, layer[f"int8_{name}"])
        before = {name: globals()[name] for name in names}
        globals().update(names)
        try:
            return function(params, *rest)
        finally:
            globals().update(before)

    return run


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    nbytes: int
    seconds: float


def median_time(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def chained(function: Callable, params: Any, start: Any) -> Callable[[], Any]:
    """A call that feeds the result of the last one in."""
    state = [start]

    def call() -> Any:
        state[0] = function(params, *state[0])
        return state[0]

    return call


def variants(quick: bool, step: bool) -> list[tuple[str, hx.Config]]:
    """Ours, as a user would set it; attention is in a whole step alone."""
    everywhere = (hx.Rule("*", force=True),)

    def config(active: float, predictor: Any = None, dense: hx.Dense | None = None) -> hx.Config:
        predictor = predictor or hx.Quantized(8)
        return hx.Config(
            vocab=hx.Vocab(predictor=predictor, certify=False),
            ffn=hx.Ffn(active=active, predictor=predictor),
            dense=dense,
            rules=everywhere,
        )

    found = [
        ("ours, int8, 25 % of units, not proved", config(0.25)),
        ("ours, int8, 6.25 % of units", config(0.0625)),
        ("ours, low rank d/4 in 8 bits, 6.25 % of units", config(0.0625, hx.LowRank(0.25, bits=8))),
        ("ours, low rank d/8 in 8 bits, 6.25 % of units", config(0.0625, hx.LowRank(0.125, bits=8))),
    ]
    if quick:
        return [found[0], found[2]]
    if step:
        low_rank = hx.LowRank(0.125, bits=8)
        found += [
            ("ours, int8, 25 % of units; attention in int8 (hx.Dense)", config(0.25, None, hx.Dense())),
            ("ours, low rank d/8, 6.25 %; attention in int8 (hx.Dense)", config(0.0625, low_rank, hx.Dense())),
        ]
    return found


def table_for(console: Console, title: str, rows: list[Row], base: Row) -> None:
    """Prints rows against the best dense one."""
    table = Table(title=title, title_justify="left")
    for column in ("", "weight bytes", "of dense", "time", "GB/s", "speed-up"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.nbytes / 1e6:,.0f} MB",
            f"{row.nbytes / base.nbytes:.0%}",
            f"{row.seconds * 1e3:,.2f} ms",
            f"{row.nbytes / row.seconds / 1e9:.1f}",
            f"{base.seconds / row.seconds:.2f}x",
        )
    console.print(table)


def run(console: Console, quick: bool = True, layers: int = 16, repeats: int = 15) -> dict[str, list[Row]]:
    """Measures head, FFN blocks and the whole step; prints three tables and returns their rows.

    ``quick`` measures fewer of ours, half as often.
    """
    repeats = repeats // 2 if quick else repeats
    with console.status("making random weights"):
        params = make_params(layers)
        rows_params = {**params, "layers": [{**p, "up": jnp.asarray(p["up"].T)} for p in params["layers"]]}
        peer_params = jax.block_until_ready(int8_params(params))
    x = jax.random.normal(jax.random.key(0), (1, WIDTH))
    token = jnp.zeros((1,), jnp.int32)
    head_bytes, ffn_bytes = 4 * VOCAB * WIDTH, 4 * layers * 2 * WIDTH * HIDDEN
    other = 4 * layers * 4 * WIDTH * WIDTH

    def turning(function: Callable) -> Callable:
        # Keeps the shape of the input, and makes it depend on the result: no two calls see the same input.
        return lambda p, x: (x + 1e-3 * jnp.max(function(p, x).astype(jnp.float32)),)

    parts = {
        "the head, to the token id": (turning(lambda p, x: globals()["head"](p, x)), (x,), head_bytes, 0, 4),
        f"{layers} FFN blocks": (lambda p, x: (ffn_stack(p, x),), (x,), ffn_bytes, 0, 1),
        "the whole step": (decode_step, None, head_bytes + ffn_bytes, other, 1),
    }
    results: dict[str, list[Row]] = {}
    for title, (function, start, dense_bytes, rest, _) in parts.items():
        rows: list[Row] = []
        step = title == "the whole step"

        def measure(name: str, call: Callable, weights: Any, nbytes: int, start: Any = start, step: bool = step) -> Row:
            with console.status(f"{name}"):
                if step:
                    state: list[Any] = [token, make_cache(layers)]

                    def once() -> Any:
                        state[0], state[1] = call(weights, state[1], state[0])
                        return state[0]

                    return Row(name, nbytes, median_time(once, repeats))
                return Row(name, nbytes, median_time(chained(call, weights, start), repeats))

        dense = [
            measure("dense, columns", jax.jit(function), params, dense_bytes + rest),
            measure("dense, rows", jax.jit(by_rows(function)), rows_params, dense_bytes + rest),
        ]
        best = min(dense, key=lambda r: r.seconds)
        rows += [Row("dense f32, best layout", best.nbytes, best.seconds)]
        left = "; attention stays f32" if step else ""
        name = f"peer: int8 x int8, nothing exact{left}"
        rows.append(measure(name, jax.jit(int8_form(function)), peer_params, dense_bytes // 4 + rest))
        if step and not quick:
            whole = jax.jit(int8_form(function, with_attention=True))
            rows.append(measure("peer: int8 x int8 everywhere", whole, peer_params, (dense_bytes + rest) // 4))
        for name, config in variants(quick, step):
            ours = hx.sparsify(function, config=config)
            arguments = (make_cache(layers), token) if step else start
            traced = ours.trace(params, *arguments)
            packed = traced.pack(params)
            rows.append(measure(name, ours, packed, traced.plan.sparse_bytes + traced.plan.refused_bytes))
        table_for(console, f"{title}, one token, f32", rows, rows[0])
        results[title] = rows
    console.print(
        "Random weights: this shows what reading fewer bytes is worth, not what it costs in quality; nothing is "
        "proved. "
        "25 % of the units is for models never trained for sparsity, 6.25 % for models trained or calibrated for it."
    )
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="FFN and attention layers (16 makes 1.07B parameters)")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each")
    options = parser.parse_args()
    if options.layers < 1 or options.repeats < 1:
        parser.error("--layers and --repeats must be at least 1")
    run(Console(), quick=False, layers=options.layers, repeats=options.repeats)


if __name__ == "__main__":
    main()
