"""Tries a region on numbers: does it leave zeros as its equations say, and does a model's own choice keep the largest?

The structural match proposes, the trial disposes: a region that keeps its small units, or that is zero at a few points
only, is not taken for one that leaves units out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as prims

from hire_xform.lowering import among_largest, kth_largest
from hire_xform.passes import sums
from hire_xform.passes.known import known_scalar
from hire_xform.passes.of_chosen import one_column
from hire_xform.passes.pointwise import COMPARES, stretched_scalar
from hire_xform.passes.region import (
    Apply,
    Grouped,
    Kept,
    Kth,
    Number,
    OwnSparsity,
    Place,
    Region,
    Side,
    Total,
    Up,
    needed,
    replay,
)
from hire_xform.passes.surroundings import concretely
from hire_xform.passes.zeros import gate_of

# Values of a unit that are tried: none is zero, and the spread is that of normally distributed units.
_LIMIT, _COUNT = 6.0, 1280
# The model's own k on them, and how many times as many are kept at most: scores may tie.
_KEPT, _MORE = _COUNT // 4, 1.1
# What side inputs that are not known are taken to be, one after the other: what a choice keeps may hang on them.
_UNKNOWN = (1.0, 0.0, -1.0, 2.0)
# A region leaves zeros when this share of the values gives one.
_ZERO_SHARE = 0.05


@dataclass(eq=False)
class Probe:
    """Trials of one program's regions; regions that compute the same function are tried once."""

    _tried: dict[Any, Any] = field(default_factory=dict)

    def leaves_zeros(self, region: Region) -> bool:
        """True when a range of values of one of its products makes the activation exactly zero."""
        if _is_plainly_gated(region):
            return True
        key = ("zeros", region.signature(), tuple(map(_number, region.sides)))
        return self._once(key, lambda: _leaves_zeros(region), False)

    def profile(self, region: Region, score: int) -> Any:
        """(score, activation) for each value tried, two f64 arrays; None when it can't be tried.

        A list of them: where side inputs are not known, one for each number that they are taken to be.
        """
        key = ("profile", region.signature(), score, tuple(map(_number, region.sides)))
        return self._once(key, lambda: _profile(region, score), None)

    def _once(self, key: Any, trial: Callable[[], Any], failed: Any) -> Any:
        if key not in self._tried:
            try:
                with concretely():
                    self._tried[key] = trial()
            except Exception:  # whatever an equation raises on numbers it was not written for: not verified
                self._tried[key] = failed
        return self._tried[key]


def own_sparsity(region: Region, probe: Probe) -> OwnSparsity | None:
    """The model's own choice of units in a region that has a top-k or totals; None when it is no such choice."""
    chosen = {e.operand for e in region.exprs if isinstance(e, (Kth, Kept))}
    totals = {_summed(region, e) for e in region.exprs if isinstance(e, Total)}
    if len(chosen) + len(totals) != 1 or _is_normalised(region):
        return None
    score = next(iter(chosen or totals))
    tried = probe.profile(region, score)
    if tried is None:
        return None
    found = [_kept(*one) for one in tried]
    if found[0] is None or not found[0].some or not all(one is None or one.largest for one in found):
        return None
    sure = [one for one in found if one is not None and one.count]
    if totals:
        # Of a threshold the units are normally distributed, as its authors take them to be.
        z = sure[0].least - _LIMIT / _COUNT
        if any(one.least != sure[0].least for one in sure):
            return OwnSparsity(score, None, "units above mean + a multiplier known only at run time", (score,))
        sign = "-" if round(z, 2) < 0 else "+"
        return OwnSparsity(
            score, 1.0 - NormalDist().cdf(z), f"units above mean {sign} {abs(z):.2f} deviations", (score,)
        )
    ranks = [e.rank if isinstance(e, Kth) else e.k for e in region.exprs if isinstance(e, (Kth, Kept))]
    group = max((e.size for e in region.exprs if isinstance(e, Grouped)), default=1)
    what = "" if group == 1 else f" groups of {group}"
    top = f"top {max(ranks) // group:,}{what}"
    if any(one.count > _MORE * _KEPT for one in sure):
        return OwnSparsity(score, None, f"units above a number made of the least of their {top}", (), group)
    return OwnSparsity(score, max(ranks) / region.units, top, (), group)


@dataclass(frozen=True)
class _Choice:
    """What a region keeps of the values tried.

    Attributes:
      count: how many.
      least: the least score kept.
      some: whether it keeps some and leaves some out.
      largest: whether every unit kept scores at least as high as every unit left out, but for the odd zero among them.
    """

    count: int
    least: float
    some: bool
    largest: bool


