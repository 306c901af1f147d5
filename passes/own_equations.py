"""What a certified site falls back to where the original leaves are at hand: the program's own equations.

They get operands in the program's own shapes, so that the compiler makes of them what it makes of them in the dense
program: the same order of sums, and the same values. Packed rows, in another layout, are added up in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_xform.passes import compat
from hire_xform.passes.canonical import flat_result, restored_activation, shaped_activation
from hire_xform.passes.detect import FfnMatch
from hire_xform.passes.environment import PackedView
from hire_xform.passes.layout import from_canonical, to_canonical
from hire_xform.passes.of_chosen import OfAll
from hire_xform.passes.products import Product
from hire_xform.passes.region import replay


def own_product(product: Product, x: Any, leaf: PackedView) -> Any:
    """The product's own equation.

    Args:
      product: the product.
      x: ``[n * T, d]``: the tokens of one example, or of several that a ``vmap`` put together.
      leaf: its weight's.

    Returns:
      ``[n * T, width]`` of the equation's dtype.
    """

    def one(x: Any) -> Any:
        return flat_result(product, _bound(product, shaped_activation(product, x), leaf))

    return _each(one, product.tokens, [x])


def own_block(match: FfnMatch, xs: Sequence[Any], sides: Sequence[Any], leaves: Sequence[PackedView]) -> Any:
    """A feed-forward block with its products' own equations.

    Args:
      match: the block.
      xs: ``[n * T, d]`` for each product into the units.
      sides: side inputs in canonical form, for ``n * T`` tokens.
      leaves: of ``match.products``.

    Returns:
      ``[n * T, d_out]``.
    """
    region, tokens = match.region, match.tokens
    leaf_of = dict(zip(match.products, leaves, strict=True))

    def one(*given: Any) -> Any:
        made: dict[Any, Any] = {}
        hiddens = []
        for up, x in zip(region.ups, given, strict=False):
            # Two parts of one product, as a gate and what it gates may be, are made once.
            key = up.product, tuple(up.layout[d] for d in up.product.out_x_dims)
            if key not in made:
                made[key] = _bound(up.product, restored_activation(up.product, x, up.layout), leaf_of[up.product])
            hidden = to_canonical(made[key], up.layout, tokens, match.units)
            hiddens.append(jnp.broadcast_to(hidden, (tokens, match.units)))
        values = replay(region, hiddens, given[len(region.ups) :], lambda v: v, jax.nn.relu, OfAll())
        return flat_result(match.down, _bound(match.down, from_canonical(values, match.layout), leaf_of[match.down]))

    return _each(one, tokens, [*xs, *sides])


def _bound(product: Product, x: Any, leaf: PackedView) -> Any:
    weight = leaf.matrix()
    with compat.equation_context(product.node.eqn):
        return compat.bind(product.node.eqn, [weight, x] if product.weight_left else [x, weight])[0]


def _each(fun: Callable[..., Any], tokens: int, operands: Sequence[Any]) -> Any:
    """``fun`` of ``tokens`` tokens, of each example by ``vmap`` where there are several: as the program was batched."""
    count = operands[0].shape[0] // tokens
    if count == 1:
        return fun(*operands)
    own = [jnp.ndim(o) == 2 and o.shape[0] == count * tokens for o in operands]
    given = [o.reshape(count, tokens, o.shape[1]) if each else o for o, each in zip(operands, own, strict=True)]
    out = jax.vmap(fun, in_axes=tuple(0 if each else None for each in own))(*given)
    return out.reshape(count * tokens, out.shape[2])
