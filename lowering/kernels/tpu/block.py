"""The chosen units of a feed-forward block in one kernel: products, activation and sums.

Slabs of all its matrices are one stream: while the last ones of a product are multiplied, the first ones of the next
matrix, and of the sums, are on their way. Products and the activation stay in VMEM. Whatever of the activation hangs on
no product is made before, by XLA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire_xform.lowering.kernels.results import result
from hire_xform.lowering.kernels.tpu.placing import in_hbm
from hire_xform.lowering.kernels.tpu.rows import combine_rows, dot, select_rows_dot, summed, terms
from hire_xform.lowering.kernels.tpu.shapes import AHEAD, bytes_of_slabs, rows_a_step
from hire_xform.lowering.kernels.tpu.slabs import PARAMS, Slabs, stream
from hire_xform.lowering.primitives.chosen_block import BlockForm

__all__ = ["chosen_block"]


def chosen_block(*operands: jax.Array, form: BlockForm, group: int) -> jax.Array:
    """As ``chosen_block`` of ``lowering/primitives``, of tokens that share an index."""
    ups = form.ups

    def blocks(separately: bool) -> Callable[..., jax.Array]:
        def fun(*operands: jax.Array) -> jax.Array:
            values = _Values(form, operands)
            others = [values.of(var) for var in form.beside]
            given = _Given(
                form=form,
                group=group,
                index=operands[0],
                xs=operands[1 : 1 + ups],
                rows=operands[1 + ups : 2 + 2 * ups],
                starts=operands[2 + 2 * ups : 3 + 3 * ups] if form.starts else (),
                others=others,
            )
            return (_apart if separately else _together)(given)

        return fun

    @jax.custom_batching.custom_vmap
    def fold(*operands: jax.Array) -> jax.Array:
        return blocks(False)(*operands)

    @fold.def_vmap
    def batch(size: int, batched: Sequence[bool], *operands: jax.Array) -> Any:
        """Of examples each has its own rows, or the kernels of products and sums take their tokens together."""
        axes = [0 if each else None for each in batched]
        return jax.vmap(blocks(True), axes, axis_size=size)(*operands), True

    return fold(*operands)


@dataclass(frozen=True, kw_only=True)
class _Given:
    """A block, and what it is given: operands of the step, and ``others``, what its activation takes besides."""

    form: BlockForm
    group: int
    index: jax.Array
    xs: Sequence[jax.Array]
    rows: Sequence[jax.Array]
    starts: Sequence[jax.Array]
    others: Sequence[jax.Array]


class _Values:
    """Values of a block's equations, each made when it is asked for."""

    def __init__(self, form: BlockForm, operands: Sequence[Any]):
        self._form, self._known = form, dict(zip(form.jaxpr.invars, operands, strict=True))

    def of(self, atom: Any) -> Any:
        """The value of a variable or a literal."""
        if hasattr(atom, "val"):
            return atom.val
        if atom not in self._known:
            eqn = self._form.made[atom]
            self.put(eqn, [self.of(v) for v in eqn.invars])
        return self._known[atom]

    def put(self, eqn: Any, values: Sequence[Any]) -> None:
        """Applies an equation."""
        made = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        self._known.update(zip(eqn.outvars, made if eqn.primitive.multiple_results else [made], strict=True))

    def know(self, var: Any, value: Any) -> None:
        """Says what a variable is."""
        self._known[var] = value


def _activation(form: BlockForm, hiddens: Sequence[Any], others: Sequence[Any]) -> Any:
    """What is summed up, from the products and from what else it takes."""
    values = _Values(form, [None] * len(form.jaxpr.invars))
    for eqn, hidden in zip(form.products, hiddens, strict=True):
        values.know(eqn.outvars[0], hidden)
    for var, value in zip(form.beside, others, strict=True):
        values.know(var, value)
    for eqn in form.between:
        values.put(eqn, [values.of(v) for v in eqn.invars])
    return values.of(form.sums[0].invars[0])


def _apart(given: _Given) -> jax.Array:
    """A kernel for each product, and one for the sums."""
    form, rows, group = given.form, given.rows, given.group
    at = [given.index + start for start in given.starts] or [given.index] * len(rows)
    made = [select_rows_dot(x, matrix, i, group, False) for x, matrix, i in zip(given.xs, rows, at, strict=False)]
    hiddens = [h.astype(eqn.params["out_dtype"]) for h, eqn in zip(made, form.products, strict=True)]
    return combine_rows(_activation(form, hiddens, given.others), rows[-1], at[-1], group)