def _kept(scores: np.ndarray, activation: np.ndarray) -> _Choice | None:
    """What is kept; None of a trial that says nothing, a side input that is not known having been taken to be zero."""
    if not np.isfinite(activation).all():
        return None
    kept = activation != 0.0
    count = int(kept.sum())
    least = float(scores[kept].min()) if count else np.inf
    largest = (scores[~kept] > least).sum() <= 0.1 * (scores >= least).sum()
    return _Choice(count, least, 0 < count <= (1.0 - _ZERO_SHARE) * kept.size, bool(largest))


def _is_normalised(region: Region) -> bool:
    """True when units are scaled by something taken from all of them, as a norm does, and not just compared."""
    common: list[bool] = []
    scaled: list[bool] = []
    for varies, e in zip(region.varies, region.exprs, strict=True):
        if not isinstance(e, Apply):
            common.append(isinstance(e, (Kth, Total)))
            made_of = e.update if isinstance(e, Place) else e.operand if isinstance(e, Grouped) else None
            scaled.append(made_of is not None and scaled[made_of])
            continue
        common.append(not varies and any(common[o] for o in e.operands))
        here = varies and e.node.primitive in _SCALES and any(common[o] for o in e.operands)
        scaled.append((here or any(scaled[o] for o in e.operands)) and e.node.primitive not in COMPARES)
    return scaled[region.root]


_SCALES = frozenset({prims.mul_p, prims.div_p})


def _summed(region: Region, total: Total) -> int:
    return sums.product_summed(region.exprs, region.varies, total.operand)


class _Assumed:
    """Stands for all units: the values tried, of mean 0 and variance 1."""

    def kth(self, values: Any, rank: int) -> Any:
        return kth_largest(values, _KEPT)

    def kept(self, values: Any, k: int) -> Any:
        return among_largest(values, _KEPT)

    def total(self, region: Region, operand: int, values: Sequence[Any]) -> Any:
        return sums.total(region.exprs, region.varies, operand, one_column(values), lambda _: 0.0, 1.0, region.units)


def _values() -> np.ndarray:
    step = 2 * _LIMIT / _COUNT
    return np.linspace(-_LIMIT + step / 2, _LIMIT - step / 2, _COUNT)[None]


def _number(side: Side) -> float | None:
    """The one number that a side input is everywhere; None where it is not known."""
    scalar = stretched_scalar(side.value)
    return None if scalar is None else known_scalar(scalar)


def _tried_sides(region: Region, unknown: float) -> list[Any]:
    found = []
    for side in region.sides:
        number = _number(side)
        shape = (1, 1) if side.value.shape else ()
        found.append(jnp.full(shape, unknown if number is None else number, side.value.aval.dtype))
    return found


def _run(region: Region, varied: int, roots: Sequence[int], unknown: Sequence[float]) -> list[list[np.ndarray]]:
    """Expressions ``roots`` with the values tried in product ``varied`` of ``region.ups``, and ones in the others.

    Once for each of the numbers that side inputs are taken to be where they are ``unknown``.
    """
    hiddens = [
        jnp.asarray(_values() if i == varied else np.ones((1, _COUNT)), up.product.out.aval.dtype)
        for i, up in enumerate(region.ups)
    ]

    # Compiled as one: run one by one, every operation would be compiled for itself.
    @jax.jit
    def run(hiddens: Any, sides: Any) -> Any:
        made = [replay(region, hiddens, sides, lambda x: x, jax.nn.relu, _Assumed(), root) for root in roots]
        return [jnp.broadcast_to(out, (1, _COUNT)) for out in made]

    return [
        [np.asarray(out, np.float64)[0] for out in run(hiddens, _tried_sides(region, number))] for number in unknown
    ]


def _leaves_zeros(region: Region) -> bool:
    runs = (_run(region, i, [region.root], [1.0])[0][0] for i in range(len(region.ups)))
    return any((activation == 0.0).mean() >= _ZERO_SHARE for activation in runs)


def _is_plainly_gated(region: Region) -> bool:
    """True when half of all values of a product leave zeros: its sign, after a cast or a bias, decides."""
    gate = gate_of(region)
    if gate is None:
        return False
    # A number added could move the gate out of reach, which a trial shows.
    exprs = [region.exprs[e] for e in needed(region.exprs, gate.expr)]
    return not any(isinstance(e, Number) or (isinstance(e, Side) and _number(e) is not None) for e in exprs)


def _profile(region: Region, score: int) -> list[list[np.ndarray]] | None:
    numbers = [i for i, e in enumerate(region.exprs) if isinstance(e, Up)]
    wanted = needed(region.exprs, score)
    known = all(_number(side) is not None for side in region.sides)
    for varied, number in enumerate(numbers):
        if number in wanted:
            return _run(region, varied, [score, region.root], _UNKNOWN[: 1 if known else None])
    return None
