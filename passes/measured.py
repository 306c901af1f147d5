"""What a calibration says of a site, as the planner reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hire_xform.lowering import LowRank, PredictorSpec, Projected
from hire_xform.passes.detect import FfnMatch, VocabMatch, up_rows, vocab_rows
from hire_xform.passes.provenance import Recipe, Stack
from hire_xform.passes.settings import Ffn, Vocab


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
    """A packed form: the predictor of a spec, fitted to the inputs it will see."""

    spec: PredictorSpec
    inputs: Inputs


class Measurement(Protocol):
    """What was measured of one site."""

    @property
    def inputs(self) -> Sequence[Inputs]:
        """Of each product into the units; of a vocabulary projection its one."""

    def size(self, settings: Vocab | Ffn) -> tuple[int | None, str]:
        """Candidates (rows, or groups of units) that reach the recall asked for with these settings, and how so.

        None where these settings were not measured; the text then says so.
        """


# Of a match and the names of its weights, what was measured.
Measure = Callable[[VocabMatch | FfnMatch, Sequence[str]], Measurement | None]


def takes_inputs(spec: PredictorSpec) -> bool:
    """True for a predictor that is fitted to its inputs where they are known."""
    return isinstance(spec, (LowRank, Projected))


def unmeasured(settings: Vocab | Ffn, measurement: Measurement | None) -> str | None:
    """Why a site's predictor can't be made without a calibration; None when it can."""
    if isinstance(settings.predictor, Projected) and measurement is None:
        return (
            f"predictor={settings.predictor} needs the principal directions of this site's inputs; pass "
            "calibration=hx.calibrate(fun, batches)"
        )
    return None


def with_sizes(settings: Vocab | Ffn, measurement: Measurement | None, units: int) -> tuple[Vocab | Ffn, str]:
    """Settings with the size that was measured where they state none, and what to tell of it."""
    if measurement is None:
        return settings, ""
    if settings.certify:
        return settings, "certified: its size is not taken from the calibration, which measures recall by score"
    stated = settings.candidates if isinstance(settings, Vocab) else settings.active
    if stated is not None:
        return settings, f"calibrated, but {_NAMES[type(settings)]}={stated} is given"
    size, how = measurement.size(settings)
    if size is None:
        return settings, how
    if isinstance(settings, Vocab):
        return dataclasses.replace(settings, candidates=size), how
    return dataclasses.replace(settings, active=size * settings.group_size / units), how


_NAMES = {Vocab: "candidates", Ffn: "active"}


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
