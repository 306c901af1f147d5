"""``Packed``, which stands where the weights stood, and its layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from hire_xform.passes.ir.static_values import value_key
from hire_xform.passes.plan.decisions import PackKey


@dataclass(frozen=True, eq=False)
class PackLayout:
    """What a ``Packed`` holds, and what stood in its place. Static: two layouts are the same when all fields are.

    Attributes:
      treedef: structure of the original argument.
      avals: abstract values of the original array leaves, in order.
      static: the other leaves: (position, value).
      kept: which array leaves it still holds.
      keys: the packed forms it holds, of leaves of any argument: weights may stand elsewhere in another function.
      restored: leaves that are made from packed rows when read dense: (leaf, number of the key).
      placed: where the original array leaves were, of those over several devices.
      token_axes: mesh axes that data came in sharded over.
    """

    treedef: Any
    avals: tuple[Any, ...]
    static: tuple[tuple[int, Any], ...]
    kept: tuple[int, ...]
    keys: tuple[PackKey, ...]
    restored: tuple[tuple[int, int], ...]
    placed: tuple[Any, ...] = ()
    token_axes: tuple[str, ...] = ()
    _hash: int = field(default=0, repr=False)
    _numbers: dict[PackKey, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Hashes once: a layout is part of every call's tree structure."""
        object.__setattr__(self, "_hash", hash((self.treedef, self.kept, self.keys)))
        object.__setattr__(self, "_numbers", {key: i for i, key in enumerate(self.keys)})

    def number_of(self, key: PackKey) -> int | None:
        """Where a key stands in ``keys``."""
        return self._numbers.get(key)

    def _fields(self) -> tuple[Any, ...]:
        static = tuple((position, value_key(value)) for position, value in self.static)
        held = self.kept, self.keys, self.restored, self.placed, self.token_axes
        return self.treedef, self.avals, static, *held

    def __eq__(self, other: object) -> bool:
        """Equal when everything it describes is."""
        return self is other or (isinstance(other, PackLayout) and self._fields() == other._fields())

    def __hash__(self) -> int:
        """The hash made at construction."""
        return self._hash


class PackedToken:
    """Stands for a ``Packed`` in a flattened call: one static leaf that is equal where the layouts are."""

    __slots__ = ("layout",)

    def __init__(self, layout: PackLayout):
        """For a layout."""
        self.layout = layout

    def __eq__(self, other: object) -> bool:
        """Equal when the layouts are."""
        return isinstance(other, PackedToken) and self.layout == other.layout

    def __hash__(self) -> int:
        """The layout's hash."""
        return hash(self.layout)


@jax.tree_util.register_pytree_with_keys_class
class Packed:
    """Weights in the layout decoding wants: stands where the plain weights stood, which may then be dropped.

    A pytree of arrays: pass it through ``jit``, shard it, save its leaves. It holds each matrix once.
    """

    def __init__(self, kept: Sequence[Any], forms: Sequence[Any], layout: PackLayout):
        """Not for direct use: ``step.trace(...).pack(weights)`` makes one."""
        self._kept = list(kept)
        self._forms = list(forms)
        self._layout = layout
        self._leaves: list[Any] | None = None

    @property
    def leaves(self) -> list[Any]:
        """All its arrays, as ``jax.tree.leaves`` gives them; made once, since a ``Packed`` never changes."""
        if self._leaves is None:
            self._leaves = jax.tree.leaves((self._kept, self._forms))
        return self._leaves

    @property
    def layout(self) -> PackLayout:
        """What it holds."""
        return self._layout

    def leaf(self, index: int) -> Any:
        """Original array leaf ``index`` if it is held as it was; else None."""
        return self._kept[self._layout.kept.index(index)] if index in self._layout.kept else None

    def form(self, key: PackKey) -> Any:
        """The packed form of a key, of whichever argument; None if it is not held."""
        number = self._layout.number_of(key.anywhere)
        return self._forms[number] if number is not None else None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays it holds."""
        # NumPy has no dtype for random keys; they know their own size.
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in self.leaves)

    def __repr__(self) -> str:
        """A one-line summary."""
        held = f"{len(self._kept)} plain leaves, {len(self._forms)} packed forms"
        return f"Packed({held}, {self.nbytes / 1e6:.1f} MB)"

    def tree_flatten_with_keys(self) -> tuple[Any, PackLayout]:
        """Children with keys, and the layout."""
        key = jax.tree_util.DictKey
        return ((key("kept"), self._kept), (key("forms"), self._forms)), self._layout

    def tree_flatten(self) -> tuple[Any, PackLayout]:
        """Children and the layout."""
        return (self._kept, self._forms), self._layout

    @classmethod
    def tree_unflatten(cls, layout: PackLayout, children: Any) -> Packed:
        """Inverse of flattening."""
        packed = object.__new__(cls)
        packed._kept, packed._forms = children
        packed._layout = layout
        packed._leaves = None
        return packed
