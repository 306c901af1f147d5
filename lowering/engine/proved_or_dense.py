"""The frame of a certified block: under ``vmap`` all tokens together, and the derivative of the dense block.

``vmap`` of a ``lax.cond`` runs both sides and selects, which would read the dense weights always; so the batched form
is written by hand.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hire_xform.lowering.xla.promotion import usual_promotion

__all__ = ["proved_or_dense"]


def proved_or_dense(
    attempt: Callable[[Any], tuple[jax.Array, jax.Array]], dense: Callable[[Any], jax.Array], operands: Any
) -> tuple[jax.Array, jax.Array]:
    """``attempt(operands)``, with the derivative of ``dense(operands)``; batches of tokens are run as more tokens.

    Args:
      attempt: gives ``[T, d_out]``, and a scalar that tells what was run.
      dense: the dense block, ``[T, d_out]``.
      operands: a named tuple with the fields ``xs`` (``[T, d]`` each) and ``sides`` (``[T or 1, m or 1]``, or scalars),
        in which tokens may be batched, and others.
    """

    @jax.custom_batching.custom_vmap
    def run(o: Any) -> tuple[jax.Array, jax.Array]:
        return attempt(o)

    @run.def_vmap
    @usual_promotion()
    def _batched(size: int, in_batched: list, o: Any) -> tuple:
        batched = in_batched[0]
        if any(jax.tree.leaves(batched._replace(xs=[], sides=[]))):
            each = jax.tree.map(lambda a, b: a if b else jnp.broadcast_to(a, (size, *jnp.shape(a))), o, batched)
            return lax.map(run, each), (True, True)
        tokens = o.xs[0].shape[1 if batched.xs[0] else 0]
        xs = [_together(x, b, size, tokens) for x, b in zip(o.xs, batched.xs, strict=True)]
        sides = [_together(s, b, size, tokens) for s, b in zip(o.sides, batched.sides, strict=True)]
        out, taken = run(o._replace(xs=xs, sides=sides))
        return (out.reshape(size, tokens, -1), jnp.broadcast_to(taken, (size,))), (True, True)

    @jax.custom_jvp
    def differentiable(o: Any) -> tuple[jax.Array, jax.Array]:
        return run(o)

    @differentiable.defjvp
    @usual_promotion()
    def _jvp(primals: tuple, tangents: tuple) -> tuple:
        """The dense block's, which reads every row."""
        (o,), (do,) = primals, tangents

        def of_these(xs: list, sides: list, rows: list, down: jax.Array) -> jax.Array:
            return dense(o._replace(xs=xs, sides=sides, rows=rows, down=down))

        wanted = (o.xs, o.sides, o.rows, o.down)
        _, change = jax.jvp(of_these, wanted, (do.xs, do.sides, do.rows, do.down))
        out, taken = differentiable(o)
        return (out, taken), (change, np.zeros(taken.shape, jax.dtypes.float0))

    return differentiable(operands)


def _together(value: jax.Array, batched: bool, size: int, tokens: int) -> jax.Array:
    """An operand of all examples' tokens: ``[T, n]`` for each of ``size`` examples becomes ``[size * T, n]``."""
    if not batched and (value.ndim == 0 or (value.shape[0] == 1 and tokens != 1)):
        return value  # the same for all tokens
    full = value if batched else jnp.broadcast_to(value, (size, *value.shape))
    if full.ndim == 1:
        full = full[:, None, None]
    return jnp.broadcast_to(full, (size, tokens, full.shape[2])).reshape(size * tokens, full.shape[2])
