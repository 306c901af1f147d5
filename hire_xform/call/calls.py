"""Takes a call apart: which leaves are weights, which are data, which are static; and puts it together again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hire_xform.call.opaque import check_static
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.each_device import is_explicit
from hire_xform.passes.ir.static_values import value_key
from hire_xform.passes.pack.packed import Packed, PackedToken
from hire_xform.passes.plan.placement import device_of, placement_of, platform_of, token_axes_of
from hire_xform.passes.weights.recipe import Root

# What jax.jit traces; any other leaf (a function, a string, a dtype) is static.
ARRAY_TYPES = (jax.Array, np.ndarray, np.generic, bool, int, float, complex, jax.ShapeDtypeStruct)


class Static:
    """Wraps a static argument, so that flattening a call takes it for one opaque leaf."""

    __slots__ = ("_key", "value")

    def __init__(self, value: Any):
        self.value = value
        self._key = value_key(value)

    def __eq__(self, other: object) -> bool:
        """Equal when the values are, types included, as for jax.jit: 1 is not 1.0."""
        return isinstance(other, Static) and self._key == other._key

    def __hash__(self) -> int:
        """The value's hash."""
        return hash(self._key)


@dataclass(frozen=True)
class Abstract:
    """A call reduced to what tracing depends on, weights plain: hashable.

    Attributes:
      treedef: structure of ``(args, kwargs)``.
      statics: (position, value) of the leaves that are not traced.
      avals: abstract values of the array leaves, in order.
      roots: for each array leaf, the root it is as a weight, or None.
      placed: for each array leaf that is a weight over several devices, its sharding; None for the others.
      token_axes: mesh axes that data comes in sharded over.
      platform: of the devices that the array leaves are on, where one of them says so.
      where: for each array leaf, the sharding it was given with, if that was stated. What a trace means does not hang
        on it, but what it is compiled for does.
    """

    treedef: Any
    statics: tuple[tuple[int, Any], ...] = field(compare=False)
    avals: tuple[Any, ...]
    roots: tuple[Root | None, ...] = field(compare=False)
    placed: tuple[Any, ...] = ()
    token_axes: tuple[str, ...] = ()
    platform: str | None = None
    where: tuple[Any, ...] = field(default=(), compare=False)
    # What the static values are compared by.
    _keys: tuple[Any, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Notes what the static values are compared by."""
        object.__setattr__(self, "_keys", tuple((position, value_key(value)) for position, value in self.statics))

    def rebuild(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments again, with these for the array leaves."""
        return self.treedef.unflatten(merge(self.statics, leaves))


def merge(statics: Sequence[tuple[int, Any]], arrays: Iterable[Any]) -> list[Any]:
    """All leaves in order, from the static ones and the arrays between them."""
    merged: list[Any] = []
    rest = iter(arrays)
    for position, value in statics:
        while len(merged) < position:
            merged.append(next(rest))
        merged.append(value)
    merged.extend(rest)
    return merged


def unwrap_statics(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments with static ones taken out of their wrappers."""

    def bare(value: Any) -> Any:
        return value.value if isinstance(value, Static) else value

    return [bare(a) for a in args], {k: bare(v) for k, v in kwargs.items()}


class Weights(NamedTuple):
    """Which arguments hold weights, as ``sparsify`` was told: the options of these names."""

    argnums: int | Sequence[int] | None = None
    argnames: str | Sequence[str] | None = None


@dataclass(frozen=True)
class Signature:
    """Which arguments of a function are weights, static and donated.

    An argument is known by its position, or by its name where it has none.

    Raises:
      ValueError, TypeError: the numbers or names do not fit the function or each other.
    """

    fun: Callable
    weights: tuple[int | str, ...]
    static: frozenset[int | str]
    donated: frozenset[int | str]
    names: tuple[str, ...]

    @classmethod
    def of(cls, fun: Callable, weights: Weights, options: Mapping[str, Any]) -> Signature:
        """Reads what is said of weights and jit's static and donate options against the function's own signature."""
        try:
            parameters = list(inspect.signature(fun).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = tuple(p.name for p in parameters if p.kind in positional)
        open_ended = not parameters or any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
        limit = None if open_ended else len(names)
        if weights.argnums is None and weights.argnames is None:
            weights = Weights(0)
        told = {"weights_argnums": weights.argnums, "weights_argnames": weights.argnames}
        marked = _both(told, "weights", names, parameters, limit)
        static = frozenset(_both(options, "static", names, parameters, limit))
        donated = frozenset(_both(options, "donate", names, parameters, limit))
        for key in marked:
            if key in static:
                raise ValueError(
                    f"sparsify: argument {key!r} is in weights_argnums and in static_argnums; weights are arrays"
                )
            if key in donated:
                raise ValueError(
                    f"sparsify: argument {key!r} is in weights_argnums and in donate_argnums; weights are remembered "
                    "between calls and can't be donated"
                )
        return cls(fun, tuple(marked), static, donated, names)

    @property
    def stated(self) -> str:
        """Which arguments hold weights, as the options that say so."""
        named = tuple(key for key in self.weights if isinstance(key, str))
        numbers = tuple(key for key in self.weights if isinstance(key, int))
        told = [f"weights_argnums={numbers}"] if numbers or not named else []
        return " and ".join(told + ([f"weights_argnames={named}"] if named else []))

    def holds(self, marked: frozenset[int | str], key: int | str) -> bool:
        """True when an argument, given by position or name, is among the marked ones."""
        return self.key_of(key) in marked

    def misfit(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """What is wrong with these as the arguments of a call; empty when nothing is, as far as can be known."""
        try:
            signature = inspect.signature(self.fun)
        except (TypeError, ValueError):
            return ""
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            return str(error)
        return ""

    def key_of(self, argument: int | str) -> int | str:
        """What an argument that is given by position or name is known by."""
        return self.names.index(argument) if isinstance(argument, str) and argument in self.names else argument

    def weight_key(self, argument: int | str) -> int | str | None:
        """What a weights argument that is given by position or name is known by; None for any other argument."""
        key = self.key_of(argument)
        return key if key in self.weights else None

    def name_at(self, key: int | str) -> str | None:
        """The name of the argument at a position; None where it has none."""
        if isinstance(key, str):
            return key
        return self.names[key] if key < len(self.names) else None

    def name_of(self, path: Sequence[Any]) -> str:
        """The name of a leaf of ``(args, kwargs)``, for messages, such as ``params['w']``."""
        key = argument_of(path)
        return (self.name_at(key) or f"argument {key}") + jax.tree_util.keystr(tuple(path[2:]))

    def traces(self, path: Sequence[Any], leaf: Any) -> bool:
        """True for a leaf of ``(args, kwargs)`` that is traced, as opposed to static.

        Arrays are. So is a number that is an argument by itself, as for jax.jit. A number inside a weights argument is
        a setting of the model (a dropout rate, a flag it branches on), as for Equinox's filter_jit.
        """
        setting = isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic)
        if setting and len(path) > 2 and self.weight_key(argument_of(path)) is not None:
            return False
        return is_array(leaf)

    def wrap_statics(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with static arguments wrapped."""
        if not self.static:
            return args, kwargs
        return (
            tuple(_wrap(a) if self.holds(self.static, i) else a for i, a in enumerate(args)),
            {k: _wrap(v) if self.holds(self.static, k) else v for k, v in kwargs.items()},
        )


def _wrap(value: Any) -> Static:
    try:
        hash(value)
    except TypeError:
        raise ValueError(
            f"sparsify: a static argument must be hashable, as for jax.jit; got {type(value).__name__}"
        ) from None
    return Static(value)


def _argnums(name: str, value: Any, limit: int | None) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(numbers, (tuple, list)) or not all(
        isinstance(n, int) and not isinstance(n, bool) for n in numbers
    ):
        raise TypeError(f"sparsify: {name}={value!r}; expected an integer or a tuple of integers")
    for number in numbers:
        # The default, 0, is no promise that there is an argument: arrays closed over are weights too.
        if number < 0 or (limit is not None and number >= max(limit, 1)):
            count = "arguments" if limit is None else f"the function's {limit} positional arguments"
            raise ValueError(f"sparsify: {name}={value!r}; expected positions from 0 among {count}")
    return tuple(numbers)


def _both(
    options: Mapping[str, Any], kind: str, names: Sequence[str], parameters: Sequence[Any], limit: int | None
) -> list[int | str]:
    """What the arguments of ``<kind>_argnums`` and ``<kind>_argnames`` are known by, in this order."""
    numbers = options.get(f"{kind}_argnums")
    texts = options.get(f"{kind}_argnames")
    found: list[int | str] = list(_argnums(f"{kind}_argnums", numbers, limit) if numbers is not None else ())
    if texts is not None:
        texts = (texts,) if isinstance(texts, str) else texts
        if not isinstance(texts, Iterable):
            raise TypeError(f"sparsify: {kind}_argnames={texts!r}; expected a name or a tuple of names")
        known = {p.name for p in parameters}
        variadic = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters) or not parameters
        for text in texts:
            if not isinstance(text, str) or (text not in known and not variadic):
                raise ValueError(f"sparsify: {kind}_argnames has {text!r}; expected names among {sorted(known)}")
            found.append(names.index(text) if text in names else text)
    return list(dict.fromkeys(found))


def keyed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[int | str, Any]]:
    """The arguments of a call with their positions or names."""
    return [*enumerate(args), *kwargs.items()]


