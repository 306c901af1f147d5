"""How a weight's placement over devices carries over to the rows that a site reads, and what a site does with it.

A site whose weights are sharded along its hidden units, or its vocabulary, runs on every device for the rows that the
device holds: it predicts, picks its share (DA-TOP-k) and computes its own. A block then adds the devices' parts up, as
the dense form does; logits stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from hire_xform.lowering.xla.devices import Devices
from hire_xform.passes.ir.each_device import is_explicit
from hire_xform.passes.ir.links import How, Link
from hire_xform.passes.match.matches import Match
from hire_xform.passes.weights.recipe import Recipe, Reshape, Root, Stack, Step

# Mesh axes, outermost first.
Names = tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """Where a site runs.

    Attributes:
      mesh: the mesh of its weights.
      rows: mesh axes that its hidden units, or its vocabulary, are split over; none where it is whole everywhere.
      tokens: mesh axes that its tokens are split over.
    """

    mesh: Any
    rows: Names
    tokens: Names

    @property
    def shards(self) -> int:
        """Over how many devices the rows are split."""
        return self.size(self.rows)

    def size(self, names: Names) -> int:
        """Devices along some axes."""
        return math.prod(self.mesh.shape[name] for name in names)

    @property
    def devices(self) -> Devices:
        """Those that its rows are split over."""
        return Devices(self.rows, self.shards)

    @property
    def explicit(self) -> bool:
        """True when the mesh has axes whose shardings are part of types."""
        return is_explicit(self.mesh)

    def __str__(self) -> str:
        """For reports: the devices that have a share each, of the rows, or where those are whole of the tokens."""
        names = self.rows if self.shards > 1 else self.tokens
        count = self.size(names)
        return f"{count} devices along {'*'.join(names)!r}" if count > 1 else "the devices"


@dataclass(frozen=True)
class CutRows:
    """Why a match stays dense whose weight is sharded along the axis that it contracts.

    Attributes:
      parts: how many each row is cut into.
      reason: why.
    """

    parts: int
    reason: str


def as_automatic(mesh: Any) -> Mesh:
    """The same devices with automatic axes."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def names_of(entry: Any) -> Names:
    """The mesh axes of one entry of a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def placement_of(array: Any) -> NamedSharding | None:
    """The sharding of an array, or of a ``ShapeDtypeStruct`` that states one, when it is over several devices."""
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size < 2:
        return None
    return sharding


def device_of(array: Any) -> SingleDeviceSharding | None:
    """The one device that an array is committed to, or that a ``ShapeDtypeStruct`` states; None where nothing does."""
    devices = _devices(getattr(array, "sharding", None)) if getattr(array, "committed", True) else ()
    return SingleDeviceSharding(devices[0]) if len(devices) == 1 else None


def platform_of(sharding: Any) -> str | None:
    """The platform of a sharding's devices: "cpu", "gpu" or "tpu"; None where it names no devices."""
    devices = _devices(sharding)
    return platform_named(devices[0].platform) if devices else None


def kind_of_device(sharding: Any) -> str | None:
    """What JAX calls the kind of a sharding's devices; None where it names no devices."""
    devices = _devices(sharding)
    return str(devices[0].device_kind) if devices else None


def platform_named(name: str) -> str:
    """A platform's name as the planner knows it: one for all kinds of GPU."""
    return "gpu" if name in ("gpu", "cuda", "rocm") else name


def _devices(sharding: Any) -> Sequence[Any]:
    """A sharding's devices; none of what is not one, or is over a mesh without devices."""
    if isinstance(sharding, NamedSharding):
        return list(sharding.mesh.devices.flat) if isinstance(sharding.mesh, Mesh) else ()
    return tuple(sharding.device_set) if isinstance(sharding, SingleDeviceSharding) else ()


def placed_rows(sharding: NamedSharding, shape: Sequence[int], recipe: Recipe) -> list[Names] | str:
    """The mesh axes of every dimension of what a recipe makes of a placed leaf, or why that can't be said.

    Args:
      sharding: the leaf's.
      shape: its shape.
      recipe: the steps.

    Returns:
      For each dimension, stack axes first, its mesh axes; or a reason.
    """
    now = tuple(shape)
    axes = [names_of(entry) for entry in (*sharding.spec, *[None] * len(now))][: len(now)]
    stacked: list[Names] = []
    for step in recipe.steps:
        if isinstance(step, Stack):
            stacked.append(axes[0])
            axes[0] = ()
        links, after = step.axes(now)
        found: list[Names] = [()] * len(after)
        for link in links:
            named = [d for d in link.before if axes[d]]
            if named and link.how is How.CUT:
                return "it is one part of a weight that is sharded along the axis it is cut from"
            if len(named) == 1:
                into = _outermost(link, named[0], now, after, math.prod(sharding.mesh.shape[n] for n in axes[named[0]]))
                if into is not None:
                    found[into], axes[named[0]] = axes[named[0]], ()
        if any(axes):
            return "a reshape mixes its sharded axis with others"
        axes, now = found, after
    return [*stacked, *axes]


