"""A vocabulary projection whose arg max is proved, per input, to be the dense one's; else the dense product is run.

Candidates are the rows of largest *upper bound*. The best of them is the dense arg max when no other row's interval of
possible dense values reaches its own; where intervals meet only in a value that both round to, the lower index must be
the best's, as the dense arg max breaks ties. The proof is of the logits as the projection returns them, whatever the
order in which the dense product sums; see ``lowering/prove/bounds.py``. Section 5 of the design; derived there and
here.

Of several compiled sizes the smallest is computed first, and rows are added until the goal is proved.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hire_xform.lowering.engine.rows import select_rows_dot
from hire_xform.lowering.engine.selection import Selection, rungs, select
from hire_xform.lowering.predict.predictors import PredictorSpec
from hire_xform.lowering.prove.bounds import ScoresWithBounds, product_error
from hire_xform.lowering.prove.goals import proved
from hire_xform.lowering.prove.goals_across import proved_across
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.prove.proofs import Proof, scores_with_bounds
from hire_xform.lowering.prove.readings import Reading, between_proved
from hire_xform.lowering.xla.promotion import usual_promotion

__all__ = ["certified_logits"]

# What candidates are chosen by, f32 ``[T, V]``, from intervals of all logits ``[T, V]`` and side inputs.
Rank = Callable[[Interval, Sequence[jax.Array]], jax.Array]


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
    readings: Sequence[Reading] = (Reading(),),
    sides: Sequence[jax.Array] = (),
    rank: Rank | None = None,
    vocab: int | None = None,
    first_row: jax.Array | int = 0,
    fill: Literal["predicted", "-inf"] = "predicted",
    out_dtype: jax.typing.DTypeLike,
    rounded_to: jax.typing.DTypeLike | None = None,
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
      readings: what is read of the logits, all of which is to be proved.
      sides: what these take besides.
      rank: what candidates are chosen by, ``[T, V]``, from intervals of all logits and ``sides``; None: upper bounds.
      vocab: ``V``; None takes all of ``rows``.
      first_row: where the rows begin.
      fill: what stands for the other logits.
      out_dtype: dtype of the logits.
      rounded_to: what the dense product may be rounded to, or not; None: ``out_dtype``.
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
    chained = any(reading.between is not None for reading in readings)
    if across and (smaller or chained):
        raise ValueError(f"certified_logits: smaller={tuple(smaller)} across devices; expected one size, of logits")
    vocab = rows.shape[0] if vocab is None else vocab
    head = _Head(
        spec=spec,
        readings=tuple(readings),
        rank=rank,
        vocab=vocab,
        fill=fill,
        out_dtype=jnp.dtype(out_dtype),
        rounded_to=jnp.dtype(out_dtype if rounded_to is None else rounded_to),
        input_bits=input_bits,
        across=tuple(across),
        shards=shards,
    )
    # Arrays are operands of `run`, never closed over: transformations have to see them.
    arrays = (rows, proof, jnp.asarray(first_row, jnp.int32), leaf)

    def own_rows(rows: jax.Array, first_row: jax.Array) -> jax.Array:
        return rows if rows.shape[0] == vocab else lax.dynamic_slice_in_dim(rows, first_row, vocab)

    @jax.custom_batching.custom_vmap
    def run(x: jax.Array, sides: list[jax.Array], arrays: tuple) -> tuple[jax.Array, jax.Array]:
        rows, proof, first_row, leaf = arrays
        start = 0 if rows.shape[0] == vocab else first_row

        def fallback() -> jax.Array:
            if own is None or leaf is None:
                return dense(x, own_rows(rows, first_row))
            return own(x, leaf)

        selections = rungs(x.shape[0], vocab, (*smaller, candidates))
        return head.climb(x, sides, rows, proof, start, selections, fallback)

    @run.def_vmap
    @usual_promotion()
    def _batched(size: int, in_batched: list, x: jax.Array, sides: list[jax.Array], arrays: tuple) -> tuple:
        each = any(jax.tree.leaves(in_batched[2]))
        if each or chained:
            # What is read has the shape of one example's: one after the other. Weights are spread only if they differ.
            given = [jax.tree.map(_spread(size), *pair) for pair in zip((x, sides), in_batched[:2], strict=True)]
            if not each:
                return lax.map(lambda own: run(*own, arrays), tuple(given)), (True, True)
            given.append(jax.tree.map(_spread(size), arrays, in_batched[2]))
            return lax.map(lambda own: run(*own), tuple(given)), (True, True)
        logits, rung = run(x.reshape(-1, x.shape[-1]), sides, arrays)
        return (logits.reshape(size, -1, vocab), jnp.broadcast_to(rung, (size,))), (True, True)

    @jax.custom_jvp
    def differentiable(x: jax.Array, sides: list[jax.Array], arrays: tuple) -> tuple[jax.Array, jax.Array]:
        return run(x, sides, arrays)

    @differentiable.defjvp
    @usual_promotion()
    def _jvp(primals: tuple, tangents: tuple) -> tuple:
        """The dense product's, of every logit that is not minus infinity; it reads every row."""
        (x, sides, arrays), (dx, _, darrays) = primals, tangents
        logits, rung = differentiable(x, sides, arrays)
        change = dense(dx, own_rows(arrays[0], arrays[2])) + dense(x, own_rows(darrays[0], arrays[2]))
        change = jnp.where(logits == -jnp.inf, jnp.zeros((), change.dtype), change)
        return (logits, rung), (change, np.zeros(rung.shape, jax.dtypes.float0))

    return differentiable(x, list(sides), arrays)


