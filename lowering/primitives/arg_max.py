"""``hire_arg_max``: where the largest entry of an axis stands."""

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.primitives.kernels import bind_step, step_primitive

__all__ = ["arg_max", "arg_max_p"]


def arg_max(values: jax.Array) -> jax.Array:
    """``lax.argmax`` along the last axis: the first of the largest, or the first NaN.

    Args:
      values: ``[..., n]`` floating.

    Returns:
      int32 ``[...]``.
    """

    def portable(values: jax.Array) -> list[jax.Array]:
        return [lax.argmax(values, values.ndim - 1, jnp.int32)]

    return bind_step(arg_max_p, portable, lax.stop_gradient(values))[0]


# A kernel: rule(values) -> what arg_max returns.
arg_max_p = step_primitive("hire_arg_max")
