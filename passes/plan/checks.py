"""The checks that a match goes through before its size is asked for, in order: each finds no fault, or says why not.

Checks of meaning come first, so that the reason told is the one that most stands in the way; among the others those
that take long, proofs above all, come last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from hire_xform.passes.match.kinds import SiteKind
from hire_xform.passes.match.region import OwnSparsity
from hire_xform.passes.plan.measurement import Chosen, Measurement, unpredicted, with_choices
from hire_xform.passes.plan.placement import Placement
from hire_xform.passes.plan.profile import Profile
from hire_xform.passes.plan.settings import Choice
from hire_xform.passes.prove.certifiable import not_certifiable
from hire_xform.passes.prove.what_to_prove import NOTHING_READ, Reads
from hire_xform.passes.weights.few_bits import in_few_bits


@dataclass(eq=False, repr=False)
class Case:
    """A match that is to be decided on, and what is known of it.

    Attributes:
      match: the match.
      kind: that of the match.
      choice: what the user states for it.
      profile: of the machine where it will run.
      names: of its weights, for reports.
      measurement: what a calibration says of it.
      placed: where its weights are, where they are over several devices; or why it can't run there.
      runs_dense: True where it is measured only, so that its size does not matter.
    """

    match: Any
    kind: SiteKind
    choice: Choice
    profile: Profile
    names: tuple[str, ...]
    measurement: Measurement | None
    placed: Placement | str | None
    runs_dense: bool

    @property
    def platform(self) -> str:
        """Where it will run: "cpu", "gpu" or "tpu"."""
        return self.profile.platform

    @property
    def placement(self) -> Placement | None:
        """Where its weights are, where they are over several devices."""
        return None if isinstance(self.placed, str) else self.placed

    @property
    def shards(self) -> int:
        """Over how many devices its units are split."""
        return 1 if self.placement is None else self.placement.shards

    @cached_property
    def _stated(self) -> Any:
        """The settings as they are stated, and what is certified decided."""
        assert self.choice.settings is not None
        measurement = self.measurement
        settings: Any = self.choice.settings.decided(None if measurement is None else measurement.certified)
        own = self.own
        if own is not None and settings.group_size == 1:
            # Where none are stated, the groups are those that the model itself keeps.
            settings = dataclasses.replace(settings, group_size=own.group)
        return settings

    @cached_property
    def _chosen(self) -> tuple[Any, Chosen]:
        stays = self.placed is not None or self.match.scaled_in_groups
        static = not stays and self.kind.may_be_static(self.match, self._stated)
        return with_choices(self._stated, self.measurement, self.match.units, static)

    @property
    def settings(self) -> Any:
        """The settings, with what a calibration chose where they state nothing. Only of what is not to stay dense."""
        return self._chosen[0]

    def alternatives(self) -> Iterator[Case]:
        """The same with each other predictor that a calibration found to do as well, where none is stated."""
        if self.measurement is None or self._stated.predictor is not None:
            return
        for predictor in self.measurement.alternatives(self._stated):
            if predictor == self.settings.predictor:
                continue
            settings: Any = dataclasses.replace(self.choice.settings, predictor=predictor)  # type: ignore[type-var]
            other = dataclasses.replace(self, choice=dataclasses.replace(self.choice, settings=settings))
            # What is proved of readers is the same for all predictors, and takes long to find.
            other.found_reads = self.found_reads
            yield other

    @property
    def chosen(self) -> Chosen:
        """What a calibration chose."""
        return self._chosen[1]

    @property
    def own(self) -> OwnSparsity | None:
        """The model's own choice of units."""
        return self.match.own

    @property
    def tokens(self) -> int:
        """Rows of the activation in a call, T."""
        tokens: int = self.match.tokens
        return tokens

    @property
    def group_size(self) -> int:
        """Units that are chosen together."""
        size: int = self.settings.group_size
        return size

    @cached_property
    def found_reads(self) -> Reads | str:
        """What is proved of the readers of logits, or why nothing is."""
        found = self.kind.reads(self)
        return NOTHING_READ if found is None else found

    @property
    def reads(self) -> Reads:
        """What is proved of the readers of logits."""
        return NOTHING_READ if isinstance(self.found_reads, str) else self.found_reads

    @cached_property
    def count(self) -> int:
        """Rows, or groups of units, that a token may have: all of those over all devices."""
        return self.kind.count(self)


