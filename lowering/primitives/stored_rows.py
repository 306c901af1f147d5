"""Rows of weights that are stored in few bits, times scales: read as they are stored, and made of that where needed.

Checkpoints keep integers and a scale for each row, column or group of them. A weight is what some operations make of
the integers, in the order and in the dtypes of the program, so that rows made here are those the program makes. What
they take besides the integers is kept as small as it is: a matrix whose entries each stand for a block of the weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.xla.slabs import slabs_of

__all__ = ["Operation", "StoredRows", "as_operands", "own_rows", "rows_at", "scaled_in"]

_BINARY = {"mul": lax.mul, "div": lax.div, "add": lax.add, "sub": lax.sub}


@dataclass(frozen=True)
class Operation:
    """One operation on a matrix of weights.

    Attributes:
      name: "mul", "div", "add" or "sub", each with another operand; or "convert".
      dtype: that it runs in, or converts to.
      number: the other operand, where it is one number for all.
    """

    name: str
    dtype: Any
    number: float | None = None

    def __call__(self, x: jax.Array, other: jax.Array | None) -> jax.Array:
        """The operation on ``x`` and its other operand, which has the shape of ``x`` or stretches to it."""
        x = x.astype(self.dtype)
        if self.name == "convert":
            return x
        other = jnp.asarray(self.number if other is None else other, self.dtype)
        return _BINARY[self.name](x, jnp.broadcast_to(other, x.shape))

    @property
    def takes_rows(self) -> bool:
        """Whether its other operand is a matrix."""
        return self.name != "convert" and self.number is None


def scaled_in(operations: Sequence[Operation], exact: Container[Any]) -> Any:
    """The dtype in which stored values are multiplied with a scale, where conversions to ``exact`` dtypes are all else.

    None where more is done. In 16 bits XLA may leave out the product's rounding, as kernels do that multiply in f32.
    """
    *before, last = operations
    kept = all(each.name == "convert" and jnp.dtype(each.dtype) in exact for each in before)
    return jnp.dtype(last.dtype) if kept and last.name == "mul" else None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StoredRows:
    """A matrix ``[n, d]`` of weights as it is stored.

    Attributes:
      values: ``[n, d]``, integers or narrow floats.
      others: for each operation that takes one its other operand, ``[n / r, d / c]``: entry ``[i, j]`` is of the rows
        ``i * r ...`` and the columns ``j * c ...``.
      operations: what makes the weights of them, in order.
      shared: for each of ``others``, whether the rows that are read together have the same row of it.
    """

    values: jax.Array
    others: tuple[jax.Array, ...]
    operations: tuple[Operation, ...] = dataclasses.field(metadata={"static": True})
    shared: tuple[bool, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, d)``."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Two."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """That of the weights."""
        return jnp.dtype(self.operations[-1].dtype)

    def dense(self) -> jax.Array:
        """All weights, ``[n, d]``."""
        return self.taken(self.values, jnp.arange(self.shape[0]))

    def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """All weights in a dtype."""
        return self.dense().astype(dtype)

    def taken(self, values: jax.Array, at: jax.Array) -> jax.Array:
        """Some of the weights, ``[K, d]``.

        Args:
          values: their values, ``[K, d]``.
          at: which rows they are, ``[K]`` int, in bounds.
        """
        n = self.shape[0]
        others = []
        for other, shared in zip(self.others, self.shared, strict=True):
            rows = at // (n // other.shape[0])
            others.append(_stretched(other, rows[:1] if shared else rows, values.shape))
        return self._made(values, others)

    def block(self, first: Any, count: int) -> jax.Array:
        """``count`` rows from ``first`` on."""
        return self.taken(lax.dynamic_slice_in_dim(self.values, first, count), first + jnp.arange(count))

    def _made(self, values: jax.Array, others: Sequence[jax.Array]) -> jax.Array:
        given = iter(others)
        for operation in self.operations:
            values = operation(values, next(given) if operation.takes_rows else None)
        return values


def _stretched(other: jax.Array, rows: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Rows of an operand, ``[K or 1, d / c]``, as ``[K or 1, d]``."""
    taken = other.at[rows].get(mode="promise_in_bounds")
    return jnp.repeat(taken, shape[1] // other.shape[1], axis=1)


def rows_at(rows: Any, index: jax.Array, group_size: int) -> jax.Array:
    """The rows of chosen groups of a matrix, one after the other: ``[K * group_size, d]``."""
    if not isinstance(rows, StoredRows):
        return slabs_of(rows, index, group_size)
    at = index if group_size == 1 else (index[:, None] * group_size + jnp.arange(group_size, dtype=index.dtype)).ravel()
    return rows.taken(slabs_of(rows.values, index, group_size), at)


def as_operands(rows: StoredRows) -> tuple[list[jax.Array], Any, dict[str, Any]]:
    """Rows as a step takes them: its arrays, what makes rows of arrays again, and what a kernel is told of them."""
    arrays, tree = jax.tree.flatten(rows)
    told = {"operations": rows.operations, "shared": rows.shared}
    return arrays, lambda *arrays: jax.tree.unflatten(tree, arrays), told


def own_rows(rows: Any, first: Any, count: int) -> Any:
    """``count`` rows of a matrix from ``first`` on: the matrix itself where they are all."""
    if rows.shape[0] == count:
        return rows
    return rows.block(first, count) if isinstance(rows, StoredRows) else lax.dynamic_slice_in_dim(rows, first, count)
