"""Evaluates the program as the sparse one would be, but densely: each token has its own units and candidates.

Sizes are operands, so one compiled program serves all of them; what is left out is computed, and then left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp

from hire_xform.lowering.engine.block import group_scores
from hire_xform.lowering.measure.statistics import KL_SIZES, first_in_order
from hire_xform.lowering.predict.predictors import predict_scores
from hire_xform.lowering.primitives.records import record
from hire_xform.passes.ir.each_device import whole_results
from hire_xform.passes.ir.graph import Frame
from hire_xform.passes.match.matches import FfnMatch, VocabMatch
from hire_xform.passes.match.own_choice import OfChosen
from hire_xform.passes.measure.capture import dense_activation
from hire_xform.passes.plan.decisions import Decision, Need
from hire_xform.passes.plan.forms import vocab_forms
from hire_xform.passes.plan.needs import stack_need
from hire_xform.passes.plan.settings import Ffn, Vocab
from hire_xform.passes.rewrite.canonical import dense_product, flat_activation, result_shape
from hire_xform.passes.rewrite.environment import Env, PackedView, read
from hire_xform.passes.rewrite.rewriter import Rewriter
from hire_xform.passes.rewrite.splice import ffn_parts, site_operands, site_signature


@dataclass(frozen=True)
class Sizes:
    """A packed form that is none: int32 ``[*stack]``, the candidates or groups of units of the site at a path."""

    path: str


@dataclass(frozen=True, eq=False, repr=False)
class Rehearsed(Decision):
    """A match whose sparse form is rehearsed. The last of ``needs`` is its ``Sizes``."""

    @classmethod
    def of(cls, decision: Decision) -> Rehearsed:
        """The rehearsal of a decision."""
        values = {f.name: getattr(decision, f.name) for f in fields(Decision)}
        needs = decision.needs if decision.levels is None else decision.needs[:-1]
        values["needs"] = (*needs, stack_need(decision.match, Sizes(decision.site.path)))
        values["levels"] = None
        return cls(**values)


class Rehearse(Rewriter):
    """Puts the rehearsed form where the rewriter would put the sparse subgraph; records ``logits`` of vocabularies."""

    def _site(self, decision: Decision, env: Env, seen: list[PackedView]) -> Any:
        key = site_signature(decision), decision.node.outputs[0].aval
        if key not in self._calls:
            self._calls[key] = jax.jit(_rehearsed(decision))
        value, logits = self._calls[key](site_operands(decision, lambda o: read(env, o)), seen)
        if logits is not None:
            record({"logits": logits}, decision.site.path)
        return value

    def _call_key(self, frame: Frame, passed: list[Any], needs: list[Need], seen: list[PackedView]) -> Any:
        """Calls of one function are not shared: what is recorded inside carries the path of one site."""
        return frame.path, super()._call_key(frame, passed, needs, seen)


@dataclass(frozen=True)
class _OfMasked(OfChosen):
    """The model's own choice among the units chosen, the others being there too."""

    mask: Any = None

    def kth(self, values: Any, rank: int) -> Any:
        return super().kth(jnp.where(self.mask, values, -jnp.inf), rank)

    def kept(self, values: Any, k: int) -> Any:
        return super().kept(jnp.where(self.mask, values, -jnp.inf), k)


def _rehearsed(decision: Decision) -> Callable[[list[Any], list[PackedView]], tuple[Any, Any]]:
    match = decision.match

    def run(operands: list[Any], views: list[PackedView]) -> tuple[Any, Any]:
        if isinstance(match, VocabMatch):
            return _vocab(decision, match, operands, views)
        return _ffn(decision, match, operands, views), None

    return whole_results(run, decision.node.outputs[0].aval)


def _vocab(
    decision: Decision, match: VocabMatch, operands: Sequence[Any], views: Sequence[PackedView]
) -> tuple[Any, Any]:
    product, settings = match.product, decision.settings
    assert isinstance(settings, Vocab)
    forms = dict(zip(vocab_forms(settings), views[:-1], strict=True))
    x = flat_activation(product, operands[0])
    dense = dense_product(product, x, forms["rows"].whole())
    scores = predict_scores(x, forms[settings.spec].whole(), settings.spec, product.width)
    chosen = first_in_order(scores, views[-1].whole(), min(KL_SIZES, product.width))
    rest = scores.astype(dense.dtype) if settings.fill == "predicted" else -jnp.inf
    logits = jnp.where(chosen, dense, rest)
    return result_shape(product, forms["rows"].filled(logits)), logits.astype(jnp.float32)


def _ffn(decision: Decision, match: FfnMatch, operands: Sequence[Any], views: Sequence[PackedView]) -> Any:
    settings = decision.settings
    assert isinstance(settings, Ffn)
    parts = ffn_parts(decision, match, operands, views[:-1])
    down = parts.down["rows"].whole()
    scores = group_scores(
        parts.ups,
        parts.region(match),
        units=match.units,
        down_norms=parts.down["norms"].whole() if "norms" in parts.down else None,
        score=parts.score(match),
        group_size=settings.group_size,
    )
    chosen = first_in_order(scores, views[-1].whole(), scores.shape[1])
    chosen = jnp.repeat(chosen, settings.group_size, axis=1)
    own = parts.statistics
    activation = dense_activation(
        match, dataclasses.replace(parts, statistics=_OfMasked(own.mean, own.variance, chosen))
    )
    activation = jnp.where(chosen, activation, 0).astype(match.hidden.aval.dtype)
    result = dense_product(match.down, activation, down, contracted_first=True)
    return result_shape(match.down, parts.down["rows"].filled(result))