def arguments_of(call: Sequence[Any] | dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call that is written as a tuple, or as a dictionary by name."""
    return ((), call) if isinstance(call, dict) else (tuple(call), {})


def argument_of(path: Sequence[Any]) -> int | str:
    """The position or name of the argument that a leaf of ``(args, kwargs)`` belongs to."""
    return path[1].idx if path[0].idx == 0 else path[1].key


@dataclass(frozen=True)
class _PlacedAval:
    """A leaf that a ``Packed`` stands for: its abstract value, and where it was."""

    aval: Any
    sharding: Any


def expand_packed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with the plain weights' shapes where a ``Packed`` stands."""

    def plain(value: Any) -> Any:
        if not isinstance(value, (Packed, PackedToken)):
            return value
        layout = value.layout
        leaves = [a if s is None else _PlacedAval(a, s) for a, s in zip(layout.avals, layout.placed, strict=True)]
        return layout.treedef.unflatten(merge(layout.static, leaves))

    return tuple(plain(a) for a in args), {k: plain(v) for k, v in kwargs.items()}


def is_array(leaf: Any) -> bool:
    """True for a leaf that jax.jit would trace."""
    return isinstance(leaf, (*ARRAY_TYPES, jax.core.ShapedArray, _PlacedAval))


def aval_of(leaf: Any) -> Any:
    """The abstract value of an array leaf; of shardings only those that are part of its type."""
    if isinstance(leaf, _PlacedAval):
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


def _where(leaf: Any) -> Any:
    """Where a leaf is, if that is known and over several devices."""
    return None if compat.is_tracer(leaf) else placement_of(leaf)


def stated_sharding(leaf: Any) -> Any:
    """Where a leaf is bound to be: over several devices, or on the one it was committed to."""
    return None if compat.is_tracer(leaf) else placement_of(leaf) or device_of(leaf)


def platform_in(shardings: Iterable[Any]) -> str | None:
    """The platform that some shardings name; None where none does."""
    return next((name for name in map(platform_of, shardings) if name is not None), None)


def abstract_call(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Abstract:
    """Reduces a call (static arguments wrapped) to what tracing depends on.

    Raises:
      TypeError: a leaf is no array and hides what it holds, or a Packed is only part of an argument.
    """
    held = [p for p in [*args, *kwargs.values()] if _is_held(p)]
    axes = {name: None for p in held for name in p.layout.token_axes}
    args, kwargs = expand_packed(args, kwargs)
    inside = [p for p, v in jax.tree_util.tree_leaves_with_path((args, kwargs), is_leaf=_is_packed) if _is_packed(v)]
    if inside:
        raise TypeError(
            f"sparsify: there is a Packed inside argument {argument_of(inside[0])!r}, at "
            f"{signature.name_of(inside[0])}; expected it in the place of a whole weights argument"
        )
    found, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
    statics: list[tuple[int, Any]] = []
    avals: list[Any] = []
    roots: list[Root | None] = []
    placed: list[Any] = []
    data: list[Any] = []
    where: list[Any] = []
    counts: dict[int | str, int] = {}
    for position, (path, leaf) in enumerate(found):
        key = argument_of(path)
        if not signature.traces(path, leaf):
            check_static(leaf, signature.name_of(path), signature.weight_key(key) is not None)
            if len(path) == 2:
                check_holds_arrays(signature, leaf, key)
            statics.append((position, leaf))
            continue
        avals.append(aval_of(leaf))
        where.append(stated_sharding(leaf))
        weight = signature.weight_key(key)
        placed.append(None if weight is None else _where(leaf))
        if weight is None:
            roots.append(None)
            data.append(_where(leaf))
            continue
        roots.append(Root.of(weight, counts.get(weight, 0)))
        counts[weight] = counts.get(weight, 0) + 1
    token_axes = tuple(axes) or token_axes_of(data)
    platform = platform_in([*where, *(stated_sharding(leaf) for p in held if _is_packed(p) for leaf in p.leaves)])
    return Abstract(
        treedef, tuple(statics), tuple(avals), tuple(roots), tuple(placed), token_axes, platform, tuple(where)
    )


def _is_held(value: Any) -> bool:
    return isinstance(value, (Packed, PackedToken))


def _is_packed(value: Any) -> bool:
    return isinstance(value, Packed)


def check_holds_arrays(signature: Signature, leaf: Any, key: int | str) -> None:
    """Raises TypeError when a whole weights argument is one opaque object: the wrong argument, or no pytree.

    Arrays inside it would be taken for constants, and changes to them would go unseen.
    """
    if signature.weight_key(key) is None or isinstance(leaf, (str, bytes)):
        return
    raise TypeError(
        f"sparsify: argument {key!r} is in {signature.stated}, but JAX sees no arrays in a "
        f"{type(leaf).__name__}; expected a pytree of arrays, or weights_argnums=() where all weights are closed over"
    )
