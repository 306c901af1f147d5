"""HiRE as one writes it at first: scores of low rank, ``lax.top_k``, a gather of rows, a product with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.speed.cases import Weights
from benchmarks.speed.peers import INT8, LOSSY, Kernel, Settings
from benchmarks.speed.peers.on_jax import OPS, copies, kernel, nbytes, placed
from hire_xform.lowering.xla.huge_pages import on_huge_pages

CANDIDATES, ACTIVE = 256, 0.0625


def missing() -> str | None:
    """Nothing: it is JAX."""
    return None


def _head(params: dict[str, Any], rest: dict[str, Any], x: jax.Array) -> jax.Array:
    x = OPS.norm(x)[0]
    left, right = params["factors"]["head"]
    scores = left @ (right @ x)
    _, chosen = lax.top_k(scores, CANDIDATES)
    return jnp.argmax(scores.at[chosen].set(params["head"][chosen] @ x))[None]


def _blocks(params: dict[str, Any], rest: dict[str, Any], x: jax.Array) -> jax.Array:
    x = x[0]
    for i in range(len(rest)):
        up, down, bias = params[f"{i}.up"], params[f"{i}.down"], rest[f"{i}.bias"]
        left, right = params["factors"][f"{i}.up"]
        normed = OPS.norm(x)
        _, chosen = lax.top_k(jax.nn.relu(left @ (right @ normed) + bias), int(ACTIVE * len(up)))
        x = x + jax.nn.relu(up[chosen] @ normed + bias[chosen]) @ down[chosen]
    return x[None]


def kernels(weights: Weights, settings: Settings) -> Iterator[Kernel]:
    """Of a head, and of blocks with no gate, for one token; the factors are those that the weights are made of."""
    case = weights.case
    if case.tokens > 1 or case.kind == "step" or case.gated or case.stored != "float32":
        return
    base = placed(weights)
    factors = {name: (jnp.asarray(left), jnp.asarray(right)) for name, (left, right) in weights.factors.items()}
    on_huge_pages(factors)
    exact = CANDIDATES * case.d if case.kind == "head" else int(ACTIVE * case.m) * 2 * case.d * case.layers
    if case.vocab and case.vocab <= CANDIDATES:
        return
    read = nbytes(factors) + 4 * exact
    sets = copies({**base, "factors": factors}, read, settings, share=base.values())
    what = f"{CANDIDATES} rows" if case.kind == "head" else f"{ACTIVE:.2%} of units"
    step = jax.jit(_head if case.kind == "head" else _blocks)
    tolerance = INT8 if case.kind == "head" else LOSSY
    yield kernel(f"naive HiRE, low rank d/8 f32, {what}", step, sets, weights, read, tolerance)
