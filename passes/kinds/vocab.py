"""Vocabulary projections: candidates are scored, the best computed exactly, and the other logits are their scores."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hire_xform.lowering.engine.cyclic_rows import from_cyclic, return_candidates
from hire_xform.lowering.engine.head import certified_logits, vocab_candidates, vocab_logits
from hire_xform.lowering.measure.statistics import (
    KL_SIZES,
    Sample,
    covariance,
    first_in_order,
    open_share,
    proved_ranks,
    vocab_ranks,
)
from hire_xform.lowering.predict.predictors import predict_scores_of_many
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.prove.proofs import proof_bytes, scores_with_bounds
from hire_xform.lowering.xla.blocks import fold_row_blocks
from hire_xform.lowering.xla.devices import ONE, Devices
from hire_xform.lowering.xla.in_line import in_line
from hire_xform.passes.ir.graph import Node, Operand
from hire_xform.passes.kinds.readings import on_each_device, rank_of, readings_of
from hire_xform.passes.match.kinds import SiteKind, register_site_kind
from hire_xform.passes.match.matches import VocabMatch
from hire_xform.passes.measure.capture import Measured, Recorded, numbered
from hire_xform.passes.plan.checks import MEANING, Case, can_be_certified, has_few_tokens, is_placed, is_wanted
from hire_xform.passes.plan.decisions import Decision
from hire_xform.passes.plan.forms import ROWS, Form, PackedPredictor
from hire_xform.passes.plan.placement import Placement
from hire_xform.passes.plan.settings import Vocab
from hire_xform.passes.plan.slots import ProductForms, SiteForms
from hire_xform.passes.prove.chains import Chain
from hire_xform.passes.prove.what_to_prove import Reads, reads_of
from hire_xform.passes.rewrite.action import Context
from hire_xform.passes.rewrite.canonical import dense_product, flat_activation, product_key
from hire_xform.passes.rewrite.environment import PackedView
from hire_xform.passes.rewrite.own_equations import own_product
from hire_xform.passes.weights.cut_weights import is_cut, parts_of_rows

Views = SiteForms[PackedView]
# Logits that a calibration looks at together: 48 MB, for each of its arrays of them.
_LOGITS_TOGETHER = 3 << 22


def is_known_for_logits(case: Case) -> str | None:
    """Something says that a wide product's outputs are logits: a reader, a lookup, a rule or a calibration."""
    match = case.match
    if match.evidence or case.choice.named or case.measurement is not None:
        return None
    return _smallest(match) or (
        "nothing says that its outputs are logits: no arg max, top-k or softmax that rises with them, and no weight of "
        f"as many rows is looked up by id; if they are, hx.Rule({match.node.path!r}, vocab=hx.Vocab()) makes it a site"
    )


def has_provable_readers(case: Case) -> str | None:
    """What reads its logits takes what can be proved of them, or what candidates can be chosen by."""
    return case.found_reads if isinstance(case.found_reads, str) else None


def has_enough_candidates(case: Case) -> str | None:
    """Its candidates are as many as are read, and of the side that is."""
    match, settings = case.match, case.settings
    most = case.reads.most
    if settings.certify and (settings.candidates or match.units) < min(most, match.units):
        return f"candidates={settings.candidates} are fewer than the {most} largest, which are read"
    return (_smallest(match) or None) if case.count < match.units else None


def _smallest(match: VocabMatch) -> str:
    """Why a projection is left of which the smallest outputs are wanted; empty where they are not."""
    if not match.smallest:
        return ""
    return f"{match.smallest} reads the smallest of its outputs, where candidates are the largest"


