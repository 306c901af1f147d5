"""Feed-forward blocks: groups of hidden units are scored, and only the chosen ones computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hire_xform.lowering.engine.engine import proved_or_dense
from hire_xform.lowering.xla.devices import ONE
from hire_xform.lowering.xla.in_line import in_line
from hire_xform.passes.ir.graph import Operand
from hire_xform.passes.kinds import ffn_blocks, ffn_measured
from hire_xform.passes.kinds.ffn_blocks import Views, certified_operands, match_of
from hire_xform.passes.match.equations import equations_between
from hire_xform.passes.match.kinds import SiteKind, register_site_kind
from hire_xform.passes.match.matches import FfnMatch
from hire_xform.passes.match.zeros import gate_of
from hire_xform.passes.measure.capture import Measured, Recorded
from hire_xform.passes.plan.checks import (
    MEANING,
    Case,
    can_be_certified,
    chooses_on_one_device,
    has_few_tokens,
    has_whole_groups,
    has_whole_groups_on_each_device,
    is_placed,
    is_wanted,
)
from hire_xform.passes.plan.decisions import Decision
from hire_xform.passes.plan.forms import ROWS, Form, LargestNorm, Moments, Norms, PackedPredictor
from hire_xform.passes.plan.placement import Placement
from hire_xform.passes.plan.settings import Ffn
from hire_xform.passes.plan.slots import ProductForms, SiteForms
from hire_xform.passes.prove.region_intervals import unbounded
from hire_xform.passes.rewrite.canonical import canonical_activation, canonical_side, product_key
from hire_xform.passes.weights.cut_weights import is_cut
from hire_xform.passes.weights.products import Product


def leaves_zeros(case: Case) -> str | None:
    """Units of it can be left out, its activation being zero often, or as its user allows.

    Certified, zeros are proved for each input, however rare they are: of a gate, or of the model's own threshold.
    """
    match, settings = case.match, case.settings
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


def has_a_size(case: Case) -> str | None:
    """How many of its units are computed is known, where the model itself chooses them."""
    own, settings = case.own, case.settings
    if own is None or own.share is not None or settings.active is not None:
        return None
    if settings.certify or case.runs_dense:
        return None
    proved = unbounded(case.match.region) is None
    return (
        f"the model itself keeps {own.name}, so how many of its units are to be computed is not known; state it, "
        f"hx.Ffn(active=...){', ' if proved else ' or '}calibrate"
        + (", or prove it for each input, hx.Ffn(certify=True)" if proved else "")
    )


class FfnKind(SiteKind):
    """See ``SiteKind``. Canonical values: ``[T, d]`` for each product into the units, then the side inputs."""

    name = "ffn"
    # Each token has hundreds of units to find.
    tokens_enough = 2048
    checks = (
        *(is_wanted, *MEANING, leaves_zeros, has_few_tokens, is_placed, has_whole_groups, has_a_size),
        *(chooses_on_one_device, has_whole_groups_on_each_device, can_be_certified),
    )

    def count(self, case: Case) -> int:
        """The groups of units, by the share of what the model itself keeps."""
        assert isinstance(case.settings, Ffn)
        return case.settings.groups_of(case.match.units, None if case.own is None else case.own.share)

    def listing(self, match: FfnMatch) -> list[str]:
        """With the expressions of its region."""
        region = match.region
        zeros = f"zeros: {'none' if region.zero_share is None else f'{region.zero_share:.2f}'}"
        own = f"; the model's own choice: {region.own.name}" if region.own is not None else ""
        lines = [f"ffn {match.node.path}: {match.units:,} units; {zeros}{own}"]
        for number, expr in enumerate(region.exprs):
            root = "  <- activation" if number == region.root else ""
            lines.append(f"  {number:3d}  {expr}{root}")
        return lines

    def described(self, case: Case) -> dict[str, Any]:
        """What is between the products."""
        return {"activation": case.match.region.activation}

    def forms(self, match: FfnMatch, settings: Ffn) -> SiteForms[Form]:
        """Rows of all; a predictor of what is scored; what a proof takes of the others, and sums over all units."""
        region, certify = match.region, bool(settings.certify)
        predictor = PackedPredictor(settings.spec, proves=certify)
        scored, totalled = region.scored, region.totalled
        if certify and match.own is None:
            # Zeros are proved of the gate alone.
            gate = gate_of(region)
            scored = [gate is not None and i == gate.up for i in range(len(region.ups))]
            totalled = [False] * len(scored)
        ups = tuple(
            ProductForms[Form](
                ROWS,
                predictor=predictor if own else None,
                largest=LargestNorm() if certify and not own else None,
                moments=Moments(bounded=certify) if summed else None,
            )
            for own, summed in zip(scored, totalled, strict=True)
        )
        norms = None if certify or match.own is not None else Norms()
        largest = LargestNorm() if certify else None
        beside = tuple(ProductForms[Form](ROWS, largest=largest) for _ in match.beside)
        return SiteForms(ups, ProductForms[Form](ROWS, largest=largest, norms=norms), beside=beside)

    def tries(self, match: FfnMatch) -> bool:
        """Zeros are proved before any unit is computed."""
        return False

    def may_reorder(self, match: FfnMatch, settings: Ffn) -> bool:
        """Where nothing is proved and the model does not choose by place, and all weights are stacked alike."""
        if settings.certify or match.own is not None:
            return False
        stacks = {matrix.stack for matrix in match.matrices}
        return len(stacks) == 1 and not any(is_cut(product.origin.refs) for product in match.products)

    def may_be_static(self, match: FfnMatch, settings: Ffn) -> bool:
        """Of blocks whose zeros tell units apart, whose units are no groups and contracted once."""
        return (
            not match.beside and settings.group_size == 1 and match.region.zeroing and self.may_reorder(match, settings)
        )

    def may_be_short(self, match: FfnMatch, settings: Ffn) -> bool:
        """Where units are left out for being zero: not whatever they are, and not by the model's own choice."""
        return not settings.certify and settings.activations != "any" and match.own is None

    def bounded(self, match: FfnMatch) -> list[Product]:
        """Those that the model's own choice is made of, or else the gate."""
        if match.own is not None:
            return [up.product for up in match.region.ups]
        gate = gate_of(match.region)
        return [match.region.ups[0 if gate is None else gate.up].product]

    def unproved(self, match: FfnMatch, platform: str) -> str | None:
        """Zeros are proved of gates at zero, and of a threshold that is subtracted where all it takes has bounds."""
        if match.own is not None:
            why = unbounded(match.region)
            return why and f"the model itself keeps {match.own.name}, and certify=True {why}"
        if gate_of(match.region) is None:
            return (
                f"certify=True proves zeros of max(u, 0), alone, squared, or times another product; not of this "
                f"activation ({match.region.activation})"
            )
        return None

    def has_own_equations(self, match: FfnMatch) -> bool:
        """Where what lies between the products hangs on nothing else."""
        return equations_between(match) is not None

    def operands(self, decision: Decision) -> list[Operand]:
        """The activations, and the region's side inputs."""
        region = match_of(decision).region
        return [*(up.product.x for up in region.ups), *(side.value for side in region.sides)]

    def signature(self, decision: Decision) -> Any:
        """Of the products, the sides and the region."""
        match = match_of(decision)
        ups = tuple((product_key(up.product), up.layout) for up in match.region.ups)
        sides = tuple((side.value.shape, str(side.value.aval.dtype), side.layout) for side in match.region.sides)
        return match.units, ups, sides, match.region.signature(), tuple(map(product_key, match.ends))

    def canonical(self, decision: Decision, values: Sequence[Any]) -> list[Any]:
        """Tokens and units flattened."""
        match = match_of(decision)
        region, tokens = match.region, match.tokens
        xs = [canonical_activation(u.product, x, u.layout, tokens) for u, x in zip(region.ups, values, strict=False)]
        sides = values[len(xs) :]
        return xs + [canonical_side(v, s.layout, tokens, match.units) for v, s in zip(sides, region.sides, strict=True)]

    def specs(self, decision: Decision, given: Sequence[Any], placement: Placement) -> list[PartitionSpec]:
        """Tokens over their axes; of a side input, hidden units over theirs. One for all stays one on every device."""
        match = match_of(decision)

        def side(value: Any) -> PartitionSpec:
            shape = jnp.shape(value)
            if not shape:
                return PartitionSpec()
            tokens = placement.tokens if shape[0] == match.tokens > 1 else ()
            units = placement.rows if shape[1] == match.units > 1 else ()
            return PartitionSpec(tokens or None, units or None)

        ups = len(match.region.ups)
        return [PartitionSpec(placement.tokens or None, None)] * ups + [side(value) for value in given[ups:]]

    @in_line()
    def subgraph(
        self, decision: Decision, given: Sequence[Any], views: Views, placement: Placement | None
    ) -> tuple[Any, Any]:
        """The block, or each device's units added up; and the size that was taken, or whether it was short.

        Each device falls back by itself.
        """
        devices = ONE if placement is None else placement.devices
        if decision.settings.certify:
            block = ffn_blocks.certified_block(decision, devices.count)
            flat, mark = proved_or_dense(block, certified_operands(given, views, decision.settings.spec))
        else:
            flat, mark = ffn_blocks.chosen(decision, given, views, devices.count)
        return devices.total(ffn_blocks.filled(flat, views)), mark

    def criterion(self, match: FfnMatch, settings: Ffn) -> str:
        """Units that are not zero, or the energy of those chosen."""
        return "units" if match.region.zeroing else "energy"

    def measured(self, decision: Measured, given: Sequence[Any], views: Any) -> tuple[Any, Recorded]:
        """The dense block. Which units fire; of each way where these stand in its order."""
        return ffn_measured.measured(decision, given, views)

    def rehearsed(self, decision: Decision, given: Sequence[Any], views: Views, sizes: Any) -> tuple[Any, None]:
        """The dense block without the units that each token does not choose."""
        return ffn_measured.rehearsed(decision, given, views, sizes), None


register_site_kind(FfnKind())
