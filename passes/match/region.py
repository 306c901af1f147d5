"""The pointwise region between the products of a feed-forward block: found backwards, replayed on chosen units.

Starting from the activation that a weight product contracts, the hidden axis is followed backwards through pointwise
and moving equations to the weight products that make it. What is met on the way becomes a small expression over
canonical ``[T, K]`` arrays, which the rewriter evaluates twice: on all units with predicted products, and on the chosen
units with exact ones. ``passes/match/block_region.py`` finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as prims

from hire_xform.lowering.primitives.ranks import over_groups
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.axes import Layout
from hire_xform.passes.ir.debugging import type_text
from hire_xform.passes.ir.equation_contexts import equation_context
from hire_xform.passes.ir.graph import Node, Value
from hire_xform.passes.ir.pointwise import known_number, literal_number
from hire_xform.passes.weights.origins import shape_of
from hire_xform.passes.weights.products import Product


@dataclass(frozen=True, eq=False, repr=False)
class Up:
    """A weight product whose outputs, restricted to ``layout``, are the hidden units."""

    product: Product
    layout: Layout

    def __str__(self) -> str:
        """For whoever develops the pass."""
        return f"product {self.product.path}"

    @property
    def dtype(self) -> Any:
        """dtype of its values as the region is given them: f32 where they are not rounded to the product's."""
        return jnp.dtype(jnp.float32) if self.product.unrounded else self.product.out.aval.dtype


@dataclass(frozen=True, eq=False, repr=False)
class Side:
    """A value that does not depend on the hidden units: a bias, a scale, a mask."""

    value: Value
    layout: Layout

    def __str__(self) -> str:
        """Likewise."""
        return f"from outside {type_text(self.value.aval)}"


@dataclass(frozen=True, eq=False)
class Number:
    """A scalar literal."""

    operand: Any

    def __str__(self) -> str:
        """Likewise."""
        return f"number {self.operand.val}"


@dataclass(frozen=True, eq=False, repr=False)
class Apply:
    """A pointwise equation on earlier expressions, given by their numbers."""

    node: Node
    operands: tuple[int, ...]

    def __str__(self) -> str:
        """Likewise."""
        return f"{self.node.primitive} {', '.join(map(str, self.operands))}  ({self.node.path})"


@dataclass(frozen=True)
class Grouped:
    """The sum (or the largest) of an expression over a group of ``size`` neighbouring units: the same for all of them.

    It is exact on chosen units as on all, as long as whole groups are chosen.
    """

    operand: int
    size: int
    largest: bool


@dataclass(frozen=True)
class Kth:
    """The ``rank``-th largest of an expression over the units of a token: the same for all of them."""

    operand: int
    rank: int


@dataclass(frozen=True)
class Kept:
    """Whether a unit's value of an expression is among the ``k`` largest of its token."""

    operand: int
    k: int


@dataclass(frozen=True)
class Place:
    """An expression (None: a number) where ``kept``, zero elsewhere."""

    kept: int
    update: int | None
    number: float
    dtype: Any


@dataclass(frozen=True)
class Total:
    """The sum of an expression over all units of a token: a polynomial of at most second degree in one product."""

    operand: int
    dtype: Any


Expr = Up | Side | Number | Apply | Grouped | Kth | Kept | Place | Total


@dataclass(frozen=True)
class OwnSparsity:
    """The model's own choice of units, an explicit top-k or a threshold at mean and deviation.

    Attributes:
      score: the number of the expression whose largest values are kept.
      share: the share of the units that are kept; of a threshold, for normally distributed units; None where it hangs
        on data: a multiplier that is an argument or a weight, or a distance from the k-th largest.
      name: for reports: "top 512" or "units above mean + 1.64 deviations".
      totalled: numbers of the expressions (products) whose mean and variance are read.
      group: neighbouring units that the model keeps or leaves out together.
    """

    score: int
    share: float | None
    name: str
    totalled: tuple[int, ...]
    group: int = 1


@dataclass(frozen=True, repr=False)
class Unfollowed:
    """Why the way back from what a product contracts leads to no region.

    Attributes:
      reason: a clause.
      node: the equation at which the way ends, where it is one.
    """

    reason: str
    node: Node | None = None

    def __str__(self) -> str:
        """The reason with the equation's source line, which takes long to find: it is told of few products."""
        return self.reason if self.node is None else f"{self.reason} ({self.node.primitive} at {self.node.source})"


