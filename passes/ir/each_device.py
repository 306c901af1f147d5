"""Runs a function on every device of a mesh by itself, whatever the types of the mesh's axes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def is_explicit(mesh: Any) -> bool:
    """True when some axis of a mesh is explicit."""
    return any(kind == AxisType.Explicit for kind in mesh.axis_types)


def mesh_here(mesh: Any) -> Any:
    """What ``jax.shard_map`` takes for a mesh: the one that is set, else the mesh itself."""
    around = jax.sharding.get_abstract_mesh()
    return mesh if around.empty else around


def under_automatic_axes(run: Callable[..., Any], mesh: Any, results: Any) -> Callable[..., Any]:
    """``run`` with no axis of the mesh explicit inside.

    Args:
      run: a function of arrays.
      mesh: the mesh; if none of its axes is explicit, ``run`` is returned.
      results: the specs that the program expects of what ``run`` returns.
    """
    if not is_explicit(mesh):
        return run
    abstract = mesh.abstract_mesh
    out = jax.tree.map(lambda spec: NamedSharding(abstract, spec), results)

    def typed(*operands: Any) -> Any:
        automatic = jax.sharding.auto_axes(run, axes=mesh.axis_names, out_sharding=out)
        around = jax.sharding.get_abstract_mesh()
        with jax.sharding.use_abstract_mesh(abstract) if around.empty else contextlib.nullcontext():
            return automatic(*operands)

    return typed


def whole_results(run: Callable[..., Any], out: Any) -> Callable[..., Any]:
    """``run`` under automatic axes of the mesh that the type of its first result is on.

    Args:
      run: a function of arrays.
      out: the abstract value that the program expects of the first of what it returns; all else is whole everywhere.
    """
    return under_automatic_axes(run, out.sharding.mesh, (out.sharding.spec, PartitionSpec()))
