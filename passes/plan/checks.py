"""The checks that a match goes through before its size is asked for, in order: each finds no fault, or says why not.

Checks of meaning come first, so that the reason told is the one that most stands in the way; among the others those
that take long, proofs above all, come last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hire_xform.passes.match.matches import FfnMatch, VocabMatch, vocab_rows
from hire_xform.passes.match.region import OwnSparsity
from hire_xform.passes.match.zeros import gate_of
from hire_xform.passes.plan.measurement import Chosen, Measurement, unmeasured, with_choices
from hire_xform.passes.plan.needs import may_be_static
from hire_xform.passes.plan.placement import Placement
from hire_xform.passes.plan.settings import Choice, Ffn, Vocab
from hire_xform.passes.prove.certifiable import not_certifiable
from hire_xform.passes.prove.what_to_prove import NOTHING_READ, Reads, reads_of
from hire_xform.passes.weights.cut_weights import is_cut, parts_of_rows


@dataclass(eq=False, repr=False)
class Case:
    """A match that is to be decided on, and what is known of it.

    Attributes:
      match: the match.
      kind: "ffn" or "vocab".
      choice: what the user states for it.
      platform: where it will run: "cpu", "gpu" or "tpu".
      names: of its weights, for reports.
      measurement: what a calibration says of it.
      placed: where its weights are, where they are over several devices; or why it can't run there.
      runs_dense: True where it is measured only, so that its size does not matter.
    """

    match: VocabMatch | FfnMatch
    kind: str
    choice: Choice
    platform: str
    names: tuple[str, ...]
    measurement: Measurement | None
    placed: Placement | str | None
    runs_dense: bool

    @property
    def placement(self) -> Placement | None:
        """Where its weights are, where they are over several devices."""
        return None if isinstance(self.placed, str) else self.placed

    @property
    def shards(self) -> int:
        """Over how many devices its units are split."""
        return 1 if self.placement is None else self.placement.shards

    @cached_property
    def _chosen(self) -> tuple[Vocab | Ffn, Chosen]:
        assert self.choice.settings is not None
        measurement = self.measurement
        settings = self.choice.settings.decided(None if measurement is None else measurement.certified)
        own = self.own
        if own is not None and isinstance(settings, Ffn) and settings.group_size == 1:
            # Where none are stated, the groups are those that the model itself keeps.
            settings = dataclasses.replace(settings, group_size=own.group)
        static = self.placed is None and may_be_static(self.match, settings)
        return with_choices(settings, measurement, self.match.units, static)

    @property
    def settings(self) -> Vocab | Ffn:
        """The settings, with what a calibration chose where they state nothing. Only of what is not to stay dense."""
        return self._chosen[0]

    @property
    def chosen(self) -> Chosen:
        """What a calibration chose."""
        return self._chosen[1]

    @property
    def own(self) -> OwnSparsity | None:
        """The model's own choice of units."""
        return self.match.region.own if isinstance(self.match, FfnMatch) else None

    @property
    def tokens(self) -> int:
        """Rows of the activation in a call, T."""
        return self.match.tokens if isinstance(self.match, FfnMatch) else self.match.product.tokens

    @property
    def group_size(self) -> int:
        """Units that are chosen together."""
        return self.settings.group_size if isinstance(self.settings, Ffn) else 1

    @cached_property
    def found_reads(self) -> Reads | str:
        """What is proved of the readers of logits, or why nothing is."""
        if not isinstance(self.match, VocabMatch):
            return NOTHING_READ
        split = self.placement is not None or is_cut(self.match.product.origin.refs)
        return reads_of(self.match, self.settings, split)

    @property
    def reads(self) -> Reads:
        """What is proved of the readers of logits."""
        return NOTHING_READ if isinstance(self.found_reads, str) else self.found_reads

    @cached_property
    def count(self) -> int:
        """Rows, or groups of units, that a token may have: all of those over all devices."""
        match, settings = self.match, self.settings
        if isinstance(match, FfnMatch):
            assert isinstance(settings, Ffn)
            return settings.groups_of(match.units, self.own.share if self.own is not None else None)
        assert isinstance(settings, Vocab)
        # Each device of a shard_map that cuts the vocabulary takes its share.
        parts = parts_of_rows(vocab_rows(match), match.product.origin.refs)
        return -(-settings.candidates_of(match.units * parts, self.reads.most) // parts)


# Why a match stays dense; None where it is no reason to.
Check = Callable[[Case], "str | None"]


def is_wanted(case: Case) -> str | None:
    """The user does not leave it dense."""
    return case.choice.reason if case.choice.settings is None else None


def is_known_for_logits(case: Case) -> str | None:
    """Something says that a wide product's outputs are logits: a reader, a lookup, a rule or a calibration."""
    match = case.match
    if not isinstance(match, VocabMatch) or match.evidence or case.choice.named or case.measurement is not None:
        return None
    return _smallest(match) or (
        "nothing says that its outputs are logits: no arg max, top-k or softmax that rises with them, and no weight of "
        f"as many rows is looked up by id; if they are, hx.Rule({match.node.path!r}, vocab=hx.Vocab()) makes it a site"
    )


def has_a_predictor(case: Case) -> str | None:
    """Its predictor can be made of what is known."""
    return unmeasured(case.settings, case.measurement)


def is_executed(case: Case) -> str | None:
    """It runs at all."""
    return None if case.match.node.scope.iterations else "the loop around it has no iterations"


def has_float_weights(case: Case) -> str | None:
    """Its weights are of a dtype that is predicted."""
    dtypes = {np.dtype(p.weight.aval.dtype).name for p in case.match.products}
    if dtypes <= {"float32", "bfloat16", "float16", "float64"}:
        return None
    return f"its weights are {', '.join(sorted(dtypes))}; only floating-point weights are predicted"


def leaves_zeros(case: Case) -> str | None:
    """Units of it can be left out, its activation being zero often, or as its user allows.

    Certified, zeros are proved for each input, however rare they are: of a gate, or of the model's own choice.
    """
    match, settings = case.match, case.settings
    if not isinstance(match, FfnMatch) or not isinstance(settings, Ffn):
        return None
    region = match.region
    proves = settings.certify and (region.own is not None or gate_of(region) is not None)
    if settings.activations == "any" or region.zeroing or proves:
        return None
    if region.untried:
        what = f"is not known to leave exact zeros ({region.untried})"
    elif region.zero_share is None:
        what = "does not leave exact zeros"
    else:
        often = f"about {region.zero_share:.0%}" if region.zero_share >= 0.01 else "under 1%"
        what = f"is zero for {often.replace('%', ' %')} of ordinary inputs only"
    return (
        f"its activation ({region.activation}) {what}, so units left out would change the result; allow it with "
        'activations="any"'
    )


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


def has_provable_readers(case: Case) -> str | None:
    """What reads its logits takes what can be proved of them, or what candidates can be chosen by."""
    return case.found_reads if isinstance(case.found_reads, str) else None


def has_enough_candidates(case: Case) -> str | None:
    """Its candidates are as many as are read, and of the side that is."""
    match, settings = case.match, case.settings
    if not isinstance(match, VocabMatch) or not isinstance(settings, Vocab):
        return None
    most = case.reads.most
    if settings.certify and (settings.candidates or match.units) < min(most, match.units):
        return f"candidates={settings.candidates} are fewer than the {most} largest, which are read"
    return (_smallest(match) or None) if case.count < match.units else None


def has_whole_groups(case: Case) -> str | None:
    """The groups of its units are whole, and whole ones of the model's own."""
    size, own, units = case.group_size, case.own, case.match.units
    if own is not None and size % own.group:
        return (
            f"group_size={size} is no multiple of the {own.group} units that the model itself keeps or leaves out "
            "together"
        )
    return f"group_size={size} does not divide its {units} hidden units" if units % size else None


def has_a_size(case: Case) -> str | None:
    """How many of its units are computed is known, where the model itself chooses them."""
    own, settings = case.own, case.settings
    if own is None or own.share is not None or not isinstance(settings, Ffn) or settings.active is not None:
        return None
    if settings.certify or case.runs_dense:
        return None
    return (
        f"the model itself keeps {own.name}, so how many of its units are to be computed is not known; state it, "
        "hx.Ffn(active=...), calibrate, or prove it for each input, hx.Ffn(certify=True)"
    )


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


# By the kind of a match, in order.
CHECKS: dict[str, tuple[Check, ...]] = {
    "ffn": (
        is_wanted,
        has_a_predictor,
        is_executed,
        has_float_weights,
        leaves_zeros,
        has_few_tokens,
        is_placed,
        has_whole_groups,
        has_a_size,
        chooses_on_one_device,
        has_whole_groups_on_each_device,
        can_be_certified,
    ),
    "vocab": (
        is_wanted,
        is_known_for_logits,
        has_a_predictor,
        is_executed,
        has_float_weights,
        has_few_tokens,
        is_placed,
        can_be_certified,
        has_provable_readers,
        has_enough_candidates,
    ),
}


def _smallest(match: VocabMatch) -> str:
    """Why a projection is left of which the smallest outputs are wanted; empty where they are not."""
    if not match.smallest:
        return ""
    return f"{match.smallest} reads the smallest of its outputs, where candidates are the largest"