@dataclass(eq=False, repr=False)
class Region:
    """The region as a list of expressions, operands before their users.

    Attributes:
      units: number of hidden units.
      exprs: the expressions.
      root: the number of the expression that is the activation.
      inner: values inside the region that depend on its products, all equations that make them included.
      nodes: the equations of the region.
      varies: for each expression, whether it differs from unit to unit of a token.
      zeroing: True when units of it are exactly zero over a range that many ordinary inputs are in (ReLU and its kin),
        or the model itself leaves them out.
      zero_share: the share of ordinary inputs that leave a zero; None where none does, or the model itself chooses.
      untried: why ``zero_share`` is not known, its trial having failed; empty where it has not.
      own: the model's own choice of units, when there is one.
      updates: products into the units that are low-rank updates of others: they are read whole, and come from outside.
      mixing: why what mixes the units is not followed as the model's own choice; empty where nothing does or it is.
    """

    units: int
    exprs: list[Expr] = field(default_factory=list)
    varies: list[bool] = field(default_factory=list)
    root: int = 0
    inner: set[Value] = field(default_factory=set)
    nodes: set[Node] = field(default_factory=set)
    zeroing: bool = False
    zero_share: float | None = None
    untried: str = ""
    own: OwnSparsity | None = None
    updates: tuple[Product, ...] = ()
    mixing: str = ""

    @property
    def ups(self) -> list[Up]:
        """The products into the hidden units, in the order of their expressions."""
        return [e for e in self.exprs if isinstance(e, Up)]

    @property
    def sides(self) -> list[Side]:
        """Values that come from outside."""
        return [e for e in self.exprs if isinstance(e, Side)]

    @property
    def scored(self) -> list[bool]:
        """For each of ``ups``, whether the score of a unit hangs on it, so that it has to be predicted."""
        wanted = needed(self.exprs, self.root if self.own is None else self.own.score)
        return [i in wanted for i, e in enumerate(self.exprs) if isinstance(e, Up)]

    @property
    def totalled(self) -> list[bool]:
        """For each of ``ups``, whether its mean and variance over all units are read."""
        wanted = () if self.own is None else self.own.totalled
        return [i in wanted for i, e in enumerate(self.exprs) if isinstance(e, Up)]

    def signature(self) -> Any:
        """Equal for two regions that compute the same function; hashable."""
        found: list[Any] = []
        for e in self.exprs:
            if isinstance(e, Number):
                number = np.asarray(e.operand.val)
                found.append((str(number.dtype), number.tobytes()))
            elif isinstance(e, Apply):
                found.append((e.node.primitive, hashable(e.node.params), e.operands, _is_relu(e, self)))
            elif isinstance(e, (Grouped, Kth, Kept, Place, Total)):
                found.append((type(e), e))
            else:
                found.append(type(e))
        return tuple(found), self.root, self.own

    @property
    def activation(self) -> str:
        """The pointwise operations, for reports: ``max``, ``logistic, mul``."""
        skip = (prims.convert_element_type_p, prims.name_p, prims.copy_p)
        names = [str(e.node.primitive) for e in self.exprs if isinstance(e, Apply) and e.node.primitive not in skip]
        return ", ".join(dict.fromkeys(names)) or "none"


def hashable(params: dict[str, Any]) -> Any:
    """An equation's parameters as a key; only identical ones compare equal where they can't be hashed."""
    items = tuple(sorted(params.items(), key=lambda item: item[0]))
    try:
        hash(items)
    except TypeError:
        return id(params)
    return items


class Statistics(Protocol):
    """What the model's own choice of units takes from all units of a token; each result is ``[T, K]`` or ``[T, 1]``."""

    def kth(self, values: Any, rank: int) -> Any:
        """The ``rank``-th largest of ``values [T, K]``."""

    def kept(self, values: Any, k: int) -> Any:
        """Whether each of ``values [T, K]`` is among its token's ``k`` largest, bool."""

    def total(self, region: Region, operand: int, values: Sequence[Any]) -> Any:
        """The sum of expression ``operand`` over all units, given the values of the expressions before it."""


