"""What a calibration says of a site, as the planner reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hire_xform.lowering.predict.predictors import Predictor
from hire_xform.passes.match.matches import Match
from hire_xform.passes.plan.forms import Inputs, Order
from hire_xform.passes.plan.settings import Settings, SizedSettings
from hire_xform.passes.weights.cut_weights import is_cut


class Measurement(Protocol):
    """What was measured of one site."""

    @property
    def certified(self) -> bool:
        """Whether it was measured as a certified site."""

    @property
    def least_tokens(self) -> int:
        """Tokens that were counted; of several layers the fewest."""

    @property
    def inputs(self) -> Sequence[Inputs]:
        """Of each product into the units; of a vocabulary projection its one."""

    def order_for(self, settings: Settings) -> Order | None:
        """The order in which the units of groups of this size are neighbours; None for that they have."""

    def static_sets(self) -> tuple[Order | None, tuple[int, ...]]:
        """The order of a block's units by how often they fire, and how many of the first may be always computed."""

    def advise(self, settings: SizedSettings, static: bool) -> Chosen:
        """What a site with these settings should have where they state nothing; ``static``: some units always."""

    def alternatives(self, settings: SizedSettings) -> Sequence[Predictor]:
        """The predictors that do what was asked for at some size, with settings that state none; that advised too."""


@dataclass(frozen=True)
class Chosen:
    """What a calibration chose for a site, given what the settings state.

    Attributes:
      predictor: how rows are scored; None where that was not measured with these settings.
      size: candidates (rows, or groups of units); None likewise.
      how: what to tell of it.
      sizes: where weights are stacked, that of each layer, int ``[*stack]``; ``size`` is the largest.
      needs: of a certified site, how many tokens were seen to need 1, 2, ... rows (or groups), ``[*stack, n]``; None
        where that was not measured with its predictor.
      static: units that are always computed, the first in the order of ``static_sets``; ``size`` is of the others.
    """

    predictor: Predictor | None
    size: int | None
    how: str
    sizes: np.ndarray | None = None
    needs: np.ndarray | None = None
    static: int = 0


# Of a match and the names of its weights, what was measured.
MeasurementOf = Callable[[Match, Sequence[str]], Measurement | None]


def unpredicted(match: Match, settings: Settings, measurement: Measurement | None, split: bool) -> str | None:
    """Why a site's predictor can't be made, or is not enough; None when it can.

    Args:
      match, settings: the site.
      measurement: what a calibration says of it; None without one.
      split: whether its rows are over several devices.
    """
    spec = settings.spec
    if spec.needs_inputs and measurement is None:
        return (
            f"predictor={spec} needs the {spec.needs_inputs} of this site's inputs; pass "
            "calibration=hx.calibrate(fun, batches)"
        )
    if settings.certify and not spec.proves:
        return (
            f"predictor={spec} proves nothing of what it predicts, as certify=True asks; allow what is not proved with "
            "certify=False, hx.approximate(), a size, or a calibration"
        )
    if not spec.arrays:
        return None
    if split or any(is_cut(product.origin.refs) for product in match.products):
        return f"predictor={spec} holds arrays of whole weights, and the rows of these are over several devices"
    if any(array.shape[: spec.stack_axes] != match.stack for array in spec.arrays.values()):
        return (
            f"predictor={spec} holds arrays whose leading stack_axes={spec.stack_axes} axes should be those of the "
            f"weight, which is stacked {list(match.stack)}"
        )
    return None


def with_choices(
    settings: SizedSettings, measurement: Measurement | None, units: int, static: bool
) -> tuple[SizedSettings, Chosen]:
    """Settings with the predictor and size a calibration chose where they state none, and what it chose.

    Args:
      settings: what the user states; without a measurement those of a kind that chooses no rows will do.
      measurement: what the calibration says; None without one.
      units: rows, or hidden units, there are.
      static: whether some units may be always computed.
    """
    if measurement is None:
        return dataclasses.replace(settings, predictor=settings.spec), Chosen(None, None, "")
    chosen = measurement.advise(settings, static)
    settings = dataclasses.replace(settings, predictor=chosen.predictor or settings.spec)
    if getattr(settings, settings.size_name) is not None or chosen.size is None:
        return settings, dataclasses.replace(chosen, sizes=None)
    return settings.with_size(chosen.size, units), chosen
