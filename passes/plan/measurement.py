"""What a calibration says of a site, as the planner reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from hire_xform.lowering.predict.predictors import Predictor
from hire_xform.passes.match.matches import FfnMatch, VocabMatch, up_rows, vocab_rows
from hire_xform.passes.plan.forms import Proving
from hire_xform.passes.plan.settings import Ffn, Vocab
from hire_xform.passes.weights.cut_weights import is_cut
from hire_xform.passes.weights.provenance import Recipe, Stack


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs of a product. Equal, and hashed, by content.

    Attributes:
      digest: of the covariance.
      covariance: mean of ``x x'`` over tokens, f32 ``[*stack, d, d]``.
    """

    digest: str
    covariance: Any = field(compare=False, repr=False)


@dataclass(frozen=True)
class Fitted:
    """A packed form fitted to the inputs it will see: the predictor of a spec, or what a proof with it reads."""

    form: Predictor | Proving
    inputs: Inputs


@dataclass(frozen=True)
class Order:
    """An order of a block's units. Equal, and hashed, by content.

    Attributes:
      digest: of the order.
      units: int32 ``[*stack, m]``, for each place the unit.
      how: what to tell of it.
    """

    digest: str
    units: Any = field(compare=False, repr=False)
    how: str = field(compare=False, repr=False, default="")


@dataclass(frozen=True)
class Regrouped:
    """A packed form with its rows in another order. Of the form "order" the order itself."""

    form: Any
    order: Order


@dataclass(frozen=True)
class Predicted:
    """A packed form of the rows that are predicted: all but the first ``static``, which are always computed."""

    form: Any
    static: int


class Measurement(Protocol):
    """What was measured of one site."""

    @property
    def certified(self) -> bool:
        """Whether it was measured as a certified site."""

    @property
    def inputs(self) -> Sequence[Inputs]:
        """Of each product into the units; of a vocabulary projection its one."""

    def order_for(self, settings: Vocab | Ffn) -> Order | None:
        """The order in which the units of groups of this size are neighbours; None for that they have."""

    def static_sets(self) -> tuple[Order | None, tuple[int, ...]]:
        """The order of a block's units by how often they fire, and how many of the first may be always computed."""

    def choose(self, settings: Vocab | Ffn, static: bool) -> Chosen:
        """What a site with these settings should have where they state nothing; ``static``: some units always."""


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
Measure = Callable[[VocabMatch | FfnMatch, Sequence[str]], Measurement | None]


def takes_inputs(spec: Predictor) -> bool:
    """True for a predictor that is fitted to its inputs where they are known."""
    return spec.takes_inputs


def unpredicted(
    match: VocabMatch | FfnMatch, settings: Vocab | Ffn, measurement: Measurement | None, split: bool
) -> str | None:
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
    stack = site_stack(match)
    if split or any(is_cut(product.origin.refs) for product in match.products):
        return f"predictor={spec} holds arrays of whole weights, and the rows of these are over several devices"
    if any(array.shape[: spec.stack_axes] != stack for array in spec.arrays.values()):
        return (
            f"predictor={spec} holds arrays whose leading stack_axes={spec.stack_axes} axes should be those of the "
            f"weight, which is stacked {list(stack)}"
        )
    return None


def with_choices(
    settings: Vocab | Ffn, measurement: Measurement | None, units: int, static: bool
) -> tuple[Vocab | Ffn, Chosen]:
    """Settings with the predictor and size a calibration chose where they state none, and what it chose.

    Args:
      settings: what the user states.
      measurement: what the calibration says; None without one.
      units: rows, or hidden units, there are.
      static: whether some units may be always computed.
    """
    if measurement is None:
        return dataclasses.replace(settings, predictor=settings.spec), Chosen(None, None, "")
    chosen = measurement.choose(settings, static)
    stated = settings.candidates if isinstance(settings, Vocab) else settings.active
    settings = dataclasses.replace(settings, predictor=chosen.predictor or settings.spec)
    if stated is not None or chosen.size is None:
        return settings, dataclasses.replace(chosen, sizes=None)
    if isinstance(settings, Vocab):
        return dataclasses.replace(settings, candidates=chosen.size), chosen
    return dataclasses.replace(settings, active=chosen.size * settings.group_size / units), chosen


def site_stack(match: VocabMatch | FfnMatch) -> tuple[int, ...]:
    """Lengths of the stack axes of a site's (first) weight: layers, mostly."""
    recipe: Recipe = vocab_rows(match) if isinstance(match, VocabMatch) else up_rows(match.region.ups[0])
    return tuple(step.size for step in recipe.steps if isinstance(step, Stack))


def input_numbers(match: VocabMatch | FfnMatch) -> list[int]:
    """For each product into the units, the first of them with the same inputs."""
    if isinstance(match, VocabMatch):
        return [0]
    found: dict[Any, int] = {}
    numbers: list[int] = []
    for i, up in enumerate(match.region.ups):
        product = up.product
        tokens = tuple(up.layout[d] for d in product.out_x_dims)
        stack = tuple(s.size for s in up_rows(up).steps if isinstance(s, Stack))
        key = (product.x, product.x_contract, product.x_free, tokens, stack)
        numbers.append(found.setdefault(key, i))
    return numbers
