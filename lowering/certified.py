"""A vocabulary projection whose arg max is proved, per input, to be the dense one's; else the dense product is run.

Candidates are the rows of largest *upper bound*. The best of them is the dense arg max when no other row's interval of
possible dense values reaches its own; where intervals meet only in a value that both round to, the lower index must be
the best's, as the dense arg max breaks ties. The proof is of the logits as the projection returns them, whatever the
order in which the dense product sums; see ``lowering/bounds.py``. Section 5 of the design; derived there and here.

Of several compiled sizes the smallest is computed first, and rows are added until the goal is proved.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hire_xform.lowering.bounds import ScoresWithBounds, product_error
from hire_xform.lowering.goals import Goal, proved
from hire_xform.lowering.goals_across import proved_across
from hire_xform.lowering.predictors import PredictorSpec
from hire_xform.lowering.promotion import usual_promotion
from hire_xform.lowering.proofs import Proof, scores_with_bounds
from hire_xform.lowering.rows import select_rows_dot
from hire_xform.lowering.selection import Selection, rungs, select

__all__ = ["certified_logits"]


def certified_logits(
    x: jax.Array,
    rows: jax.Array,
    proof: Proof,
    spec: PredictorSpec,
    dense: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    own: Callable[[jax.Array, Any], jax.Array] | None = None,
    leaf: Any = None,
    candidates: int,
    smaller: Sequence[int] = (),
    goal: Goal = True,
    vocab: int | None = None,
    first_row: jax.Array | int = 0,
    fill: Literal["predicted", "-inf"] = "predicted",
    out_dtype: jax.typing.DTypeLike,
    input_bits: int = 24,
    across: Sequence[str] = (),
    shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """``x @ rows.T`` with exact logits for the candidates, and the arg max (or another goal) of the dense product.

    With ``smaller`` sizes these are tried first. A larger one adds the rows of next largest bound to those that are
    there, so that no row is read twice.

    Under ``vmap`` over ``x`` the tokens of all examples are taken together: one dense product if any of them fails.

    Args:
      x: ``[T, d]``, f32 or 16 bits.
      rows: ``[V, d]`` of the same kind, or a taller matrix that holds these rows from ``first_row`` on.
      proof: what is kept of the ``V`` rows, with bounds.
      spec: the predictor's spec.
      dense: the dense product of ``[T, d]`` and ``[V, d]``, of ``out_dtype``, ``[T, V]``.
      own: the same of the original weight, ``own(x, leaf)``, as the program computes it; what is fallen back to.
      leaf: the original weight, a pytree; None where it is not there, and ``dense`` is fallen back to.
      candidates: rows each token may have computed exactly.
      smaller: fewer, ascending, to try before that.
      goal: what is to be proved; True is the arg max.
      vocab: ``V``; None takes all of ``rows``.
      first_row: where the rows begin.
      fill: what stands for the other logits.
      out_dtype: dtype of the logits.
      input_bits: significant bits that the dense product keeps of f32 inputs.
      across: in a ``shard_map``, mesh axes of the devices that have parts of the rows: all else is of one device's
        part, and the goal is proved of all of them, or each runs its dense product. ``smaller`` is then empty.
      shards: devices along them.

    Returns:
      Logits ``[T, V]`` of ``out_dtype``, and an int32 scalar: the number of the size that was computed, of ``smaller``
      and then ``candidates``; one more for the dense product.

    Raises:
      ValueError: there are smaller sizes of rows that several devices have parts of.
    """
    if across and smaller:
        raise ValueError(f"certified_logits: smaller={tuple(smaller)} across devices; expected one size")
    vocab = rows.shape[0] if vocab is None else vocab
    head = _Head(
        spec=spec,
        goal=goal,
        vocab=vocab,
        fill=fill,
        out_dtype=jnp.dtype(out_dtype),
        input_bits=input_bits,
        across=tuple(across),
        shards=shards,
    )
    # Arrays are operands of `run`, never closed over: transformations have to see them.
    arrays = (rows, proof, jnp.asarray(first_row, jnp.int32), leaf)

    def own_rows(rows: jax.Array, first_row: jax.Array) -> jax.Array:
        return rows if rows.shape[0] == vocab else lax.dynamic_slice_in_dim(rows, first_row, vocab)

    @jax.custom_batching.custom_vmap
    def run(x: jax.Array, arrays: tuple) -> tuple[jax.Array, jax.Array]:
        rows, proof, first_row, leaf = arrays
        start = 0 if rows.shape[0] == vocab else first_row

        def fallback() -> jax.Array:
            if own is None or leaf is None:
                return dense(x, own_rows(rows, first_row))
            return own(x, leaf)

        selections = rungs(x.shape[0], vocab, (*smaller, candidates))
        return head.climb(x, rows, proof, start, selections, fallback)

    @run.def_vmap
    @usual_promotion()
    def _batched(size: int, in_batched: list, x: jax.Array, arrays: tuple) -> tuple:
        if any(jax.tree.leaves(in_batched[1])):
            x_of, arrays_of = (jax.tree.map(_spread(size), a, b) for a, b in zip((x, arrays), in_batched, strict=True))
            return lax.map(lambda pair: run(*pair), (x_of, arrays_of)), (True, True)
        logits, rung = run(x.reshape(-1, x.shape[-1]), arrays)
        return (logits.reshape(size, -1, vocab), jnp.broadcast_to(rung, (size,))), (True, True)

    @jax.custom_jvp
    def differentiable(x: jax.Array, arrays: tuple) -> tuple[jax.Array, jax.Array]:
        return run(x, arrays)

    @differentiable.defjvp
    @usual_promotion()
    def _jvp(primals: tuple, tangents: tuple) -> tuple:
        """The dense product's, of every logit that is not minus infinity; it reads every row."""
        (x, arrays), (dx, darrays) = primals, tangents
        logits, rung = differentiable(x, arrays)
        change = dense(dx, own_rows(arrays[0], arrays[2])) + dense(x, own_rows(darrays[0], arrays[2]))
        change = jnp.where(logits == -jnp.inf, jnp.zeros((), change.dtype), change)
        return (logits, rung), (change, np.zeros(rung.shape, jax.dtypes.float0))

    return differentiable(x, arrays)


