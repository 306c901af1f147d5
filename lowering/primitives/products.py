"""``hire_products``: products of a few tokens with every row of a matrix in floating point."""

import jax
import jax.numpy as jnp

from hire_xform.lowering.primitives.kernels import bind_step, step_primitive
from hire_xform.lowering.primitives.stack_entry import StackEntry, whole
from hire_xform.lowering.xla.skinny_dot import skinny_dot

__all__ = ["all_products", "products_p"]


def all_products(x: jax.Array, rows: jax.Array | StackEntry) -> jax.Array:
    """``x @ rows.T``, f32 ``[T, n]``, of ``x [T, d]`` and ``rows [n, d]`` of one dtype."""

    def portable(x: jax.Array, rows: jax.Array | StackEntry) -> list[jax.Array]:
        return [skinny_dot(x, whole(rows)).astype(jnp.float32)]

    return bind_step(products_p, portable, x, rows)[0]


# A kernel: rule(x, rows) -> what all_products returns.
products_p = step_primitive("hire_products")
