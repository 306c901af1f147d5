"""Makes one packed form of one weight: the compiled functions that do it, on one device or on those that hold parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from hire_xform.lowering.engine.certified_ffn import largest_norm
from hire_xform.lowering.engine.cyclic_rows import from_cyclic, to_cyclic
from hire_xform.lowering.predict.predictors import Packed, Predictor, pack_predictor
from hire_xform.lowering.primitives.ranks import pack_moments
from hire_xform.lowering.prove.moment_bounds import pack_bounded_moments
from hire_xform.lowering.prove.proofs import pack_proof
from hire_xform.passes.ir.each_device import mesh_here, under_automatic_axes
from hire_xform.passes.ir.trace_context import as_usual, concretely
from hire_xform.passes.plan.decisions import PackKey
from hire_xform.passes.plan.forms import Proving
from hire_xform.passes.plan.levels import Levels
from hire_xform.passes.plan.measurement import Fitted, Predicted, Regrouped
from hire_xform.passes.plan.placement import Names, as_automatic, names_of, placed_rows, stacks_of
from hire_xform.passes.weights.recipe import Cyclic, Recipe, Root, Step


@functools.lru_cache(maxsize=256)
def packer(steps: tuple[Step, ...], form: Any) -> Any:
    """The jitted function that packs a leaf that is on one device, one for all leaves that are packed alike."""
    recipe = Recipe(Root("", 0), steps)
    if isinstance(form, Levels):
        return jax.jit(lambda leaf: jnp.asarray(form.array))
    if isinstance(form, RegroupedForm):
        return jax.jit(functools.partial(_regrouped, recipe, form.form))
    if isinstance(form, FittedForm):
        return jax.jit(lambda leaf, *given: _fit_each(form, recipe.apply(leaf), *given))
    if form == "rows":
        return jax.jit(recipe.apply)
    return jax.jit(lambda leaf: recipe.apply(leaf, functools.partial(_finish, form)))


def pack_placed(key: PackKey, leaf: Any, sharding: NamedSharding) -> Any:
    """A packed form of a leaf that is over several devices: each packs the rows it holds, and holds what it packed.

    What belongs to no site that is split is packed whole, on every device.
    """
    spec = packed_spec(sharding, leaf.shape, key)
    mesh = as_automatic(sharding.mesh)
    with concretely():
        leaf = jax.device_put(leaf, NamedSharding(mesh, sharding.spec if any(spec) else PartitionSpec()))
        given = [jax.device_put(a, NamedSharding(mesh, PartitionSpec())) for a in given_to(key.form)]
    # Traced outside of `concretely`: there a constant in the body of a shard_map is computed at once, and where a mesh
    # is set it gets a manual sharding, which no array can have.
    with as_usual(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in (leaf, *given))
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        settings = jax.config.jax_enable_x64, precision  # type: ignore[attr-defined]
        pack = _compiled(key.recipe.steps, bare_form(key.form), mesh, spec, shapes, settings)
    with concretely():
        return jax.device_put(pack(leaf, *given), NamedSharding(sharding.mesh, spec))


@functools.lru_cache(maxsize=256)
def _compiled(
    steps: tuple[Step, ...], form: Any, mesh: Any, spec: PartitionSpec, shapes: tuple[Any, ...], settings: Any
) -> Callable[..., Any]:
    """``shard_packer``, or ``packer`` of what is not split, compiled once for these shapes under these settings."""
    pack = shard_packer(steps, form, mesh, spec) if any(spec) else packer(steps, form)
    return pack.lower(*shapes).compile()


@functools.lru_cache(maxsize=256)
def shard_packer(steps: tuple[Step, ...], form: Any, mesh: Any, spec: PartitionSpec) -> Any:
    """The jitted function that packs a leaf that is sharded over a mesh with automatic axes, to be placed by ``spec``.

    Rows that are to lie cyclically are exchanged by the devices first: none holds more than its own.
    """
    cyclic = _cyclic_of(steps)
    before = steps if cyclic is None else steps[: steps.index(cyclic)]
    rows = packer(before, "rows")
    stacks, around = stacks_of(steps), stacks_of(before)
    names = _names_at(spec, around)

    def finish(here: Any, rows: Any, *given: Any) -> Any:
        if cyclic is not None:
            rows = to_cyclic(rows, names, cyclic.parts, axis=around, here=here[0])
        if cyclic is not None and stacks > around:
            rows = jnp.expand_dims(rows, around)  # the one part that a device has
        if isinstance(form, FittedForm):
            return _fit_each(form, rows, *given)
        if form == "rows":
            return rows
        made = functools.partial(_finish, form)
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
        back = functools.partial(from_cyclic, names=names, shards=cyclic.parts, axis=around)
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
    kept = axes[: stacks_of(key.recipe.steps) + (key.form == "rows")]
    while kept and not kept[-1]:
        kept.pop()
    return PartitionSpec(*(names or None for names in kept))


@dataclass(frozen=True)
class FittedForm:
    """A predictor, or its proof, without the arrays it is made with, which the packer is given: one program serves all.

    First the second moments of the inputs, if it is fitted to them, then what the predictor holds.
    """

    form: Predictor | Proving
    inputs: bool

    def given(self, arrays: Sequence[Any]) -> tuple[Any, Packed | None]:
        """The second moments, and what the predictor holds by name; None of what there is not."""
        held = arrays[self.inputs :]
        by_name = dict(zip(_predictor(self.form).arrays, held, strict=True)) if held else None
        return arrays[0] if self.inputs else None, by_name


@dataclass(frozen=True)
class RegroupedForm:
    """``Regrouped`` without the order, which the packer is given first."""

    form: Any


def _regrouped(recipe: Recipe, form: Any, leaf: Any, order: Any, *given: Any) -> Any:
    if form == "order":
        return order
    static, form = (form.static, form.form) if isinstance(form, Predicted) else (0, form)

    def one(rows: Any, order: Any, *given: Any) -> Any:
        numbers = order[static:]
        return _fit(form, rows[numbers], given, numbers) if given else _finish(form, rows[numbers])

    for _ in range(order.ndim - 1):
        one = jax.vmap(one)
    return one(recipe.apply(leaf), order, *given)


def bare_form(form: Any) -> Any:
    """A form without the arrays that it is made with, which the packer is given."""
    if isinstance(form, Regrouped):
        return RegroupedForm(bare_form(form.form))
    if isinstance(form, Predicted):
        return Predicted(bare_form(form.form), form.static)
    if isinstance(form, Fitted):
        return FittedForm(form.form, inputs=True)
    return FittedForm(form, inputs=False) if _held(form) else form


def given_to(form: Any) -> tuple[Any, ...]:
    """Those arrays."""
    if isinstance(form, Regrouped):
        return (form.order.units, *given_to(form.form))
    if isinstance(form, Predicted):
        return given_to(form.form)
    return (form.inputs.covariance, *_held(form.form)) if isinstance(form, Fitted) else _held(form)


def _predictor(form: Any) -> Any:
    return form.spec if isinstance(form, Proving) else form


def _held(form: Any) -> tuple[Any, ...]:
    """What the predictor of a form holds."""
    spec = _predictor(form)
    return tuple(spec.arrays.values()) if isinstance(spec, Predictor) else ()


def _finish(form: Any, rows: Any) -> Any:
    if form == "rows":
        return rows
    if form == "norms":
        return jnp.sqrt(jnp.sum(jnp.square(rows.astype(jnp.float32)), axis=-1))
    if form == "largest":
        return largest_norm(rows)
    if form == "moments":
        return pack_moments(rows)
    if form == "bounded_moments":
        return pack_bounded_moments(rows)
    return _fit(FittedForm(form, inputs=False), rows, ())


def _fit_each(form: FittedForm, rows: Any, *given: Any) -> Any:
    """Of each matrix of a stack, ``[*stack, n, d]``, with its own arrays: those of a matrix's parts are one."""
    held = _predictor(form.form).stack_axes
    stacks = [array.ndim - 2 if form.inputs and i == 0 else held for i, array in enumerate(given)]

    def fit(rows: Any, *given: Any) -> Any:
        return _fit(form, rows, given)

    for axis in range(rows.ndim - 2, 0, -1):
        fit = jax.vmap(fit, in_axes=(0, *(0 if axis <= own else None for own in stacks)))
    return fit(rows, *given)


def _fit(form: FittedForm, rows: Any, given: Sequence[Any], numbers: Any = None) -> Any:
    covariance, held = form.given(given)
    pack = pack_proof if isinstance(form.form, Proving) else pack_predictor
    return pack(rows, _predictor(form.form), covariance, held, numbers)
