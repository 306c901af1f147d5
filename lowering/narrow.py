"""Reading parts of a matrix of a narrow dtype without all of it being widened.

XLA's CPU backend has no slice or gather of bfloat16 or of 8 bits: it widens the whole matrix and slices that. Fused,
only what is sliced is widened. But in a loop that does not change the matrix, such as a scan over layers, the widening
is moved out of the loop first, and then it writes the whole matrix, of all layers.
"""

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["kept_narrow", "sliced_on_cpu"]


def sliced_on_cpu(dtype: jax.typing.DTypeLike) -> bool:
    """True for the floating dtypes that XLA's CPU backend slices as they are."""
    return jnp.dtype(dtype) in (jnp.float16, jnp.float32, jnp.float64)


def kept_narrow(rows: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``rows`` and where they are read, for CPU: what comes with an index that a loop changes stays in the loop.

    Measured on a CPU, bfloat16, 512 rows of 4 KiB gathered in each of 16 layers of 4,096: 4.0 ms against 61.

    Args:
      rows: a matrix, ``[n, d]`` or ``[n / g, g, d]``.
      at: where it is read.

    Returns:
      Both, unchanged.
    """
    return (rows, at) if sliced_on_cpu(rows.dtype) else lax.optimization_barrier((rows, at))
