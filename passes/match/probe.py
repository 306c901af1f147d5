"""Tries a region on numbers: does it leave zeros as its equations say, and does a model's own choice keep the largest?

The structural match proposes, the trial disposes: a region that keeps its small units, or that is zero at a few points
only, or for few of the values that products ordinarily have, is not taken for one that leaves units out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as prims

from hire_xform.lowering.primitives.ranks import among_largest, kth_largest
from hire_xform.passes.ir.debugging import debugging
from hire_xform.passes.ir.known_numbers import known_scalar
from hire_xform.passes.ir.pointwise import COMPARES, stretched_scalar
from hire_xform.passes.ir.trace_context import concretely
from hire_xform.passes.match import sums
from hire_xform.passes.match.own_choice import one_column
from hire_xform.passes.match.region import (
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
from hire_xform.passes.match.zeros import gate_of

# Values of a unit that a model's own choice is tried on: none is zero, and they reach far out.
_LIMIT, _COUNT = 6.0, 1280
# The model's own k on them, and how many times as many are kept at most: scores may tie.
_KEPT, _MORE = _COUNT // 4, 1.1
# What side inputs that are not known are taken to be, one after the other: what a choice keeps may hang on them.
_UNKNOWN = (1.0, 0.0, -1.0, 2.0)
# Of the values tried a choice leaves out this share at least.
_LEFT_OUT = 0.05
# Values that zeros are looked for among: so many as normally distributed units have them, and so many far out, which
# tell zeros that are rare from none. What products and side inputs really are is not known when a program is planned.
_ORDINARY, _FAR = 1024, 256
# A region leaves units out when this share of ordinary values gives a zero. A ReLU's is a half, one whose input is
# shifted by half a deviation either way has .31 or .69; a sparse_plus has .16, a hard_swish .001.
ENOUGH_ZEROS = 0.3


@dataclass(frozen=True)
class Untried:
    """A trial that failed, and why."""

    reason: str


@dataclass(eq=False)
class Probe:
    """Trials of one program's regions; regions that compute the same function are tried once."""

    _tried: dict[Any, Any] = field(default_factory=dict)

    def zero_share(self, region: Region) -> float | Untried | None:
        """The share of ordinary units for which the activation is exactly zero; None where it never is.

        Ordinary units are of products that are normally distributed, of mean 0 and deviation 1. Side inputs, a learned
        bias among them, are not known: they are taken to be small or one, whichever leaves more zeros.
        """
        if _is_plainly_gated(region):
            return 0.5
        key = ("zeros", region.signature(), tuple(map(_number, region.sides)))
        return self._once(key, lambda: _zero_share(region))

    def profile(self, region: Region, score: int) -> Any:
        """(score, activation) for each value tried, two f64 arrays; ``Untried`` when it can't be tried.

        A list of them: where side inputs are not known, one for each number that they are taken to be.
        """
        key = ("profile", region.signature(), score, tuple(map(_number, region.sides)))
        return self._once(key, lambda: _profile(region, score))

    def _once(self, key: Any, trial: Callable[[], Any]) -> Any:
        if key not in self._tried:
            try:
                with concretely():
                    self._tried[key] = trial()
            except Exception as error:  # whatever an equation raises on numbers it was not written for: not verified
                if debugging():
                    raise
                first = str(error).strip().split("\n")[0]
                self._tried[key] = Untried(f"tried on numbers, it raises {type(error).__name__}: {first}")
        return self._tried[key]


def own_sparsity(region: Region, probe: Probe) -> OwnSparsity | str:
    """The model's own choice of units in a region that has a top-k or totals, or why it is no such choice."""
    chosen = {e.operand for e in region.exprs if isinstance(e, (Kth, Kept))}
    totals = {_summed(region, e) for e in region.exprs if isinstance(e, Total)}
    if len(chosen) + len(totals) != 1:
        return f"{len(chosen) + len(totals)} of its values are ranked or summed over all units; a choice has one"
    if _is_normalised(region):
        return "units are scaled by what is taken from all of them, as a norm does"
    score = next(iter(chosen or totals))
    tried = probe.profile(region, score)
    if isinstance(tried, Untried):
        return tried.reason
    found = [_kept(*one) for one in tried]
    if found[0] is None or not found[0].some:
        return "tried on numbers, it does not keep some units and leave others zero"
    if not all(one is None or one.largest for one in found):
        return "tried on numbers, the units it keeps are not those of the largest scores"
    sure = [one for one in found if one is not None and one.count]
    group = max((e.size for e in region.exprs if isinstance(e, Grouped)), default=1)
    if totals:
        # Of a threshold the units are normally distributed, as its authors take them to be.
        z = sure[0].least - _LIMIT / _COUNT
        if any(one.least != sure[0].least for one in sure):
            return OwnSparsity(score, None, "units above mean + a multiplier known only at run time", (score,), group)
        sign = "-" if round(z, 2) < 0 else "+"
        told = f"units above mean {sign} {abs(z):.2f} deviations"
        return OwnSparsity(score, 1.0 - NormalDist().cdf(z), told, (score,), group)
    ranks = [e.rank if isinstance(e, Kth) else e.k for e in region.exprs if isinstance(e, (Kth, Kept))]
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
    return _Choice(count, least, 0 < count <= (1.0 - _LEFT_OUT) * kept.size, bool(largest))


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


