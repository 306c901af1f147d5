"""What a user may choose for a vocabulary projection, for a feed-forward block and for any other weight product."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from hire_xform.lowering.predict.predictors import Predictor
from hire_xform.lowering.predict.quantized import Quantized
from hire_xform.lowering.prove.goals import Goal, Nucleus, TopSet, fewest_candidates


def refuse(owner: str, field: str, value: Any, expected: str) -> None:
    """Raises the one kind of error a wrong setting gets.

    Raises:
      ValueError: always; names the field, what came and what was expected.
    """
    raise ValueError(f"{owner}({field}={value!r}): expected {expected}")


def _check_count(owner: str, field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        refuse(owner, field, value, "an integer of at least 1")


def check_predictor(owner: str, predictor: Any, or_else: str = "") -> None:
    """Raises the error for a value that is no predictor."""
    if not isinstance(predictor, Predictor):
        known = "hx.Quantized(bits), hx.LowRank(rank, bits), hx.Projected(rank, bits)"
        refuse(owner, "predictor", predictor, f"{or_else}{known} or a subclass of hx.Predictor")
    try:
        hash(predictor)
    except TypeError as error:
        expected = f"one that is hashable, such as a frozen dataclass of settings, or one with eq=False ({error})"
        refuse(owner, "predictor", predictor, expected)


def _check_common(owner: str, predictor: Any, certify: Any, max_tokens: Any) -> None:
    if predictor is not None:
        check_predictor(owner, predictor, "None, ")
        if owner != "Vocab" and len(predictor.stages) > 1:
            refuse(
                owner,
                "predictor",
                predictor,
                "one that is read at once, as each of its stages is: only vocabulary projections are read in stages",
            )
    goal = owner == "Vocab" and isinstance(certify, (TopSet, Nucleus))
    if certify is not None and not isinstance(certify, bool) and not goal:
        goals = ", hx.TopSet(k) or hx.Nucleus(eps)" if owner == "Vocab" else ""
        refuse(owner, "certify", certify, f"None, True or False{goals}")
    _check_count(owner, "max_tokens", max_tokens)


def _certified(certify: Any) -> str:
    return f", certify={certify!r}" if certify else ""


def _check_logprobs(settings: Vocab) -> None:
    within = settings.logprobs
    if within is None:
        return
    if isinstance(within, bool) or not isinstance(within, (int, float)) or not 0.0 < within < math.inf:
        refuse("Vocab", "logprobs", within, "None or a number of nats above zero")
    if settings.certify not in (None, True) or settings.fill != "predicted":
        refuse("Vocab", "logprobs", within, "None without certify=True and fill='predicted'")


# What `Vocab(candidates=None)` computes, and what `predictor=None` is without a calibration.
CANDIDATES = 256
PREDICTOR = Quantized(bits=8)


class Settings(Protocol):
    """What the settings of any kind of site say: a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def predictor(self) -> Predictor | None:
        """What is stated; None for what a calibration chose, or else the default."""

    @property
    def spec(self) -> Predictor:
        """The predictor: the one that is stated or was chosen, or else the default."""

    @property
    def certify(self) -> Goal | None:
        """What is proved, False for nothing; None where ``decided`` has not decided it."""

    @property
    def fill(self) -> str:
        """What stands for what is not computed; empty where nothing does."""

    @property
    def group_size(self) -> int:
        """Rows that are chosen together."""

    @property
    def max_tokens(self) -> int:
        """Calls with more tokens run dense."""

    @property
    def in_words(self) -> str:
        """For reports."""

    def decided(self, calibrated: bool | None) -> Settings:
        """These settings with ``certify`` decided.

        Args:
          calibrated: whether the site was calibrated as a certified one; None where it was not calibrated.
        """


class SizedSettings(Settings, Protocol):
    """What settings say besides where rows are chosen."""

    @property
    def size_name(self) -> str:
        """The field that states a size."""

    def with_size(self, size: int, units: int) -> Self:
        """With so many rows, or groups, of so many units."""

    def size_in(self, units: int) -> int:
        """The rows, or groups, of so many units."""


class _Predicted:
    """Settings that have a predictor."""

    predictor: Predictor | None

    @property
    def spec(self) -> Predictor:
        """The predictor: the one that is stated or was chosen, or else the default."""
        return PREDICTOR if self.predictor is None else self.predictor


