"""What is proved of a vocabulary projection: its arg max, its set of the k largest, or most of its softmax's mass.

All decide from the candidates' exact products, how far dense ones can be from them, and upper bounds of all others.

Where several devices have parts of the rows no score travels. With A the k-th largest of what the candidates' dense
logits are at least (k is 1 for an arg max), k of them are at least A. If no more than k rows *can* be at least A, those
are the k largest. Each device sends its own k largest lower bounds, and then how many of its rows can be at least A:
4 k and 4 bytes for each token. A nucleus takes its largest lower bound and two sums. Derived here. All devices get the
same answer, so that they branch alike. Where the dense product may be rounded to 16 bits or not, exactly k rows must be
able to be the rounded A. Rounding keeps order, so that what can't be the rounded A can't be A: the same k rows are the
k largest both ways. Rows that tie once they are rounded are no k largest of the unrounded ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.primitives.ranks import among_largest
from hire_xform.lowering.prove.bounds import U
from hire_xform.lowering.xla.devices import ONE, Devices
from hire_xform.lowering.xla.nan_max import largest_or_nan

__all__ = [
    "Goal",
    "Nucleus",
    "TopSet",
    "candidates_needed",
    "candidates_within",
    "fewest_candidates",
    "mass_margin",
    "proved",
    "proved_across",
]

# In one count: rows that can be more than A, at most two a device, and whether any is A for sure.
_MORE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class TopSet:
    """``Vocab(certify=TopSet(k))``: the k largest logits are those of the dense projection, as a set.

    All of them are exact logits. Their order among themselves is not proved: it is that of the exact logits, which
    differ from the dense ones by rounding. Where the k-th and the next tie, the dense product is run.
    """

    # How many.
    k: int = field(kw_only=False)

    def __post_init__(self) -> None:
        """Refuses a value out of range."""
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"TopSet: k={self.k!r}; expected an integer of at least 1")


@dataclass(frozen=True, kw_only=True)
class Nucleus:
    """``Vocab(certify=Nucleus(eps))``: the candidates hold at least ``1 - eps`` of the dense softmax's mass.

    The softmax is that of the logits as the projection returns them, at temperature 1. With ``fill="-inf"`` a sample of
    the returned logits is one of the dense distribution given that it is a candidate, so that the two distributions
    are within ``eps`` of each other in total variation, and rounding. The arg max is not proved by it.
    """

    # The mass that may be missed.
    eps: float = field(kw_only=False)

    def __post_init__(self) -> None:
        """Refuses a value out of range."""
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)) or not 1e-6 <= self.eps < 1.0:
            raise ValueError(f"Nucleus: eps={self.eps!r}; expected a number, 1e-6 <= eps < 1")


# True is the arg max.
Goal = bool | TopSet | Nucleus


def fewest_candidates(goal: Goal) -> int:
    """Candidates below which nothing can be proved."""
    return goal.k if isinstance(goal, TopSet) else 1


def mass_margin(goal: Goal, vocab: int) -> float:
    """How far below the largest logit a row still matters: for mass, as all of V such rows would miss ``eps``."""
    return math.log(vocab / goal.eps) if isinstance(goal, Nucleus) else 0.0


def proved(
    goal: Goal,
    exact: jax.Array,
    error: jax.Array,
    others: jax.Array,
    index: jax.Array,
    out_dtype: jnp.dtype,
    ordered: bool = False,
    devices: Devices = ONE,
) -> jax.Array:
    """For each token whether what is asked for is proved, bool ``[T]``; a NaN anywhere proves nothing.

    A product of 16 bits may be rounded in the dense program or not (XLA leaves out a rounding that is followed by
    widening), so what is asked for is proved both ways, and must be the same.

    Args:
      goal: what is asked for.
      exact: f32 ``[T, K]``, the candidates' products.
      error: f32 ``[T, K]``, how far the dense ones can be from them.
      others: f32 ``[T, V]``, above every dense product of the other rows; minus infinity for the candidates.
      index: ``[K]`` or ``[T, K]``, the candidates.
      out_dtype: what the dense product is rounded to, or not.
      ordered: of a set, whether the order of its members is proved as well; on one device.
      devices: those that have parts of the rows. All else is of this one's part, and the answer is that of all.
    """
    dtypes = tuple(dict.fromkeys((jnp.dtype(out_dtype), jnp.promote_types(out_dtype, jnp.float32))))
    if isinstance(goal, Nucleus):
        return _nucleus(exact, error, others, dtypes, goal.eps, devices)
    if devices != ONE:
        return proved_across(goal, exact, error, others, out_dtype, devices, also_unrounded=len(dtypes) > 1)
    index = jnp.broadcast_to(index, exact.shape)
    outside = largest_or_nan(others, 1)
    if isinstance(goal, TopSet):
        k, vocab = goal.k, others.shape[1]
        found = [_top_set(exact, error, outside, index, dtype, k, vocab, ordered) for dtype in dtypes]
    else:
        found = [_arg_max(exact, error, outside, index, dtype) for dtype in dtypes]
    sure, members = found[0]
    for also, same in found[1:]:
        sure &= also & jnp.all(members == same, axis=1)
    return sure


def _top_set(
    exact: jax.Array,
    error: jax.Array,
    outside: jax.Array,
    index: jax.Array,
    out_dtype: jnp.dtype,
    k: int,
    vocab: int,
    ordered: bool,
) -> tuple[jax.Array, jax.Array]:
    """The smallest that a member can be is above the largest that any other row can be; and the members, a mask."""
    if k > exact.shape[1]:
        return jnp.full(exact.shape[:1], exact.shape[1] == vocab and not ordered), jnp.ones_like(exact, bool)
    low, high = (exact - error).astype(out_dtype), (exact + error).astype(out_dtype)
    # Of equal values the lowest row comes first, whatever the order of the candidates.
    order = jnp.argsort(index, axis=1)
    value, low, high = (jnp.take_along_axis(a, order, axis=1) for a in (exact.astype(out_dtype), low, high))
    member = among_largest(value, k)
    floor = jnp.min(jnp.where(member, low, jnp.inf), axis=1)
    ceiling = jnp.max(jnp.where(member, -jnp.inf, high), axis=1)
    sure = jnp.all(jnp.isfinite(low) & jnp.isfinite(high), axis=1)
    if ordered:
        # Members by their exact logits, each above the most that those behind it can be.
        first = jnp.argsort(jnp.where(member, -value.astype(jnp.float32), jnp.inf), axis=1)[:, :k]
        lows, highs = (jnp.take_along_axis(a, first, axis=1) for a in (low, high))
        behind = lax.cummax(highs[:, ::-1], axis=1)[:, ::-1]
        sure &= jnp.all(lows[:, :-1] > behind[:, 1:], axis=1)
    return (floor > ceiling) & (floor > outside.astype(out_dtype)) & sure, member


def proved_across(
    goal: Goal,
    exact: jax.Array,
    error: jax.Array,
    others: jax.Array,
    out_dtype: jnp.dtype,
    devices: Devices,
    also_unrounded: bool = False,
) -> jax.Array:
    """For each token whether what is asked for is proved of the rows of all devices, bool ``[T]``.

    Args:
      goal, exact, error, others: as for :func:`proved`, of one device's part.
      out_dtype: what the dense product is rounded to.
      devices: all of them.
      also_unrounded: of a dense product that is not rounded, too, and the same.
    """
    if isinstance(goal, Nucleus):
        return _nucleus(exact, error, others, (out_dtype,), goal.eps, devices)
    k, (candidates, rows) = fewest_candidates(goal), (exact.shape[1], others.shape[1])
    if k > devices.count * candidates:
        return jnp.full(exact.shape[:1], candidates == rows)
    low, high = ((exact + part).astype(out_dtype).astype(jnp.float32) for part in (-error, error))
    finite = jnp.all(jnp.isfinite(low) & jnp.isfinite(high), axis=1)
    low = jnp.where(finite[:, None], low, -jnp.inf)
    others = others.astype(out_dtype).astype(jnp.float32)
    floor = _kth_largest(low, k, devices)
    # What is not a candidate is not known to be A; nor is a NaN known to be below it.
    unknown = jnp.logical_not(largest_or_nan(others, 1) < floor) | jnp.logical_not(finite)
    can = high >= floor[:, None]
    if k > 1 or also_unrounded:
        count = jnp.where(unknown, k + 1, jnp.sum(can, axis=1))
        return devices.total(count) == k
    # Rows that are all A for sure tie in the dense product too, where the lowest id of them is the arg max, as it is of
    # the exact logits.
    sure = low == high
    more = jnp.where(unknown, 2, jnp.minimum(jnp.sum(can & ~sure, axis=1), 2))
    total = devices.total(more * _MORE + jnp.any(can & sure, axis=1))
    return (total < _MORE) | (total == _MORE)


def _kth_largest(low: jax.Array, k: int, devices: Devices) -> jax.Array:
    """The k-th largest of all devices' ``[T, K]``, ``[T]``."""
    if k == 1:
        return devices.largest(jnp.max(low, axis=1))
    return lax.top_k(devices.gathered(lax.top_k(low, min(k, low.shape[1]))[0], 1), k)[0][:, -1]


