"""Other weight products, attention's above all, read compressed where asked for: the predictor's scores are the result.

The product itself is replaced, in its result dtype; bias, casts and reshapes around it stay the program's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hire_xform.lowering.predict.predictors import predict_scores
from hire_xform.passes.ir.graph import Operand
from hire_xform.passes.match.kinds import SiteKind, register_site_kind
from hire_xform.passes.match.matches import Match, Matrix
from hire_xform.passes.match.vocab import BATCHED
from hire_xform.passes.plan.checks import MEANING, Case, has_few_tokens, is_placed, is_wanted
from hire_xform.passes.plan.decisions import Decision
from hire_xform.passes.plan.forms import Form, PackedPredictor, ProductForms, SiteForms
from hire_xform.passes.plan.placement import Placement
from hire_xform.passes.plan.settings import Dense
from hire_xform.passes.rewrite.canonical import flat_activation, product_key
from hire_xform.passes.rewrite.environment import PackedView
from hire_xform.passes.weights.products import Product


@dataclass(frozen=True, eq=False, repr=False)
class DenseMatch(Match):
    """A weight product of any kind: ``product`` maps ``[T, d]`` to ``[T, n]``."""

    kind: ClassVar[str] = "dense"

    product: Product

    @property
    def last(self) -> Product:
        """Its one product."""
        return self.product

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Its one weight, ``[n, d]``: a row for each output."""
        return (Matrix(self.product, self.product.rows_free(), self.product.contracted),)

    @property
    def tokens(self) -> int:  # type: ignore[override]
        """T."""
        return self.product.tokens

    @property
    def units(self) -> int:  # type: ignore[override]
        """Outputs of a token, n."""
        return self.product.width


def has_float_values(case: Case) -> str | None:
    """What it multiplies and what it gives are floats: scores are."""
    product = case.match.product
    dtypes = [value.aval.dtype for value in (product.x, product.out)]
    if all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return None
    return f"it multiplies {dtypes[0].name} and gives {dtypes[1].name}; only floating-point products are predicted"


class DenseKind(SiteKind):
    """See ``SiteKind``. The one canonical value is the activation ``[T, d]``."""

    name = "dense"
    chooses = False
    splits_result = True
    checks = (is_wanted, *MEANING, has_float_values, has_few_tokens, is_placed)

    def instead(self, product: Product) -> Match | str | None:
        """Any product of one matrix."""
        if product.batched:
            return BATCHED
        return DenseMatch(product) if product.width and product.contracted and product.tokens else None

    def forms(self, match: DenseMatch, settings: Dense) -> SiteForms[Form]:
        """A predictor alone: the rows are not read, and need not be kept."""
        return SiteForms((ProductForms(predictor=PackedPredictor(settings.spec)),))

    def count(self, case: Case) -> int:
        """No row is computed exactly."""
        return 0

    def operands(self, decision: Decision) -> list[Operand]:
        """The activation."""
        return [_product(decision).x]

    def signature(self, decision: Decision) -> Any:
        """Of the product."""
        return product_key(_product(decision))

    def canonical(self, decision: Decision, values: Sequence[Any]) -> list[Any]:
        """Tokens flattened."""
        return [flat_activation(_product(decision), values[0])]

    def specs(self, decision: Decision, given: Sequence[Any], placement: Placement) -> list[PartitionSpec]:
        """Tokens over their axes."""
        return [PartitionSpec(placement.tokens or None, None)]

    def subgraph(
        self, decision: Decision, given: Sequence[Any], views: SiteForms[PackedView], placement: Placement | None
    ) -> tuple[Any, Any]:
        """The scores: all, or of the outputs that a device has the rows of."""
        product, predictor = _product(decision), views.head.predictor
        assert predictor is not None
        outputs = product.width // (1 if placement is None else placement.shards)
        scores = predict_scores(given[0], predictor.whole(), decision.settings.spec, outputs)
        return predictor.filled(scores).astype(product.out.aval.dtype), None


def _product(decision: Decision) -> Product:
    match = decision.match
    assert isinstance(match, DenseMatch)
    return match.product


register_site_kind(DenseKind())
