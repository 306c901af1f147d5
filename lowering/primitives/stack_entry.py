"""One matrix of a stack, which a kernel reads where it lies.

A scan over layers, or a static index, takes one layer's matrix out of an array that holds all of them. XLA does that as
a part of what it makes of a product. Before a call of a kernel it has to copy the matrix, which takes longer than the
kernel. A :class:`StackEntry` goes to the kernel as the whole stack and a number instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["StackEntry", "of_one", "whole"]

_T = TypeVar("_T")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackEntry:
    """``stack[index]``, not yet taken.

    Attributes:
      stack: ``[*stack axes, n, ...]``.
      index: one int32 scalar for each stack axis, outermost first; all are in range.
    """

    stack: Any
    index: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the one matrix."""
        return tuple(self.stack.shape[len(self.index) :])

    @property
    def dtype(self) -> Any:
        """Of the one matrix."""
        return self.stack.dtype

    @property
    def ndim(self) -> int:
        """Of the one matrix."""
        return len(self.shape)

    def whole(self) -> jax.Array:
        """The matrix, taken out."""
        array = self.stack
        for i in self.index:
            array = lax.dynamic_index_in_dim(array, i, 0, keepdims=False)
        return array

    def laid_out(self) -> tuple[jax.Array, jax.Array]:
        """All rows of the stack as one matrix ``[N, ...]``, and the number of this entry's first one, int32."""
        stack = self.stack.shape[: len(self.index)]
        number: Any = jnp.int32(0)
        for size, i in zip(stack, self.index, strict=True):
            number = number * size + i
        rows, *columns = self.shape
        return self.stack.reshape(math.prod(stack) * rows, *columns), number * rows


def whole(array: jax.Array | StackEntry) -> jax.Array:
    """An array as it is, and an entry of a stack taken out of it."""
    return array.whole() if isinstance(array, StackEntry) else array


def of_one(structs: _T) -> _T:
    """Shapes and dtypes of operands, those of an entry of a stack without its stack axes."""

    def one(struct: Any) -> Any:
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype) if isinstance(struct, StackEntry) else struct

    return jax.tree.map(one, structs, is_leaf=lambda each: isinstance(each, StackEntry))