@dataclass(frozen=True, kw_only=True)
class Vocab(_Predicted):
    """Settings of a vocabulary projection.

    ``Vocab(candidates=V)`` computes every logit exactly.

    Raises:
      ValueError: a value is out of range; the message names it.
    """

    # One row is one candidate. The field that states a size.
    group_size: ClassVar[int] = 1
    size_name: ClassVar[str] = "candidates"

    # Rows of the vocabulary computed exactly for each token; more than there are means all of them. None is what a
    # calibration found, without one 256. Of a certified one it finds several sizes, of which each input takes the
    # smallest that proves its goal; a number that is given is the only size.
    candidates: int | None = None
    # How the other rows are scored, and the candidates found. None is what a calibration chose, without one
    # `Quantized(8)`.
    predictor: Predictor | None = None
    # What stands for the other logits: the predictor's scores (the softmax normaliser stays right), or -inf.
    fill: str = "predicted"
    # True: prove for every input that what reads the logits (an arg max, a top-k) takes what it takes of the dense
    # ones, or run the dense product. Takes weights of f32, bf16 or f16. `hx.TopSet(k)`: that the k largest are, as a
    # set. `hx.Nucleus(eps)`: that the candidates hold all of the softmax's mass but `eps`. None is True, unless an
    # approximation is asked for: by a number of candidates, or by a calibration that was not certified.
    certify: Goal | None = None
    # How far numbers that a program makes of all logits of a token may be from those of the dense logits: for the
    # log-probability of the token that is chosen, beside it, in nats. Proved for each input, or the dense product is
    # run; with `certify=True` and `fill="predicted"`, on one device. None: such numbers are not proved.
    logprobs: float | None = None
    # Calls with more tokens than this (prefill) run dense.
    max_tokens: int = 8

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_logprobs(self)
        if self.candidates is not None:
            _check_count("Vocab", "candidates", self.candidates)
            if self.candidates < fewest_candidates(self.certify or False):
                refuse("Vocab", "candidates", self.candidates, f"no fewer than certify={self.certify} asks for")
        if self.fill not in ("predicted", "-inf"):
            refuse("Vocab", "fill", self.fill, "'predicted' or '-inf'")
        _check_common("Vocab", self.predictor, self.certify, self.max_tokens)

    def decided(self, calibrated: bool | None) -> Vocab:
        """These settings with ``certify`` decided.

        Args:
          calibrated: whether the site was calibrated as a certified one; None where it was not calibrated.
        """
        if self.certify is not None:
            return self
        return dataclasses.replace(self, certify=self.candidates is None if calibrated is None else calibrated)

    def with_size(self, size: int, units: int) -> Vocab:
        """With so many candidates, of so many rows."""
        return dataclasses.replace(self, candidates=size)

    def size_in(self, units: int) -> int:
        """The candidates of so many rows."""
        return self.candidates_of(units)

    @property
    def in_words(self) -> str:
        """For reports."""
        return f"{self.spec}, fill={self.fill!r}{_certified(self.certify)}"

    def candidates_of(self, vocab: int, read: int = 1) -> int:
        """The rows of a vocabulary to compute for each token.

        Args:
          vocab: rows there are.
          read: how many of the largest are read.
        """
        usual = max(CANDIDATES, 2 * read, 2 * fewest_candidates(self.certify or False))
        return min(usual if self.candidates is None else self.candidates, vocab)


# What `Ffn(active=None)` computes of a block, and of one whose model chooses units itself, as a multiple of its share.
ACTIVE, OWN_MARGIN = 0.25, 1.5


