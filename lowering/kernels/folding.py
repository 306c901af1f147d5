"""Steps of kernels under ``vmap``: tokens of all examples are taken together, so that each row is still read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["folded"]


def folded(step: Callable[..., Any], *operands: jax.Array) -> Any:
    """A step on operands, the first of which are tokens ``[T, ...]``: those of all examples under ``vmap``.

    Where the rows are batched as well, examples are taken one after the other.
    """

    @jax.custom_batching.custom_vmap
    def fold(*operands: jax.Array) -> Any:
        return step(*operands)

    @fold.def_vmap
    def batch(size: int, batched: Sequence[bool], *operands: jax.Array) -> Any:
        x, *others = operands
        own = [i for i, each in enumerate(batched[1:]) if each]
        # An index is the one thing that examples may have of their own: then each token has the one of its example.
        if not batched[0] or own not in ([], [1]) or (own and not _is_index(others[1])):
            made = jax.lax.map(lambda one: fold(*_placed(operands, batched, one)), _given(operands, batched))
            return made, jax.tree.map(lambda _: True, made)
        tokens = x.shape[1]
        if own:
            index = others[1] if others[1].ndim == 3 else jnp.repeat(others[1][:, None], tokens, axis=1)
            others[1] = index.reshape(size * tokens, -1)
        elif len(others) > 1 and _is_index(others[1]):
            others[1] = jnp.tile(others[1], (size, 1))
        made = fold(x.reshape(size * tokens, -1), *others)
        return jax.tree.map(lambda out: out.reshape(size, tokens, -1), made), jax.tree.map(lambda _: True, made)

    return fold(*operands)


def _is_index(operand: jax.Array) -> bool:
    """Whether these are numbers of rows, ``[K]`` or ``[T, K]`` of each example, and no rows of integers in few bits."""
    return operand.ndim > 1 and operand.dtype == jnp.int32


def _given(operands: Sequence[jax.Array], batched: Sequence[bool]) -> list[jax.Array]:
    return [operand for operand, each in zip(operands, batched, strict=True) if each]


def _placed(operands: Sequence[jax.Array], batched: Sequence[bool], one: Sequence[jax.Array]) -> list[jax.Array]:
    taken = iter(one)
    return [next(taken) if each else operand for operand, each in zip(operands, batched, strict=True)]