def _spread(size: int) -> Callable[[jax.Array, bool], jax.Array]:
    """Gives what is not batched a leading axis of ``size``."""
    return lambda array, batched: array if batched else jnp.broadcast_to(array, (size, *jnp.shape(array)))


@dataclass(frozen=True, kw_only=True)
class _Head:
    """What is static of a certified projection."""

    spec: PredictorSpec
    goal: Goal
    vocab: int
    fill: str
    out_dtype: jnp.dtype
    input_bits: int
    across: tuple[str, ...]
    shards: int

    def climb(
        self,
        x: jax.Array,
        rows: jax.Array,
        proof: Proof,
        first_row: jax.Array | int,
        selections: Sequence[Selection],
        dense: Callable[[], jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Logits, and the number of the selection that proved the goal for every token, or one more."""
        with jax.named_scope("predict"):
            found = scores_with_bounds(x, proof, self.spec, input_bits=self.input_bits)

        def products(index: jax.Array, magnitudes: bool = False) -> jax.Array:
            out = jnp.promote_types(self.out_dtype, jnp.float32)
            at = index + first_row
            return select_rows_dot(x, rows, at, preferred_element_type=out, magnitudes=magnitudes)

        def rung(number: int, index: Any, exact: Any, terms: Any, failed: Any) -> tuple[jax.Array, jax.Array]:
            """The first selection from this one on that will do, given the rows that are computed already."""
            if number == len(selections):
                return dense(), lax.full_like(failed, number, jnp.int32)
            here, before = selections[number], selections[number - 1] if number else None
            if before is not None and here.size == before.size:
                return rung(number + 1, index, exact, terms, failed)
            with jax.named_scope("select"):
                more, fresh = _next_rows(found.upper, index, here, before)
            with jax.named_scope("compute"):
                exact = _joined(exact, products(more))
                terms = _joined(terms, lax.stop_gradient(products(more, magnitudes=True)))
            index = _joined(index, more)
            with jax.named_scope("prove"):
                others = _without(found.upper, index)
                error = product_error(terms, x.shape[1], self.input_bits)
                sure = jnp.all(self.proved(lax.stop_gradient(exact), error, others, index)) & fresh
            return lax.cond(
                sure,
                lambda: (self.logits(found, index, exact), lax.full_like(sure, number, jnp.int32)),
                lambda: rung(number + 1, index, exact, terms, sure),
            )

        return rung(0, None, None, None, None)

    def proved(self, exact: jax.Array, error: jax.Array, others: jax.Array, index: jax.Array) -> jax.Array:
        """For each token whether the goal is proved, bool ``[T]``."""
        if self.across:
            return proved_across(self.goal, exact, error, others, self.out_dtype, self.across, self.shards)
        return proved(self.goal, exact, error, others, index, self.out_dtype)

    def logits(self, found: ScoresWithBounds, index: jax.Array, exact: jax.Array) -> jax.Array:
        """All logits ``[T, V]``, with those of ``index`` exact."""
        rest = found.scores if self.fill == "predicted" else jnp.full(found.scores.shape, -jnp.inf, exact.dtype)
        logits = rest.astype(exact.dtype).at[_at(index, rest)].set(exact, unique_indices=True, mode="promise_in_bounds")
        return logits.astype(self.out_dtype)


def _at(index: jax.Array, values: jax.Array) -> tuple:
    """Where ``index`` points to in ``values [T, V]``."""
    return (slice(None), index) if index.ndim == 1 else (jnp.arange(values.shape[0])[:, None], index)


def _joined(before: jax.Array | None, added: jax.Array) -> jax.Array:
    return added if before is None else jnp.concatenate([before, added], axis=-1)


def _without(upper: jax.Array, index: jax.Array) -> jax.Array:
    """Upper bounds ``[T, V]`` of all rows but those of ``index``, which get minus infinity."""
    return upper.at[_at(index, upper)].set(-jnp.inf, unique_indices=True, mode="promise_in_bounds")


def _next_rows(
    upper: jax.Array, index: jax.Array | None, selection: Selection, before: Selection | None
) -> tuple[jax.Array, jax.Array]:
    """What a selection adds to the rows of the one before, and whether none of it is among those."""
    if index is None or before is None:
        return select(upper, selection), jnp.bool_(True)
    more = Selection(mode=selection.mode, size=selection.size - before.size, k=selection.k - before.k)
    others = _without(upper, index)
    added = select(others, more)
    # Computed rows have minus infinity, and are taken again only where nothing else is left.
    bounds = jnp.take_along_axis(others, jnp.broadcast_to(added, (upper.shape[0], more.size)), axis=1)
    return added, jnp.all(bounds > -jnp.inf)
