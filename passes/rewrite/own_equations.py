"""What a certified site falls back to where the original leaves are at hand: the program's own equations.

They get operands in the program's own shapes, so that the compiler makes of them what it makes of them in the dense
program: the same order of sums, and the same values. Packed rows, in another layout, are added up in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.equation_contexts import equation_context
from hire_xform.passes.match.equations import equations_between
from hire_xform.passes.match.matches import FfnMatch
from hire_xform.passes.rewrite.canonical import flat_result, restored_activation, restored_side, shaped_activation
from hire_xform.passes.rewrite.environment import Env, PackedView, read
from hire_xform.passes.weights.products import Product


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
    """A feed-forward block as the program has it, equation by equation.

    Args:
      match: the block, which has ``equations_between``.
      xs: ``[n * T, d]`` for each product into the units.
      sides: side inputs in canonical form, for ``n * T`` tokens.
      leaves: of ``match.products``.

    Returns:
      ``[n * T, d_out]``.
    """
    region, tokens = match.region, match.tokens
    nodes, leaf_of = equations_between(match), dict(zip(match.products, leaves, strict=True))
    assert nodes is not None

    def one(*given: Any) -> Any:
        env: Env = {
            side.value: restored_side(value, side.layout, tokens, match.units)
            for side, value in zip(region.sides, given[len(region.ups) :], strict=True)
        }
        for up, x in zip(region.ups, given, strict=False):
            if up.product.out not in env:
                own = restored_activation(up.product, x, up.layout, tokens)
                env[up.product.out] = _bound(up.product, own, leaf_of[up.product])
        for node in nodes:
            with equation_context(node.eqn):
                results = compat.bind(node.eqn, [read(env, o) for o in node.inputs])
            env.update(zip(node.outputs, results, strict=True))
        made = [flat_result(end, _bound(end, env[match.hidden], leaf_of[end])) for end in match.ends]
        return made[0] if len(made) == 1 else jnp.concatenate(made, axis=1)

    return _each(one, tokens, [*xs, *sides])


def _bound(product: Product, x: Any, leaf: PackedView) -> Any:
    weight = leaf.matrix()
    with equation_context(product.node.eqn):
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
