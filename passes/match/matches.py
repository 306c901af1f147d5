"""What detection finds: vocabulary projections, feed-forward blocks, and weight products that are neither."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from hire_xform.passes.ir.axes import Layout
from hire_xform.passes.ir.graph import Node, Value
from hire_xform.passes.match.output_axis import Fate
from hire_xform.passes.match.readers import Reader
from hire_xform.passes.match.region import OwnSparsity, Region, Up
from hire_xform.passes.weights.few_bits import blocks
from hire_xform.passes.weights.lookups import Lookup
from hire_xform.passes.weights.products import Product, normal_form, widened_at_once
from hire_xform.passes.weights.recipe import Recipe, Reshape, Root, Slice, Stack, Transpose


@dataclass(frozen=True, eq=False, repr=False)
class Matrix:
    """The weight of a product of a match, as rows ``[units, columns]``."""

    product: Product
    rows: Recipe
    columns: int

    @property
    def dtype(self) -> np.dtype:
        """dtype of the weight as it is used; f32 of integers that are multiplied as they are."""
        used = self.product.weight.aval.dtype
        return np.dtype(used if jnp.issubdtype(used, jnp.floating) else np.float32)

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row as it is stored, with its share of what it is scaled by."""
        units = self.product.nbytes / (math.prod(self.product.weight.shape) // self.columns)
        return math.ceil(units)

    @property
    def stack(self) -> tuple[int, ...]:
        """Lengths of its stack axes: layers, mostly."""
        return tuple(step.size for step in self.rows.steps if isinstance(step, Stack))


class Match:
    """Products of which not all rows need be computed. Whatever its kind, this is known of a match.

    Attributes:
      kind: the name of its ``SiteKind``.
      tokens: T.
      units: rows to choose from.
      own: the model's own choice of units; None where it makes none.
    """

    kind: ClassVar[str]
    tokens: int
    units: int
    own: OwnSparsity | None = None

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """The weights, a row for each unit: those of the products that make the units, then what contracts them."""
        raise NotImplementedError

    @property
    def last(self) -> Product:
        """The product whose result is replaced."""
        raise NotImplementedError

    @property
    def node(self) -> Node:
        """The equation whose result is replaced."""
        return self.last.node

    @property
    def ends(self) -> tuple[Product, ...]:
        """The products whose results are replaced, the last one first."""
        return (self.last,)

    @property
    def products(self) -> list[Product]:
        """All its products, each once."""
        return [self.last]

    @property
    def nodes(self) -> set[Node]:
        """All equations that are replaced, products included."""
        return {product.node for product in self.products}

    @property
    def inputs(self) -> int:
        """Columns of the (first) weight, d."""
        return self.matrices[0].columns

    @property
    def input_numbers(self) -> list[int]:
        """For each product that makes units, the first of them with the same inputs."""
        return [0]

    @property
    def scaled_in_groups(self) -> bool:
        """Whether neighbouring rows of a weight share a scale, so that they have to stay where they are."""
        scales = (s.by for matrix in self.matrices for s in matrix.rows.scalings if s.by is not None)
        return any(1 < blocks(by)[0] < self.units for by in scales)

    @property
    def stack(self) -> tuple[int, ...]:
        """Lengths of the stack axes of the (first) weight."""
        return self.matrices[0].stack


@dataclass(frozen=True, eq=False, repr=False)
class OneProduct(Match):
    """A match of one product, which maps ``[T, d]`` to ``[T, n]``: its rows are the units.

    Attributes:
      product: the product.
    """

    product: Product

    @property
    def last(self) -> Product:
        """Its one product."""
        return self.product

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Its one weight, ``[n, d]``."""
        return (Matrix(self.product, self.product.rows_free(), self.product.contracted),)

    @property
    def tokens(self) -> int:  # type: ignore[override]
        """T."""
        return self.product.tokens

    @property
    def units(self) -> int:  # type: ignore[override]
        """n."""
        return self.product.width


@dataclass(frozen=True, eq=False, repr=False)
class VocabMatch(OneProduct):
    """A vocabulary projection: ``product`` maps ``[T, d]`` to ``[T, V]``.

    Attributes:
      fate: what becomes of its output.
      readers: what takes its logits as a whole.
      evidence: what says that they are logits; empty where nothing does.
      smallest: what reads the smallest of them, where candidates are the largest; empty where nothing does.
    """

    kind: ClassVar[str] = "vocab"

    fate: Fate
    readers: tuple[Reader, ...] = ()
    evidence: str = ""
    smallest: str = ""

    @property
    def out_dtype(self) -> np.dtype:
        """dtype of the logits: the product's, or what all that reads it widens it to.

        XLA leaves out the rounding of a product that is widened at once, so it is computed unrounded here, too.
        """
        return widened_at_once(self.product)


@dataclass(frozen=True, eq=False, repr=False)
class FfnMatch(Match):
    """A feed-forward block: products into ``units`` hidden units, a pointwise region, a product that contracts them.

    Attributes:
      down: the contracting product.
      hidden: its activation operand.
      layout: layout of ``hidden``.
      region: what lies between.
      tokens: T.
      units: m.
      beside: further products that contract the same units, such as the first factor of a low-rank update of ``down``.
    """

    kind: ClassVar[str] = "ffn"

    down: Product
    hidden: Value
    layout: Layout
    region: Region
    tokens: int
    units: int
    beside: tuple[Product, ...] = ()

    @property
    def own(self) -> OwnSparsity | None:  # type: ignore[override]
        """The model's own choice of units."""
        return self.region.own

    @property
    def last(self) -> Product:
        """The contracting product."""
        return self.down

    @property
    def ends(self) -> tuple[Product, ...]:
        """All that contract its units."""
        return (self.down, *self.beside)

    @property
    def products(self) -> list[Product]:
        """All its products, each once."""
        return list(dict.fromkeys([*[up.product for up in self.region.ups], *self.ends]))

    @property
    def nodes(self) -> set[Node]:
        """The products, and all that lies between."""
        return super().nodes | self.region.nodes

    @property
    def input_numbers(self) -> list[int]:
        """For each product into the units, the first of them with the same inputs."""
        found: dict[Any, int] = {}
        numbers: list[int] = []
        for i, (up, own) in enumerate(zip(self.region.ups, self.matrices, strict=False)):
            product = up.product
            tokens = tuple(up.layout[d] for d in product.out_x_dims)
            key = (product.x, product.x_contract, product.x_free, tokens, own.stack)
            numbers.append(found.setdefault(key, i))
        return numbers

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """The weights into the units, ``[m, d]``, and the contracting ones, ``[m, d_out]``."""
        ups = (Matrix(up.product, up_rows(up), up.product.contracted) for up in self.region.ups)
        return (*ups, *(Matrix(end, _down_rows(end), end.width) for end in self.ends))


def names_of(match: Match, name_of: Callable[[Root], str]) -> tuple[str, ...]:
    """The names of all its weights, and of what they are scaled by."""
    return tuple(dict.fromkeys(name_of(root) for product in match.products for root in product.origin.recipe.roots))


def _down_rows(down: Product) -> Recipe:
    """The weight of a contracting product as ``[m, d_out]``, units in canonical order."""
    order = sorted(range(len(down.x_contract)), key=lambda i: down.x_contract[i])
    return down.rows_contracted(tuple(order))


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
        return self.read if self.product is None else self.product.read


@dataclass(frozen=True, repr=False)
class Detection:
    """All that was found in a graph, in program order, which is ``order``."""

    matches: list[Match]
    rejections: list[Rejection]
    products: list[Product]
    order: dict[Node, int]
    lookups: list[Lookup]
