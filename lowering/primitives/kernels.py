"""The seam that kernels plug into: steps that read memory as primitives, each with a portable form and a registry.

A step (``predict_scores``, ``select_rows_dot``, ...) is written once in portable JAX. :func:`step_primitive` makes the
primitive of it, and :func:`bind_step` applies it. The equation carries the portable form as it was traced there, a
jaxpr: types, derivatives, batching and the lowering are those of it, so programs compile to what they would without a
primitive. A platform's kernel (:func:`register_kernel`) takes its place when a program is lowered for it.

Under ``vmap`` the kernel is batched by ``vmap``, as it is written to be. Under differentiation values are the kernel's,
derivatives those of the portable form.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from hire_xform.lowering.primitives.stack_entry import StackEntry, of_one, whole
from hire_xform.lowering.xla.promotion import usual_promotion

__all__ = [
    "ENTRIES",
    "PLATFORMS",
    "backends",
    "bind_step",
    "has_kernels",
    "is_overridden",
    "lower_kernel",
    "no_built_in",
    "portable_only",
    "register_built_in",
    "register_kernel",
    "step_primitive",
]

# What JAX calls the platforms it lowers for.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclass(frozen=True)
class Kernel:
    """What runs a step on a platform: see :func:`register_kernel`."""

    rule: Callable[..., Any]
    serves: Callable[..., bool]
    name: str
    exported: bool
    # What it makes use of, of what a kernel may do without: ENTRIES, and settings that are in _OPTIONAL.
    takes: frozenset[str] = frozenset()


# Operands that are entries of stacks, as they are (`stack_entry.py`): other kernels get them taken out.
ENTRIES = "entries of stacks"
# Settings that other kernels are not told of.
_OPTIONAL = frozenset({"ordered"})
# By the name of a primitive and a platform.
_kernels: dict[tuple[str, str], Kernel] = {}
# The library's own, which those of users stand before; and why a platform has none, where it might.
_built_in: dict[tuple[str, str], Kernel] = {}
# By a platform, or by a step and a platform.
_missing: dict[str | tuple[str, str], str] = {}
# How a primitive is lowered for a platform that has had a kernel, by its name.
_lowerings: dict[str, tuple[Primitive, Callable[..., Any]]] = {}
# The platforms whose lowering of a primitive asks for a kernel first.
_asking: set[tuple[str, str]] = set()


def register_kernel(
    primitive: str,
    platform: str,
    rule: Callable[..., Any],
    serves: Callable[..., bool] = lambda *operands, **settings: True,
    exported: bool = False,
) -> Callable[[], None]:
    """Has a step run by a kernel of one platform instead of by its portable form, or by one that is built in.

    Programs that are lowered from then on have it; those that are compiled already stay as they are. ``hx.backends()``
    lists the steps, and docs/extending/kernel.md says what each is given::

        def best(scores, *, k, shards):
            return jax.ffi.ffi_call("my_top_k", ...)(scores, k=k)

        remove = hx.register_kernel("da_top_k", "cpu", best, serves=lambda scores, *, k, shards: shards == 1)

    Args:
      primitive: the step's name.
      platform: "cpu", "cuda", "rocm" or "tpu".
      rule: a function of the step's operands and, by keyword, of its settings, in JAX: it is traced, and may call an
        FFI target or Pallas. It returns what the portable form does, of the same shapes and dtypes.
      serves: of the operands' shapes and dtypes, and the settings, whether it is for them; where it is not, the one
        that is built in or the portable form is lowered. By default it is for all.
      exported: whether programs that ``jax.export`` writes down have it. They run in other processes: what is lowered
        of it has to need nothing of this one, as Pallas kernels for TPUs do, and FFI targets do not.

    Returns:
      What takes the kernel away again.

    Raises:
      ValueError: there is no such step or platform, or it has a kernel of a user's there already.
      TypeError: ``rule`` or ``serves`` is no function.
    """
    if primitive not in _lowerings:
        raise ValueError(f"register_kernel: primitive={primitive!r}; expected one of {', '.join(sorted(_lowerings))}")
    if platform not in PLATFORMS:
        raise ValueError(f"register_kernel: platform={platform!r}; expected one of {', '.join(PLATFORMS)}")
    for name, given in (("rule", rule), ("serves", serves)):
        if not callable(given):
            raise TypeError(f"register_kernel: {name}={given!r}; expected a function")
    key = primitive, platform
    if key in _kernels:
        raise ValueError(f"register_kernel: {primitive} has a kernel on {platform} already; take that away first")
    kernel = _kernels[key] = Kernel(rule, serves, getattr(rule, "__qualname__", repr(rule)), exported)
    _ask(key)

    def remove() -> None:
        if _kernels.get(key) is kernel:
            del _kernels[key]

    return remove


def register_built_in(
    primitive: str,
    platform: str,
    rule: Callable[..., Any],
    serves: Any,
    name: str,
    *,
    exported: bool = False,
    takes: frozenset[str] = frozenset(),
) -> None:
    """A kernel of this library, by the name that reports have; users' kernels stand before it."""
    _built_in[primitive, platform] = Kernel(rule, serves, name, exported, takes)
    _ask((primitive, platform))


