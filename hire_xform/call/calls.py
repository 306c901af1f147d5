"""Takes a call apart: which leaves are weights, which are data, which are static; and puts it together again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from hire_xform.call.leaves import PlacedAval, aval_of, kind_elsewhere, placed_at, platform_in, stated_sharding
from hire_xform.call.opaque import check_static
from hire_xform.call.signature import Signature, argument_of
from hire_xform.passes.ir.static_values import value_key
from hire_xform.passes.pack.packed import Packed, PackedToken
from hire_xform.passes.plan.placement import token_axes_of
from hire_xform.passes.weights.recipe import Root


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
      elsewhere: the kind of an accelerator that they are on, where that is not here, as ahead of time.
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
    elsewhere: str | None = None
    # What the static values are compared by.
    _keys: tuple[Any, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Notes what the static values are compared by."""
        object.__setattr__(self, "_keys", tuple((position, value_key(value)) for position, value in self.statics))

    def rebuild(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments again, with these for the array leaves."""
        return self.treedef.unflatten(merge(self.statics, leaves))


class _Absent:
    """Stands in a call for an array leaf whose value is not there."""


ABSENT = _Absent()


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


def expand_packed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with the plain weights' shapes where a ``Packed`` stands."""

    def plain(value: Any) -> Any:
        if not isinstance(value, (Packed, PackedToken)):
            return value
        layout = value.layout
        leaves = [a if s is None else PlacedAval(a, s) for a, s in zip(layout.avals, layout.placed, strict=True)]
        return layout.treedef.unflatten(merge(layout.static, leaves))

    return tuple(plain(a) for a in args), {k: plain(v) for k, v in kwargs.items()}


def call_leaves(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The traced leaves of a call, None for each leaf that a ``Packed`` stands for."""

    def expand(value: Any) -> Any:
        if not isinstance(value, Packed):
            return value
        layout = value.layout
        return layout.treedef.unflatten(merge(layout.static, [ABSENT] * len(layout.avals)))

    expanded = (tuple(expand(a) for a in args), {k: expand(v) for k, v in kwargs.items()})
    leaves = jax.tree_util.tree_leaves_with_path(expanded)
    return [None if leaf is ABSENT else leaf for path, leaf in leaves if leaf is ABSENT or signature.traces(path, leaf)]


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
        placed.append(None if weight is None else placed_at(leaf))
        if weight is None:
            roots.append(None)
            data.append(placed_at(leaf))
            continue
        roots.append(Root.of(weight, counts.get(weight, 0)))
        counts[weight] = counts.get(weight, 0) + 1
    token_axes = tuple(axes) or token_axes_of(data)
    stated = [*where, *(stated_sharding(leaf) for p in held if _is_packed(p) for leaf in p.leaves)]
    platform, elsewhere = platform_in(stated), kind_elsewhere(stated)
    lists = tuple(statics), tuple(avals), tuple(roots), tuple(placed)
    return Abstract(treedef, *lists, token_axes, platform, tuple(where), elsewhere)


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
