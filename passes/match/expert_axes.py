"""Axes of experts: their number is the leading digits of the token index, an expert's tokens following one another."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hire_xform.passes.ir.axes import Atom, Dim, Layout
from hire_xform.passes.weights.products import Product


def is_of_experts(atom: Atom, each: int) -> bool:
    """Whether a digit is of the expert's number.

    Args:
      atom: the digit.
      each: tokens of an expert.
    """
    return atom.space == "t" and atom.stride >= each


def units_of(layout: Sequence[Dim]) -> int:
    """How many hidden units some dimensions hold."""
    return math.prod(a.size for dim in layout for a in dim.atoms if a.space == "h")


def makes_units_of_experts(product: Product, layout: Layout, units: int, each: int) -> bool:
    """Whether a product with weights of experts makes their units, each dimension of a weight being of one kind.

    Args:
      product: the product.
      layout: of its result.
      units: of an expert.
      each: tokens of an expert.
    """
    batch = layout[: len(product.w_batch)]
    x_dims = [layout[d] for d in product.out_x_dims]
    w_dims = [layout[d] for d in product.out_w_dims]
    of_units = all(a.space == "h" or is_of_experts(a, each) for d in w_dims for a in d.atoms)
    of_experts = all(is_of_experts(a, each) for d in batch for a in d.atoms)
    of_tokens = all(a.space == "t" for d in x_dims for a in d.atoms)
    if not (of_units and of_experts and of_tokens and product.contracted):
        return False
    return units_of(w_dims) == units and all(d.full for d in (*batch, *x_dims, *w_dims))