def no_built_in(platform: str, reason: str, primitive: str | None = None) -> None:
    """Notes why there are no built-in kernels for a platform, or none of one step, for :func:`backends`."""
    _missing[platform if primitive is None else (primitive, platform)] = reason


def is_overridden(primitive: str, platform: str) -> bool:
    """Whether a step has a kernel of a user's: one that is built in, and does more than it, is to stand back."""
    return (primitive, platform) in _kernels


@contextlib.contextmanager
def portable_only() -> Iterator[None]:
    """Programs that are lowered in it, by any thread, have portable forms only: to compare kernels with."""
    held = [(kernels, dict(kernels)) for kernels in (_kernels, _built_in)]
    for kernels, _ in held:
        kernels.clear()
    try:
        yield
    finally:
        for kernels, had in held:
            kernels.update(had)


def _ask(key: tuple[str, str]) -> None:
    """Has the lowering of a step for a platform look for kernels.

    Not before there is one: a program lowered for several platforms has each rule of its own in a branch.
    """
    if key not in _asking:
        held, lower = _lowerings[key[0]]
        mlir.register_lowering(held, functools.partial(lower, key[1]), platform=key[1])
        _asking.add(key)


def _serving(
    key: tuple[str, str],
    avals: Sequence[Any],
    batched: Sequence[Any],
    layout: Any,
    settings: dict[str, Any],
    for_export: bool = False,
) -> tuple[str, Callable[..., list[Any]]] | None:
    """The kernel for such operands, a user's or one that is built in: its name, and it as a function of them.

    Args:
      key: step and platform.
      avals: shapes and dtypes of the operands.
      batched: the axes that they are batched along, the innermost ``vmap`` first.
      layout: how operands are made of these arrays; None where each is one.
      settings: the step's.
      for_export: whether it is for a program that is written down.
    """
    alone = [list(aval.shape) for aval in avals]
    for dims in reversed(batched):
        for shape, dim in zip(alone, dims, strict=True):
            if dim is not None:
                del shape[dim]
    structs: Sequence[Any] = [jax.ShapeDtypeStruct(tuple(s), a.dtype) for s, a in zip(alone, avals, strict=True)]
    if layout is not None:
        structs = of_one(layout.unflatten(structs))
    found = [kernel for kernels in (_kernels, _built_in) if (kernel := kernels.get(key)) is not None]
    found = [kernel for kernel in found if kernel.exported or not for_export]
    chosen = next((kernel for kernel in found if kernel.serves(*structs, **_told(kernel, settings))), None)
    if chosen is None:
        return None

    def one(*arrays: Any) -> list[Any]:
        operands = arrays if layout is None else layout.unflatten(arrays)
        if ENTRIES not in chosen.takes:
            operands = [whole(operand) for operand in operands]
        made = chosen.rule(*operands, **_told(chosen, settings))
        return list(made) if isinstance(made, (tuple, list)) else [made]

    @usual_promotion()
    def run(*operands: Any) -> list[Any]:
        fun = one
        for dims in batched:
            fun = jax.vmap(fun, in_axes=dims)
        return fun(*operands)

    return chosen.name, run


