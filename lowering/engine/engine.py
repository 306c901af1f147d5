"""The selection engine: predict, select, compute and, where something is to be proved, prove or fall back.

What rows are predicted, how, and what is made of them says a configuration, as :class:`Steps`: a vocabulary projection
(``head.py``), a feed-forward block (``block.py``), or one with units proved to be zero (``certified_ffn.py``). The
first two take the steps of one :class:`Selection` as they are. What is certified goes through :func:`proved_or_dense`,
the one frame of all proofs.

Under ``vmap`` all tokens are taken together, and the derivative is that of the dense form. ``vmap`` of a ``lax.cond``
runs both sides and selects, which would read the dense weights always; so the batched form is written by hand.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hire_xform.lowering.engine.selection import Selection, entries, select
from hire_xform.lowering.primitives.ranks import Moments
from hire_xform.lowering.prove.proofs import Proof
from hire_xform.lowering.xla.in_line import loop
from hire_xform.lowering.xla.promotion import usual_promotion

__all__ = ["Certified", "Operands", "Steps", "proved_or_dense", "selected", "without"]

# What was computed of chosen rows: a pytree of arrays ``[T, K]``.
Made = Any


@dataclass(frozen=True, kw_only=True)
class Steps:
    """One configuration on its arrays, predicted already.

    Attributes:
      scores: what rows, or groups of them, are chosen by, f32 ``[T, n]``; ``[1, n]`` where all tokens share them.
      compute: what is computed of chosen rows, from their index.
      in_order: whether an index ascends, as ties of a top-k are broken; else it has any order.
      result: what stands where the dense result stood, from the index and what was computed.
      proved: whether that is proved to do, a bool scalar, of the same two.
      rung: int32 scalar, where bounds alone prove it: the number of the selection to take, or how many there are.
      read: rows that each further stage of a predictor has read, int32 scalars.
    """

    scores: jax.Array
    compute: Callable[[jax.Array], Made]
    in_order: bool = False
    result: Callable[[jax.Array, Made], jax.Array] = lambda index, made: made
    proved: Callable[[jax.Array, Made], jax.Array] | None = None
    rung: jax.Array | None = None
    read: Sequence[jax.Array] = ()


class Operands(NamedTuple):
    """The arrays of a certified site: ``u`` products into hidden units, or the one of a head.

    Attributes:
      xs: the tokens, ``[T, d]`` for each product.
      sides: side inputs. Of a block in canonical form: ``[T or 1, m or 1]``, or scalars.
      rows: ``[m, d]`` for each product, or taller matrices.
      first_rows: where the rows begin in them.
      proofs: what is kept of the rows, with bounds; None where nothing hangs on them.
      largest: the largest norm of a row, f32 scalars, where there is no proof; of a block.
      moments: from ``pack_bounded_moments``; None where the model takes no mean of them.
      down: of a block its contracting matrix, ``[m, d_out]``, or taller.
      first_down: where its rows begin.
      largest_down: the largest norm of one of them.
      leaves: the original weights, a pytree; None where they are not there, and the fallback reads the rows.
      beside: of a block further contracting matrices, whose results stand beside that of ``down``.
      first_beside: where their rows begin.
    """

    xs: list[jax.Array]
    sides: list[jax.Array]
    rows: list[jax.Array]
    first_rows: list[jax.Array]
    proofs: Sequence[Proof | None]
    largest: Sequence[jax.Array | None] = ()
    moments: Sequence[Moments | None] = ()
    down: jax.Array | None = None
    first_down: jax.Array | None = None
    largest_down: jax.Array | None = None
    leaves: Any = None
    beside: Sequence[jax.Array] = ()
    first_beside: Sequence[jax.Array] = ()


class Certified(Protocol):
    """A configuration that proves what it leaves out.

    Under ``vmap`` over tokens and side inputs the tokens of all examples are taken together.
    """

    @property
    def one_by_one(self) -> bool:
        """Whether examples of a batch are run one after the other: one's tokens can't stand beside another's."""

    def steps(self, o: Operands) -> tuple[Steps, Sequence[Selection]]:
        """The steps, and the selections to try, none smaller than the one before."""

    def dense(self, o: Operands) -> jax.Array:
        """The dense form of packed rows, ``[T, n]``, which is differentiated."""

    def fallback(self, o: Operands) -> jax.Array:
        """The same as the program computes it, of the original weights where they are there."""

    def tangent(self, out: jax.Array, change: jax.Array) -> jax.Array:
        """The derivative of a result, from that of the dense form."""


def selected(steps: Steps, selection: Selection) -> tuple[jax.Array, Made]:
    """The rows of one selection, ``[K]`` or ``[T, K]``, and what was computed of them."""
    with jax.named_scope("select"):
        index = _select(steps, steps.scores, selection)
    with jax.named_scope("compute"):
        made = steps.compute(index)
    return index, made


def _select(steps: Steps, scores: jax.Array, selection: Selection) -> jax.Array:
    index = select(scores, selection)
    return jnp.sort(index, axis=-1) if steps.in_order else index


