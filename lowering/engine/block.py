"""What stands in a program where a dense feed-forward block stood: only the chosen hidden units are computed.

Units, or groups of them, are scored with the compressed predictor, chosen by score, and computed exactly. At full width
(every unit chosen) the result is that of the dense block, up to the order of sums.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.engine.engine import Steps, selected
from hire_xform.lowering.engine.selection import leaves_out, selection_of
from hire_xform.lowering.engine.static_units import static_units
from hire_xform.lowering.engine.top_groups import group_energy
from hire_xform.lowering.predict.predictors import PackedArrays, Predictor, predict_scores
from hire_xform.lowering.primitives.chosen_block import chosen_block
from hire_xform.lowering.primitives.combine_rows import combine_rows
from hire_xform.lowering.primitives.select_rows import select_rows_dot
from hire_xform.lowering.primitives.stored_rows import StoredRows

__all__ = [
    "Gather",
    "UpProduct",
    "beside_one_another",
    "chosen_products",
    "combined",
    "ffn",
    "gather_chosen",
    "group_scores",
]

# A pointwise region of a feed-forward block on some of its hidden units: `region(hiddens, gather)`; see `ffn`.
Gather = Callable[[jax.Array], jax.Array]
Region = Callable[[list[jax.Array], Gather], jax.Array]


@dataclass(frozen=True, kw_only=True)
class UpProduct:
    """One product into the hidden units, ``x @ rows.T``."""

    # [T, d]: the tokens.
    x: jax.Array
    # [m, d]: a row for each hidden unit; or a taller matrix that holds these rows from `first_row` on.
    rows: jax.Array
    # Where the m rows begin in `rows`, a multiple of the group size.
    first_row: jax.Array | int = 0
    # The predictor of the m rows; None when no score hangs on this product.
    packed: PackedArrays | None
    # Its spec.
    spec: Predictor
    # dtype of the dense product's result, which the region expects.
    dtype: jax.typing.DTypeLike


def ffn(
    ups: Sequence[UpProduct],
    region: Region,
    down: jax.Array,
    *,
    units: int | None = None,
    first_row: jax.Array | int = 0,
    beside: Sequence[tuple[jax.Array, jax.Array | int]] = (),
    down_norms: jax.Array | None,
    score: Callable[[list[jax.Array | None]], jax.Array] | None = None,
    active: int,
    group_size: int = 1,
    out_dtype: jax.typing.DTypeLike,
    static: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """A feed-forward block, ``region(ups) @ down``, with only the chosen hidden units computed.

    Units are scored by the size of what they would add: |predicted activation| times the norm of their down row. A
    group's score is the sum of squares of its units'. Where the model itself chooses units, by a top-k or a threshold,
    ``score`` gives what it chooses by, and a group's score is that of its best unit.

    Args:
      ups: the products into the hidden units, in the order the region takes them.
      region: what the model does to the hidden units, pointwise along them: ``region(hiddens, gather)`` takes one
        ``[T, K]`` array for each of ``ups`` and returns ``[T, K]``. ``gather`` brings anything else the region holds
        that varies along the units to the same ``K`` units: ``[m]`` becomes ``[K]`` or ``[T, K]``, ``[T, m]`` or
        ``[1, m]`` becomes ``[T, K]`` (or ``[1, K]``). It is called twice: at full width (K = m) on predicted values,
        where ``gather`` is the identity, and on the chosen units.
      down: ``[m, d_out]``, or a taller matrix that holds these rows from ``first_row`` on.
      units: ``m``; None takes all of ``down``.
      first_row: where the ``m`` rows begin in ``down``, a multiple of ``group_size``.
      beside: further matrices like ``down``, each with where its rows begin; what they make stands beside what it does.
      down_norms: f32 ``[m]``, the norm of each row of ``down``; not read, and may be None, when there is a ``score``.
      score: from the predicted ``[T, m]`` of each of ``ups`` (None for those without predictor) the units' scores,
        ``[T, m]``. The chosen units then reach ``region`` in ascending order, as ties of a top-k are broken.
      active: how many *groups* each token may have computed, ``1 <= active <= m / group_size``; of those predicted.
      group_size: neighbouring units chosen together, a divisor of ``m``.
      out_dtype: dtype of the result.
      static: how many units, the first ones, are always computed. The predictors are of the others only. Takes groups
        of one unit, no ``score`` and nothing ``beside``.

    Returns:
      ``[T, d_out]`` of ``out_dtype``, and a bool scalar: whether any token has a unit that is not zero, going by the
      predictors, and was left out. That means something where there is no ``score``, and zeros are many.

    Raises:
      ValueError: a size does not fit, or there is nothing to score by.
    """
    if not ups:
        raise ValueError("ffn: no product into the hidden units; expected at least one")
    m = down.shape[0] if units is None else units
    if group_size < 1 or m % group_size:
        raise ValueError(f"ffn: group_size={group_size} does not divide the {m} hidden units")
    if static and (group_size > 1 or score is not None or beside or not 0 < static < m):
        raise ValueError(f"ffn: static={static} of {m} units; expected fewer, in groups of one")
    others = m - static
    selection = selection_of(ups[0].x.shape[0], others // group_size, active)

    def predicted(hiddens: list[jax.Array], gather: Gather) -> jax.Array:
        return region(hiddens, (lambda values: values[..., static:]) if static else gather)

    with jax.named_scope("predict"):
        norms = down_norms[static:] if static and down_norms is not None else down_norms
        scores = group_scores(ups, predicted, units=others, down_norms=norms, score=score, group_size=group_size)
        scores = jax.lax.stop_gradient(scores)

    wide = jnp.promote_types(out_dtype, jnp.float32) if static else out_dtype
    contracting = ((down, first_row), *beside)

    def compute(index: jax.Array) -> jax.Array:
        return _of_chosen(ups, region, contracting, index + static if static else index, m, group_size, wide)

    steps = Steps(scores=scores, compute=compute, in_order=score is not None)
    index, made = selected(steps, selection)
    with jax.named_scope("select"):
        short = leaves_out(scores, index)
    with jax.named_scope("compute"):
        if static:
            fixed = static_units(ups, region, down, first_row, static).astype(wide)
            made = (fixed + made).astype(out_dtype)
    return made, short


def group_scores(
    ups: Sequence[UpProduct],
    region: Region,
    *,
    units: int,
    down_norms: jax.Array | None,
    score: Callable[[list[jax.Array | None]], jax.Array] | None = None,
    group_size: int = 1,
) -> jax.Array:
    """What groups of hidden units are chosen by, from the predictors alone.

    Args:
      ups, region, units, down_norms, score, group_size: as in :func:`ffn`; rows are not read.

    Returns:
      f32 ``[T, units / group_size]``.
    """
    grouped = (ups[0].x.shape[0], units // group_size, group_size)
    predicted = [
        None if up.packed is None else predict_scores(up.x, up.packed, up.spec, units).astype(up.dtype) for up in ups
    ]
    if score is not None:
        return score(predicted).astype(jnp.float32).reshape(grouped).max(axis=-1)
    if down_norms is None or any(p is None for p in predicted):
        raise ValueError("ffn: without a score every product needs its predictor, and down its norms")
    activation = region([p for p in predicted if p is not None], lambda values: values)
    return group_energy(activation, down_norms, group_size)


def chosen_products(ups: Sequence[UpProduct], index: jax.Array, group_size: int) -> list[jax.Array]:
    """Each product into the units, of the chosen ones only: ``[T, K * group_size]``, not yet rounded to 16 bits.

    Args:
      ups: the products; predictors are not read.
      index: the chosen groups of units, ``[K]`` for all tokens or ``[T, K]``.
      group_size: units in a group.
    """
    return [
        select_rows_dot(
            up.x,
            up.rows,
            _groups_from(index, up.first_row, group_size),
            group_size=group_size,
            preferred_element_type=jnp.promote_types(up.dtype, jnp.float32),
        )
        for up in ups
    ]


def _of_chosen(
    ups: Sequence[UpProduct],
    region: Region,
    contracting: Sequence[tuple[jax.Array, jax.Array | int]],
    index: jax.Array,
    units: int,
    group_size: int,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """What the chosen groups make of all contracting matrices, ``[T, d_out]`` of a dtype."""
    gather = gather_chosen(index, ups[0].x.shape[0], units, group_size)
    (down, first), *others = contracting
    if not others and not any(isinstance(rows, StoredRows) for rows in (down, *(up.rows for up in ups))):
        return chosen_block(
            [up.x for up in ups],
            [up.rows for up in ups],
            down,
            index,
            [_group_of(row, group_size) for row in (*(up.first_row for up in ups), first)],
            lambda hiddens: region(hiddens, gather),
            group_size=group_size,
            dtypes=[up.dtype for up in ups],
            out_dtype=dtype,
        )
    hiddens = chosen_products(ups, index, group_size)
    activation = region([h.astype(up.dtype) for h, up in zip(hiddens, ups, strict=True)], gather)
    return beside_one_another([combined(activation, *own, index, group_size, dtype) for own in contracting])


def combined(
    activation: jax.Array,
    down: jax.Array,
    first_row: jax.Array | int,
    index: jax.Array,
    group_size: int,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """What the chosen units add, ``[T, d_out]`` of ``out_dtype``, from their activation ``[T, K * group_size]``."""
    at = _groups_from(index, first_row, group_size)
    return combine_rows(activation, down, at, group_size=group_size, preferred_element_type=out_dtype)


def beside_one_another(results: Sequence[jax.Array]) -> jax.Array:
    """``[T, n]`` of each as ``[T, sum of n]``."""
    return results[0] if len(results) == 1 else jnp.concatenate(results, axis=1)


def gather_chosen(index: jax.Array, tokens: int, units: int, group_size: int) -> Gather:
    """What brings ``[m]``, ``[1, m]`` or ``[T, m]`` to the units of the chosen groups; see :func:`ffn`."""
    chosen = (index[..., None] * group_size + jnp.arange(group_size, dtype=index.dtype)).reshape(*index.shape[:-1], -1)

    def gather(values: jax.Array) -> jax.Array:
        if chosen.ndim == 1 or values.ndim == 1:
            return values.at[..., chosen].get(mode="promise_in_bounds")
        values = jnp.broadcast_to(values, (tokens, units))
        return jnp.take_along_axis(values, chosen, axis=1, mode="promise_in_bounds")

    return gather


def _groups_from(index: jax.Array, row: jax.Array | int, group_size: int) -> jax.Array:
    start = _group_of(row, group_size)
    return index if isinstance(start, int) and not start else index + start


def _group_of(row: jax.Array | int, group_size: int) -> jax.Array | int:
    """The group that begins with a row."""
    if isinstance(row, int):
        return row // group_size
    # Not `//`, which is fifteen operations: no row is below zero.
    return lax.div(row, lax.full_like(row, group_size))
