"""Predict, select, compute: what stands in a program where a dense vocabulary projection or feed-forward block stood.

Both forms score every row with the compressed predictor, choose rows by score, and compute those rows exactly. At full
width (every row chosen) the result is that of the dense product, up to the order of sums.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from hire_xform.lowering.engine.rows import combine_rows, select_rows_dot
from hire_xform.lowering.engine.selection import choose, leaves_out, select
from hire_xform.lowering.engine.static_units import static_units
from hire_xform.lowering.engine.top_groups import group_energy
from hire_xform.lowering.predict.predictors import Packed, PredictorSpec, predict_scores, predictor_bytes

__all__ = [
    "Gather",
    "UpProduct",
    "chosen_products",
    "chosen_units",
    "ffn",
    "ffn_bytes",
    "gather_chosen",
    "group_scores",
    "vocab_bytes",
    "vocab_candidates",
    "vocab_logits",
]

# A pointwise region of a feed-forward block on some of its hidden units: `region(hiddens, gather)`; see `ffn`.
Gather = Callable[[jax.Array], jax.Array]
Region = Callable[[list[jax.Array], Gather], jax.Array]


def vocab_logits(
    x: jax.Array,
    rows: jax.Array,
    packed: Packed,
    spec: PredictorSpec,
    *,
    candidates: int,
    vocab: int | None = None,
    first_row: jax.Array | int = 0,
    fill: Literal["predicted", "-inf"] = "predicted",
    out_dtype: jax.typing.DTypeLike,
    shards: int = 1,
    rank: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """``x @ rows.T`` with exact logits for the candidates only.

    Args:
      x: ``[T, d]``.
      rows: ``[V, d]``, or a taller matrix that holds these rows somewhere.
      packed: the predictor of the ``V`` rows.
      spec: its spec.
      candidates: rows each token may have computed exactly, ``1 <= candidates <= V``; see ``choose`` for how several
        tokens share them.
      vocab: ``V``; None takes all of ``rows``.
      first_row: where the ``V`` rows begin in ``rows``; one of several stacked matrices is read in place this way.
      fill: what stands for the rest: ``"predicted"`` scores or ``"-inf"``.
      out_dtype: dtype of the logits.
      shards: equal blocks of rows that each give their share of the candidates.
      rank: what candidates are chosen by, from the scores, f32 ``[T, V]`` both; None: the scores themselves.

    Returns:
      ``[T, V]`` of ``out_dtype``.

    Raises:
      ValueError: ``candidates``, ``shards`` or ``fill`` does not fit.
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
        shards=shards,
        rank=rank,
    )
    with jax.named_scope("compute"):
        rest = scores if fill == "predicted" else jnp.full(scores.shape, -jnp.inf, exact.dtype)
        at = (slice(None), index) if index.ndim == 1 else (jnp.arange(x.shape[0])[:, None], index)
        out = rest.astype(exact.dtype).at[at].set(exact, unique_indices=True, mode="promise_in_bounds")
        return out.astype(out_dtype)


