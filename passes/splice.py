"""Puts the predict-then-compute subgraphs of ``hire_xform.lowering`` where a site stood, shapes and dtypes kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering import (
    Quantized,
    UpProduct,
    among_largest,
    certified_logits,
    ffn,
    kth_largest,
    moments,
    vocab_logits,
)
from hire_xform.passes import sums
from hire_xform.passes.detect import FfnMatch, VocabMatch
from hire_xform.passes.environment import PackedView
from hire_xform.passes.layout import Layout, row_major, to_canonical, whole
from hire_xform.passes.plan import Decision, down_forms, up_forms
from hire_xform.passes.products import Product
from hire_xform.passes.region import Region, Up, replay
from hire_xform.passes.settings import Ffn, Vocab
from hire_xform.passes.treatment import DenseRows
from hire_xform.passes.walk import Operand

Read = Callable[[Operand], Any]


def site_operands(decision: Decision, read: Read) -> list[Any]:
    """The runtime values, besides packed arrays, that a rewritten site reads: activations, then side inputs."""
    match = decision.match
    if isinstance(match, VocabMatch):
        return [read(match.product.x)]
    return [read(up.product.x) for up in match.region.ups] + [read(side.value) for side in match.region.sides]


def site_signature(decision: Decision) -> Any:
    """Equal for two sites that are rewritten to the same function of their operands and packed arrays; hashable."""
    match = decision.match
    settings = (decision.settings, decision.count, decision.site.tokens)
    if isinstance(match, VocabMatch):
        return "vocab", settings, _product_signature(match.product)
    ups = tuple((_product_signature(up.product), up.layout) for up in match.region.ups)
    sides = tuple((side.value.shape, str(side.value.aval.dtype), side.layout) for side in match.region.sides)
    return "ffn", settings, match.units, ups, sides, match.region.signature(), _product_signature(match.down)


def _product_signature(product: Product) -> Any:
    dtypes = tuple(str(v.aval.dtype) for v in (product.x, product.weight, product.out))
    dims = (product.x_contract, product.w_contract, product.x_free, product.w_free, product.weight_left)
    return product.x.shape, product.weight.shape, dtypes, dims


def site_function(decision: Decision) -> Callable[[list[Any], list[PackedView]], Any]:
    """The rewritten site as a function of ``site_operands`` and its packed forms, in the order of ``needs``."""
    match = decision.match
    if isinstance(match, VocabMatch):
        return lambda operands, views: _vocab(decision, match, operands, views)
    return lambda operands, views: _ffn(decision, match, operands, views)


def _vocab(decision: Decision, match: VocabMatch, operands: Sequence[Any], views: Sequence[PackedView]) -> Any:
    product, settings = match.product, decision.settings
    assert isinstance(settings, Vocab)
    rows, first = views[0].rows()
    if settings.certify:
        return _certified(decision, match, operands, views)
    logits = vocab_logits(
        flat_activation(product, operands[0]),
        rows,
        views[1].whole(),
        settings.predictor,
        candidates=decision.count,
        vocab=product.width,
        first_row=first,
        fill=settings.fill,  # type: ignore[arg-type]
        out_dtype=product.out.aval.dtype,
    )
    return result_shape(product, views[0].filled(logits))


def _certified(decision: Decision, match: VocabMatch, operands: Sequence[Any], views: Sequence[PackedView]) -> Any:
    """Logits and whether the dense product was run."""
    product, settings = match.product, decision.settings
    assert isinstance(settings, Vocab)
    assert isinstance(settings.predictor, Quantized)
    rows, first = views[0].rows()
    params = product.node.params

    def dense(x: Any, rows: Any) -> Any:
        found = lax.dot_general(
            x,
            rows,
            (((1,), (1,)), ((), ())),
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
        return found.astype(product.out.aval.dtype)

    logits, fallback = certified_logits(
        flat_activation(product, operands[0]),
        rows,
        views[1].whole(),
        views[2].whole(),
        settings.predictor,
        dense,
        candidates=decision.count,
        vocab=product.width,
        first_row=first,
        fill=settings.fill,  # type: ignore[arg-type]
        out_dtype=product.out.aval.dtype,
        input_bits=decision.input_bits,
    )
    return result_shape(product, views[0].filled(logits)), fallback


def _ffn(decision: Decision, match: FfnMatch, operands: Sequence[Any], views: Sequence[PackedView]) -> Any:
    settings = decision.settings
    assert isinstance(settings, Ffn)
    region, tokens = match.region, match.tokens
    ups: list[UpProduct] = []
    mean: dict[int, Any] = {}
    variance: Any = None
    given = iter(views)
    numbers = [i for i, e in enumerate(region.exprs) if isinstance(e, Up)]
    described = zip(region.ups, region.scored, region.totalled, numbers, operands, strict=False)
    for up, scored, totalled, number, operand in described:
        forms = {form: next(given) for form in up_forms(settings.predictor, scored, totalled)}
        rows, first = forms["rows"].rows()
        x = forms["rows"].filled(canonical_activation(up.product, operand, up.layout, tokens))
        packed = forms[settings.predictor].whole() if scored else None
        ups.append(
            UpProduct(
                x=x, rows=rows, first_row=first, packed=packed, spec=settings.predictor, dtype=up.product.out.aval.dtype
            )
        )
        if totalled:
            mean[number], variance = moments(x, forms["moments"].whole())
    values = operands[len(ups) :]
    sides = [_side(v, side.layout, tokens, match.units) for v, side in zip(values, region.sides, strict=True)]
    statistics = _OfChosen(mean, variance)
    last = {form: next(given) for form in down_forms(region)}
    down, down_first = last["rows"].rows()

    def score(predicted: Sequence[Any]) -> Any:
        assert region.own is not None
        return replay(region, predicted, sides, lambda v: v, jax.nn.relu, statistics, region.own.score)

    result = ffn(
        ups,
        lambda hiddens, gather: replay(region, hiddens, sides, gather, jax.nn.relu, statistics),
        down,
        units=match.units,
        first_row=down_first,
        down_norms=last["norms"].whole() if region.own is None else None,
        score=None if region.own is None else score,
        active=decision.count,
        group_size=settings.group_size,
        out_dtype=match.down.out.aval.dtype,
    )
    return result_shape(match.down, last["rows"].filled(result))


@dataclass(frozen=True)
class _OfChosen:
    """The model's own choice of units among the chosen ones; sums are those of all units, from their moments.

    Attributes:
      mean: mean over all units of the products (by expression) that are summed, ``[T, 1]``.
      variance: variance of the one that is.
    """

    mean: dict[int, Any]
    variance: Any

    def kth(self, values: Any, rank: int) -> Any:
        return kth_largest(values, rank)

    def kept(self, values: Any, k: int) -> Any:
        return among_largest(values, k)

    def total(self, region: Region, operand: int, values: Sequence[Any]) -> Any:
        def value(number: int) -> Any:
            return values[number][:, :1] if jnp.ndim(values[number]) == 2 else values[number]

        return sums.total(
            region.exprs, region.varies, operand, value, self.mean.__getitem__, self.variance, region.units
        )


def _side(value: Any, layout: Layout, tokens: int, units: int) -> Any:
    return value if jnp.ndim(value) == 0 else to_canonical(value, layout, tokens, units)


def flat_activation(product: Product, x: Any) -> Any:
    """A product's activation as ``[T, d]``, columns in the order of the weight's contracted dimensions."""
    perm = (*product.x_free, *product.x_contract)
    return jnp.transpose(x, perm).reshape(product.tokens, product.contracted)


def canonical_activation(product: Product, x: Any, layout: Layout, tokens: int) -> Any:
    """A product's activation as ``[T, d]``, tokens in the order of the block's contracting product.

    Args:
      product: a product into the hidden units.
      x: its activation.
      layout: layout of the product's result.
      tokens: T of the block.
    """
    dims: list[Any] = [None] * len(product.x.shape)
    for d, out in zip(product.x_free, product.out_x_dims, strict=True):
        dims[d] = layout[out]
    sizes = [product.x.shape[d] for d in product.x_contract]
    for d, atom in zip(product.x_contract, row_major("h", sizes), strict=True):
        dims[d] = whole([atom], product.x.shape[d])
    canonical = to_canonical(x, tuple(dims), tokens, product.contracted)
    return jnp.broadcast_to(canonical, (tokens, product.contracted))


def result_shape(product: Product, flat: Any) -> Any:
    """``[T, width]`` as the product's result: its token and weight dimensions, in their order."""
    x_shape = [product.x.shape[d] for d in product.x_free]
    w_shape = [product.weight.shape[d] for d in product.w_free]
    shaped = flat.reshape(*x_shape, *w_shape)
    if product.weight_left:
        lead = range(len(x_shape), len(x_shape) + len(w_shape))
        shaped = jnp.transpose(shaped, (*lead, *range(len(x_shape))))
    return shaped


def dense_rows(treatment: DenseRows, read: Read, view: PackedView) -> Any:
    """A dense product from packed rows."""
    product = treatment.product
    x = flat_activation(product, read(product.x))
    rows = view.whole()
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
