"""Evaluates the program densely, with statistics of every site recorded beside its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering import (
    UpProduct,
    covariance,
    ffn_statistics,
    group_scores,
    predict_scores,
    record,
    vocab_statistics,
)
from hire_xform.passes.canonical import flat_activation, result_shape
from hire_xform.passes.detect import FfnMatch, VocabMatch
from hire_xform.passes.environment import Env, PackedView, read
from hire_xform.passes.forms import up_forms, vocab_forms
from hire_xform.passes.measured import input_numbers
from hire_xform.passes.plan import Decision, Need
from hire_xform.passes.rewrite import Rewriter
from hire_xform.passes.settings import Ffn
from hire_xform.passes.splice import ffn_parts, site_operands, site_signature
from hire_xform.passes.splice_certified import dense_product
from hire_xform.passes.walk import Frame

# For each product into the units, what is recorded with the stack index of its weight.
Recorded = list[dict[str, jax.Array]]


class Capture(Rewriter):
    """Puts "dense, and statistics" where the rewriter would put the sparse subgraph.

    Values are recorded (``lowering/record.py``) under the site's path: ``tokens`` and what ``vocab_statistics`` or
    ``ffn_statistics`` say, and ``covariance0``, ... of the inputs of each product into the units.
    """

    # Whether predictors are run; without, only ``tokens`` and covariances are recorded.
    ranks = True

    def _site(self, decision: Decision, env: Env, seen: list[PackedView]) -> Any:
        key = site_signature(decision), tuple(input_numbers(decision.match))
        if key not in self._calls:
            self._calls[key] = jax.jit(_measured(decision, self.ranks))
        value, recorded = self._calls[key](site_operands(decision, lambda o: read(env, o)), seen)
        for values, first in zip(recorded, _first_views(decision), strict=True):
            view = seen[first]
            record(values, decision.site.path, view.arrays.shape[: len(view.index)], view.index)
        return value

    def _call_key(self, frame: Frame, passed: list[Any], needs: list[Need], seen: list[PackedView]) -> Any:
        """Calls of one function are not shared: what is recorded inside carries the path of one site."""
        return frame.path, super()._call_key(frame, passed, needs, seen)


class CaptureInputs(Capture):
    """Records of a site's inputs only: what predictors are fitted to."""

    ranks = False


def _first_views(decision: Decision) -> list[int]:
    """Where the packed forms of each product into the units begin among those of the site."""
    match, settings = decision.match, decision.settings
    if isinstance(match, VocabMatch):
        return [0]
    assert isinstance(settings, Ffn)
    lengths = [len(forms) for forms in up_forms(match.region, settings)]
    return [sum(lengths[:i]) for i in range(len(lengths))]


def _measured(decision: Decision, ranks: bool) -> Callable[[list[Any], list[PackedView]], tuple[Any, Recorded]]:
    match = decision.match
    if isinstance(match, VocabMatch):
        return lambda operands, views: _vocab(decision, match, operands, views, ranks)
    return lambda operands, views: _ffn(decision, match, operands, views, ranks)


def _vocab(
    decision: Decision, match: VocabMatch, operands: Sequence[Any], views: Sequence[PackedView], ranks: bool
) -> tuple[Any, Recorded]:
    product, settings = match.product, decision.settings
    forms = dict(zip(vocab_forms(settings), views, strict=True))  # type: ignore[arg-type]
    x = flat_activation(product, operands[0])
    logits = dense_product(product, x, forms["rows"].whole())
    found = {"tokens": jnp.int32(x.shape[0]), "covariance0": covariance(x)}
    if ranks:
        scores = predict_scores(x, forms[settings.predictor].whole(), settings.predictor, product.width)
        found.update(vocab_statistics(logits, scores))
    return result_shape(product, forms["rows"].filled(logits)), [found]


def _ffn(
    decision: Decision, match: FfnMatch, operands: Sequence[Any], views: Sequence[PackedView], ranks: bool
) -> tuple[Any, Recorded]:
    settings = decision.settings
    assert isinstance(settings, Ffn)
    parts = ffn_parts(decision, match, operands, views)
    region = parts.region(match)
    down = parts.down["rows"].whole()
    hiddens = [
        dense_product(up.product, part.x, _own_rows(part, match.units))
        for up, part in zip(match.region.ups, parts.ups, strict=True)
    ]
    activation = region(hiddens, lambda values: values)
    result = dense_product(match.down, activation.astype(match.hidden.aval.dtype), down, contracted_first=True)
    recorded: Recorded = [{} for _ in parts.ups]
    recorded[0]["tokens"] = jnp.int32(match.tokens)
    for i, first in enumerate(input_numbers(match)):
        if first == i:
            recorded[i][f"covariance{i}"] = covariance(parts.ups[i].x)
    if ranks:
        norms = jnp.sqrt(jnp.sum(jnp.square(down.astype(jnp.float32)), axis=-1))
        scores = group_scores(
            parts.ups,
            region,
            units=match.units,
            down_norms=norms,
            score=parts.score(match),
            group_size=settings.group_size,
        )
        recorded[0].update(ffn_statistics(activation, norms, scores, settings.group_size))
    return result_shape(match.down, parts.down["rows"].filled(result)), recorded


def _own_rows(up: UpProduct, units: int) -> jax.Array:
    return up.rows if up.rows.shape[0] == units else lax.dynamic_slice_in_dim(up.rows, up.first_row, units)