def _nucleus(
    exact: jax.Array,
    error: jax.Array,
    others: jax.Array,
    dtypes: Sequence[jnp.dtype],
    eps: float,
    devices: Devices,
) -> jax.Array:
    """With I at least the candidates' sum of exponentials and O at most the others': O / (I + O) is at most eps.

    Of products rounded to each of the dtypes.
    """

    def rounded(values: jax.Array) -> jax.Array:
        return jnp.stack([values.astype(dtype).astype(jnp.float32) for dtype in dtypes])

    low = rounded(exact - error)
    finite = jnp.all(jnp.isfinite(low) & jnp.isfinite(rounded(exact + error)), axis=-1)
    low = jnp.where(finite[..., None], low, -jnp.inf)
    peak = devices.largest(jnp.max(low, axis=-1))[..., None]
    inside = jnp.sum(jnp.exp(low - peak), axis=-1)
    outside = jnp.sum(jnp.exp(rounded(others) - peak), axis=-1)
    inside, outside = devices.total(jnp.stack([inside, jnp.where(finite, outside, jnp.inf)]))
    rounding = sum_rounding(devices.count * others.shape[1])
    return jnp.all(outside * (1.0 + rounding) * (1.0 - eps) <= eps * inside, axis=0)


def sum_rounding(vocab: int) -> float:
    """Twice what a sum of V exponentials rounds by (V u), with an exponential's own error: 88 u of its argument's."""
    return 2.0 * (vocab + 1024.0) * U


