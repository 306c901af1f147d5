"""Compresses weights once: the packed forms that sites read, and ``Packed``, which stands where the weights stood."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from hire_xform.lowering.xla.promotion import usual_promotion
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.trace_context import concretely
from hire_xform.passes.pack.packers import as_blocks, pack_placed, packed_spec, packer
from hire_xform.passes.plan.decisions import PackKey
from hire_xform.passes.plan.forms import Together
from hire_xform.passes.plan.placement import placement_of
from hire_xform.passes.weights.recipe import Cyclic, Reshape, Root, Stack, Step, Transpose


def pack_array(key: PackKey, leaf: Any, *others: Any, rows: Any = None) -> Any:
    """One packed form: ``[*stack, n, d]`` rows, f32 ``[*stack, n]`` norms, or a predictor's dictionary of arrays.

    Of a leaf that is sharded along the rows, each device packs those it holds, and holds what it packed.

    Args:
      key: which form.
      leaf: the weight.
      *others: the leaves that it is scaled by, where it is stored in few bits.
      rows: its packed rows of the same recipe, where these are there: laying them out again would take a copy.
    """
    sharding = placement_of(leaf) if not compat.is_tracer(leaf) else None
    if sharding is not None:
        return pack_placed(key, leaf, sharding)
    if rows is not None:
        stacks = tuple(step for step in key.recipe.steps if isinstance(step, Stack))
        key, leaf = replace(key, recipe=replace(key.recipe, steps=stacks)), rows
    # Under a trace around the call too: packed forms of concrete weights are remembered, so they must be concrete.
    with usual_promotion() if compat.is_tracer(leaf) else concretely():
        return _packer(key)(leaf, *others, *(array for array, _ in key.form.given))


def together(keys: Sequence[PackKey]) -> PackKey:
    """The key of forms of one weight that are ``alike``: packed, it is a tuple of them."""
    return replace(keys[0], form=Together(tuple(key.form for key in keys)))  # type: ignore[misc]


def _packer(key: PackKey) -> Any:
    scalings = key.recipe.from_roots(lambda root: Root("", 0)).scalings
    return packer(key.recipe.steps, key.form.bare, *((scalings,) if scalings else ()))


def pack_shapes(key: PackKey, leaf: Any, *others: Any, sharding: Sharding | None = None) -> Any:
    """Shapes and dtypes of ``pack_array``'s result, and where it is, of a leaf that is there; computes nothing."""
    arrays = (leaf, *others, *(array for array, _ in key.form.given))
    made = _pack_shapes(_packer(key), tuple((tuple(a.shape), np.dtype(a.dtype)) for a in arrays))
    if sharding is None:
        return made
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, packed_spec(sharding, leaf.shape, key))
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), made)


@functools.lru_cache(maxsize=256)
def _pack_shapes(pack: Any, arrays: tuple[tuple[tuple[int, ...], Any], ...]) -> Any:
    return jax.eval_shape(pack, *(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays))


def unpack_rows(key: PackKey, leaf_shape: Sequence[int], rows: Any, sharding: NamedSharding | None) -> Any:
    """The leaf again, from its packed rows, for recipes that are ``rounding_free``; ``sharding`` is where it was."""
    recipe = key.recipe
    if sharding is not None:
        recipe, rows = as_blocks(key, leaf_shape, rows, sharding)
    return _undo(recipe.steps, tuple(leaf_shape), rows)


def _undo(steps: Sequence[Step], shape: tuple[int, ...], rows: Any) -> Any:
    if not steps:
        return rows
    step, rest = steps[0], steps[1:]
    if isinstance(step, Stack):
        return jax.vmap(lambda r: _undo(rest, shape[1:], r))(rows)
    if isinstance(step, Transpose):
        before = _undo(rest, tuple(shape[p] for p in step.perm), rows)
        return jnp.transpose(before, [int(i) for i in np.argsort(step.perm)])
    if isinstance(step, Reshape):
        return _undo(rest, step.shape, rows).reshape(shape)
    if isinstance(step, Cyclic):
        return step.undo(_undo(rest, shape, rows))
    raise AssertionError(f"{step} can't be undone")


def packing_bytes(keys: Iterable[PackKey], leaf_of: Callable[[Root], Any]) -> int:
    """Bytes read while packing, for progress."""
    leaves = (leaf_of(root) for key in keys for root in key.recipe.roots)
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