# Why a match stays dense; None where it is no reason to.
Check = Callable[[Case], "str | None"]


def is_wanted(case: Case) -> str | None:
    """The user does not leave it dense."""
    return case.choice.reason if case.choice.settings is None else None


def has_a_predictor(case: Case) -> str | None:
    """Its predictor can be made of what is known."""
    return unpredicted(case.match, case.settings, case.measurement, case.placement is not None)


def is_executed(case: Case) -> str | None:
    """It runs at all."""
    return None if case.match.node.scope.iterations else "the loop around it has no iterations"


def has_float_weights(case: Case) -> str | None:
    """Its weights are of a dtype that is predicted, or stored in few bits and multiplied as they are."""
    for product in case.match.products:
        weight, x = (np.dtype(v.aval.dtype).name for v in (product.weight, product.x))
        integers = in_few_bits(weight) and jnp.issubdtype(product.weight.aval.dtype, jnp.integer)
        if weight in _FLOATS or (x in _FLOATS and integers):
            continue
        if integers:
            return f"its weights are {weight}, multiplied by {x}; only products of floating-point data are predicted"
        return f"its weights are {weight}; only floating-point weights are predicted"
    return None


_FLOATS = ("float32", "bfloat16", "float16", "float64")


def has_few_tokens(case: Case) -> str | None:
    """It has no more tokens in a call than are worth it."""
    most = case.settings.max_tokens
    if case.tokens <= most:
        return None
    return f"{case.tokens} tokens in one call, more than max_tokens={most}; a prefill runs dense"


def can_be_certified(case: Case) -> str | None:
    """What is to be proved of it can be."""
    why = not_certifiable(case.match, case.platform) if case.settings.certify else None
    return why and f"{why}; allow what is not proved with hx.approximate(), a size, or a calibration"


def is_placed(case: Case) -> str | None:
    """Its weights are where it can run."""
    return case.placed if isinstance(case.placed, str) else None


def has_whole_groups(case: Case) -> str | None:
    """The groups of its units are whole, and whole ones of the model's own."""
    size, own, units = case.group_size, case.own, case.match.units
    if own is not None and size % own.group:
        return (
            f"group_size={size} is no multiple of the {own.group} units that the model itself keeps or leaves out "
            "together"
        )
    return f"group_size={size} does not divide its {units} hidden units" if units % size else None


def chooses_on_one_device(case: Case) -> str | None:
    """A model's own choice of units is made where all of them are."""
    if case.own is None or case.placement is None:
        return None
    if case.shards > 1:
        return f"the model itself chooses among all its units, which are sharded over {case.placement}"
    if case.settings.certify:
        return "the model itself chooses among its units, which is certified without explicit axes only"
    return None


def has_whole_groups_on_each_device(case: Case) -> str | None:
    """The groups of its units are whole on each device."""
    here = case.match.units // case.shards
    if not here % case.group_size:
        return None
    return f"group_size={case.group_size} does not divide the {here} hidden units of each device"


# What any match goes through. A kind's own checks stand among them.
MEANING: tuple[Check, ...] = (has_a_predictor, is_executed, has_float_weights)
SIZE: tuple[Check, ...] = (has_whole_groups, chooses_on_one_device, has_whole_groups_on_each_device)
COMMON: tuple[Check, ...] = (is_wanted, *MEANING, has_few_tokens, is_placed, *SIZE, can_be_certified)
