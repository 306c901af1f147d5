"""Puts the predict-then-compute subgraphs of ``hire_xform.lowering`` where a site stood, shapes and dtypes kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.engine.block import UpProduct, ffn
from hire_xform.lowering.engine.head import vocab_candidates, vocab_logits
from hire_xform.lowering.primitives.ranks import moments
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.passes.ir.graph import Operand
from hire_xform.passes.match.matches import FfnMatch, VocabMatch
from hire_xform.passes.match.own_choice import OfChosen
from hire_xform.passes.match.region import Up, replay
from hire_xform.passes.plan.decisions import Decision
from hire_xform.passes.plan.forms import down_forms, up_forms
from hire_xform.passes.plan.levels import Levels
from hire_xform.passes.plan.settings import Ffn, Vocab
from hire_xform.passes.rewrite.actions import DenseRows
from hire_xform.passes.rewrite.canonical import canonical_activation, canonical_side, flat_activation, result_shape
from hire_xform.passes.rewrite.environment import PackedView
from hire_xform.passes.rewrite.splice_certified import certified_function
from hire_xform.passes.rewrite.splice_readings import rank_of
from hire_xform.passes.weights.products import Product, precision_asked

Read = Callable[[Operand], Any]


def site_operands(decision: Decision, read: Read) -> list[Any]:
    """The runtime values, besides packed arrays, that a rewritten site reads: activations, then side inputs."""
    match = decision.match
    if isinstance(match, VocabMatch):
        return [read(match.product.x)] + [read(chain.resolved(side)) for chain, side in decision.reads.sides]
    return [read(up.product.x) for up in match.region.ups] + [read(side.value) for side in match.region.sides]


def site_signature(decision: Decision) -> Any:
    """Equal for two sites that are rewritten to the same function of their operands and packed arrays; hashable."""
    match = decision.match
    settings = (
        decision.settings,
        decision.rungs,
        decision.static,
        decision.levels,
        len(decision.needs),
        decision.site.tokens,
        decision.placement,
        decision.cyclic,
        decision.input_bits,
        precision_asked(match.products),
    )
    if isinstance(match, VocabMatch):
        chains = tuple(chain.signature() for chain in decision.reads.chains)
        return "vocab", settings, _product_signature(match.product), chains, match.out_dtype.name
    ups = tuple((_product_signature(up.product), up.layout) for up in match.region.ups)
    sides = tuple((side.value.shape, str(side.value.aval.dtype), side.layout) for side in match.region.sides)
    return "ffn", settings, match.units, ups, sides, match.region.signature(), _product_signature(match.down)


def _product_signature(product: Product) -> Any:
    dtypes = tuple(str(v.aval.dtype) for v in (product.x, product.weight, product.out))
    dims = (product.x_contract, product.w_contract, product.x_free, product.w_free, product.weight_left)
    return product.x.shape, product.weight.shape, dtypes, dims


def site_function(decision: Decision) -> Callable[[list[Any], list[PackedView]], Any]:
    """The rewritten site as a function of ``site_operands`` and its packed forms, in the order of ``needs``.

    Where the site ``marks`` something it gives its value and what is marked.
    """
    match = decision.match
    if decision.levels is not None:
        return _branches(decision, decision.levels)
    if decision.settings.certify:
        return certified_function(decision)
    if isinstance(match, VocabMatch):
        return lambda operands, views: _vocab(decision, match, operands, views)
    return lambda operands, views: _ffn(decision, match, operands, views)


def _branches(decision: Decision, levels: Levels) -> Callable[[list[Any], list[PackedView]], Any]:
    """A site whose layers have counts of their own: a branch for each."""
    number = len(decision.needs) - decision.leaves - 1
    one = dataclasses.replace(decision, levels=None, needs=_without(decision.needs, number))
    functions, before = [], 0
    for *smaller, count in levels.ladders:
        own = site_function(dataclasses.replace(one, count=count, smaller=tuple(smaller)))
        functions.append(_numbered(own, before, len(smaller) + 1, len(decision.rungs)) if one.settings.certify else own)
        before += len(smaller) + 1
    return lambda operands, views: lax.switch(views[number].whole(), functions, operands, list(_without(views, number)))


def _without(given: Sequence[Any], number: int) -> tuple[Any, ...]:
    return (*given[:number], *given[number + 1 :])


def _numbered(function: Callable[..., Any], before: int, own: int, total: int) -> Callable[..., Any]:
    """A certified site's function of one level, with its rungs numbered among those of all levels."""

    def numbered(operands: list[Any], views: list[PackedView]) -> Any:
        value, rung = function(operands, views)
        return value, jnp.where(rung < own, before + rung, total)

    return numbered


def _vocab(decision: Decision, match: VocabMatch, operands: Sequence[Any], views: Sequence[PackedView]) -> Any:
    return result_shape(match.product, flat_logits(decision, match, operands[0], views, sides=operands[1:]))


def flat_logits(
    decision: Decision,
    match: VocabMatch,
    operand: Any,
    views: Sequence[PackedView],
    shards: int = 1,
    canonical: bool = False,
    sides: Sequence[Any] = (),
) -> Any:
    """The logits ``[T, V]``, or one device's part of them; ``canonical``: the operand is ``[T, d]`` already."""
    assert isinstance(decision.settings, Vocab)
    given, sizes = _vocab_arguments(decision, match, operand, views, shards, canonical)
    rank = rank_of(match.product, decision.reads)
    if rank is not None:
        sizes["rank"] = lambda scores: rank(Interval(scores, scores), sides)
    return views[0].filled(vocab_logits(*given, **sizes, fill=decision.settings.fill))  # type: ignore[arg-type]


