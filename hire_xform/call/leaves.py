"""The leaves of a call that are arrays: which are, their abstract values, and where they lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.each_device import is_explicit
from hire_xform.passes.plan.machine import device_kind
from hire_xform.passes.plan.placement import device_of, kind_of_device, placement_of, platform_of

# What jax.jit traces; any other leaf (a function, a string, a dtype) is static.
ARRAY_TYPES = (jax.Array, np.ndarray, np.generic, bool, int, float, complex, jax.ShapeDtypeStruct)


@dataclass(frozen=True)
class PlacedAval:
    """A leaf that a ``Packed`` stands for: its abstract value, and where it was."""

    aval: Any
    sharding: Any


def is_array(leaf: Any) -> bool:
    """True for a leaf that jax.jit would trace."""
    return isinstance(leaf, (*ARRAY_TYPES, jax.core.ShapedArray, PlacedAval))


def aval_of(leaf: Any) -> Any:
    """The abstract value of an array leaf; of shardings only those that are part of its type."""
    if isinstance(leaf, PlacedAval):
        return leaf.aval
    aval = _aval_of_struct(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    aval = aval if isinstance(aval, jax.core.ShapedArray) else jax.typeof(leaf)
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    if mesh is None or mesh.empty or is_explicit(mesh) or getattr(mesh, "manual_axes", ()):
        return aval
    return jax.core.ShapedArray(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _aval_of_struct(leaf: jax.ShapeDtypeStruct) -> Any:
    weak_type = getattr(leaf, "weak_type", False)
    placed = placement_of(leaf)
    if placed is None or not is_explicit(placed.mesh):
        return jax.core.ShapedArray(leaf.shape, leaf.dtype, weak_type=weak_type)
    entries = (*placed.spec, *[None] * len(leaf.shape))[: len(leaf.shape)]
    sharding = NamedSharding(placed.mesh.abstract_mesh, PartitionSpec(*entries))
    return jax.core.ShapedArray(leaf.shape, leaf.dtype, weak_type=weak_type, sharding=sharding)


def placed_at(leaf: Any) -> Any:
    """Where a leaf is, if that is known and over several devices."""
    return None if compat.is_tracer(leaf) else placement_of(leaf)


def stated_sharding(leaf: Any) -> Any:
    """Where a leaf is bound to be: over several devices, or on the one it was committed to."""
    return None if compat.is_tracer(leaf) else placement_of(leaf) or device_of(leaf)


def kind_elsewhere(shardings: Iterable[Any]) -> str | None:
    """The kind of the accelerator that some shardings name, if it is none that is here."""
    named = (s for s in shardings if s is not None)
    found = next(((p, kind_of_device(s)) for s in named if (p := platform_of(s)) not in (None, "cpu")), None)
    return None if found is None or found[1] == device_kind(str(found[0])) else found[1]


def platform_in(shardings: Iterable[Any]) -> str | None:
    """The platform that some shardings name; None where none does."""
    return next((p for s in shardings if s is not None and (p := platform_of(s)) is not None), None)