def _together(given: _Given) -> jax.Array:
    """One kernel for all."""
    form, group, index, starts = given.form, given.group, given.index, given.starts
    xs, rows, others = given.xs, given.rows, given.others
    tokens, ups, wanted = xs[0].shape[0], form.ups, index.shape[0] * group
    slabs = Slabs(index.shape[0], group, rows[0].shape[1], rows[0].dtype)
    size, d_out = slabs.steps * rows_a_step(group), rows[-1].shape[1]
    # Products of one token are of one operand.
    distinct = list({id(x): x for x in xs}.values())
    lefts = [terms(x, slabs.dtype) for x in distinct]
    of_up = [[id(x) for x in distinct].index(id(x)) for x in xs]
    beside = [value if value.ndim else jnp.broadcast_to(value, (tokens, wanted)) for value in others]
    # XLA makes one of those that are equal, as where layers are stacked.
    at = [index + start for start in starts] or [index]
    picks = [slabs.which(i) for i in at] if slabs.single else []
    narrow = slabs.narrow and form.sums[0].invars[0].aval.dtype == jnp.bfloat16
    factors = (1 if narrow or not slabs.narrow else 3) * tokens

    def kernel(*refs: Any) -> None:
        numbers, refs = refs[: len(at)], refs[len(at) :]
        inputs, (out, held, sent, hidden, factor) = refs[:-5], refs[-5:]
        left, more, sources = inputs[: len(lefts)], inputs[len(lefts) : -ups - 1], inputs[-ups - 1 :]
        which, more = more[: len(picks)], more[len(picks) :]

        def block(number: int, step: Any, slot: Any) -> jax.Array:
            return slabs.block(held, which[number if starts else 0] if picks else None, step, slot)

        use = _uses(form, slabs, block, [left[i] for i in of_up], more, hidden, factor, out)
        stream(slabs, sources, numbers if starts else numbers * (ups + 1), held, sent, use)

    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    moved = (ups + 1) * bytes_of_slabs(slabs.count, group, slabs.d, slabs.dtype)
    small = sum(a.nbytes for a in (*lefts, *picks, *beside, *at))
    return pl.pallas_call(
        kernel,
        name="hire_chosen_block",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(at),
            grid=(),
            in_specs=[whole] * len((*lefts, *picks, *beside)) + [pl.BlockSpec(memory_space=pltpu.HBM)] * (ups + 1),
            out_specs=whole,
            scratch_shapes=[
                slabs.held(),
                pltpu.SemaphoreType.DMA((AHEAD,)),
                pltpu.VMEM((ups, tokens, size), jnp.float32),
                pltpu.VMEM((factors, size), jnp.bfloat16 if slabs.narrow else jnp.float32),
            ],
        ),
        compiler_params=PARAMS,
        out_shape=result((tokens, d_out), jnp.float32),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * (ups + 1) * wanted * slabs.d,
            bytes_accessed=moved + small + 4 * tokens * d_out,
            transcendentals=0,
        ),
    )(*at, *lefts, *picks, *beside, *(in_hbm(matrix) for matrix in rows))


def _uses(
    form: BlockForm,
    slabs: Slabs,
    block: Callable[[int, Any, Any], jax.Array],
    left: Sequence[Any],
    others: Sequence[Any],
    hidden: Any,
    factor: Any,
    out: Any,
) -> list[Callable[[Any, Any], None]]:
    """What is done with the rows of a step of each matrix.

    Args:
      form, slabs: of the block, and how its rows are read.
      block: the rows of a step, of the matrix of a number.
      left: for each product the terms of its tokens.
      others: what the activation takes besides.
      hidden: where products are kept, f32 ``[ups, T, size]``.
      factor: where terms of the activation are, ``[terms * T, size]``.
      out: the sums, f32 ``[T, d_out]``.
    """
    tokens, rows, wanted = out.shape[0], rows_a_step(slabs.group), slabs.count * slabs.group

    def of_step(step: Any) -> Any:
        return pl.ds(pl.multiple_of(step * rows, rows), rows)

    def product(number: int, step: Any, slot: Any) -> None:
        made = dot(left[number][...], block(number, step, slot), ((1,), (1,)))
        hidden[number, :, of_step(step)] = summed(made, tokens)

    def total(step: Any, slot: Any) -> None:
        @pl.when(step == 0)
        def activate() -> None:
            own = [hidden[number][:, :wanted] for number in range(form.ups)]
            made = _activation(form, own, [each[...] for each in others])
            factor[...] = jnp.zeros_like(factor)
            factor[:, :wanted] = terms(made, slabs.dtype).astype(factor.dtype)
            out[...] = jnp.zeros_like(out)

        out[...] += summed(dot(factor[:, of_step(step)], block(form.ups, step, slot), ((1,), (0,))), tokens)

    return [*(functools.partial(product, number) for number in range(form.ups)), total]