class VocabKind(SiteKind):
    """See ``SiteKind``. Canonical values are the activation ``[T, d]``, then what readers take besides, as it is."""

    name = "vocab"
    gathers = True
    # The mean of a divergence, which is three times as spread as it is large, is then within 5 %.
    tokens_enough = 4096
    checks = (
        *(is_wanted, is_known_for_logits, *MEANING, has_few_tokens, is_placed, can_be_certified),
        *(has_provable_readers, has_enough_candidates),
    )

    def count(self, case: Case) -> int:
        """The candidates. Each device of a shard_map that cuts the vocabulary takes its share."""
        match, settings = case.match, case.settings
        assert isinstance(settings, Vocab)
        parts = parts_of_rows(match.matrices[0].rows, match.product.origin.refs)
        return -(-settings.candidates_of(match.units * parts, max(case.reads.most, case.reads.filters)) // parts)

    def reads(self, case: Case) -> Reads | str:
        """What reads the logits."""
        placed = case.placement is not None
        together = case.placement is not None and not case.placement.tokens
        split = placed or is_cut(case.match.product.origin.refs)
        return reads_of(case.match, case.settings, split, placed, together)

    def listing(self, match: VocabMatch) -> list[str]:
        """With what says that they are logits, and what reads them."""
        (line,) = super().listing(match)
        readers = [f"  read by {reader.kind}: {reader.where}" for reader in match.readers]
        return [f"{line}; logits: {match.evidence or 'nothing says so'}", *readers]

    def described(self, case: Case) -> dict[str, Any]:
        """Why the outputs are taken for logits."""
        otherwise = "a rule says so" if case.choice.named else "they were measured as such"
        return {"evidence": case.match.evidence or otherwise, "stages": _stages(case)}

    def forms(self, match: VocabMatch, settings: Vocab) -> SiteForms[Form]:
        """Rows, and their predictor."""
        predictor = PackedPredictor(settings.spec, proves=bool(settings.certify))
        return SiteForms((ProductForms(ROWS, predictor),))

    def unproved(self, match: VocabMatch, platform: str) -> str | None:
        """Nothing keeps a head from being certified."""
        return None

    def has_own_equations(self, match: VocabMatch) -> bool:
        """Its one product can be run again."""
        return True

    def operands(self, decision: Decision) -> list[Operand]:
        """The activation, and what readers of the logits take besides."""
        match = _match(decision)
        return [match.product.x, *(leaf for chain in decision.reads.chains for leaf in chain.leaves())]

    def values(self, decision: Decision, context: Context) -> list[Any]:
        """The activation, and the side inputs of readers, which may be made further on."""
        reads = _reads(decision)
        for chain in reads.chains:
            if chain.ahead:
                context = context.with_results(chain.ahead, chain.resolved)
        sides = [context.read(chain.resolved(side)) for chain, side in reads.sides]
        return [context.read(_match(decision).product.x), *sides]

    def reached_by(self, decision: Decision) -> list[Node]:
        """The equations of readers that take something besides."""
        reads = decision.reads
        return [node for chain in reads.chains for node in chain.nodes] if reads.sides else []

    def signature(self, decision: Decision) -> Any:
        """Of the product and its readers."""
        match = _match(decision)
        chains = tuple(chain.signature() for chain in decision.reads.chains)
        return product_key(match.product), chains, match.out_dtype.name

    def canonical(self, decision: Decision, values: Sequence[Any]) -> list[Any]:
        """Tokens flattened, and readers' side inputs as they are."""
        x, *sides = values
        return [flat_activation(_match(decision).product, x), *sides]

    def specs(self, decision: Decision, given: Sequence[Any], placement: Placement) -> list[PartitionSpec]:
        """Tokens over their axes, and of side inputs along the vocabulary each device its part."""
        product = _match(decision).product
        tokens, rows = placement.tokens or None, placement.rows or None

        def spec(chain: Chain, side: Any) -> PartitionSpec:
            # What is read of all devices' logits together takes all of its side inputs.
            if not side.ndim or not chain.split:
                return PartitionSpec()
            lengths = zip(side.shape, (product.tokens, product.width), (tokens, rows), strict=True)
            return PartitionSpec(*(names if have == full and full > 1 else None for have, full, names in lengths))

        chains = [chain for chain, _ in _reads(decision).sides]
        return [PartitionSpec(tokens, None), *map(spec, chains, map(jnp.asarray, given[1:]))]

    def splits_result(self, match: VocabMatch) -> bool:
        """Logits stay where they are made."""
        return True

    @in_line()
    def subgraph(
        self, decision: Decision, given: Sequence[Any], views: Views, placement: Placement | None
    ) -> tuple[Any, Any]:
        """The logits, or a device's part of them: of the rows it has, or, where these are cyclic, of those it had."""
        devices = ONE if placement is None else placement.devices
        match, head, mark = _match(decision), views.head, None
        if decision.cyclic == "candidates":
            exact, index, _ = vocab_candidates(
                *self._arguments(decision, given, views), **_sizes(decision, views, devices)
            )
            exact = head.rows.filled(exact).astype(match.out_dtype)
            return return_candidates(exact, index, devices, match.units // devices.count), None
        if decision.settings.certify:
            logits, mark = self._certified(decision, given, views, devices)
        else:
            sizes = _sizes(decision, views, devices)
            rank = rank_of(match.product, _reads(decision))
            if rank is not None:
                sizes["rank"] = lambda scores: rank(Interval(scores, scores), given[1:])
            logits = vocab_logits(*self._arguments(decision, given, views), **sizes, fill=_settings(decision).fill)  # type: ignore[arg-type]
        logits = head.rows.filled(logits)
        return from_cyclic(logits, devices, axis=1) if decision.cyclic == "logits" else logits, mark

    def _arguments(self, decision: Decision, given: Sequence[Any], views: Views) -> tuple[Any, Any, Any, Any]:
        assert views.head.predictor is not None
        spec = decision.settings.spec
        return given[0], views.head.rows.rows()[0], views.head.predictor.for_predictor(spec), spec

    def _certified(self, decision: Decision, given: Sequence[Any], views: Views, devices: Devices) -> tuple[Any, Any]:
        """The logits ``[T, V]``, or one device's part of them, proved of all devices; and the size."""
        match, settings = _match(decision), _settings(decision)
        product, reads, split = match.product, _reads(decision), decision.placement is not None
        return certified_logits(
            *self._arguments(decision, given, views),
            lambda x, rows: dense_product(product, x, rows).astype(match.out_dtype),
            own=lambda x, leaf: own_product(product, x, leaf).astype(match.out_dtype),
            leaf=views.leaves[0] if views.leaves else None,
            smaller=decision.smaller,
            readings=readings_of(product, reads, settings.certify or False, settings.logprobs, split),
            sides=[jnp.asarray(side) for side in given[1:]],
            rank=rank_of(product, reads, split),
            fill=settings.fill,  # type: ignore[arg-type]
            rounded_to=product.out.aval.dtype,
            input_bits=decision.input_bits,
            devices=devices,
            **_sizes(decision, views, devices),
        )

    def criterion(self, match: VocabMatch, settings: Vocab) -> str:
        """Tokens whose arg max is among the candidates."""
        return "argmax"

    def measured(self, decision: Measured, given: Sequence[Any], views: Any) -> tuple[Any, Recorded]:
        """The dense logits. Of each way how many candidates its order needs, with ``vocab_ranks`` or a proof's.

        These are of a few tokens at a time, whose logits are computed for them alone: all together may take more memory
        than the model, and where nothing reads the head's own they are not computed at all.
        """
        product, x, rows = _match(decision).product, given[0], views.ways[0].head.rows
        logits = dense_product(product, x, rows.whole())
        found = {"tokens": jnp.int32(x.shape[0])}
        if decision.inputs:
            found["covariance0"] = covariance(x)
        if decision.ranks:
            # In blocks of about the same size: packed forms are unpacked again for each.
            count = -(-x.shape[0] * product.width // _LOGITS_TOGETHER)
            together = max(16, -(-x.shape[0] // count))
            found |= fold_row_blocks(lambda some: self._ranks(decision, some, views), together, x)
        return rows.filled(logits), [found]

    def _ranks(self, decision: Measured, x: Any, views: Any) -> dict[str, Any]:
        """Of each way. In a loop, one after the other: scores of all at once may take more memory than the model."""
        product = _match(decision).product
        logits = dense_product(product, x, views.ways[0].head.rows.whole())
        sample = None if views.first is None else Sample(decision.every, views.first.whole())
        ways = [
            functools.partial(_ranks_of, way, x, logits, own.head.predictor.whole(), sample)
            for way, own in zip(decision.ways, views.ways, strict=True)
        ]
        if len(ways) == 1:
            return numbered(ways[0](), 0)
        shapes = [jax.eval_shape(way) for way in ways]
        most = {
            name: max((s[name] for s in shapes if name in s), key=lambda s: s.shape) for own in shapes for name in own
        }
        every = jax.lax.map(lambda i: jax.lax.switch(i, [_padded(way, most) for way in ways]), jnp.arange(len(ways)))
        found: dict[str, Any] = {}
        for number, own in enumerate(shapes):
            found |= numbered({name: every[name][number][: s.shape[0]] for name, s in own.items()}, number)
        return found

    def rehearsed(
        self, decision: Decision, given: Sequence[Any], views: Views, sizes: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Exact logits for the candidates of each token, and what fills the others."""
        product, settings, x = _match(decision).product, _settings(decision), given[0]
        assert views.head.predictor is not None
        dense = dense_product(product, x, views.head.rows.whole())
        scores = predict_scores_of_many(x, views.head.predictor.whole(), settings.spec, product.width)
        chosen = first_in_order(scores, sizes, min(KL_SIZES, product.width))
        rest = scores.astype(dense.dtype) if settings.fill == "predicted" else -jnp.inf
        logits = jnp.where(chosen, dense, rest)
        return views.head.rows.filled(logits), logits.astype(jnp.float32)


def _stages(case: Case) -> str:
    """What each stage of a certified projection is expected to read; empty of one stage."""
    (matrix,), spec, rows = case.match.matrices, case.settings.spec, case.match.units // case.shards
    if not case.settings.certify or len(spec.stages) < 2:
        return ""
    told = []
    for number, (share, stage) in enumerate(zip(spec.expected, spec.stages, strict=True)):
        read = math.ceil(share * proof_bytes(rows, matrix.columns, stage, matrix.dtype))
        of = (
            f"of {share:.2%} of the rows, those still open, {'measured' if spec.shares else 'a guess'}"
            if number
            else "of all rows"
        )
        told.append(f"{stage} {of} ({read:,} bytes)")
    return "; ".join(told)


def _ranks_of(way: Decision, x: Any, logits: Any, packed: Any, sample: Sample | None) -> dict[str, jax.Array]:
    """What is recorded of a way: ``vocab_ranks``, or ``proved_ranks`` and ``opened``."""
    settings = _settings(way)
    if not settings.certify:
        scores = predict_scores_of_many(x, packed, settings.spec, logits.shape[1])
        return vocab_ranks(logits, scores, settings.fill, sample)
    bound = scores_with_bounds(x, packed, settings.spec, input_bits=way.input_bits)
    bounds = bound.scores, bound.upper, bound.exact_error
    ranked = proved_ranks(logits, *bounds, settings.certify, settings.fill, sample, settings.logprobs)
    return ranked | _opened(way, x, packed, logits)


def _padded(way: Callable[[], dict[str, jax.Array]], shapes: Mapping[str, Any]) -> Callable[[], dict[str, jax.Array]]:
    """What gives what a way does, with zeros up to these shapes and where it gives nothing."""

    def run() -> dict[str, jax.Array]:
        given = way()
        found = {name: given.get(name, jnp.zeros(0, s.dtype)) for name, s in shapes.items()}
        return {name: jnp.pad(found[name], (0, s.shape[0] - found[name].shape[0])) for name, s in shapes.items()}

    return run


def _opened(way: Decision, x: jax.Array, packed: Any, logits: jax.Array) -> dict[str, jax.Array]:
    """Of each stage but the last the share of the rows that it leaves open, added up over tokens; none of one stage."""
    spec, goal = way.settings.spec, way.settings.certify or True
    shares = [
        open_share(goal, logits, scores_with_bounds(x, spec.part(packed, i), stage, input_bits=way.input_bits).upper)
        for i, stage in enumerate(spec.stages[:-1])
    ]
    return {"opened": jnp.stack(shares)} if shares else {}


def _reads(decision: Decision) -> Reads:
    """What reads the logits, as far as it has to be told; of rows on several devices what keeps their order has not."""
    return decision.reads if decision.placement is None else on_each_device(decision.reads)


def _match(decision: Decision) -> VocabMatch:
    match = decision.match
    assert isinstance(match, VocabMatch)
    return match


def _settings(decision: Decision) -> Vocab:
    settings = decision.settings
    assert isinstance(settings, Vocab)
    return settings


def _sizes(decision: Decision, views: Views, devices: Devices) -> dict[str, Any]:
    match = _match(decision)
    return {
        "candidates": decision.count,
        "vocab": match.units // devices.count,
        "first_row": views.head.rows.rows()[1],
        "out_dtype": match.out_dtype,
    }


register_site_kind(VocabKind())