def needed(exprs: Sequence[Expr], root: int) -> set[int]:
    """The expressions that expression ``root`` is computed from, itself included."""
    found: set[int] = set()
    queue = [root]
    while queue:
        number = queue.pop()
        if number in found:
            continue
        found.add(number)
        expr = exprs[number]
        if isinstance(expr, Apply):
            queue += expr.operands
        elif isinstance(expr, Place):
            queue += [expr.kept] if expr.update is None else [expr.kept, expr.update]
        elif isinstance(expr, (Grouped, Kth, Kept, Total)):
            queue.append(expr.operand)
    return found


def replay(
    region: Region,
    hiddens: Sequence[Any],
    sides: Sequence[Any],
    gather: Callable[[Any], Any],
    relu: Callable[[Any], Any],
    statistics: Statistics,
    root: int | None = None,
) -> Any:
    """Evaluates the region on some of the hidden units.

    Args:
      region: the region.
      hiddens: ``[T, K]`` for each of ``region.ups``; None for those that ``root`` does not hang on.
      sides: for each of ``region.sides`` its canonical array: ``[T or 1, m or 1]``, or a scalar.
      gather: brings ``[T or 1, m]`` to the same K units.
      relu: stands for ``max(u, 0)``, so that its derivative at zero is the activation's.
      statistics: the model's own choice of units.
      root: the number of the expression wanted; None is the region's activation.

    Returns:
      ``[T, K]``.
    """
    root = region.root if root is None else root
    shape = next(h.shape for h in hiddens if h is not None)
    wanted = needed(region.exprs, root)
    values: list[Any] = []
    ups, others = iter(hiddens), iter(sides)
    for number, expr in enumerate(region.exprs):
        hidden: Any = next(ups) if isinstance(expr, Up) else None
        side: Any = next(others) if isinstance(expr, Side) else None
        if number not in wanted:
            values.append(None)
        elif isinstance(expr, Up):
            values.append(hidden)
        elif isinstance(expr, Side):
            if jnp.ndim(side) == 2 and side.shape[1] > 1:
                side = gather(side)
            values.append(jnp.broadcast_to(side, shape) if jnp.ndim(side) else side)
        elif isinstance(expr, Number):
            values.append(expr.operand.val)
        elif isinstance(expr, Grouped):
            values.append(over_groups(values[expr.operand], expr.size, expr.largest))
        elif isinstance(expr, Kth):
            values.append(jnp.broadcast_to(statistics.kth(values[expr.operand], expr.rank), shape))
        elif isinstance(expr, Kept):
            values.append(statistics.kept(values[expr.operand], expr.k))
        elif isinstance(expr, Place):
            update = expr.number if expr.update is None else values[expr.update]
            values.append(jnp.where(values[expr.kept], jnp.asarray(update, expr.dtype), jnp.zeros((), expr.dtype)))
        elif isinstance(expr, Total):
            total = statistics.total(region, expr.operand, values)
            values.append(jnp.broadcast_to(jnp.asarray(total, expr.dtype), shape))
        else:
            values.append(_apply(region, expr, values, shape, relu))
    return values[root]


def _apply(region: Region, expr: Apply, values: Sequence[Any], shape: Any, relu: Callable[[Any], Any]) -> Any:
    # What was stretched to a shape by an equation left out here (a literal zero of a `where`) is so again.
    operands = [
        jnp.broadcast_to(values[o], shape) if shape_of(read) and not jnp.ndim(values[o]) else values[o]
        for o, read in zip(expr.operands, expr.node.inputs, strict=True)
    ]
    with equation_context(expr.node.eqn):
        if _is_relu(expr, region):
            return relu(operands[0])
        return compat.bind(expr.node.eqn, operands)[0]


def is_zero(expr: Expr) -> bool:
    """True for a literal zero, or one that a shard_map marks as varying."""
    if isinstance(expr, Side):
        return known_number(expr.value) == 0.0
    return isinstance(expr, Number) and literal_number(expr.operand) == 0.0


def _is_relu(expr: Apply, region: Region) -> bool:
    second = region.exprs[expr.operands[-1]]
    return (
        expr.node.primitive is prims.max_p
        and expr.node.frame.kind in ("jit", "custom")
        and is_zero(second)
        and any(frame.kind == "custom" for frame in expr.node.frame.ancestors())
    )