def _spread(size: int) -> Callable[[jax.Array, bool], jax.Array]:
    """Gives what is not batched a leading axis of ``size``."""
    return lambda array, batched: array if batched else jnp.broadcast_to(array, (size, *jnp.shape(array)))


@dataclass(frozen=True, kw_only=True)
class _Head:
    """What is static of a certified projection."""

    spec: PredictorSpec
    readings: tuple[Reading, ...]
    rank: Rank | None
    vocab: int
    fill: str
    out_dtype: jnp.dtype
    rounded_to: jnp.dtype
    input_bits: int
    across: tuple[str, ...]
    shards: int

    def climb(
        self,
        x: jax.Array,
        sides: list[jax.Array],
        rows: jax.Array,
        proof: Proof,
        first_row: jax.Array | int,
        selections: Sequence[Selection],
        dense: Callable[[], jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Logits, and the number of the selection that proved the goal for every token, or one more."""
        with jax.named_scope("predict"):
            found = scores_with_bounds(x, proof, self.spec, input_bits=self.input_bits)
            sides = lax.stop_gradient(sides)
            ranked = found.upper
            if self.rank is not None:
                ranked = lax.stop_gradient(self.rank(Interval(found.lower, found.upper), sides))

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
                more, fresh = _next_rows(ranked, index, here, before)
            with jax.named_scope("compute"):
                exact = _joined(exact, products(more))
                terms = _joined(terms, lax.stop_gradient(products(more, magnitudes=True)))
            index = _joined(index, more)
            with jax.named_scope("prove"):
                error = product_error(terms, x.shape[1], self.input_bits)
                sure = self.proved(found, lax.stop_gradient(exact), error, index, sides) & fresh
            return lax.cond(
                sure,
                lambda: (self.logits(found, index, exact), lax.full_like(sure, number, jnp.int32)),
                lambda: rung(number + 1, index, exact, terms, sure),
            )

        return rung(0, None, None, None, None)

    def proved(
        self, found: ScoresWithBounds, exact: jax.Array, error: jax.Array, index: jax.Array, sides: list[jax.Array]
    ) -> jax.Array:
        """Whether all that is read is proved for every token, a bool scalar."""
        sure = jnp.bool_(True)
        others = _without(found.upper, index)
        for reading in self.readings:
            if reading.between is not None:
                sure &= self.between_proved(reading, found, exact, error, index, sides)
            elif self.across:
                sure &= jnp.all(self.proved_across(reading, exact, error, others))
            else:
                sure &= jnp.all(proved(reading.goal, exact, error, others, index, self.rounded_to, reading.ordered))
        return sure

    def proved_across(self, reading: Reading, exact: jax.Array, error: jax.Array, others: jax.Array) -> jax.Array:
        """The same of rows that several devices have; of 16 bits, whether the product is rounded to them or not."""
        if self.rounded_to.itemsize < 4:
            apart = float(jnp.finfo(self.rounded_to).eps)
            error, others = error + apart * jnp.abs(exact), others + apart * jnp.abs(others)
        dtype = jnp.promote_types(self.rounded_to, jnp.float32)
        return proved_across(reading.goal, exact, error, others, dtype, self.across, self.shards)

    def between_proved(
        self,
        reading: Reading,
        found: ScoresWithBounds,
        exact: jax.Array,
        error: jax.Array,
        index: jax.Array,
        sides: list[jax.Array],
    ) -> jax.Array:
        """The same of one that reads more than the logits, whether the product is rounded to 16 bits or not."""
        low, high = (
            end.at[_at(index, end)].set(own, unique_indices=True, mode="promise_in_bounds")
            for end, own in ((found.lower, exact - error), (found.upper, exact + error))
        )
        sure, best = between_proved(reading, Interval(low, high), sides)
        if self.rounded_to.itemsize < 4:
            ends = (end.astype(self.rounded_to).astype(jnp.float32) for end in (low, high))
            also, same = between_proved(reading, Interval(*ends), sides)
            sure &= also & jnp.all(best == same, axis=1)
        return jnp.all(sure)

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
