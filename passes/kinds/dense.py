"""Other weight products, attention's above all, read compressed where asked for: the predictor's scores are the result.

The product itself is replaced, in its result dtype; bias, casts and reshapes around it stay the program's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hire_xform.lowering.predict.predictors import predict_scores
from hire_xform.lowering.xla.in_line import in_line
from hire_xform.passes.ir.graph import Operand
from hire_xform.passes.match.kinds import SiteKind, register_site_kind
from hire_xform.passes.match.matches import Match, Matrix
from hire_xform.passes.match.vocab import BATCHED
from hire_xform.passes.plan.checks import MEANING, Case, has_few_tokens, is_placed, is_wanted
from hire_xform.passes.plan.decisions import Decision
from hire_xform.passes.plan.forms import Form, PackedPredictor
from hire_xform.passes.plan.placement import Placement
from hire_xform.passes.plan.settings import Dense
from hire_xform.passes.plan.slots import ProductForms, SiteForms
from hire_xform.passes.rewrite.canonical import flat_activation, product_key
from hire_xform.passes.rewrite.environment import PackedView
from hire_xform.passes.weights.products import Product, normal_form
from hire_xform.passes.weights.recipe import Reshape, Transpose


@dataclass(frozen=True, eq=False, repr=False)
class DenseMatch(Match):
    """A weight product of any kind: ``product`` maps ``[T, d]`` to ``[T, n]``.

    Attributes:
      product: the product.
      parts: on how many devices each row of its weight is in parts; 1 where rows are whole.
    """

    kind: ClassVar[str] = "dense"

    product: Product
    parts: int = 1

    @property
    def last(self) -> Product:
        """Its one product."""
        return self.product

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Its one weight, ``[n, d]``: a row for each output, or those of each part, one part below the other."""
        product, rows = self.product, self.product.rows_free()
        columns = product.contracted // self.parts
        if self.parts > 1:
            cut = Reshape((product.width, self.parts, columns)), Transpose((1, 0, 2))
            rows = normal_form(rows.then(*cut, Reshape((self.units, columns))))
        return (Matrix(product, rows, columns),)

    @property
    def tokens(self) -> int:  # type: ignore[override]
        """T."""
        return self.product.tokens

    @property
    def units(self) -> int:  # type: ignore[override]
        """Outputs of a token, n, of each part."""
        return self.product.width * self.parts


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
    checks = (is_wanted, *MEANING, has_float_values, has_few_tokens, is_placed)

    def instead(self, product: Product) -> Match | str | None:
        """Any product of one matrix."""
        if product.w_batch:
            return BATCHED
        return DenseMatch(product) if product.width and product.contracted and product.tokens else None

    def with_cut_rows(self, match: DenseMatch, parts: int) -> Match | None:
        """The same product: each device reads its part of every row, and the sum over devices is the result."""
        return None if match.product.contracted % parts else replace(match, parts=parts)

    def described(self, case: Case) -> dict[str, Any]:
        """Its shape as a whole, whatever part of it a device has."""
        return {"units": case.match.product.width, "inputs": case.match.product.contracted}

    def forms(self, match: DenseMatch, settings: Dense) -> SiteForms[Form]:
        """A predictor alone: the rows are not read, and need not be kept."""
        return SiteForms((ProductForms(predictor=PackedPredictor(settings.spec)),))

    def count(self, case: Case) -> int:
        """No row is computed exactly."""
        return 0

    def operands(self, decision: Decision) -> list[Operand]:
        """The activation."""
        return [_match(decision).product.x]

    def signature(self, decision: Decision) -> Any:
        """Of the product."""
        return product_key(_match(decision).product), _match(decision).parts

    def canonical(self, decision: Decision, values: Sequence[Any]) -> list[Any]:
        """Tokens flattened."""
        return [flat_activation(_match(decision).product, values[0])]

    def specs(self, decision: Decision, given: Sequence[Any], placement: Placement) -> list[PartitionSpec]:
        """Tokens over their axes; of rows in parts what these are multiplied with over theirs."""
        columns = placement.rows if _match(decision).parts > 1 else ()
        return [PartitionSpec(placement.tokens or None, columns or None)]

    def splits_result(self, match: DenseMatch) -> bool:
        """Where rows are whole."""
        return match.parts == 1

    @in_line()
    def subgraph(
        self, decision: Decision, given: Sequence[Any], views: SiteForms[PackedView], placement: Placement | None
    ) -> tuple[Any, Any]:
        """The scores: all, or of the outputs that a device has the rows of; or the sum over the devices' parts."""
        match, predictor = _match(decision), views.head.predictor
        assert predictor is not None
        outputs = match.units // (1 if placement is None else placement.shards)
        spec = decision.settings.spec
        with jax.named_scope("predict"):
            scores = predict_scores(given[0], predictor.for_predictor(spec), spec, outputs)
        result = predictor.filled(scores).astype(match.product.out.aval.dtype)
        return result if placement is None or match.parts == 1 else placement.devices.total(result), None


def _match(decision: Decision) -> DenseMatch:
    match = decision.match
    assert isinstance(match, DenseMatch)
    return match


register_site_kind(DenseKind())
