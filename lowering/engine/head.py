"""What stands in a program where a dense vocabulary projection stood: exact logits for the candidates only.

:func:`vocab_logits` takes the rows of largest score for candidates. At full width (every row chosen) the result is that
of the dense product, up to the order of sums.

Of :func:`certified_logits` the arg max is proved, per input, to be the dense one's; else the dense product is run.
Candidates are the rows of largest *upper bound*. The best of them is the dense arg max when no other row's interval of
possible dense values reaches its own; where intervals meet only in a value that both round to, the lower index must be
the best's, as the dense arg max breaks ties. The proof is of the logits as the projection returns them, whatever the
order in which the dense product sums; see ``lowering/prove/bounds.py``. Section 5 of the design; derived there, in
``lowering/prove/goals.py`` and here. Of several compiled sizes the smallest is computed first, and rows are added until
the goal is proved.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.engine.engine import Operands, Steps, proved_or_dense, selected, without
from hire_xform.lowering.engine.narrowing import narrowed
from hire_xform.lowering.engine.selection import Selection, entries, rungs, select, selection_of
from hire_xform.lowering.predict.predictors import PackedArrays, Predictor, predict_scores
from hire_xform.lowering.primitives.da_top_k import da_top_k
from hire_xform.lowering.primitives.select_rows import select_rows_dot
from hire_xform.lowering.primitives.stored_rows import own_rows
from hire_xform.lowering.prove.bounds import ScoresWithBounds, flushed, product_error
from hire_xform.lowering.prove.goals import fewest_candidates, mass_margin, proved
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.prove.proofs import PROBED, Proof
from hire_xform.lowering.prove.readings import Reading, between_proved, between_proved_across, within_proved
from hire_xform.lowering.xla.devices import ONE, Devices

__all__ = ["certified_logits", "vocab_candidates", "vocab_logits"]

# What candidates are chosen by, f32 ``[T, V]``, from intervals of all logits ``[T, V]`` and side inputs.
Rank = Callable[[Interval, Sequence[jax.Array]], jax.Array]
Fill = Literal["predicted", "-inf"]


def vocab_logits(
    x: jax.Array,
    rows: jax.Array,
    packed: PackedArrays,
    spec: Predictor,
    *,
    candidates: int,
    vocab: int | None = None,
    first_row: jax.Array | int = 0,
    fill: Fill = "predicted",
    out_dtype: jax.typing.DTypeLike,
    rank: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """``x @ rows.T`` with exact logits for the candidates only.

    Args:
      x: ``[T, d]``.
      rows: ``[V, d]``, or a taller matrix that holds these rows somewhere.
      packed: the predictor of the ``V`` rows.
      spec: its spec.
      candidates: rows each token may have computed exactly, ``1 <= candidates <= V``; ``selection_of`` says how several
        tokens share them.
      vocab: ``V``; None takes all of ``rows``.
      first_row: where the ``V`` rows begin in ``rows``; one of several stacked matrices is read in place this way.
      fill: what stands for the rest: ``"predicted"`` scores or ``"-inf"``.
      out_dtype: dtype of the logits.
      rank: what candidates are chosen by, from the scores, f32 ``[T, V]`` both; None: the scores themselves.

    Returns:
      ``[T, V]`` of ``out_dtype``.

    Raises:
      ValueError: ``candidates`` or ``fill`` does not fit.
    """
    if fill not in ("predicted", "-inf"):
        raise ValueError(f"vocab_logits: fill={fill!r}; expected 'predicted' or '-inf'")
    exact, index, scores = vocab_candidates(
        x,
        rows,
        packed,
        spec,
        candidates=candidates,
        vocab=vocab,
        first_row=first_row,
        out_dtype=out_dtype,
        rank=rank,
    )
    with jax.named_scope("compute"):
        return _filled(scores, index, exact, fill).astype(out_dtype)


def vocab_candidates(
    x: jax.Array,
    rows: jax.Array,
    packed: PackedArrays,
    spec: Predictor,
    *,
    candidates: int,
    vocab: int | None = None,
    first_row: jax.Array | int = 0,
    out_dtype: jax.typing.DTypeLike,
    rank: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The candidates of :func:`vocab_logits`, which says what the arguments are.

    Returns:
      Their exact products ``[T, K]``, of ``out_dtype`` or f32 if that is wider; which rows they are, ``[K]`` or
      ``[T, K]``; and the scores of all rows, f32 ``[T, V]``.
    """
    tokens, vocab = x.shape[0], rows.shape[0] if vocab is None else vocab
    selection = selection_of(tokens, vocab, candidates)
    with jax.named_scope("predict"):
        scores = predict_scores(x, packed, spec, vocab)
    with jax.named_scope("select"):
        ranked = lax.stop_gradient(scores)
        ranked = ranked if rank is None else lax.stop_gradient(rank(ranked))
    wide = jnp.promote_types(out_dtype, jnp.float32)

    def products(index: jax.Array) -> jax.Array:
        return select_rows_dot(x, rows, index + first_row, preferred_element_type=wide)

    index, exact = selected(Steps(scores=ranked, compute=products), selection)
    return exact, index, scores


