"""What detection finds: vocabulary projections, feed-forward blocks, and weight products that are neither."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from hire_xform.passes.ir.axes import Layout
from hire_xform.passes.ir.graph import Node, Value
from hire_xform.passes.match.output_axis import Fate
from hire_xform.passes.match.readers import Reader
from hire_xform.passes.match.region import Region, Up
from hire_xform.passes.weights.lookups import Lookup
from hire_xform.passes.weights.products import Product, matrix, normal_form, widened_at_once
from hire_xform.passes.weights.provenance import Recipe, Reshape, Root, Slice, Transpose


@dataclass(frozen=True, eq=False, repr=False)
class VocabMatch:
    """A vocabulary projection: ``product`` maps ``[T, d]`` to ``[T, V]``.

    Attributes:
      product: the product.
      fate: what becomes of its output.
      readers: what takes its logits as a whole.
      evidence: what says that they are logits; empty where nothing does.
      smallest: what reads the smallest of them, where candidates are the largest; empty where nothing does.
    """

    product: Product
    fate: Fate
    readers: tuple[Reader, ...] = ()
    evidence: str = ""
    smallest: str = ""

    @property
    def node(self) -> Node:
        """The equation whose result is replaced."""
        return self.product.node

    @property
    def products(self) -> list[Product]:
        """All its products."""
        return [self.product]

    @property
    def out_dtype(self) -> np.dtype:
        """dtype of the logits: the product's, or what all that reads it widens it to.

        XLA leaves out the rounding of a product that is widened at once, so it is computed unrounded here, too.
        """
        return widened_at_once(self.product)

    @property
    def units(self) -> int:
        """Rows to choose from, V."""
        return self.product.width


@dataclass(frozen=True, eq=False, repr=False)
class FfnMatch:
    """A feed-forward block: products into ``units`` hidden units, a pointwise region, a product that contracts them.

    Attributes:
      down: the contracting product.
      hidden: its activation operand.
      layout: layout of ``hidden``.
      region: what lies between.
      tokens: T.
      units: m.
    """

    down: Product
    hidden: Value
    layout: Layout
    region: Region
    tokens: int
    units: int

    @property
    def node(self) -> Node:
        """The equation whose result is replaced."""
        return self.down.node

    @property
    def products(self) -> list[Product]:
        """All its products, each once."""
        return list(dict.fromkeys([*(up.product for up in self.region.ups), self.down]))

    def down_rows(self) -> Recipe:
        """The contracting weight as ``[m, d_out]``."""
        order = sorted(range(len(self.down.x_contract)), key=lambda i: self.down.x_contract[i])
        return self.down.rows_contracted(tuple(order))


def up_rows(up: Up) -> Recipe:
    """The weight of a product into the hidden units as ``[m, d]``, units in canonical order, cut to those used."""
    product = up.product
    dims = [up.layout[d] for d in product.out_w_dims]
    atoms = [a for d in dims for a in d.atoms]
    order = sorted(range(len(atoms)), key=lambda i: -atoms[i].stride)
    if all(d.full for d in dims) and order == list(range(len(atoms))):
        return product.rows_free()
    recipe, shape = product.origin.recipe, product.weight.shape
    start, limit, strides = [0] * len(shape), list(shape), [1] * len(shape)
    for axis, dim in zip(product.w_free, dims, strict=True):
        start[axis], limit[axis] = dim.start, dim.start + dim.step * (dim.size - 1) + 1
        strides[axis] = dim.step
    recipe = recipe.then(Slice(tuple(start), tuple(limit), tuple(strides)))
    sizes = [a.size for a in atoms]
    contracted = [shape[d] for d in product.w_contract]
    recipe = recipe.then(
        Transpose((*product.w_free, *product.w_contract)),
        Reshape((*sizes, *contracted)),
        Transpose((*order, *range(len(sizes), len(sizes) + len(contracted)))),
        Reshape((math.prod(sizes), math.prod(contracted))),
    )
    return normal_form(recipe)


def vocab_rows(match: VocabMatch) -> Recipe:
    """The weight of a vocabulary projection as ``[V, d]``."""
    product = match.product
    return matrix(product.origin.recipe, product.weight.shape, product.w_free, product.w_contract)


@dataclass(frozen=True, repr=False)
class Rejection:
    """A weight product that is no match, and why.

    Attributes:
      node: the equation.
      product: the product; None of one that has no weight in normal form.
      reason: why.
      read: the weights of one without, and the bytes of each that a call reads.
    """

    node: Node
    product: Product | None
    reason: str
    read: dict[Root, int] = field(default_factory=dict)

    @property
    def weights_read(self) -> dict[Root, int]:
        """Its weights, and the bytes of each that a call reads."""
        if self.product is None:
            return self.read
        return {self.product.origin.recipe.root: self.product.nbytes * self.node.scope.iterations}


@dataclass(frozen=True, repr=False)
class Detection:
    """All that was found in a graph, in program order, which is ``order``."""

    matches: list[VocabMatch | FfnMatch]
    rejections: list[Rejection]
    products: list[Product]
    order: dict[Node, int]
    lookups: list[Lookup]