@lru_cache
def _ordinary(number: int) -> np.ndarray:
    """Values of product ``number`` of a region, in an order of its own; the ordinary ones first. None is zero."""
    order = np.random.default_rng(number)
    quantiles = [NormalDist().inv_cdf((i + 0.5) / _ORDINARY) for i in range(_ORDINARY)]
    far = np.linspace(-8.0, 8.0, _FAR)
    return np.concatenate([order.permutation(quantiles), order.permutation(far)])[None]


def _number(side: Side) -> float | None:
    """The one number that a side input is everywhere; None where it is not known."""
    scalar = stretched_scalar(side.value)
    return None if scalar is None else known_scalar(scalar)


def _all_known(region: Region) -> bool:
    return all(_number(side) is not None for side in region.sides)


def _tried_sides(region: Region, unknown: float) -> list[Any]:
    found = []
    for side in region.sides:
        number = _number(side)
        shape = (1, 1) if side.value.shape else ()
        found.append(jnp.full(shape, unknown if number is None else number, side.value.aval.dtype))
    return found


def _run(
    region: Region, values: Sequence[np.ndarray], roots: Sequence[int], unknown: Sequence[float]
) -> list[list[np.ndarray]]:
    """Expressions ``roots`` with ``values`` in the products of ``region.ups``.

    Once for each of the numbers that side inputs are taken to be where they are ``unknown``.
    """
    hiddens = [jnp.asarray(v, up.product.out.aval.dtype) for v, up in zip(values, region.ups, strict=True)]
    shape = values[0].shape

    # Compiled as one: run one by one, every operation would be compiled for itself.
    @jax.jit
    def run(hiddens: Any, sides: Any) -> Any:
        made = [replay(region, hiddens, sides, lambda x: x, jax.nn.relu, _Assumed(), root) for root in roots]
        return [jnp.broadcast_to(out, shape) for out in made]

    return [
        [np.asarray(out, np.float64)[0] for out in run(hiddens, _tried_sides(region, number))] for number in unknown
    ]


def _zero_share(region: Region) -> float | None:
    values = [_ordinary(i) for i in range(len(region.ups))]
    # A bias of one may move the zeros out of reach; a scale must not become zero.
    unknown = [1.0] if _all_known(region) else [1.0, 1e-3]
    found = [activation == 0.0 for (activation,) in _run(region, values, [region.root], unknown)]
    return max(float(zeros[:_ORDINARY].mean()) for zeros in found) if np.any(found) else None


def _is_plainly_gated(region: Region) -> bool:
    """True when half of all values of a product leave zeros: its sign, after a cast or a bias, decides."""
    gate = gate_of(region)
    if gate is None:
        return False
    # A number added could move the gate out of reach, which a trial shows.
    exprs = [region.exprs[e] for e in needed(region.exprs, gate.expr)]
    return not any(isinstance(e, Number) or (isinstance(e, Side) and _number(e) is not None) for e in exprs)


def _profile(region: Region, score: int) -> list[list[np.ndarray]] | Untried:
    numbers = [i for i, e in enumerate(region.exprs) if isinstance(e, Up)]
    wanted = needed(region.exprs, score)
    for varied, number in enumerate(numbers):
        if number in wanted:
            values = [_values() if i == varied else np.ones((1, _COUNT)) for i in range(len(numbers))]
            return _run(region, values, [score, region.root], _UNKNOWN[: 1 if _all_known(region) else None])
    return Untried("its scores hang on no product")
