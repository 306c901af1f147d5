"""Notices weights that a function changes in place, as Flax NNX modules do: under ``jax.jit`` such changes are lost."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from hire_xform.call.signature import Signature
from hire_xform.errors import HireWarning
from hire_xform.passes.ir.graph import Value, walk
from hire_xform.passes.weights.provenance import Provenance
from hire_xform.passes.weights.recipe import Root


def weight_leaves(signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[tuple[Any, ...], Any]:
    """The leaves of weights arguments by their paths in ``(args, kwargs)``."""
    mine = (
        [arg if signature.weight_key(i) is not None else None for i, arg in enumerate(args)],
        {name: arg for name, arg in kwargs.items() if signature.weight_key(name) is not None},
    )
    return {tuple(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(mine)}


def changed_weights(
    before: Mapping[tuple[Any, ...], Any], after: Mapping[tuple[Any, ...], Any], results: Sequence[Any]
) -> dict[tuple[Any, ...], Any]:
    """Leaves that are other arrays than before and that the function does not return.

    Args:
      before: leaves as the function was given them, by path.
      after: leaves after the function has run.
      results: the leaves of its result.
    """
    returned = set(map(id, results))
    return {
        path: leaf
        for path, leaf in after.items()
        if path in before and leaf is not before[path] and isinstance(leaf, jax.Array) and id(leaf) not in returned
    }


def warn_if_lost(
    signature: Signature, jaxpr: Any, roots: Sequence[Root | None], paths: Sequence[tuple[Any, ...]]
) -> None:
    """Warns about the changes that hold data, such as a cache's; others (a count of random numbers) are not missed.

    Args:
      signature: names the arguments.
      jaxpr: the program; its last results are the changed leaves.
      roots: for each input, the root it is as a weight, or None.
      paths: the paths of the changed leaves.
    """
    graph = walk(jaxpr)
    provenance = Provenance(graph, roots)
    values = graph.top.outputs[len(graph.top.outputs) - len(paths) :]

    looped = {result: node for node in graph.program_order() if node.children for result in node.outputs}

    def holds_data(value: Any) -> bool:
        if not isinstance(value, Value) or value.const is not None:
            return False
        if value not in looped:
            return provenance.origin(value) is None and provenance.derived(value) is None
        number = looped[value].outputs.index(value)
        return any(holds_data(body.outputs[number]) for body in looped[value].children)

    lost = [path for path, value in zip(paths, values, strict=True) if holds_data(value)]
    if not lost:
        return
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    warnings.warn(
        f"{signature.name_of(lost[0])}{more} changed in place but not returned: as under jax.jit, the "
        "change is lost. Return what changed, or keep it in an argument of its own (nnx.split, nnx.merge)",
        HireWarning,
        stacklevel=2,
    )