def _outermost(link: Link, dim: int, before: Sequence[int], after: Sequence[int], parts: int) -> int | None:
    """Where a dimension that is cut in parts is: one that is split, or outermost of those merged, keeps its own.

    Rows that are distributed cyclically move between devices, each of which has as many as before.
    """
    if len(link.before) == len(link.after) == 1:
        return link.after[0]
    into = next((e for e in link.after if after[e] > 1), None)
    leads = dim == next((d for d in link.before if before[d] > 1), None)
    return into if leads and into is not None and after[into] % parts == 0 else None


def in_parts(recipe: Recipe, rows: int, columns: int, shards: int) -> Recipe:
    """A recipe of ``[rows, columns]`` as one of a stack of equal parts of those rows."""
    return recipe if shards == 1 else recipe.then(Reshape((shards, rows // shards, columns)), Stack(shards))


def place(match: Match, leaf_of: Callable[[Root], Any], token_axes: Names) -> Placement | CutRows | str | None:
    """Where a match runs.

    Args:
      match: the match.
      leaf_of: a weight's shape and sharding.
      token_axes: mesh axes that data comes in sharded over.

    Returns:
      A placement; None where there is nothing to split and nothing to say of types; or the reason to stay dense.
    """
    if any(scope.kind == "shard_map" for scope in match.node.scope.chain()):
        return None  # of the program's own, which says what each device has
    found: set[Names] = set()
    meshes: list[Any] = []
    for matrix in match.matrices:
        product, recipe = matrix.product, matrix.rows
        leaf = leaf_of(recipe.root)
        sharding = placement_of(leaf)
        if recipe.scalings and any(placement_of(leaf_of(root)) is not None for root in recipe.roots):
            return f"{product.path}: its weight is stored in few bits and scaled, over several devices"
        if sharding is None:
            found.add(())
            continue
        meshes.append(sharding.mesh)
        axes = placed_rows(sharding, leaf.shape, recipe)
        if isinstance(axes, str):
            return f"{product.path}: {axes}, so that its rows would have to move between devices"
        *stacks, rows, columns = axes
        if any(stacks):
            return f"{product.path}: its weight is sharded along the axis that stacks it, over {_text(stacks)}"
        if columns:
            what = "its output" if matrix is not match.matrices[0] and product is match.last else "its input"
            reason = (
                f"{product.path}: its weight is sharded along {what} axis, over {_text([columns])}; only those sharded "
                "along the hidden units or the vocabulary are predicted"
            )
            return CutRows(math.prod(sharding.mesh.shape[name] for name in columns), reason)
        found.add(rows)
    if not meshes:
        return None
    if len(found) > 1:
        return f"its weights are sharded differently along the hidden units: {_text(sorted(found))}"
    if any(mesh != meshes[0] for mesh in meshes):
        return "its weights are on different meshes"
    (rows,) = found
    mesh = meshes[0]
    if not rows and not is_explicit(mesh):
        return None  # whole on every device: the compiler needs no help
    tokens = _token_axes(match, mesh, token_axes, rows)
    return Placement(mesh, rows, tokens)


def _token_axes(match: Match, mesh: Any, token_axes: Names, rows: Names) -> Names:
    """The axes to split tokens over: those that data is sharded over, as far as they divide the tokens."""
    product = match.last
    typed = getattr(product.x.aval, "sharding", None)
    if is_explicit(mesh) and typed is not None and typed.spec:
        token_axes = tuple(n for d in product.x_free for n in names_of(typed.spec[d]))
    free = tuple(n for n in token_axes if n in mesh.shape and n not in rows)
    return free if product.tokens % math.prod(mesh.shape[n] for n in free) == 0 else ()


def _text(axes: Iterable[Names]) -> str:
    return ", ".join("*".join(names) or "nothing" for names in axes)


def token_axes_of(shardings: Iterable[NamedSharding | None]) -> Names:
    """The mesh axes that some data is sharded over, in the order of the mesh."""
    used: dict[str, None] = {}
    for sharding in shardings:
        if sharding is not None:
            named = {name for entry in sharding.spec for name in names_of(entry)}
            used.update({name: None for name in sharding.mesh.axis_names if name in named})
    return tuple(used)


def spec_of(stacks: int, axes: Names) -> PartitionSpec:
    """The spec of a packed form: split along what follows its stack axes. That of a whole one may be a number."""
    return PartitionSpec(*[None] * stacks, axes) if axes else PartitionSpec()


def stacks_of(steps: Sequence[Step]) -> int:
    """How many stack axes some steps make."""
    return sum(isinstance(step, Stack) for step in steps)