def proved_or_dense(site: Certified, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """The site's result from the first selection that is proved to do for every token, else the dense form.

    Under ``vmap`` over tokens and side inputs the tokens of all examples are taken together.

    Returns:
      ``[T, n]``, and an int32 scalar: the number of the selection, or how many there are for the dense form. Of a
      predictor in stages int32 ``[stages]``: that number, and how many rows each stage after the first has read.
    """

    @jax.custom_batching.custom_vmap
    def run(o: Operands) -> tuple[jax.Array, jax.Array]:
        steps, selections = site.steps(o)
        fallback = functools.partial(site.fallback, o)
        if steps.rung is None:
            out, rung = _climbed(steps, selections, fallback)
            return out, jnp.stack([rung, *steps.read]) if steps.read else rung
        sizes = [functools.partial(_sized, steps, selection) for selection in selections]
        return lax.switch(steps.rung, [*sizes, fallback]), steps.rung

    @run.def_vmap
    @usual_promotion()
    def _batched(size: int, in_batched: list, o: Operands) -> tuple:
        batched = in_batched[0]
        if site.one_by_one or any(jax.tree.leaves(batched._replace(xs=[], sides=[]))):
            return _one_by_one(run, o, batched), (True, True)
        tokens = o.xs[0].shape[1 if batched.xs[0] else 0]
        xs = [_together(x, b, size, tokens) for x, b in zip(o.xs, batched.xs, strict=True)]
        sides = [_together(s, b, size, tokens) for s, b in zip(o.sides, batched.sides, strict=True)]
        out, rung = run(o._replace(xs=xs, sides=sides))
        taken = jnp.broadcast_to(rung, (size, *rung.shape))
        # Rows are read once for all examples, each of which takes the size.
        taken = taken.at[1:, 1:].set(0) if rung.ndim else taken
        return (out.reshape(size, tokens, -1), taken), (True, True)

    @jax.custom_jvp
    def differentiable(o: Operands) -> tuple[jax.Array, jax.Array]:
        return run(o)

    @differentiable.defjvp
    @usual_promotion()
    def _jvp(primals: tuple, tangents: tuple) -> tuple:
        """The dense form's, which reads every row."""
        (o,), (do,) = primals, tangents

        def of_these(xs: list, sides: list, rows: list, down: jax.Array, beside: Any) -> jax.Array:
            return site.dense(o._replace(xs=xs, sides=sides, rows=rows, down=down, beside=beside))

        wanted = (o.xs, o.sides, o.rows, o.down, o.beside)
        _, change = jax.jvp(of_these, wanted, (do.xs, do.sides, do.rows, do.down, do.beside))
        out, rung = differentiable(o)
        return (out, rung), (site.tangent(out, change), np.zeros(rung.shape, jax.dtypes.float0))

    # Arrays are operands of `run`, never closed over: transformations have to see them.
    return differentiable(operands)


def _one_by_one(run: Callable[[Operands], Any], o: Operands, batched: Operands) -> Any:
    """``run`` of one example after the other; what is not batched, weights most of all, is not spread."""
    arrays, tree = jax.tree.flatten(o)
    flags = jax.tree.leaves(batched)

    def one(own: list[jax.Array]) -> Any:
        given = iter(own)
        return run(jax.tree.unflatten(tree, [next(given) if b else a for a, b in zip(arrays, flags, strict=True)]))

    return loop(lax.map, one, [a for a, b in zip(arrays, flags, strict=True) if b])


def _together(value: jax.Array, batched: bool, size: int, tokens: int) -> jax.Array:
    """An operand of all examples' tokens: ``[T, n]`` for each of ``size`` examples becomes ``[size * T, n]``."""
    if not batched and (value.ndim == 0 or (value.shape[0] == 1 and tokens != 1)):
        return value  # the same for all tokens
    full = value if batched else jnp.broadcast_to(value, (size, *value.shape))
    if full.ndim == 1:
        full = full[:, None, None]
    return jnp.broadcast_to(full, (size, tokens, full.shape[2])).reshape(size * tokens, full.shape[2])


def _sized(steps: Steps, selection: Selection) -> jax.Array:
    return steps.result(*selected(steps, selection))


def _climbed(steps: Steps, selections: Sequence[Selection], fallback: Callable[[], jax.Array]) -> tuple[Any, jax.Array]:
    """The result of the first selection that is proved to do, and its number: rows are added, none is read twice."""

    def rung(number: int, index: Any, made: Made, failed: Any) -> tuple[jax.Array, jax.Array]:
        """The first selection from this one on that will do, given the rows that are computed already."""
        if number == len(selections):
            return fallback(), lax.full_like(failed, number, jnp.int32)
        here, before = selections[number], selections[number - 1] if number else None
        if before is None:
            index, made = selected(steps, here)
            fresh = None
        elif here.size == before.size:
            return rung(number + 1, index, made, failed)
        else:
            with jax.named_scope("select"):
                more, fresh = _next_rows(steps, index, here, before)
            with jax.named_scope("compute"):
                made = jax.tree.map(_joined, made, steps.compute(more))
            index = _joined(index, more)
        with jax.named_scope("prove"):
            assert steps.proved is not None
            sure = steps.proved(index, made)
            sure = sure if fresh is None else sure & fresh
        return lax.cond(
            sure,
            lambda: (steps.result(index, made), lax.full_like(sure, number, jnp.int32)),
            lambda: rung(number + 1, index, made, sure),
        )

    return rung(0, None, None, None)


def _joined(before: jax.Array, added: jax.Array) -> jax.Array:
    return jnp.concatenate([before, added], axis=-1)


def _next_rows(steps: Steps, index: jax.Array, selection: Selection, before: Selection) -> tuple[jax.Array, jax.Array]:
    """What a selection adds to the rows of the one before, and whether none of it is among those."""
    more = Selection(mode=selection.mode, size=selection.size - before.size, k=selection.k - before.k)
    others = without(steps.scores, index)
    added = _select(steps, others, more)
    # Computed rows have minus infinity, and are taken again only where nothing else is left.
    scores = jnp.take_along_axis(others, jnp.broadcast_to(added, (others.shape[0], more.size)), axis=1)
    return added, jnp.all(scores > -jnp.inf)


def without(values: jax.Array, index: jax.Array) -> jax.Array:
    """Values ``[T, n]`` of all rows but those of an index, which get minus infinity."""
    return values.at[entries(index, values)].set(-jnp.inf, unique_indices=True, mode="promise_in_bounds")
