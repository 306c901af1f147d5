"""Makes one packed form of one weight: the compiled functions that do it, on one device or on those that hold parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from hire_xform.lowering.engine.cyclic_rows import from_cyclic, to_cyclic
from hire_xform.lowering.primitives.stored_rows import StoredRows
from hire_xform.lowering.xla.devices import Devices
from hire_xform.passes.ir.each_device import mesh_here, under_automatic_axes
from hire_xform.passes.ir.trace_context import as_usual, concretely
from hire_xform.passes.plan.decisions import PackKey
from hire_xform.passes.plan.forms import ROWS, Form
from hire_xform.passes.plan.placement import Names, as_automatic, names_of, placed_rows, stacks_of
from hire_xform.passes.weights.recipe import Cyclic, Recipe, Root, Scaling, Step


@functools.lru_cache(maxsize=256)
def packer(steps: tuple[Step, ...], form: Form, scalings: tuple[Scaling, ...] = ()) -> Any:
    """The jitted function that packs a leaf that is on one device, one for all leaves that are packed alike.

    With ``scalings``, of no leaf in particular, it takes the leaves that these are made of after it.
    """
    recipe = Recipe(Root("", 0), steps)
    if not form.of_rows:
        return jax.jit(form.pack)
    if scalings:
        return jax.jit(functools.partial(_of_scaled, Recipe(Root("", 0), steps, scalings), form))
    if form.given:
        return jax.jit(lambda leaf, *given: _of_each(form.pack, form, recipe.apply(leaf), given))
    return jax.jit(recipe.apply) if form == ROWS else jax.jit(lambda leaf: recipe.apply(leaf, form.pack))


def _of_scaled(recipe: Recipe, form: Form, *arrays: Any) -> Any:
    """A form of the matrices, of a stack or one, that are stored in few bits: of each as it is made."""
    count, stacks = len(recipe.parts), stacks_of(recipe.steps)
    values, *others = (part.apply(leaf) for part, leaf in zip(recipe.parts, arrays[:count], strict=True))
    given = arrays[count:]

    def made(rows: Any, *given: Any) -> Any:
        stored = StoredRows(rows[0], rows[1], recipe.operations, tuple(o.shape[0] == 1 for o in rows[1]))
        return form.pack(stored.dense(), *given)

    rows = values, tuple(others)
    if given:
        return _of_each(made, form, rows, given)
    for _ in range(stacks):
        made = functools.partial(jax.lax.map, made)  # one matrix after the other: temporaries are those of one
    return made(rows)


def pack_placed(key: PackKey, leaf: Any, sharding: NamedSharding) -> Any:
    """A packed form of a leaf that is over several devices: each packs the rows it holds, and holds what it packed.

    What belongs to no site that is split is packed whole, on every device.
    """
    spec = packed_spec(sharding, leaf.shape, key)
    mesh = as_automatic(sharding.mesh)
    with concretely():
        leaf = jax.device_put(leaf, NamedSharding(mesh, sharding.spec if any(spec) else PartitionSpec()))
        given = [jax.device_put(a, NamedSharding(mesh, PartitionSpec())) for a, _ in key.form.given]
    # Traced outside of `concretely`: there a constant in the body of a shard_map is computed at once, and where a mesh
    # is set it gets a manual sharding, which no array can have.
    with as_usual(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in (leaf, *given))
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        settings = jax.config.jax_enable_x64, precision  # type: ignore[attr-defined]
        pack = _compiled(key.recipe.steps, key.form.bare, mesh, spec, shapes, settings)
    with concretely():
        return jax.device_put(pack(leaf, *given), NamedSharding(sharding.mesh, spec))


@functools.lru_cache(maxsize=256)
def _compiled(
    steps: tuple[Step, ...], form: Form, mesh: Any, spec: PartitionSpec, shapes: tuple[Any, ...], settings: Any
) -> Callable[..., Any]:
    """``shard_packer``, or ``packer`` of what is not split, compiled once for these shapes under these settings."""
    pack = shard_packer(steps, form, mesh, spec) if any(spec) else packer(steps, form)
    return pack.lower(*shapes).compile()


@functools.lru_cache(maxsize=256)
def shard_packer(steps: tuple[Step, ...], form: Form, mesh: Any, spec: PartitionSpec) -> Any:
    """The jitted function that packs a leaf that is sharded over a mesh with automatic axes, to be placed by ``spec``.

    Rows that are to lie cyclically are exchanged by the devices first: none holds more than its own.
    """
    cyclic = _cyclic_of(steps)
    before = steps if cyclic is None else steps[: steps.index(cyclic)]
    rows = packer(before, ROWS)
    stacks, around = stacks_of(steps), stacks_of(before)
    names = _names_at(spec, around)

    def finish(here: Any, rows: Any, *given: Any) -> Any:
        if cyclic is not None:
            rows = to_cyclic(rows, Devices(names, cyclic.parts), axis=around, here=here[0])
        if cyclic is not None and stacks > around:
            rows = jnp.expand_dims(rows, around)  # the one part that a device has
        if given:
            return _of_each(form.pack, form, rows, given)
        if form == ROWS:
            return rows
        made = form.pack
        for _ in range(stacks):
            made = functools.partial(jax.lax.map, made)  # one matrix after the other: temporaries are those of one
        return made(rows)

    def run(leaf: Any, *given: Any) -> Any:
        laid_out = jax.lax.with_sharding_constraint(rows(leaf), NamedSharding(mesh, spec))
        numbers = jnp.arange(1 if cyclic is None else cyclic.parts, dtype=jnp.int32)
        own_number = PartitionSpec(None if cyclic is None else names)
        specs = (own_number, spec, *(PartitionSpec() for _ in given))
        return jax.shard_map(finish, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(
            numbers, laid_out, *given
        )

    return jax.jit(run)


def _cyclic_of(steps: Sequence[Step]) -> Cyclic | None:
    return next((step for step in steps if isinstance(step, Cyclic)), None)


def _names_at(spec: PartitionSpec, dim: int) -> Names:
    return names_of(spec[dim]) if dim < len(spec) else ()


def as_blocks(key: PackKey, shape: Sequence[int], rows: Any, sharding: NamedSharding) -> tuple[Recipe, Any]:
    """Packed rows that lie cyclically as contiguous blocks again, and the recipe of those. Each device sends its own.

    Args:
      key: of the rows.
      shape: of their leaf.
      rows: as they are packed, on tracers.
      sharding: where the leaf was.
    """
    cyclic = _cyclic_of(key.recipe.steps)
    if cyclic is None:
        return key.recipe, rows
    spec, around = packed_spec(sharding, shape, key), stacks_of(key.recipe.steps)
    names = _names_at(spec, around)

    def run(rows: Any) -> Any:
        back = functools.partial(from_cyclic, devices=Devices(names, cyclic.parts), axis=around)
        return jax.shard_map(back, mesh=mesh_here(sharding.mesh), in_specs=spec, out_specs=spec)(rows)

    blocks = Recipe(key.recipe.root, tuple(step for step in key.recipe.steps if step is not cyclic))
    return blocks, under_automatic_axes(run, sharding.mesh, jax.typeof(rows).sharding.spec)(rows)


def packed_spec(sharding: NamedSharding, shape: Sequence[int], key: PackKey) -> PartitionSpec:
    """How a packed form of a placed leaf is placed.

    Rows lie where they lay. All else is made of whole matrices, and lies where those of a stack do: each device has its
    part of the rows as a matrix of that stack.
    """
    axes = placed_rows(sharding, shape, key.recipe)
    # A weight that is placed otherwise belongs to no site that is split: it is packed whole, on every device.
    if isinstance(axes, str) or axes[-1]:
        return PartitionSpec()
    kept = axes[: stacks_of(key.recipe.steps) + key.form.split]
    while kept and not kept[-1]:
        kept.pop()
    return PartitionSpec(*(names or None for names in kept))


def _of_each(make: Callable[..., Any], form: Form, rows: Any, given: Sequence[Any]) -> Any:
    """Of each matrix of a stack, ``[*stack, n, d]``, with its own of what is given: that of a matrix's parts is one.

    One matrix after the other: temporaries are those of one.
    """
    depths = [array.ndim - own for array, (_, own) in zip(given, form.given, strict=True)]
    for axis in range(jax.tree.leaves(rows)[0].ndim - 2, 0, -1):
        make = _one_by_one(make, [axis <= depth for depth in depths])
    return make(rows, *given)


def _one_by_one(make: Callable[..., Any], stacked: Sequence[bool]) -> Callable[..., Any]:
    """``make`` of each entry of rows, and of those of what is given that are stacked too."""

    def run(rows: Any, *given: Any) -> Any:
        def one(rows_and_own: tuple[Any, list[Any]]) -> Any:
            own = iter(rows_and_own[1])
            return make(rows_and_own[0], *(next(own) if s else g for s, g in zip(stacked, given, strict=True)))

        return jax.lax.map(one, (rows, [g for s, g in zip(stacked, given, strict=True) if s]))

    return run
