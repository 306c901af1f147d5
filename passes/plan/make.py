"""Decides by predicted times which matches are rewritten, and says why the others stay dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from hire_xform.lowering.engine.selection import Selection
from hire_xform.lowering.predict.predictors import Predictor
from hire_xform.lowering.prove.arithmetic import ALL_BITS
from hire_xform.lowering.prove.proofs import stage_reads
from hire_xform.passes.ir.debugging import Why, debugging
from hire_xform.passes.ir.graph import Node
from hire_xform.passes.match.derivatives import derivative_of
from hire_xform.passes.match.kinds import kind_of, kinds
from hire_xform.passes.match.matches import Detection, Match, names_of
from hire_xform.passes.plan.checks import COMMON, Case, has_a_predictor
from hire_xform.passes.plan.cost import Running, dense_seconds, is_widened
from hire_xform.passes.plan.decisions import Decision, Plan, Refusal, Rung, Site
from hire_xform.passes.plan.forms import Order
from hire_xform.passes.plan.measurement import MeasurementOf
from hire_xform.passes.plan.needs import needs_of, order_of, stack_need
from hire_xform.passes.plan.placement import CutRows, Placement
from hire_xform.passes.plan.profile import Profile, seconds_text
from hire_xform.passes.plan.settings import ChooseSettings
from hire_xform.passes.plan.sizes import UNCHOSEN, Reading, Sizes, sizes_of
from hire_xform.passes.plan.verify import verify_plan
from hire_xform.passes.prove.certifiable import input_bits
from hire_xform.passes.weights.few_bits import in_words
from hire_xform.passes.weights.products import Product
from hire_xform.passes.weights.recipe import Root


def make_plan(
    detection: Detection,
    choose_settings: ChooseSettings,
    profile: Profile,
    name_of: Callable[[Root], str],
    measure: MeasurementOf = lambda match, names: None,
    placed: Callable[[Match], Placement | CutRows | str | None] = lambda match: None,
    runs_dense: bool = False,
) -> Plan:
    """Turns matches into decisions or refusals.

    Args:
      detection: what was found.
      choose_settings: for a kind ("ffn", "vocab", "dense"), a path and names of weights, the user's settings.
      profile: of the machine where it will run.
      name_of: the name of a weight, for reports.
      measure: what a calibration says of a match.
      placed: where a match runs; see ``place``.
      runs_dense: True where the program stays dense and sites are measured only, so that their sizes don't matter.
    """
    planner = _Planner(choose_settings, profile, name_of, placed, runs_dense)
    found: list[tuple[Node, Decision | Refusal]] = []
    for match in detection.matches:
        outcome = planner.decided(match, measure)
        if isinstance(outcome, Decision):
            found.append((match.node, outcome))
            continue
        final = choose_settings(match.kind, match.node.path, names_of(match, name_of)).final
        found += [(p.node, planner.left(p, outcome, match.kind, final)) for p in match.products]
    for rejection in detection.rejections:
        node, read = rejection.node, rejection.weights_read
        if rejection.product is not None:
            found.append((node, planner.left(rejection.product, rejection.reason)))
            continue
        size, weights = sum(read.values()), tuple(name_of(root) for root in read)
        found.append((node, Refusal(node.path, node.source, rejection.reason, "", size, weights)))
    found.sort(key=lambda pair: detection.order[pair[0]])
    decisions = tuple(outcome for _, outcome in found if isinstance(outcome, Decision))
    refusals = tuple(outcome for _, outcome in found if isinstance(outcome, Refusal))
    plan = Plan(tuple(d.site for d in decisions), refusals, profile.platform, decisions, profile=profile)
    if debugging():
        verify_plan(detection, plan)
    return plan


@dataclass(frozen=True, eq=False)
class _Planner:
    """What all matches are decided by; see ``make_plan``."""

    choose_settings: ChooseSettings
    profile: Profile
    name_of: Callable[[Root], str]
    placed: Callable[[Match], Placement | CutRows | str | None]
    runs_dense: bool
    why: Why = field(default_factory=Why)

    def decided(self, match: Match, measure: MeasurementOf) -> Decision | str:
        """A decision, or the reason to stay dense."""
        kind, placed = kind_of(match), self.placed(match)
        if isinstance(placed, CutRows) and (other := kind.with_cut_rows(match, placed.parts)) is not None:
            match, placed = other, self.placed(other)
        placed = placed.reason if isinstance(placed, CutRows) else placed
        names = tuple(self.name_of(p.origin.recipe.root) for p in match.products)
        choice = self.choose_settings(match.kind, match.node.path, names_of(match, self.name_of))
        measured = measure(match, names)
        case = Case(match, kind, choice, self.profile, names, measured, placed, self.runs_dense)
        return _decide(case, self.why)

    def left(self, product: Product, reason: str, kind: str = "", final: bool = False) -> Decision | Refusal:
        """What becomes of a product that is in no site: one of its own where a kind has such, and settings ask for it.

        Args:
          product: the product.
          reason: why it is in no site.
          kind: of the match that it is in, if it is in one.
          final: that nothing else is to be tried.
        """
        read = product.read
        names = tuple(self.name_of(root) for root in read)
        for other in () if final else kinds():
            match = other.instead(product)
            if match is None or self.choose_settings(other.name, product.path, names).settings is None:
                continue
            # What was measured is of other matches.
            found = match if isinstance(match, str) else self.decided(match, lambda match, names: None)
            if isinstance(found, Decision):
                return found
            if found != reason:
                reason = f"{reason}; nor is it a site of kind {other.name!r}: {found}"
        return Refusal(product.path, product.node.source, reason, kind, sum(read.values()), names)


def _decide(case: Case, why: Why) -> Decision | str:
    """A decision, or the reason to stay dense: checks, then the size and what it costs."""
    path = case.match.node.path
    told = why.asks_for(*(product.path for product in case.match.products))

    def tell(check: str, outcome: str) -> None:
        if told:
            why.write(path, f"{case.match.kind} {check}", outcome)

    for check in case.kind.checks or COMMON:
        reason = check(case)
        tell(check.__name__.replace("_", " "), reason or "yes")
        if reason:
            return reason
    case, sized = _fastest(case)
    reason = _slower(case, sized)
    tell("is faster", reason or f"yes: {seconds_text(sized.sparse_seconds)}, dense {seconds_text(sized.dense_seconds)}")
    if reason:
        return reason
    decision = _describe(case, sized)
    tell("site", f"{decision.site.computed:,} of {decision.site.units:,} exact")
    return decision


@dataclass(frozen=True)
class _Sized:
    """The size of a site, and what it costs.

    Attributes:
      tokens: of one execution, on one device; so are all counts here.
      count: rows, or groups of units, that each token may have of those predicted.
      selection: how tokens share them.
      computed: rows computed exactly.
      static: units that are always computed.
      order: an order of its units that is not theirs.
      sizes: the sizes it may take.
      taken: how often each is expected to be.
      dense_bytes, sparse_bytes: weight bytes read per call, over all devices.
      dense_seconds, sparse_seconds: what a call is predicted to take, on each device at once.
      running: what that is predicted from.
      instead: the predictor of fewer bytes that a calibration chose, where another one is faster.
    """

    tokens: int
    count: int
    selection: Selection
    computed: int
    static: int
    order: Order | None
    sizes: Sizes
    taken: list[tuple[float, int, bool]]
    dense_bytes: int
    sparse_bytes: int
    dense_seconds: float
    sparse_seconds: float
    running: Running
    instead: Predictor | None = None


# Another predictor than the one of fewest bytes, which a calibration chose, is worth it where it saves this share of
# the predicted time: less may be chance, and it takes more memory.
WORTH = 0.05


def _fastest(case: Case) -> tuple[Case, _Sized]:
    """The case with the predictor of least predicted time, of those that a calibration found to do, and its size."""
    sized = _size(case)
    if case.runs_dense:
        return case, sized
    others = [(other, _size(other)) for other in case.alternatives() if has_a_predictor(other) is None]
    best, fastest = min(others, key=lambda one: one[1].sparse_seconds, default=(case, sized))
    if fastest.sparse_seconds > (1.0 - WORTH) * sized.sparse_seconds:
        best, fastest = case, sized
    return best, replace(fastest, instead=None if best is case else case.settings.spec)


def _size(case: Case) -> _Sized:
    match, settings, placement, shards = case.match, case.settings, case.placement, case.shards
    # Of one device, which has its share of the units, and of the tokens where data is sharded too.
    tokens = case.tokens if placement is None else case.tokens // placement.size(placement.tokens)
    count, static = -(-case.count // shards), case.chosen.static
    groups = (match.units // shards - static) // case.group_size
    order = None if placement is not None else order_of(match, settings, case.measurement)
    if static and case.measurement is not None:
        order = case.measurement.static_sets()[0]
    read = Reading(match, settings, tokens, groups, case.group_size, shards, static)
    selection = read.selection(count)
    sizes = sizes_of(read, case.chosen if placement is None else UNCHOSEN, count)
    taken = sizes.taken(read.tried)
    iterations = match.node.scope.iterations
    running = Running(match, settings, case.profile, tokens, selection.mode == "shared", shards, static)
    return _Sized(
        tokens,
        count,
        selection,
        read.rows(count),
        static,
        order,
        sizes,
        taken,
        dense_bytes=sum(p.nbytes for p in match.products) * iterations,
        sparse_bytes=(sizes.predicted + sizes.exact) * iterations * shards,
        dense_seconds=dense_seconds(match, case.profile, tokens) * iterations / shards,
        sparse_seconds=running.seconds(sizes.predicted, taken) * iterations,
        running=running,
    )


def _slower(case: Case, sized: _Sized) -> str | None:
    """Why a site would not be faster; None where it would be, or a rule forces it."""
    enough = (1.0 - case.profile.margin) * sized.dense_seconds
    if sized.sparse_seconds < enough or case.choice.force:
        return None
    excess = (sized.sparse_seconds - enough) / case.match.node.scope.iterations
    why = sized.running.why_slower(excess, sized.taken)
    over = "" if case.placement is None else f", over {case.placement}"
    dense, sparse = seconds_text(sized.dense_seconds), seconds_text(sized.sparse_seconds)
    return (
        f"it reads {sized.dense_bytes:,} bytes dense and {sized.sparse_bytes:,} sparse{over}, which would not be "
        f"faster on {case.platform}{why}; predicted are {dense} dense and {sparse} sparse; a Rule with force=True "
        "overrides this"
    )


def _rungs(case: Case, sizes: Sequence[Rung]) -> tuple[Rung, ...]:
    """What ``with_rungs`` counts: rows of further stages, and sizes, of whose bytes those of these stages are not."""
    match, spec, shards = case.match, case.settings.spec, case.shards
    stages: list[Rung] = []
    if sizes and len(spec.stages) > 1:
        (matrix,), rows = match.matrices, match.units // shards
        stages = [
            Rung(0, each, expected, str(stage))
            for stage, expected, each in stage_reads(rows, matrix.columns, spec, matrix.dtype)
        ]
    read = sum(round(stage.bytes * (stage.share or 0.0)) for stage in stages)
    stages = [replace(stage, share=(stage.share or 0.0) * shards) for stage in stages]
    return (*stages, *(Rung(r.computed * shards, (r.bytes - read) * shards, r.share) for r in sizes))


def _stored(match: Match) -> str:
    told = (in_words(m.rows, (match.units, m.columns), m.product.stored) for m in match.matrices)
    return ", ".join(dict.fromkeys(text for text in told if text))


def _describe(case: Case, sized: _Sized) -> Decision:
    match, settings, placement, shards = case.match, case.settings, case.placement, case.shards
    order, sizes, static, reads = sized.order, sized.sizes, sized.static, case.reads
    ordered = "" if order is None else f"; {order.how}"
    if sized.instead is not None:
        ordered += f"; {settings.spec} is predicted to be faster here than {sized.instead}, which reads fewer bytes"
    site = Site(
        kind=match.kind,
        path=match.node.path,
        source=match.node.source,
        tokens=case.tokens,
        dense_bytes=sized.dense_bytes,
        sparse_bytes=sized.sparse_bytes,
        settings=settings,
        weights=case.names,
        inputs=match.inputs,
        units=match.units,
        computed=sized.computed * shards,
        shared=sized.selection.mode == "shared",
        own="" if case.own is None else case.own.name,
        forced=case.choice.force,
        calibrated=case.chosen.how + ordered + sizes.how,
        shards=shards,
        placed="" if placement is None else str(placement),
        rungs=_rungs(case, sizes.rungs),
        static=static,
        derivative=derivative_of(match),
        proved=reads.proved,
        unproved=reads.unproved,
        widened=is_widened(match, case.profile, sized.tokens),
        stored=_stored(match),
        dense_seconds=sized.dense_seconds,
        sparse_seconds=sized.sparse_seconds,
    )
    site = replace(site, **case.kind.described(case))
    inputs = None if case.measurement is None else case.measurement.inputs
    forms = needs_of(match, settings, inputs, shards, order, static)
    if sizes.levels is not None:
        forms = replace(forms, level=stack_need(match, sizes.levels))
    return Decision(
        match,
        site,
        settings,
        sized.count,
        forms,
        input_bits(match, case.platform) or ALL_BITS,
        placement,
        sizes.levels,
        smaller=sizes.smaller,
        static=static,
        reads=reads,
    )