def vocab_candidates(
    x: jax.Array,
    rows: jax.Array,
    packed: Packed,
    spec: PredictorSpec,
    *,
    candidates: int,
    vocab: int | None = None,
    first_row: jax.Array | int = 0,
    out_dtype: jax.typing.DTypeLike,
    shards: int = 1,
    rank: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The candidates of :func:`vocab_logits`, which says what the arguments are.

    Returns:
      Their exact products ``[T, K]``, of ``out_dtype`` or f32 if that is wider; which rows they are, ``[K]`` or
      ``[T, K]``; and the scores of all rows, f32 ``[T, V]``.
    """
    tokens, vocab = x.shape[0], rows.shape[0] if vocab is None else vocab
    selection = choose(tokens, vocab, candidates, shards)
    with jax.named_scope("predict"):
        scores = predict_scores(x, packed, spec, vocab)
    with jax.named_scope("select"):
        ranked = jax.lax.stop_gradient(scores)
        index = select(ranked if rank is None else jax.lax.stop_gradient(rank(ranked)), selection, shards)
    with jax.named_scope("compute"):
        exact = select_rows_dot(
            x, rows, index + first_row, preferred_element_type=jnp.promote_types(out_dtype, jnp.float32)
        )
    return exact, index, scores


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
    packed: Packed | None
    # Its spec.
    spec: PredictorSpec
    # dtype of the dense product's result, which the region expects.
    dtype: jax.typing.DTypeLike


def ffn(
    ups: Sequence[UpProduct],
    region: Region,
    down: jax.Array,
    *,
    units: int | None = None,
    first_row: jax.Array | int = 0,
    down_norms: jax.Array | None,
    score: Callable[[list[jax.Array | None]], jax.Array] | None = None,
    active: int,
    group_size: int = 1,
    out_dtype: jax.typing.DTypeLike,
    shards: int = 1,
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
      down_norms: f32 ``[m]``, the norm of each row of ``down``; not read, and may be None, when there is a ``score``.
      score: from the predicted ``[T, m]`` of each of ``ups`` (None for those without predictor) the units' scores,
        ``[T, m]``. The chosen units then reach ``region`` in ascending order, as ties of a top-k are broken.
      active: how many *groups* each token may have computed, ``1 <= active <= m / group_size``; of those predicted.
      group_size: neighbouring units chosen together, a divisor of ``m``.
      out_dtype: dtype of the result.
      shards: equal blocks of groups that each give their share.
      static: how many units, the first ones, are always computed. The predictors are of the others only. Takes groups
        of one unit, one shard and no ``score``.

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
    if static:
        if group_size > 1 or shards > 1 or score is not None or not 0 < static < m:
            raise ValueError(f"ffn: static={static} of {m} units; expected fewer, in groups of one, on one device")
        return _with_static(
            ups, region, down, m, first_row, down_norms, active=active, out_dtype=out_dtype, static=static
        )
    tokens, n_groups = ups[0].x.shape[0], m // group_size
    selection = choose(tokens, n_groups, active, shards)
    with jax.named_scope("predict"):
        scores = group_scores(ups, region, units=m, down_norms=down_norms, score=score, group_size=group_size)
    with jax.named_scope("select"):
        scores = jax.lax.stop_gradient(scores)
        index = select(scores, selection, shards)
        short = leaves_out(scores, index)
        if score is not None:
            index = jnp.sort(index, axis=-1)
    result = chosen_units(
        ups, region, down, index, units=m, first_row=first_row, group_size=group_size, out_dtype=out_dtype
    )
    return result, short


def _with_static(
    ups: Sequence[UpProduct],
    region: Region,
    down: jax.Array,
    units: int,
    first_row: jax.Array | int,
    down_norms: jax.Array | None,
    *,
    active: int,
    out_dtype: jax.typing.DTypeLike,
    static: int,
) -> tuple[jax.Array, jax.Array]:
    others = units - static
    wide = jnp.promote_types(out_dtype, jnp.float32)
    with jax.named_scope("predict"):
        norms = None if down_norms is None else down_norms[static:]
        scores = group_scores(
            ups, lambda hiddens, _: region(hiddens, lambda v: v[..., static:]), units=others, down_norms=norms
        )
    with jax.named_scope("select"):
        scores = jax.lax.stop_gradient(scores)
        index = select(scores, choose(ups[0].x.shape[0], others, active))
        short = leaves_out(scores, index)
        index = index + static
    chosen = chosen_units(ups, region, down, index, units=units, first_row=first_row, out_dtype=wide)
    with jax.named_scope("compute"):
        products = [(up.x, up.rows, up.first_row, up.dtype) for up in ups]
        fixed = static_units(products, region, down, first_row, static).astype(wide)
        return (fixed + chosen).astype(out_dtype), short


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


def chosen_units(
    ups: Sequence[UpProduct],
    region: Region,
    down: jax.Array,
    index: jax.Array,
    *,
    units: int,
    first_row: jax.Array | int = 0,
    group_size: int = 1,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """The part of a feed-forward block that some of its hidden units make, computed exactly.

    Args:
      ups, region, down, units, first_row, group_size, out_dtype: as in :func:`ffn`; predictors are not read.
      index: the chosen groups of units, ``[K]`` for all tokens or ``[T, K]``.

    Returns:
      ``[T, d_out]`` of ``out_dtype``.
    """
    with jax.named_scope("compute"):
        activation = region(
            [h.astype(up.dtype) for h, up in zip(chosen_products(ups, index, group_size), ups, strict=True)],
            gather_chosen(index, ups[0].x.shape[0], units, group_size),
        )
        return combine_rows(
            activation,
            down,
            _groups_from(index, first_row, group_size),
            group_size=group_size,
            preferred_element_type=out_dtype,
        )


def chosen_products(
    ups: Sequence[UpProduct], index: jax.Array, group_size: int, magnitudes: bool = False
) -> list[jax.Array]:
    """Each product into the units, of the chosen ones only: ``[T, K * group_size]``, not yet rounded to 16 bits.

    Args:
      ups: the products; predictors are not read.
      index: the chosen groups of units, ``[K]`` for all tokens or ``[T, K]``.
      group_size: units in a group.
      magnitudes: those of tokens and rows instead.
    """
    return [
        select_rows_dot(
            up.x,
            up.rows,
            _groups_from(index, up.first_row, group_size),
            group_size=group_size,
            preferred_element_type=jnp.promote_types(up.dtype, jnp.float32),
            magnitudes=magnitudes,
        )
        for up in ups
    ]


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
    return index if isinstance(row, int) and row == 0 else index + row // group_size


def vocab_bytes(
    tokens: int,
    vocab: int,
    d: int,
    dtype: jax.typing.DTypeLike,
    spec: PredictorSpec,
    *,
    candidates: int,
    shards: int = 1,
) -> int:
    """Weight bytes one call of :func:`vocab_logits` reads: the predictor and the candidates' rows."""
    chosen = choose(tokens, vocab, candidates, shards).rows_read(tokens)
    return predictor_bytes(vocab, d, spec, dtype) + chosen * d * jnp.dtype(dtype).itemsize


def ffn_bytes(
    tokens: int,
    m: int,
    ups: Sequence[tuple[int, jax.typing.DTypeLike, PredictorSpec | None]],
    d_out: int,
    down_dtype: jax.typing.DTypeLike,
    *,
    active: int,
    group_size: int = 1,
    norms: bool = True,
    shards: int = 1,
    static: int = 0,
) -> int:
    """Weight bytes one call of :func:`ffn` reads: predictors, chosen up and down rows, and the down norms.

    Args:
      tokens: ``T``.
      m: hidden units.
      ups: ``(d, dtype, spec)`` of each product into them; the spec is None where nothing is predicted.
      d_out: columns of the down matrix.
      down_dtype: its dtype.
      active: groups each token may have computed.
      group_size: units in a group.
      norms: whether the down norms are read.
      shards, static: as in :func:`ffn`.

    Returns:
      Bytes.
    """
    m -= static
    units = choose(tokens, m // group_size, active, shards).rows_read(tokens) * group_size + static
    total = (4 * m if norms else 0) + units * d_out * jnp.dtype(down_dtype).itemsize
    for d, dtype, spec in ups:
        row = d * jnp.dtype(dtype).itemsize
        total += (0 if spec is None else predictor_bytes(m, d, spec, dtype)) + units * row
    return total