def _filled(scores: jax.Array, index: jax.Array, exact: jax.Array, fill: str) -> jax.Array:
    """All logits ``[T, V]``, with those of the candidates exact."""
    rest = scores if fill == "predicted" else jnp.full(scores.shape, -jnp.inf, exact.dtype)
    return rest.astype(exact.dtype).at[entries(index, rest)].set(exact, unique_indices=True, mode="promise_in_bounds")


def certified_logits(
    x: jax.Array,
    rows: jax.Array,
    proof: Proof,
    spec: Predictor,
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
    fill: Fill = "predicted",
    out_dtype: jax.typing.DTypeLike,
    rounded_to: jax.typing.DTypeLike | None = None,
    input_bits: int = 24,
    devices: Devices = ONE,
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
      devices: those that have parts of the rows, in a ``shard_map``: all else is of one device's part, and the goal is
        proved of all of them, or each runs its dense product. Of several, ``smaller`` is empty.

    Returns:
      Logits ``[T, V]`` of ``out_dtype``, and an int32 scalar: the number of the size that was computed, of ``smaller``
      and then ``candidates``; one more for the dense product. Of a predictor in stages int32 ``[stages]``: that number,
      and how many rows each stage after the first has read.

    Raises:
      ValueError: there are smaller sizes of rows that several devices have parts of.
    """
    head = _Head(
        spec=spec,
        product=dense,
        own=own,
        sizes=(*smaller, candidates),
        readings=tuple(readings),
        rank=rank,
        vocab=rows.shape[0] if vocab is None else vocab,
        fill=fill,
        out_dtype=jnp.dtype(out_dtype),
        rounded_to=jnp.dtype(out_dtype if rounded_to is None else rounded_to),
        input_bits=input_bits,
        devices=devices,
    )
    if devices != ONE and smaller:
        raise ValueError(f"certified_logits: smaller={tuple(smaller)} across devices; expected one size")
    operands = Operands(
        xs=[x],
        sides=list(sides),
        rows=[rows],
        first_rows=[jnp.asarray(first_row, jnp.int32)],
        proofs=[proof],
        leaves=leaf,
    )
    return proved_or_dense(head, operands)


@dataclass(frozen=True, kw_only=True)
class _Head:
    """What is static of a certified projection."""

    spec: Predictor
    product: Callable[[jax.Array, jax.Array], jax.Array]
    own: Callable[[jax.Array, Any], jax.Array] | None
    sizes: tuple[int, ...]
    readings: tuple[Reading, ...]
    rank: Rank | None
    vocab: int
    fill: str
    out_dtype: jnp.dtype
    rounded_to: jnp.dtype
    input_bits: int
    devices: Devices

    @property
    def one_by_one(self) -> bool:
        """Whether what is read has the shape of one example's."""
        return any(reading.between is not None for reading in self.readings)

    def dense(self, o: Operands) -> jax.Array:
        """The dense product of packed rows."""
        (x,), (rows,), (first,) = o.xs, o.rows, o.first_rows
        return self.product(x, own_rows(rows, first, self.vocab))

    def fallback(self, o: Operands) -> jax.Array:
        """The program's own product."""
        return self.dense(o) if self.own is None or o.leaves is None else self.own(o.xs[0], o.leaves)

    def tangent(self, out: jax.Array, change: jax.Array) -> jax.Array:
        """Of every logit that is not minus infinity."""
        return jnp.where(out == -jnp.inf, jnp.zeros((), change.dtype), change)

    def steps(self, o: Operands) -> tuple[Steps, Sequence[Selection]]:
        """Candidates are the rows of largest upper bound."""
        (x,), (rows,), (first,), (proof,) = o.xs, o.rows, o.first_rows, o.proofs
        assert proof is not None
        start = 0 if rows.shape[0] == self.vocab else first
        wide = jnp.promote_types(self.out_dtype, jnp.float32)

        def products(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Exact ones, and what their sums are of."""
            exact, terms = (
                select_rows_dot(x, rows, index + start, preferred_element_type=wide, magnitudes=magnitudes)
                for magnitudes in (False, True)
            )
            return exact, lax.stop_gradient(terms)

        with jax.named_scope("predict"):
            sides = lax.stop_gradient(o.sides)
            found, counts = narrowed(
                x,
                proof,
                self.spec,
                lambda known: self.opened(known, lambda index: products(index)[0], sides),
                few=self.sizes[0],
                input_bits=self.input_bits,
            )
            ranked = found.upper
            if self.rank is not None:
                ranked = lax.stop_gradient(self.rank(Interval(found.lower, found.upper), sides))

        def proves(index: jax.Array, made: tuple[jax.Array, jax.Array]) -> jax.Array:
            exact, terms = made
            exact = lax.stop_gradient(exact)
            error = product_error(terms, x.shape[1], self.input_bits, exact.astype(terms.dtype))
            error = error + flushed(lax.stop_gradient(x))
            return self.proved(found, exact, error, index, sides)

        def logits(index: jax.Array, made: tuple[jax.Array, jax.Array]) -> jax.Array:
            return _filled(found.scores, index, made[0], self.fill).astype(self.out_dtype)

        steps = Steps(scores=ranked, compute=products, proved=proves, result=logits, read=counts)
        return steps, rungs(x.shape[0], self.vocab, self.sizes)

    def opened(
        self, known: ScoresWithBounds, exact: Callable[[jax.Array], jax.Array], sides: list[jax.Array]
    ) -> jax.Array:
        """How far each row can be above what is read for sure, f32 ``[V]``, for the token for which it is most.

        That is known of the rows that look best, which are computed; a row below zero will not be read. Each device
        knows of its own rows.

        Args:
          known: scores and bounds.
          exact: the products of chosen rows.
          sides: what readers take besides.
        """
        (tokens, vocab), scores = known.scores.shape, lax.stop_gradient(known.scores)
        goals = [reading.goal for reading in self.readings]
        most = min(max(map(fewest_candidates, goals)), vocab)
        looks = scores if self.rank is None else self.rank(Interval(scores, scores), sides)
        best = select(lax.stop_gradient(looks), selection_of(tokens, vocab, min(max(PROBED, most), vocab)))
        at, own = entries(best, scores), lax.stop_gradient(exact(best))
        # Their own upper bounds stay: those that are not candidates later have no others.
        low, high = known.lower.at[at].set(own, unique_indices=True, mode="promise_in_bounds"), known.upper
        numbers = [math.log(vocab / reading.within) for reading in self.readings if reading.within is not None]
        opened = None if self.rank is None else lax.stop_gradient(self.rank(Interval(low, high), sides))
        if opened is None or numbers:
            low = jnp.where(jnp.isnan(low), -jnp.inf, low)
            floor = jnp.max(low, axis=1, keepdims=True) if most == 1 else da_top_k(low, most)[0][:, -1:]
            above = high - floor + max(*(mass_margin(goal, vocab) for goal in goals), *numbers, 0.0)
            opened = above if opened is None else jnp.maximum(opened, above)
        return jnp.max(jnp.where(jnp.isnan(opened), jnp.inf, opened), axis=0)

    def proved(
        self, found: ScoresWithBounds, exact: jax.Array, error: jax.Array, index: jax.Array, sides: list[jax.Array]
    ) -> jax.Array:
        """Whether all that is read is proved for every token, a bool scalar."""
        sure = jnp.bool_(True)
        others = without(found.upper, index)
        for reading in self.readings:
            if reading.between is not None:
                sure &= self.between_proved(reading, found, exact, error, index, sides)
                continue
            told = proved(reading.goal, exact, error, others, index, self.rounded_to, reading.ordered, self.devices)
            sure &= jnp.all(told)
        return sure

    def _of_all(self, part: Interval) -> Interval:
        """Intervals of the logits of all devices, 8 bytes an entry."""
        return part.map(lambda end: self.devices.gathered(end, 1))

    def _alike(self, sure: jax.Array) -> jax.Array:
        """What all devices have computed of the same, so that they branch alike whatever each of them rounds."""
        return self.devices.total((~sure).astype(jnp.int32)) == 0 if self.devices != ONE else sure

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
            end.at[entries(index, end)].set(own, unique_indices=True, mode="promise_in_bounds")
            for end, own in ((found.lower, exact - error), (found.upper, exact + error))
        )
        narrow = self.rounded_to.itemsize < 4

        def once(end: jax.Array) -> jax.Array:
            return end.astype(self.rounded_to).astype(jnp.float32) if narrow else end

        rounded = [once(end) for end in (low, high)]
        if reading.mixed or self.devices != ONE:
            low, high = jnp.minimum(low, rounded[0]), jnp.maximum(high, rounded[1])
        if self.devices != ONE and not reading.gathered:
            return jnp.all(between_proved_across(reading, Interval(low, high), sides, self.devices))
        logits = self._of_all(Interval(low, high))
        if reading.within is not None:
            made = _filled(lax.stop_gradient(found.scores), index, exact, self.fill).astype(jnp.float32)
            here = self._of_all(Interval(jnp.minimum(made, once(made)), jnp.maximum(made, once(made))))
            return self._alike(jnp.all(within_proved(reading, logits, here, sides)))
        sure, best = between_proved(reading, logits, sides)
        if self.devices != ONE:
            return self._alike(jnp.all(sure))
        if narrow and not reading.mixed:
            also, same = between_proved(reading, Interval(*rounded), sides)
            sure &= also & jnp.all(best == same, axis=1)
        return jnp.all(sure)