@dataclass(frozen=True, kw_only=True)
class Ffn(_Predicted):
    """Settings of a feed-forward block.

    ``Ffn(active=1.0)`` computes every hidden unit exactly.

    Raises:
      ValueError: a value is out of range; the message names it.
    """

    # Nothing stands for units that are left out. The field that states a size.
    fill: ClassVar[str] = ""
    size_name: ClassVar[str] = "active"

    # Share of the hidden units (or of their groups) computed for each token: a fraction, 0 < active <= 1. None is what
    # a calibration found; without one 0.25, but for blocks whose model keeps a top-k, or what is above a threshold:
    # there it is that share, and half as much again for the predictor to err in. Where what the model keeps hangs on
    # data, a block that is not certified stays dense until a share is stated or calibrated. Certified: the most, before
    # the dense block; a calibration adds smaller sizes.
    active: float | None = None
    # Neighbouring units chosen together and read as one slab. Above 1 only for models trained or calibrated for it.
    group_size: int = 1
    # How the units are scored. None is what a calibration chose, without one `Quantized(8)`.
    predictor: Predictor | None = None
    # True: prove for every input that the units left out are zero, or run the dense block. For ReLU, squared ReLU and
    # ReGLU, and for a threshold at mean and deviation that the model subtracts; takes weights of f32, bf16 or f16. None
    # is True, unless an approximation is asked for: by `active`, by `activations="any"`, or by a calibration that was
    # not certified.
    certify: bool | None = None
    # "zeroing": only blocks many of whose units are exactly zero for ordinary inputs (ReLU and its kin). "any": all.
    activations: str = "zeroing"
    # Calls with more tokens than this (prefill) run dense.
    max_tokens: int = 8

    def __post_init__(self) -> None:
        """Checks every field."""
        number = isinstance(self.active, (int, float)) and not isinstance(self.active, bool)
        if self.active is not None and (not number or not math.isfinite(self.active) or not 0 < self.active <= 1):
            refuse("Ffn", "active", self.active, "None or a fraction, 0 < active <= 1")
        _check_count("Ffn", "group_size", self.group_size)
        if self.activations not in ("zeroing", "any"):
            refuse("Ffn", "activations", self.activations, "'zeroing' or 'any'")
        _check_common("Ffn", self.predictor, self.certify, self.max_tokens)

    def decided(self, calibrated: bool | None) -> Ffn:
        """These settings with ``certify`` decided.

        Args:
          calibrated: whether the site was calibrated as a certified one; None where it was not calibrated.
        """
        if self.certify is not None:
            return self
        proved = self.active is None and self.activations == "zeroing"
        return dataclasses.replace(self, certify=proved if calibrated is None else calibrated)

    def with_size(self, size: int, units: int) -> Ffn:
        """With the share that so many groups are of so many units."""
        return dataclasses.replace(self, active=size * self.group_size / units)

    def size_in(self, units: int) -> int:
        """The groups of so many units."""
        return max(1, round(self.active_of(None) * (units // self.group_size)))

    @property
    def in_words(self) -> str:
        """For reports."""
        group = f", groups of {self.group_size}" if self.group_size > 1 else ""
        return f"{self.spec}{group}{_certified(self.certify)}"

    def active_of(self, own_share: float | None) -> float:
        """The share of a block's units to compute.

        Args:
          own_share: what the model itself keeps; None when it keeps all, or what it keeps is not known.
        """
        if self.active is not None:
            return self.active
        return ACTIVE if own_share is None else min(1.0, OWN_MARGIN * own_share)

    def groups_of(self, units: int, own_share: float | None) -> int:
        """The groups of a block to compute, at least one.

        Args:
          units: its hidden units, a multiple of ``group_size``.
          own_share: as in :meth:`active_of`.
        """
        return max(1, math.ceil(self.active_of(own_share) * (units // self.group_size) - 1e-9))


@dataclass(frozen=True, kw_only=True)
class Dense(_Predicted):
    """Settings of weight products that are read compressed: attention's above all. An approximation.

    The predictor's scores are the result, so nothing is computed exactly and nothing is proved.

    Raises:
      ValueError: a value is out of range; the message names it.
    """

    # No row is chosen, and so there is no size.
    certify: ClassVar[bool] = False
    group_size: ClassVar[int] = 1
    fill: ClassVar[str] = ""

    # What the weights are kept as. None is `Quantized(8)`. Fitted to no inputs: calibrations measure blocks and
    # vocabularies alone.
    predictor: Predictor | None = None
    # Calls with more tokens than this (prefill) run dense.
    max_tokens: int = 8

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_common("Dense", self.predictor, None, self.max_tokens)
        if self.predictor is not None and self.predictor.needs_inputs:
            needs = f"one that needs no {self.predictor.needs_inputs} of its inputs, which a calibration does not have"
            refuse("Dense", "predictor", self.predictor, f"{needs} for products outside of blocks and vocabularies")

    def decided(self, calibrated: bool | None) -> Dense:
        """These settings: there is nothing to prove."""
        return self

    @property
    def in_words(self) -> str:
        """For reports."""
        return str(self.spec)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the user's settings say of one site.

    ``settings`` is None when the site is to be left alone, and ``reason`` says by what; ``force`` overrides the cost
    model, never a check of meaning. ``named``: a rule for it states settings of its kind, so that the user says what
    it is. ``final``: a site that is left alone stays dense, whatever other kinds are asked for its products.
    """

    settings: Settings | None
    force: bool = False
    named: bool = False
    reason: str = ""
    final: bool = False


class ChooseSettings(Protocol):
    """What the user's settings say."""

    def __call__(self, kind: str, path: str, names: Sequence[str], /) -> Choice:
        """Of a site of a kind at a path, with weights of these names."""
