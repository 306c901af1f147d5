"""Over how many devices a matrix of weights is cut where it stands in a shard_map."""

from __future__ import annotations

from collections.abc import Sequence

from hire_xform.passes.ir.links import forwards
from hire_xform.passes.weights.origins import Ref, ShardSlice
from hire_xform.passes.weights.recipe import Recipe, Stack


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
            dims, shape = frozenset({ref.dim}), ref.shape
            for step in recipe.steps[own + 1 :]:
                links, shape = step.axes(shape)
                dims = forwards(links, dims)
            if 0 in dims:
                parts *= ref.parts
    return parts