def _told(kernel: Kernel, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a kernel takes."""
    return {name: value for name, value in settings.items() if name not in _OPTIONAL - kernel.takes}


def backends() -> dict[str, dict[str, str]]:
    """What runs each step on each platform, by name: a kernel, or "portable", what XLA makes of it, and why if known.

    A kernel runs what it serves; the portable form runs the rest.
    """

    def named(step: str, platform: str) -> str:
        kernel = _kernels.get((step, platform)) or _built_in.get((step, platform))
        reason = _missing.get((step, platform)) or _missing.get(platform)
        portable = f"portable: {reason}" if reason else "portable"
        return portable if kernel is None else kernel.name

    return {step: {platform: named(step, platform) for platform in PLATFORMS} for step in sorted(_lowerings)}


def has_kernels(primitive: Primitive, lower: Callable[..., Any]) -> None:
    """Lets a primitive have kernels; ``lower(platform, ctx, *operands, **params)`` calls :func:`lower_kernel`."""
    _lowerings[primitive.name] = primitive, lower


def lower_kernel(
    name: str,
    platform: str,
    ctx: Any,
    operands: Sequence[Any],
    batched: Sequence[Any] = (),
    layout: Any = None,
    **settings: Any,
) -> Any:
    """The step lowered as its kernel on a platform; None where there is none, or it does not serve.

    Args:
      name, platform: which step, and where.
      ctx, operands: as a lowering rule has them.
      batched: the axes that the operands of a step are batched along, the innermost ``vmap`` first.
      layout: how operands are made of these; None where each is one.
      **settings: the step's.
    """
    if not _is_whole(ctx):
        return None
    for_export = ctx.module_context.lowering_parameters.for_export
    serving = _serving((name, platform), ctx.avals_in, batched, layout, settings, for_export)
    if serving is None:
        return None
    kernel, fun = serving

    def run(*operands: Any) -> list[Any]:
        made = fun(*operands)
        got, want = ([(a.shape, jnp.dtype(a.dtype).name) for a in all_of] for all_of in (made, ctx.avals_out))
        if got != want:
            raise ValueError(f"{name}: the kernel {kernel} makes {got}; expected {want}")
        return made

    # Inside a shard_map types say along which axes values vary; a kernel is not asked to.
    plain = [ShapedArray(a.shape, a.dtype, weak_type=getattr(a, "weak_type", False)) for a in ctx.avals_in]
    return mlir.lower_fun(run, multiple_results=True)(ctx.replace(avals_in=plain), *operands)


def _is_whole(ctx: Any) -> bool:
    """Whether a kernel would see whole arrays.

    XLA can't split a call of a kernel over devices: it would gather its operands. Inside a ``shard_map`` each device's
    part is whole.
    """
    around = ctx.module_context.axis_context
    return getattr(around, "num_devices", 1) == 1 or bool(getattr(around, "manual_axes", ()))


def _is_alone(operands: Sequence[Any]) -> bool:
    return all(len(o.devices()) == 1 for o in operands if isinstance(o, jax.Array))


def step_primitive(name: str) -> Primitive:
    """The primitive of a step, whose equations :func:`bind_step` makes."""
    step_p = Primitive(name)
    step_p.multiple_results = True

    def abstract(*avals: Any, portable: ClosedJaxpr, **params: Any) -> Any:
        if list(avals) == list(portable.in_avals):
            return portable.out_avals
        # It has come into another context, such as the inside of a shard_map.
        return jax.make_jaxpr(jaxpr_as_fun(portable))(*avals).out_avals

    def run(*operands: Any, portable: ClosedJaxpr, batched: tuple[Any, ...], layout: Any, **settings: Any) -> Any:
        key = name, jax.default_backend()
        serving = _serving(key, operands, batched, layout, settings) if _is_alone(operands) else None
        return jaxpr_as_fun(portable)(*operands) if serving is None else serving[1](*operands)

    def batch(operands: Any, dims: Any, *, portable: ClosedJaxpr, batched: tuple[Any, ...], **params: Any) -> Any:
        outer = jax.make_jaxpr(jax.vmap(jaxpr_as_fun(portable), in_axes=tuple(dims)))(*operands)
        made = step_p.bind(*operands, portable=outer, batched=(*batched, tuple(dims)), **params)
        return made, (0,) * len(made)

    def jvp(primals: Any, tangents: Any, *, portable: ClosedJaxpr, **params: Any) -> Any:
        made = step_p.bind(*primals, portable=portable, **params)
        changing = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

        def of_changing(*values: Any) -> Any:
            given = dict(zip(changing, values, strict=True))
            return jaxpr_as_fun(portable)(*(given.get(i, p) for i, p in enumerate(primals)))

        return made, jax.jvp(of_changing, [primals[i] for i in changing], [tangents[i] for i in changing])[1]

    def lower(platform: str, ctx: Any, *operands: Any, portable: ClosedJaxpr, **settings: Any) -> Any:
        lowered = lower_kernel(name, platform, ctx, operands, **settings)
        return lower_portable(ctx, *operands, portable=portable) if lowered is None else lowered

    def lower_portable(ctx: Any, *operands: Any, portable: ClosedJaxpr, **params: Any) -> Any:
        return mlir.lower_fun(jaxpr_as_fun(portable), multiple_results=True)(ctx, *operands)

    step_p.def_impl(run)
    step_p.def_abstract_eval(abstract)
    batching.primitive_batchers[step_p] = batch
    ad.primitive_jvps[step_p] = jvp
    mlir.register_lowering(step_p, lower_portable)
    has_kernels(step_p, lower)
    return step_p


def bind_step(step_p: Primitive, portable: Callable[..., Any], *operands: Any, **settings: Any) -> Any:
    """A step on operands.

    Args:
      step_p: its primitive.
      portable: its portable form, a function of the operands that returns a sequence of arrays.
      *operands: arrays, or entries of stacks, which kernels that take them read where they lie.
      **settings: what a kernel is told besides; hashable.
    """
    form = jax.make_jaxpr(portable)(*operands)
    if not any(isinstance(operand, StackEntry) for operand in operands):
        return step_p.bind(*operands, portable=form, batched=(), layout=None, **settings)
    arrays, layout = jax.tree.flatten(operands)
    return step_p.bind(*arrays, portable=form, batched=(), layout=layout, **settings)
