"""Reading parts of a matrix of a narrow dtype without all of it being widened.

XLA's CPU backend has no slice or gather of bfloat16 or of 8 bits: it widens the whole matrix and slices that. Fused,
only what is sliced is widened. But in a loop that does not change the matrix, such as a scan over layers, the widening
is moved out of the loop first, and then it writes the whole matrix, of all layers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["read_part", "sliced_on_cpu"]


def sliced_on_cpu(dtype: jax.typing.DTypeLike) -> bool:
    """True for the floating dtypes that XLA's CPU backend slices as they are."""
    return jnp.dtype(dtype) in (jnp.float16, jnp.float32, jnp.float64)


def read_part(read: Callable[[jax.Array, jax.Array], jax.Array], rows: jax.Array, at: jax.Array) -> jax.Array:
    """``read(rows, at)``; on CPU, a matrix that comes with an index that a loop changes stays in the loop.

    Measured on a CPU, bfloat16, 512 rows of 4 KiB gathered in each of 16 layers of 4,096: 4.0 ms against 61.

    Args:
      read: takes a part of a matrix.
      rows: the matrix, ``[n, d]`` or ``[n / g, g, d]``.
      at: where it is read.
    """
    if sliced_on_cpu(rows.dtype):
        return read(rows, at)

    def in_place(rows: jax.Array, at: jax.Array) -> jax.Array:
        return read(*lax.optimization_barrier((rows, at)))

    return lax.platform_dependent(rows, at, cpu=in_place, default=read)