def candidates_needed(goal: Goal, logits: jax.Array, upper: jax.Array, exact_error: jax.Array) -> jax.Array:
    """About how many candidates, in the order of upper bounds, prove what is asked for: int ``[T]``, 1 to V.

    Args:
      goal: what is asked for.
      logits: ``[T, V]``, the dense ones.
      upper, exact_error: as ``scores_with_bounds`` gives them, no NaN.
    """
    vocab = logits.shape[1]
    if isinstance(goal, Nucleus):
        order = jnp.argsort(-upper, axis=1)
        low, high = (jnp.take_along_axis(a, order, axis=1) for a in (logits - exact_error, upper))
        peak = jnp.max(low, axis=1, keepdims=True)
        inside = jnp.cumsum(jnp.exp(low - peak), axis=1)
        weights = jnp.exp(high - peak)
        outside = jnp.cumsum(weights[:, ::-1], axis=1)[:, ::-1] - weights
        enough = outside * (1.0 + sum_rounding(upper.shape[1])) * (1.0 - goal.eps) <= goal.eps * inside
        return jnp.where(jnp.any(enough, axis=1), 1 + jnp.argmax(enough, axis=1), vocab)
    k = min(fewest_candidates(goal), vocab)
    values, best = jax.lax.top_k(logits.astype(jnp.float32), k)
    floor = jnp.min(values - jnp.take_along_axis(exact_error, best, axis=1), axis=1, keepdims=True)
    return jnp.clip(jnp.sum(jnp.logical_not(upper < floor), axis=1), k, vocab)


