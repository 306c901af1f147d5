"""Walking down the rows of a large matrix a block at a time, so that temporaries stay the size of a cache.

A ``lax.scan`` (differentiable, unlike ``while_loop``) over block starts; the rows that do not fill a last block are one
more call outside the loop, so no row is padded and the matrix is never copied.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.xla.in_line import loop

__all__ = ["fold_row_blocks", "map_row_blocks", "rows_together"]

# Numbers that packing looks at together: enough to use all cores, little beside a matrix that is worth packing.
_TOGETHER = 1 << 20


def rows_together(columns: int) -> int:
    """How many rows of so many columns packing looks at together."""
    return max(16, _TOGETHER // columns)


def map_row_blocks(fun: Callable[..., Any], block: int, *arrays: jax.Array) -> Any:
    """``fun(*arrays)`` for a ``fun`` that treats rows alone, a block of rows at a time.

    Args:
      fun: takes blocks ``[b, ...]`` of the arrays and returns a pytree of arrays ``[b, ...]``.
      block: rows in a block, ``>= 1``.
      *arrays: ``[n, ...]`` with one common ``n >= 1``.

    Returns:
      What ``fun`` returns, of all ``n`` rows.
    """
    n = arrays[0].shape[0]
    full, tail = divmod(n, block)
    if full + (tail > 0) <= 1:
        return fun(*arrays)

    def body(carry: None, start: jax.Array) -> tuple[None, Any]:
        return carry, fun(*(lax.dynamic_slice_in_dim(a, start, block) for a in arrays))

    _, outs = loop(lax.scan, body, None, jnp.arange(full, dtype=jnp.int32) * block)
    outs = jax.tree.map(lambda o: o.reshape((full * block, *o.shape[2:])), outs)
    if tail:
        rest = fun(*(lax.slice_in_dim(a, full * block, n) for a in arrays))
        outs = jax.tree.map(lambda o, r: jnp.concatenate([o, r]), outs, rest)
    return outs


def fold_row_blocks(fun: Callable[..., Any], block: int, *arrays: jax.Array) -> Any:
    """The sum of ``fun`` over blocks of rows.

    Args:
      fun: takes blocks ``[b, ...]`` of the arrays and returns a pytree of arrays, of the same shapes for every ``b``.
      block: rows in a block, ``>= 1``.
      *arrays: ``[n, ...]`` with one common ``n >= 1``.

    Returns:
      The sum of what ``fun`` returns.
    """
    n = arrays[0].shape[0]
    full = (n - 1) // block
    if not full:
        return fun(*arrays)
    # The last block starts the sum: zeros would lack the manual axes that the parts vary over inside a shard_map.
    total = fun(*(lax.slice_in_dim(a, full * block, n) for a in arrays))

    def body(carry: Any, start: jax.Array) -> tuple[Any, None]:
        part = fun(*(lax.dynamic_slice_in_dim(a, start, block) for a in arrays))
        return jax.tree.map(jnp.add, carry, part), None

    total, _ = loop(lax.scan, body, total, jnp.arange(full, dtype=jnp.int32) * block)
    return total
