"""Kinds of sites: the protocol, and the registry by which a match finds its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hire_xform.passes.ir.graph import Node, Operand
from hire_xform.passes.ir.registry import enter
from hire_xform.passes.match.matches import Match
from hire_xform.passes.weights.products import Product

if TYPE_CHECKING:
    from jax.sharding import PartitionSpec

    from hire_xform.passes.measure.capture import Measured
    from hire_xform.passes.plan.checks import Case, Check
    from hire_xform.passes.plan.decisions import Decision
    from hire_xform.passes.plan.forms import Form
    from hire_xform.passes.plan.placement import Placement
    from hire_xform.passes.plan.settings import Settings
    from hire_xform.passes.plan.slots import SiteForms
    from hire_xform.passes.prove.what_to_prove import Reads
    from hire_xform.passes.rewrite.action import Context


class SiteKind(Protocol):
    """All that is done with matches of one kind, one file for each kind.

    A subgraph takes what ``canonical`` gives, ``[T, n]`` arrays, and packed forms in the slots that ``forms`` fills; it
    gives ``[T, n]``, which is put in the shape of the equation that it replaces. Subclasses may leave out what has a
    body here.

    Attributes:
      name: what a match calls it, and a ``Site`` and a ``Refusal`` say.
      settings: what is chosen for its sites where a ``Config`` has no field of the kind's name: a ``Settings`` of
        ``passes/plan/settings.py``, whose docstrings say what every kind's settings have.
      chooses: whether rows are chosen, and computed exactly; without, a site reads packed forms alone.
      gathers: whether chosen rows are gathered into an array first, which costs more than reading them in place.
      tokens_enough: how many tokens a calibration needs for what is a share of many things of each token, or a mean:
        of more it takes a sample.
      checks: what a match goes through until it is a site, in order; none stands for ``COMMON`` of
        ``passes/plan/checks.py``.
    """

    name: str
    settings: Settings | None = None
    chooses: bool = True
    gathers: bool = False
    tokens_enough: int = 4096
    checks: tuple[Check, ...] = ()

    def find(self, product: Product, reason: str) -> Match | None:
        """A match that ends in a product which is in no other, or None.

        Args:
          product: the product.
          reason: why it is neither in a block nor a vocabulary projection.
        """
        return None

    def instead(self, product: Product) -> Match | str | None:
        """A match of one product that is to stay dense: it is in no site, or its own is refused.

        Taken where settings of this kind are stated for its path; kinds are asked in the order in which they were
        registered.

        Returns:
          The match; why there is none; None where the kind has no such matches.
        """
        return None

    def listing(self, match: Any) -> list[str]:
        """A match for whoever develops the pass, as lines of ``HIRE_DUMP``; the first has its path."""
        return [f"{match.kind} {match.node.path}: {match.units:,} rows"]

    def with_cut_rows(self, match: Any, parts: int) -> Match | None:
        """The match of a product each row of whose weight is cut, on as many devices, into so many equal parts.

        These parts are its rows, those of the first device first, and a site sums the devices' results up; None where
        the kind does not, and the product stays dense.
        """
        return None

    # What the planner asks.

    def forms(self, match: Any, settings: Any) -> SiteForms[Form]:
        """What a site reads: rows, which are computed exactly, and what is read of them at every call."""

    def count(self, case: Case) -> int:
        """Rows, or groups of units, that a token may have: of those over all devices."""

    def reads(self, case: Case) -> Reads | str | None:
        """What is proved of what reads the result, or why nothing can be; None where the result itself is proved."""
        return None

    def described(self, case: Case) -> dict[str, Any]:
        """What a ``Site`` says that only sites of this kind have, by the names of its fields."""
        return {}

    def tries(self, match: Any) -> bool:
        """Whether a certified site reads what it computes exactly before it knows whether the dense form must run."""
        return True

    def may_reorder(self, match: Any, settings: Any) -> bool:
        """Whether the units of a site may be packed in another order."""
        return False

    def may_be_static(self, match: Any, settings: Any) -> bool:
        """Whether some units of a site may be always computed."""
        return False

    def may_be_short(self, match: Any, settings: Any) -> bool:
        """Whether a site may leave units out that are not zero though its user wants none left out, and tells so."""
        return False

    def bounded(self, match: Any) -> list[Product]:
        """The products whose values are bounded where a site is certified."""
        return list(match.products)

    def unproved(self, match: Any, platform: str) -> str | None:
        """Why a match can't be certified on a platform, whatever the dtypes; None where it can."""
        return "certify=True is not for sites of this kind"

    def has_own_equations(self, match: Any) -> bool:
        """Whether a site's own equations can be run again, as they are, on what the subgraph is given."""
        return False

    # What the rewriter asks.

    def operands(self, decision: Decision) -> list[Operand]:
        """The values of the program that the subgraph reads."""

    def values(self, decision: Decision, context: Context) -> list[Any]:
        """These values where the site stands; by default as they are."""
        return [context.read(operand) for operand in self.operands(decision)]

    def reached_by(self, decision: Decision) -> list[Node]:
        """Equations further on that the subgraph reads values of: calls around the site that end before are opened."""
        return []

    def signature(self, decision: Decision) -> Any:
        """Hashable; equal for two sites of equal settings that have the same subgraph."""

    def canonical(self, decision: Decision, values: Sequence[Any]) -> list[Any]:
        """The values as ``[T, n]``."""

    def specs(self, decision: Decision, given: Sequence[Any], placement: Placement) -> list[PartitionSpec]:
        """On several devices, how what ``canonical`` gives is split over them."""
        raise NotImplementedError

    def subgraph(
        self, decision: Decision, given: Sequence[Any], views: SiteForms[Any], placement: Placement | None
    ) -> tuple[Any, Any]:
        """The result ``[T, n]``, and what is marked of it; None where the site marks nothing.

        Args:
          decision: the site.
          given: from ``canonical``.
          views: its packed forms; see ``PackedView``.
          placement: inside the body of a device of this placement; None on one device.
        """

    def splits_result(self, match: Any) -> bool:
        """On several devices, whether each has its columns of the result, else all have the sum."""
        return False

    # What a calibration asks.

    def criterion(self, match: Any, settings: Any) -> str:
        """What recall counts; see ``SiteCalibration``."""
        raise _uncalibrated(self.name)

    def measured(self, decision: Measured, given: Sequence[Any], views: Any) -> tuple[Any, list[Any]]:
        """The dense result ``[T, n]``, and for each product that makes units what is recorded, arrays by name."""
        raise _uncalibrated(self.name)

    def rehearsed(self, decision: Decision, given: Sequence[Any], views: Any, sizes: Any) -> tuple[Any, Any]:
        """The sparse result ``[T, n]``, densely computed with ``sizes`` rows for each token; logits to be compared."""
        raise _uncalibrated(self.name)


def _uncalibrated(name: str) -> Exception:
    return NotImplementedError(f"sites of kind {name!r} are not calibrated; expected criterion, measured and rehearsed")


_KINDS: dict[str, SiteKind] = {}


def register_site_kind(kind: SiteKind) -> Callable[[], None]:
    """Adds a kind of site: products that it ``find``s are planned, packed and rewritten as it says.

    Args:
      kind: the kind; one of the same name is replaced.

    Returns:
      What takes the kind away again, and puts back the one that was replaced.
    """
    return enter(_KINDS, kind.name, kind)


def kind_of(match: Match) -> SiteKind:
    """The kind of a match."""
    return _KINDS[match.kind]


def kind_named(name: str) -> SiteKind | None:
    """The kind of a name, if there is one."""
    return _KINDS.get(name)


def kinds() -> Iterator[SiteKind]:
    """All that are registered, in the order they were."""
    return iter(list(_KINDS.values()))


def finders() -> Iterator[Callable[[Product, str], Match | None]]:
    """What finds matches of the kinds registered, in the order they were."""
    return (kind.find for kind in list(_KINDS.values()))