def candidates_within(
    within: float, logits: jax.Array, scores: jax.Array, upper: jax.Array, exact_error: jax.Array
) -> jax.Array:
    """About how many candidates, in the order of upper bounds, prove log-probabilities: int ``[T]``, 1 to V.

    With their sum of exponentials S and that of the others between L and H, and P as predicted, what is computed and
    what is dense are apart by the larger of ``log (S + H) / (S + P)`` and ``log (S + P) / (S + L)``.

    Args:
      within: how far they may be apart, in nats.
      logits: ``[T, V]``, the dense ones.
      scores, upper, exact_error: as ``scores_with_bounds`` gives them, no NaN.
    """
    order = jnp.argsort(-upper, axis=1)
    found = (logits + exact_error, upper, scores, 2.0 * scores - upper)
    inside, high, predicted, low = (jnp.take_along_axis(a.astype(jnp.float32), order, axis=1) for a in found)
    peak = jnp.max(inside, axis=1, keepdims=True)
    known = jnp.cumsum(jnp.exp(inside - peak), axis=1)

    def others(values: jax.Array) -> jax.Array:
        weights = jnp.exp(values - peak)
        return known + jnp.cumsum(weights[:, ::-1], axis=1)[:, ::-1] - weights

    most, here, least = (others(values) for values in (high, predicted, low))
    rounding = sum_rounding(logits.shape[1])
    apart = jnp.log(jnp.maximum(most / here, here / least)) + 2.0 * rounding
    enough = apart + 2.0 * jnp.max(exact_error, axis=1, keepdims=True) <= within
    return jnp.where(jnp.any(enough, axis=1), 1 + jnp.argmax(enough, axis=1), logits.shape[1])


def _arg_max(
    exact: jax.Array, error: jax.Array, outside: jax.Array, index: jax.Array, out_dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """For each token whether the best candidate is the dense arg max, bool ``[T]``, and which it is, ``[T, 1]``.

    Args:
      exact: f32 ``[T, K]``, the candidates' products.
      error: f32 ``[T, K]``, how far the dense ones can be from them.
      outside: f32 ``[T]``, above every dense product of the other rows.
      index: ``[K]`` or ``[T, K]``, the candidates.
      out_dtype: what the dense product is rounded to.
    """
    index = jnp.broadcast_to(index, exact.shape)
    low, high = (exact - error).astype(out_dtype), (exact + error).astype(out_dtype)
    value = exact.astype(out_dtype)
    # The one that an arg max of the logits returns: of equal ones the lowest row.
    best_value = jnp.max(value, axis=1, keepdims=True)
    best = jnp.min(jnp.where(value == best_value, index, jnp.iinfo(index.dtype).max), axis=1, keepdims=True)
    is_best = index == best
    floor = jnp.max(jnp.where(is_best, low, -jnp.inf), axis=1, keepdims=True)
    beaten = (floor > high) | ((floor == high) & (best < index)) | is_best
    finite = jnp.all(jnp.isfinite(low) & jnp.isfinite(high), axis=1)
    return jnp.all(beaten, axis=1) & (floor[:, 0] > outside.astype(out_dtype)) & finite, best