def flat_candidates(
    decision: Decision, match: VocabMatch, operand: Any, views: Sequence[PackedView], shards: int
) -> tuple[Any, Any]:
    """One device's candidates, ``[T, K]``, and which of its rows they are, ``[K]`` or ``[T, K]``."""
    given, sizes = _vocab_arguments(decision, match, operand, views, shards, canonical=True)
    exact, index, _ = vocab_candidates(*given, **sizes)
    return views[0].filled(exact), index


def _vocab_arguments(
    decision: Decision, match: VocabMatch, operand: Any, views: Sequence[PackedView], shards: int, canonical: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    product, settings = match.product, decision.settings
    rows, first = views[0].rows()
    x = operand if canonical else flat_activation(product, operand)
    sizes = {
        "candidates": decision.count,
        "vocab": product.width // shards,
        "first_row": first,
        "out_dtype": match.out_dtype,
    }
    return (x, rows, views[1].whole(), settings.spec), sizes


@dataclass(frozen=True)
class FfnParts:
    """A feed-forward block's operands and packed forms, sorted and in canonical layout.

    Attributes:
      ups: the products into the hidden units.
      sides: the region's side inputs.
      statistics: what the model's own choice of units takes.
      down: packed forms of the contracting product, by form.
    """

    ups: list[UpProduct]
    sides: list[Any]
    statistics: OfChosen
    down: dict[Any, PackedView]

    def region(self, match: FfnMatch) -> Callable[[Sequence[Any], Callable[[Any], Any]], Any]:
        """What the model does to hidden units, given a product for each of ``ups`` and what gathers the rest."""
        return lambda hiddens, gather: replay(match.region, hiddens, self.sides, gather, jax.nn.relu, self.statistics)

    def score(self, match: FfnMatch) -> Callable[[Sequence[Any]], Any] | None:
        """What the model itself chooses units by; None where it makes no choice."""
        own = match.region.own
        if own is None:
            return None
        return lambda predicted: replay(
            match.region, predicted, self.sides, lambda v: v, jax.nn.relu, self.statistics, own.score
        )


def ffn_parts(
    decision: Decision,
    match: FfnMatch,
    operands: Sequence[Any],
    views: Sequence[PackedView],
    canonical: bool = False,
) -> FfnParts:
    """Sorts ``site_operands`` and the packed forms of ``needs``.

    Args:
      decision: the site.
      match: its match.
      operands: as ``site_operands`` gives them, or in canonical layout already.
      views: the packed forms.
      canonical: whether they are.
    """
    settings = decision.settings
    assert isinstance(settings, Ffn)
    region, tokens = match.region, match.tokens
    ups: list[UpProduct] = []
    mean: dict[int, Any] = {}
    variance: Any = None
    given = iter(views)
    numbers = [i for i, e in enumerate(region.exprs) if isinstance(e, Up)]
    for up, read, number, operand in zip(region.ups, up_forms(region, settings), numbers, operands, strict=False):
        forms = {form: next(given) for form in read}
        rows, first = forms["rows"].rows()
        x = operand if canonical else canonical_activation(up.product, operand, up.layout, tokens)
        x = forms["rows"].filled(x)
        packed = forms[settings.spec].whole() if settings.spec in forms else None
        ups.append(UpProduct(x=x, rows=rows, first_row=first, packed=packed, spec=settings.spec, dtype=up.dtype))
        for form in ("moments", "bounded_moments"):
            if form in forms:
                mean[number], variance = moments(x, forms[form].whole())
    values = operands[len(ups) :]
    sides = [
        v if canonical else canonical_side(v, side.layout, tokens, match.units)
        for v, side in zip(values, region.sides, strict=True)
    ]
    down = {form: next(given) for form in down_forms(region, settings)}
    order = next(given, None)
    if order is not None:
        # Units are packed in another order, in which all that varies over them has to be.
        own = order.whole()
        sides = [jnp.take(s, own, axis=1) if jnp.ndim(s) == 2 and s.shape[1] == match.units else s for s in sides]
    return FfnParts(ups, sides, OfChosen(mean, variance), down)


def _ffn(decision: Decision, match: FfnMatch, operands: Sequence[Any], views: Sequence[PackedView]) -> Any:
    flat, short = flat_block(decision, match, ffn_parts(decision, match, operands, views))
    result = result_shape(match.down, flat)
    return (result, short) if decision.marks else result


def flat_block(decision: Decision, match: FfnMatch, parts: FfnParts, shards: int = 1) -> tuple[Any, Any]:
    """A feed-forward block of ``[T, d]``, or one device's part of the sum that it is; and whether it was short."""
    settings = decision.settings
    assert isinstance(settings, Ffn)
    down, down_first = parts.down["rows"].rows()
    result, short = ffn(
        parts.ups,
        parts.region(match),
        down,
        units=match.units // shards,
        first_row=down_first,
        down_norms=parts.down["norms"].whole() if match.region.own is None else None,
        score=parts.score(match),
        active=decision.count,
        group_size=settings.group_size,
        out_dtype=match.down.out.aval.dtype,
        static=decision.static,
    )
    return parts.down["rows"].filled(result), short


def dense_rows(treatment: DenseRows, read: Read, view: PackedView) -> Any:
    """A dense product from packed rows."""
    product = treatment.product
    x = flat_activation(product, read(product.x))
    rows = view.whole().astype(product.weight.aval.dtype)
    contract = ((1,), (0,)) if treatment.contracted_first else ((1,), (1,))
    params = product.node.params
    flat = lax.dot_general(
        x,
        rows,
        (contract, ((), ())),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    assert math.prod(flat.shape) == product.tokens * product.width
    return result_shape(product, view.filled(flat))
