"""Low-rank updates among the products into hidden units: LoRA's ``x @ w + (x @ a) @ b``."""

from __future__ import annotations

from hire_xform.passes.ir.axis_rules import is_pointwise
from hire_xform.passes.ir.graph import Node, Value
from hire_xform.passes.match.region import Region
from hire_xform.passes.weights.products import Product

# A product into the units that contracts this share of what the widest does, or less, is cheap to read whole.
LOW_RANK = 0.25
# Scales, casts and dropout between the two factors.
MAX_STEPS = 16


def low_rank_updates(region: Region, products: dict[Node, Product]) -> tuple[Product, ...]:
    """The second factors of low-rank updates, ``x @ w + (x @ a) @ b``, among the products into the units.

    Whole they cost little, and what is predicted and proved of the others is so of one matrix.
    """
    widest = max(up.product.contracted for up in region.ups)
    narrow = {up.product: None for up in region.ups if up.product.contracted <= LOW_RANK * widest}
    return tuple(product for product in narrow if _follows_product(product.x, products))


def _follows_product(value: Value, products: dict[Node, Product]) -> bool:
    """Whether a value is made by a weight product, scaled or cast after it."""
    for _ in range(MAX_STEPS):
        node = value.node
        if node is None or node in products:
            return node is not None
        wide = [o for o in node.inputs if isinstance(o, Value) and o.shape == value.shape]
        if not is_pointwise(node) or len(wide) != 1:
            return False
        value = wide[0]
    return False
