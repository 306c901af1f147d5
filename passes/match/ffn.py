"""Whether a weight product ends a feed-forward block, and why what looks like one is none."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax.extend.core import primitives as prims

from hire_xform.passes.ir.axes import row_major, whole
from hire_xform.passes.ir.graph import Frame, Node, Value, nodes_in
from hire_xform.passes.ir.pointwise import STEPS
from hire_xform.passes.ir.source_lines import source_line
from hire_xform.passes.match.block_region import trace_region
from hire_xform.passes.match.ends import ends_before_products
from hire_xform.passes.match.matches import FfnMatch
from hire_xform.passes.match.output_axis import follow
from hire_xform.passes.match.probe import Probe
from hire_xform.passes.match.region import Apply, Region, Unfollowed, Up
from hire_xform.passes.match.vocab import (
    BATCHED,
    Nearly,
    is_wide,
    not_vocabulary,
    whole_width,
)
from hire_xform.passes.weights.products import Product


def ffn_ending_in(
    down: Product, by_node: dict[Node, Product], taken: set[Product], probe: Probe
) -> FfnMatch | Nearly | Unfollowed:
    """The block that ends in ``down``, what is nearly one, or why nothing points to one."""
    if down in taken:
        return Unfollowed("it belongs to another block")
    if not down.width or not down.contracted or not down.tokens:
        return Unfollowed("it is empty")
    hidden = down.x
    if down.w_batch:
        return Nearly(down, BATCHED)
    if (end := ends_before_products(down, by_node)) is not None:
        return end
    layout: list = [None] * len(hidden.shape)
    for dims, space in ((down.x_free, "t"), (sorted(down.x_contract), "h")):
        sizes = [hidden.shape[d] for d in dims]
        for d, atom in zip(dims, row_major(space, sizes), strict=True):
            layout[d] = whole([atom], hidden.shape[d])
    region = trace_region(down, tuple(layout), by_node, probe)
    if isinstance(region, Unfollowed):
        return region
    linear = is_linear(region)
    ends = [down] if linear else _contracting_alike(down, by_node, taken)
    leaked = leak(region, hidden, ends) or next(filter(None, (lost_derivative(region, end) for end in ends)), None)
    if linear:
        if leaked is not None:
            return Unfollowed(f"it follows other products through sums only, as on a residual stream, and {leaked}")
        if _factored(region, down):
            how = "nothing nonlinear lies between it and the product it follows: one matrix in two factors"
            return Nearly(down, how)
    ups = tuple(up.product for up in region.ups)
    if leaked is not None:
        leaked += f"; nor is that the model's own choice of units: {region.mixing}" if region.mixing else ""
        return Nearly(down, leaked, ups, not jnp.issubdtype(hidden.aval.dtype, jnp.floating))
    blocked = next((up.product for up in region.ups if up.product in taken), None)
    if blocked is not None:
        return Nearly(down, f"the product it follows, {blocked.path}, already belongs to another block", ups)
    last = max(ends, key=lambda end: end.width)
    beside = tuple(end for end in ends if end is not last)
    return FfnMatch(last, hidden, tuple(layout), region, last.tokens, region.units, beside)


def _contracting_alike(down: Product, by_node: dict[Node, Product], taken: set[Product]) -> list[Product]:
    """All products that contract the same units as ``down`` in the same way: with a low-rank update there are two."""

    def alike(other: Product) -> bool:
        same = other.x is down.x and sorted(other.x_contract) == sorted(down.x_contract) and other.x_free == down.x_free
        placed = other.node.scope is down.node.scope and other.out.aval.dtype == down.out.aval.dtype
        return same and placed and not other.w_batch and bool(other.width) and other not in taken

    readers = (by_node[node] for node in dict.fromkeys(down.x.consumers) if node in by_node)
    return [other for other in readers if other is down or alike(other)]


def leak(region: Region, hidden: Value, ends: Sequence[Product]) -> str | None:
    """Why the hidden units can't be left out: something besides the block reads them."""
    own = {end.node for end in ends}
    quantised = not jnp.issubdtype(hidden.aval.dtype, jnp.floating)
    for value in sorted(region.inner, key=lambda v: v.node.path if v.node else ""):
        for node in value.consumers:
            if node not in region.nodes and node not in own:
                if quantised:
                    return (
                        f"what it contracts is quantised at run time to {hidden.aval.dtype}, and {node.primitive} at "
                        f"{node.source} reads all units for the scale"
                    )
                return (
                    f"what it contracts is also read by {node.primitive} at {node.source}"
                    if value is hidden
                    else f"an activation on the way to it is also read by {node.primitive} at {node.source}"
                )
        if value.is_output:
            return "what it contracts is also returned, so every unit of it is needed"
    return None


def lost_derivative(region: Region, down: Product) -> str | None:
    """Why a block that a custom_vjp stands in the middle of stays: the rewrite would drop the derivative it states."""
    around = set(down.node.frame.ancestors())
    for frame in down.node.frame.ancestors():
        outside = any(frame not in node.frame.ancestors() for node in region.nodes)
        if outside and frame.kind == "custom" and not _keeps_derivative(frame):
            return _partly_inside(frame)
    for node in sorted(region.nodes, key=lambda n: n.path):
        for frame in node.frame.ancestors():
            if frame in around:
                break
            if frame.kind == "custom" and not _keeps_derivative(frame):
                return _partly_inside(frame)
    return None


def _partly_inside(frame: Frame) -> str:
    return (
        f"part of the block is inside the {frame.eqn.primitive} at {source_line(frame.eqn)}, whose own "
        "derivative would be lost; put the whole block inside it, or none"
    )


def _keeps_derivative(frame: Frame) -> bool:
    """True when the derivative of a custom call's body, which a replay has, is as good as the one it states.

    A stated derivative makes ReLU's zero at zero and softplus's finite far out; those are kept. One stated for a body
    that has none (a sign, a rounding) or that changes nothing means something else, and would be lost.
    """
    if frame.eqn.primitive is prims.custom_vjp_call_p:
        return False
    inside = nodes_in(frame)
    return bool(inside) and not any(n.primitive in STEPS for n in inside)


def is_linear(region: Region) -> bool:
    """True when the activation is a weighted sum of the products into the units, with no function of them between."""
    if region.own is not None:
        return False
    depends: list[bool] = []
    for e in region.exprs:
        if not isinstance(e, Apply):
            depends.append(isinstance(e, Up))
            continue
        hidden = [depends[o] for o in e.operands]
        p = e.node.primitive
        scaled = hidden.count(True) == 1 and (p is prims.mul_p or (p is prims.div_p and hidden[0]))
        if p not in _SUMS and not scaled:
            return False
        depends.append(True)
    return True


_SUMS = frozenset({prims.add_p, prims.sub_p, prims.neg_p, prims.convert_element_type_p, prims.copy_p})


def _factored(region: Region, down: Product) -> bool:
    """True when the two products of a linear region are one matrix in two factors.

    The projection of a narrower embedding before the vocabulary is that, and a low-rank update: the units between are
    no more than the inputs, or the second factor makes a vocabulary. Every unit is needed, and what follows the second
    factor decides what it is.
    """
    if all(whole_width(up.product) <= up.product.contracted for up in region.ups):
        return True
    return is_wide(down) and not_vocabulary(down, follow(down, narrow=False), {}) is None
