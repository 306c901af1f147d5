"""Brings a site's operands and result between the shapes of the user's equations and the subgraphs' ``[T, n]``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from hire_xform.passes.ir.axes import Layout, from_canonical, row_major, to_canonical, whole
from hire_xform.passes.match.region import Up
from hire_xform.passes.weights.products import Product


def canonical_side(value: Any, layout: Layout, tokens: int, units: int) -> Any:
    """A side input as ``[T or 1, m or 1]``; a scalar stays one."""
    return value if jnp.ndim(value) == 0 else to_canonical(value, layout, tokens, units)


def flat_activation(product: Product, x: Any) -> Any:
    """A product's activation as ``[T, d]``, columns in the order of the weight's contracted dimensions."""
    perm = (*product.x_free, *product.x_contract)
    return jnp.transpose(x, perm).reshape(product.tokens, product.contracted)


def canonical_activation(product: Product, x: Any, layout: Layout, tokens: int) -> Any:
    """A product's activation as ``[T, d]``, tokens in the order of the block's contracting product.

    Args:
      product: a product into the hidden units.
      x: its activation.
      layout: layout of the product's result.
      tokens: T of the block.
    """
    canonical = to_canonical(x, _activation_layout(product, layout), tokens, product.contracted)
    return jnp.broadcast_to(canonical, (tokens, product.contracted))


def _activation_layout(product: Product, layout: Layout) -> Layout:
    """The layout of a product's activation, what it contracts as hidden digits, given that of its result."""
    dims: list[Any] = [None] * len(product.x.shape)
    outs = (*range(len(product.x_batch)), *product.out_x_dims)
    for d, out in zip((*product.x_batch, *product.x_free), outs, strict=True):
        dims[d] = layout[out]
    sizes = [product.x.shape[d] for d in product.x_contract]
    for d, atom in zip(product.x_contract, row_major("h", sizes), strict=True):
        dims[d] = whole([atom], product.x.shape[d])
    return tuple(dims)


def restored_activation(product: Product, x: Any, layout: Layout, tokens: int) -> Any:
    """A product's activation in its own shape, from what ``canonical_activation`` made."""
    return from_canonical(x, _activation_layout(product, layout), tokens, product.contracted)


def restored_side(value: Any, layout: Layout, tokens: int, units: int) -> Any:
    """A side input in its own shape, from what ``canonical_side`` made; its layout is full."""
    return value if jnp.ndim(value) == 0 else from_canonical(value, layout, tokens, units)


def shaped_activation(product: Product, x: Any) -> Any:
    """The inverse of ``flat_activation``."""
    dims = (*product.x_free, *product.x_contract)
    return jnp.transpose(x.reshape([product.x.shape[d] for d in dims]), [dims.index(d) for d in range(len(dims))])


def flat_result(product: Product, result: Any) -> Any:
    """The inverse of ``result_shape``."""
    perm = (*product.out_x_dims, *product.out_w_dims)
    return jnp.transpose(result, perm).reshape(product.tokens, product.width)


def result_shape(product: Product, flat: Any) -> Any:
    """``[T, width]`` as the product's result: its token and weight dimensions, in their order."""
    x_shape = [product.x.shape[d] for d in product.x_free]
    w_shape = [product.weight.shape[d] for d in product.w_free]
    shaped = flat.reshape(*x_shape, *w_shape)
    if product.weight_left:
        lead = range(len(x_shape), len(x_shape) + len(w_shape))
        shaped = jnp.transpose(shaped, (*lead, *range(len(x_shape))))
    return shaped


def results_of(ends: Sequence[Product], flat: Any) -> Any:
    """``[T, widths]`` as the results of some products side by side: of one its result, of several all of them."""
    if len(ends) == 1:
        return result_shape(ends[0], flat)
    starts = itertools.accumulate(end.width for end in ends[:-1])
    parts = jnp.split(flat, list(starts), axis=1)
    return tuple(map(result_shape, ends, parts))


def dense_up(up: Up, x: Any, rows: Any) -> Any:
    """The product into the hidden units of ``[T, d]`` with its packed rows, as the region is given it."""
    return dense_product(up.product, x, rows, dtype=up.dtype)


def dense_product(product: Product, x: Any, rows: Any, contracted_first: bool = False, dtype: Any = None) -> Any:
    """The product of ``[T, d]`` with its packed rows as the program has it, but for the layout.

    ``dtype``: of the result, where it is not the product's.
    """
    params = product.node.params
    found = lax.dot_general(
        x,
        rows.astype(product.weight.aval.dtype),
        (((1,), (0 if contracted_first else 1,)), ((), ())),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"] if dtype is None else dtype,
    )
    return found.astype(product.out.aval.dtype if dtype is None else dtype)


def product_key(product: Product) -> Any:
    """Hashable; equal for two products that are computed alike."""
    dtypes = tuple(str(v.aval.dtype) for v in (product.x, product.weight, product.out))
    dims = (product.x_contract, product.w_contract, product.x_free, product.w_free, product.weight_left)
    return product.x.shape, product.weight.shape, dtypes, dims
