"""What is read of a vocabulary projection's logits, and its proof where it is more than the logits themselves.

A reader takes an arg max, or the k largest, of what a chain of equations makes of the logits. Candidates' logits lie in
intervals as wide as the rounding of a sum, all others in those of their bounds; the chain carries intervals to what is
read, and there the largest must be above all others. Numbers that are made of all logits, such as a log-probability,
lie in an interval then, whose ends say how far they can be from those of the dense logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.prove.goals import Goal, TopSet, fewest_candidates
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.xla.devices import Devices

__all__ = ["Reading", "between_proved", "between_proved_across", "goal_of", "openness", "within_proved"]


@dataclass(frozen=True)
class Reading:
    """One thing that is read of logits.

    Attributes:
      goal: what is to be proved of it.
      ordered: of a set, its order too.
      between: what is read of logits in intervals ``[T, V]``, ``[n, V']``, given its side inputs; None: the logits.
      margin: how far the largest must be ahead of the others, ``[n, 1]``, given those intervals; None: at all.
      sides: which of the site's side inputs it takes: from the first number up to the second.
      mixed: whether logits are read in several places, in each of which a product of 16 bits is rounded or not.
      decides: whether what is read are whole numbers, ``[n, 1]``, each of which is to be decided.
      within: of numbers that are read, ``[n, 1]``, how far each may be from what is read of the dense logits; None of
        all else.
      gathered: of several devices, whether it takes the logits of all of them together.
    """

    goal: Goal = True
    ordered: bool = False
    between: Callable[[Interval, Sequence[jax.Array]], Interval] | None = None
    margin: Callable[[Interval], jax.Array] | None = None
    sides: tuple[int, int] = (0, 0)
    decides: bool = False
    mixed: bool = False
    within: float | None = None
    gathered: bool = False

    def read(self, logits: Interval, sides: Sequence[jax.Array]) -> Interval:
        """What is read of logits in these intervals."""
        assert self.between is not None
        return self.between(logits, sides[self.sides[0] : self.sides[1]])


def between_proved_across(
    reading: Reading, logits: Interval, sides: Sequence[jax.Array], devices: Devices
) -> jax.Array:
    """Whether an arg max is proved of what is read of the logits of several devices, bool ``[T]``.

    With A the largest that any entry is for sure, the one entry that can be A or more is the arg max. Each device sends
    the largest of its own, and how many of its entries can be A: 8 bytes a token.

    Args:
      reading: with a chain, for an arg max.
      logits: f32 ``[T, V]``, of one device's part.
      sides: its side inputs, of that part.
      devices: all of them.
    """
    read = reading.read(logits, sides)
    low = jnp.where(jnp.isnan(read.low), -jnp.inf, read.low)
    floor = devices.largest(jnp.max(low, axis=1))
    can = ~(read.high < floor[:, None])
    return (devices.total(jnp.sum(can, axis=1)) == 1) & jnp.isfinite(floor)


def between_proved(reading: Reading, logits: Interval, sides: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Whether a goal is proved of what is read of logits in these intervals; NaN proves nothing.

    Args:
      reading: with a chain, for an arg max or a top set.
      logits: f32 ``[T, V]``.
      sides: the site's side inputs.

    Returns:
      bool ``[n]``, and the entries that are the largest, int32 ``[n, k]``: two proofs of one input must name the same.
    """
    read = reading.read(logits, sides)
    if reading.decides:
        sure = jnp.all(read.low == read.high, axis=1)
        return sure, jnp.where(sure[:, None], read.low, 0.0).astype(jnp.int32)
    low = jnp.where(jnp.isnan(read.low), -jnp.inf, read.low)
    high = jnp.where(jnp.isnan(read.high), jnp.inf, read.high)
    if reading.margin is not None:
        low = low - reading.margin(Interval(low, high))
    k = min(fewest_candidates(reading.goal), low.shape[1])
    floor, best = lax.top_k(low, k)
    at = jnp.arange(low.shape[0])[:, None]
    others = high.at[at, best].set(-jnp.inf, unique_indices=True, mode="promise_in_bounds")
    if k == 1:
        # Of equal ones the lowest is taken.
        later = jnp.arange(low.shape[1])[None, :] > best
        ahead = jnp.where(later, floor >= others, floor > others)
        sure = jnp.all(ahead | (others == -jnp.inf), axis=1)
    else:
        sure = floor[:, -1] > jnp.max(others, axis=1)
        sure |= jnp.full(sure.shape, k == low.shape[1])
        if reading.ordered:
            tops = jnp.take_along_axis(high, best, axis=1)
            below = lax.cummax(tops[:, ::-1], axis=1)[:, ::-1]
            sure &= jnp.all(floor[:, :-1] > below[:, 1:], axis=1)
    return sure & jnp.all(jnp.isfinite(floor), axis=1), best


def within_proved(reading: Reading, logits: Interval, here: Interval, sides: Sequence[jax.Array]) -> jax.Array:
    """Whether numbers are proved to be as close to those of the dense logits as they are to be; NaN proves nothing.

    Both are read of logits in the same intervals. What is read here is known better, but for how the program rounds.

    Args:
      reading: of numbers.
      logits: f32 ``[T, V]``, what both may be.
      here: f32 ``[T, V]``, what they are here, as far as they may be rounded or not.
      sides: the site's side inputs.

    Returns:
      bool ``[n]``.
    """
    assert reading.within is not None
    either, own = reading.read(logits, sides), reading.read(here, sides)
    error = jnp.maximum(either.high - own.low, own.high - either.low)
    return jnp.all(error <= reading.within, axis=1)


def openness(readings: Sequence[Reading], logits: Interval, sides: Sequence[jax.Array]) -> list[jax.Array]:
    """For each reading with a chain how far an entry can be above the largest lower bound of all, ``[n, V']``.

    Entries above zero are open: they can be the largest. Those that are furthest above it are the best candidates.
    """
    found = []
    for reading in readings:
        if reading.between is not None:
            read = reading.read(logits, sides)
            k = fewest_candidates(reading.goal)
            low = jnp.where(jnp.isnan(read.low), -jnp.inf, read.low)
            floor = jnp.max(low, axis=1, keepdims=True) if k == 1 else lax.top_k(low, min(k, low.shape[1]))[0][:, -1:]
            found.append(
                jnp.where(read.high == -jnp.inf, -jnp.inf, read.high - jnp.where(floor > -jnp.inf, floor, 0.0))
            )
    return found


def goal_of(k: int) -> Goal:
    """What is to be proved of a reader: its arg max, or the set of its k largest."""
    return TopSet(k) if k > 1 else True
