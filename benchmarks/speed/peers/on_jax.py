"""What the peers in JAX share: the model with a product of one's own, and weights on huge pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.cases import Case, Ops, Weights, model
from benchmarks.speed.peers import Kernel, Settings
from benchmarks.speed.timing import sets_for
from hire_xform.lowering.xla.huge_pages import on_huge_pages

OPS = Ops(
    relu=jax.nn.relu,
    silu=jax.nn.silu,
    argmax=lambda logits: jnp.argmax(logits, axis=-1),
    softmax=lambda scores: jax.nn.softmax(scores, axis=-1),
    einsum=jnp.einsum,
    concatenate=lambda parts: jnp.concatenate(parts, axis=1),
    norm=lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6),
)


def program(case: Case, product: Callable[[jax.Array, Any, str], jax.Array]) -> Callable[..., jax.Array]:
    """The case's model as a function of weights, biases and caches, and the input; ``product(x, weight, name)``."""

    def step(params: dict[str, Any], rest: dict[str, Any], x: jax.Array) -> jax.Array:
        return model(case, OPS, lambda x, name: product(x, params[name], name), rest, x)

    return step


def scanned(case: Case, product: Callable[[jax.Array, Any, str], jax.Array]) -> Callable[..., jax.Array]:
    """The same of blocks as a scan over their stacked weights."""
    block = program(dataclasses.replace(case, layers=1), product)

    def step(params: dict[str, Any], rest: dict[str, Any], x: jax.Array) -> jax.Array:
        def one(x: jax.Array, own: tuple[dict[str, Any], Any]) -> tuple[jax.Array, None]:
            return block({f"0.{name}": matrix for name, matrix in own[0].items()}, {"0.bias": own[1]}, x), None

        biases = jnp.stack([rest[f"{i}.bias"] for i in range(case.layers)])
        return jax.lax.scan(one, x, (params, biases))[0]

    return step


def stacked(case: Case, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The matrices of all blocks by their names, for :func:`scanned`."""
    names = [name.removeprefix("0.") for name in arrays if name.startswith("0.")]
    made = {name: jnp.stack([arrays[f"{i}.{name}"] for i in range(case.layers)]) for name in names}
    on_huge_pages(made)
    return made


def placed(weights: Weights) -> dict[str, jax.Array]:
    """The matrices as stored, on huge pages. NumPy's are views of them from then on, or dropped if they are wider."""
    if all(isinstance(array, jax.Array) for array in weights.arrays.values()):
        return weights.arrays  # type: ignore[return-value]
    arrays: dict[str, Any] = weights.arrays
    for name in list(arrays):
        arrays[name] = jnp.array(arrays[name], dtype=weights.case.stored)
        on_huge_pages(arrays[name])
    return arrays


def plain(x: jax.Array, w: jax.Array, name: str) -> jax.Array:
    """The best form for rows of outputs: of one token XLA puts ``x @ w.T`` and a bias into one loop, a slow one."""
    w = w.astype(jnp.float32)
    return x @ w if name.endswith("down") else (w @ x.T).T


def rows_of(name: str, w: jax.Array) -> jax.Array:
    """A row for each output, in f32."""
    return (w.T if name.endswith("down") else w).astype(jnp.float32)


def columns_of(name: str, w: jax.Array) -> jax.Array:
    """A column for each output, in f32."""
    return (w if name.endswith("down") else w.T).astype(jnp.float32)


def two_rows(x: jax.Array) -> jax.Array:
    """One token and zeros: XLA's products of one row in few bits miss its fast loops."""
    return jnp.concatenate([x, jnp.zeros_like(x)]) if len(x) == 1 else x


def nbytes(tree: Any) -> int:
    """Of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def copies(tree: Any, read: int, settings: Settings, share: Iterable[Any] = (), huge: bool = True) -> list[Any]:
    """Sets of weights, each in memory of its own but for arrays in ``share``: as many as cold calls need."""
    shared = {id(array) for array in share}
    sets = [tree]
    for _ in range(sets_for(read, settings.apart) - 1):
        sets.append(jax.tree.map(lambda a: a if id(a) in shared else jnp.array(a, copy=True), tree))
        if huge:
            on_huge_pages(sets[-1])
    return jax.block_until_ready(sets)


def kernel(
    name: str,
    step: Callable[..., jax.Array],
    sets: Sequence[Any],
    weights: Weights,
    read: int,
    tolerance: float,
    **more: Any,
) -> Kernel:
    """A kernel that goes round sets of weights and inputs."""
    rest = jax.tree.map(jnp.asarray, {**weights.biases, **weights.cache})
    inputs = [jnp.asarray(x) for x in weights.inputs]

    def call(i: int) -> np.ndarray:
        result = step(sets[i % len(sets)], rest, inputs[i % len(inputs)])
        return np.asarray(jax.block_until_ready(result))

    return Kernel(name, read, nbytes(sets[0]), call, tolerance, **more)
