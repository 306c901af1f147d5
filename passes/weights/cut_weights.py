"""Over how many devices a matrix of weights is cut where it stands in a shard_map."""

from __future__ import annotations

from collections.abc import Sequence

from hire_xform.passes.ir.axes import reshaped
from hire_xform.passes.weights.origins import Ref, ShardSlice
from hire_xform.passes.weights.recipe import Recipe, Reshape, Slice, Stack, Step, Transpose


def is_cut(refs: Sequence[Ref]) -> bool:
    """True for a weight of which each device of a shard_map has a part."""
    return any(isinstance(ref, ShardSlice) for ref in refs)


def parts_of_rows(recipe: Recipe, refs: Sequence[Ref]) -> int:
    """Over how many devices the rows of a matrix are cut.

    Args:
      recipe: makes ``[n, d]``, the part of one device.
      refs: what resolves its stack axes.
    """
    stacks = [i for i, step in enumerate(recipe.steps) if isinstance(step, Stack)]
    parts = 1
    for ref in refs:
        if isinstance(ref, ShardSlice):
            # The dimension stands where the spec says once all axes that this shard_map cuts are taken off.
            own = max(
                i
                for i, other in zip(stacks, refs, strict=True)
                if isinstance(other, ShardSlice) and other.scope is ref.scope
            )
            if 0 in _places(recipe.steps[own + 1 :], ref.shape, ref.dim):
                parts *= ref.parts
    return parts


def _places(steps: Sequence[Step], shape: tuple[int, ...], dim: int) -> frozenset[int]:
    """Dimensions that hold any part of dimension ``dim`` after some steps."""
    dims = frozenset({dim})
    for step in steps:
        if isinstance(step, Transpose):
            dims = frozenset(i for i, d in enumerate(step.perm) if d in dims)
            shape = tuple(shape[d] for d in step.perm)
        elif isinstance(step, Reshape):
            dims, shape = reshaped(shape, step.shape, dims), step.shape
        elif isinstance(step, Slice):
            shape = step.shape
        elif isinstance(step, Stack):
            dims, shape = frozenset(d - 1 for d in dims if d), shape[1:]
    return dims
