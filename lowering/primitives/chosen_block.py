"""``hire_chosen_block``: what the chosen hidden units of a feed-forward block make, from products to sums, as one step.

Its portable form is made of the steps for products and for sums, which have kernels of their own, with the model's
activation between them. A platform that gains by not sending what lies between through memory, or by starting once for
three times, has a kernel for all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from hire_xform.lowering.primitives.combine_rows import combine_rows, combine_rows_p
from hire_xform.lowering.primitives.kernels import bind_step, step_primitive
from hire_xform.lowering.primitives.select_rows import select_rows_dot, select_rows_dot_p

__all__ = ["BlockForm", "chosen_block", "chosen_block_p"]


@dataclass(frozen=True, eq=False)
class BlockForm:
    """How a block is computed: its equations, as a kernel reads them.

    Attributes:
      jaxpr: its inputs are the operands of the step; it has no constants.
      ups: how many products it has.
      starts: whether its matrices begin at some row of what they are given as.
    """

    jaxpr: Any
    ups: int
    starts: bool

    @cached_property
    def made(self) -> dict[Any, Any]:
        """The equation that makes each value."""
        return {var: eqn for eqn in self.jaxpr.eqns for var in eqn.outvars}

    @cached_property
    def products(self) -> list[Any]:
        """The equations of products, in order."""
        return [eqn for eqn in self.jaxpr.eqns if eqn.primitive is select_rows_dot_p]

    @cached_property
    def sums(self) -> list[Any]:
        """Those of sums."""
        return [eqn for eqn in self.jaxpr.eqns if eqn.primitive is combine_rows_p]

    @cached_property
    def between(self) -> list[Any]:
        """The equations that hang on products, up to sums."""
        changed = {var for eqn in self.products for var in eqn.outvars}
        found = []
        for eqn in self.jaxpr.eqns:
            if eqn.primitive is combine_rows_p or not any(v in changed for v in eqn.invars if _is_var(v)):
                continue
            changed.update(eqn.outvars)
            found.append(eqn)
        return found

    @cached_property
    def beside(self) -> list[Any]:
        """What these equations take besides the products and one another: values that hang on no product."""
        own = {var for eqn in (*self.products, *self.between) for var in eqn.outvars}
        taken = [v for eqn in self.between for v in eqn.invars if _is_var(v) and v not in own]
        return list(dict.fromkeys(taken))


def _is_var(atom: Any) -> bool:
    return not hasattr(atom, "val")


def chosen_block(
    xs: Sequence[jax.Array],
    rows: Sequence[jax.Array],
    down: jax.Array,
    index: jax.Array,
    starts: Sequence[jax.Array | int],
    activation: Callable[[list[jax.Array]], jax.Array],
    *,
    group_size: int,
    dtypes: Sequence[jax.typing.DTypeLike],
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """``activation(x @ rows[index].T for each of xs) @ down[index]`` with only those rows read.

    Args:
      xs: tokens, ``[T, d]`` for each product into the units.
      rows: a row for each unit, ``[n, d]`` for each of them.
      down: ``[n, d_out]``.
      index: the chosen groups, ``[K]`` or ``[T, K]`` int; in bounds.
      starts: for each of ``rows`` and for ``down`` the group that it begins with, which an index counts from.
      activation: of ``[T, K * group_size]`` for each product.
      group_size: neighbours in a group.
      dtypes: what products are rounded to before the activation.
      out_dtype: dtype of the result.

    Returns:
      ``[T, d_out]``.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
    """
    ups, moved = len(xs), any(not isinstance(start, int) or start for start in starts)

    def block(index: jax.Array, *arrays: jax.Array) -> jax.Array:
        begins = arrays[2 * ups + 1 :]
        at = [index + begin for begin in begins] if begins else [index] * (ups + 1)
        hiddens = []
        for x, matrix, own, dtype in zip(arrays[:ups], arrays[ups : 2 * ups], at[:-1], dtypes, strict=True):
            wide = jnp.promote_types(dtype, jnp.float32)
            made = select_rows_dot(x, matrix, own, group_size=group_size, preferred_element_type=wide)
            hiddens.append(made.astype(dtype))
        made = activation(hiddens)
        return combine_rows(made, arrays[2 * ups], at[-1], group_size=group_size, preferred_element_type=out_dtype)

    begins = [jnp.asarray(start, index.dtype) for start in starts] if moved else []
    operands = index, *xs, *rows, down, *begins
    traced = jax.make_jaxpr(block)(*operands)
    count = len(operands)

    def portable(*given: jax.Array) -> list[jax.Array]:
        # What the activation closes over has become operands.
        return jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, given[count:]))(*given[:count])

    # Settings outlive a trace, and from 0.12 on a jaxpr holds what it closes over.
    whole = jax.make_jaxpr(portable)(*operands, *traced.consts) if traced.consts else traced
    form = BlockForm(whole.jaxpr, ups, moved)
    return bind_step(chosen_block_p, portable, *operands, *traced.consts, group_size=group_size, form=form)[0]


# A kernel: rule(index, *xs, *rows, down, *starts, *others, group_size, form) -> what chosen_block returns.
chosen_block_p = step_primitive("hire_chosen_block")
