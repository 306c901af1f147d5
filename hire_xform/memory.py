"""Remembers packed forms of plain weights between calls."""

from __future__ import annotations

import warnings
import weakref
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hire_xform.errors import HireWarning
from hire_xform.packing import pack_keys
from hire_xform.passes import compat
from hire_xform.passes.decisions import PackKey
from hire_xform.passes.provenance import Root
from hire_xform.stages import Traced

# A weight leaf that was packed this many times is reported once.
REPACK_LIMIT = 3


class PackMemory:
    """Packed forms of plain weights, remembered by the identity of the leaf they were made from.

    ``jax.Array``s are immutable, so identity is sound; NumPy arrays are not, so they are fingerprinted by content. Only
    the latest leaf of each form is remembered, and it is not kept alive.
    """

    def __init__(self) -> None:
        """Empty."""
        self._numbers: dict[PackKey, str] = {}
        self._keys: dict[str, PackKey] = {}
        self._made: dict[PackKey, tuple[Any, Any]] = {}
        self._times: dict[PackKey, int] = {}
        self._told = False

    def number(self, key: PackKey) -> str:
        """A short name for a key, stable for this memory."""
        if key not in self._numbers:
            name = f"{len(self._numbers):06d}"
            self._numbers[key] = name
            self._keys[name] = key
        return self._numbers[key]

    def key(self, number: str) -> PackKey:
        """The key of a short name."""
        return self._keys[number]

    def forms(self, keys: Sequence[PackKey], plain: dict[Root, Any], traced: Traced) -> dict[PackKey, Any]:
        """The packed forms of these keys, made or remembered."""

        def leaf_of(root: Root) -> Any:
            return traced.const(root) if root.kind == "const" else plain[root]

        marks = {root: _mark(leaf_of(root)) for root in dict.fromkeys(k.recipe.root for k in keys)}
        missing = [k for k in keys if k not in self._made or not _same(self._made[k][0], marks[k.recipe.root])]
        for key in missing:
            self._made.pop(key, None)  # free the old form before the new one is made
        made = pack_keys(missing, leaf_of, None)
        for key, form in made.items():
            self._times[key] = self._times.get(key, 0) + 1
            self._made[key] = (marks[key.recipe.root], form)
        often = [k for k in missing if self._times[k] >= REPACK_LIMIT]
        if often and not self._told:
            self._told = True
            warnings.warn(
                f"{traced.name(often[0].recipe.root)} was packed {self._times[often[0]]} times because it was another "
                "array each time; packing reads all of it. The result is right. Pass the same array again, or pack "
                "once with step.trace(...).pack(weights)",
                HireWarning,
                stacklevel=4,
            )
        return {k: self._made[k][1] for k in keys}


def _mark(leaf: Any) -> Any:
    """What a leaf is recognised by: a weak reference, or a fingerprint of mutable content."""
    if isinstance(leaf, jax.Array) and not compat.is_tracer(leaf):
        return weakref.ref(leaf)
    array = np.ascontiguousarray(leaf)
    data = memoryview(array.view(np.uint8).reshape(-1))  # type: ignore[arg-type]
    return array.shape, str(array.dtype), zlib.crc32(data), zlib.adler32(data), len(data)


def _same(mark: Any, other: Any) -> bool:
    if isinstance(mark, weakref.ref) and isinstance(other, weakref.ref):
        return mark() is not None and mark() is other()
    return not isinstance(mark, weakref.ref) and not isinstance(other, weakref.ref) and mark == other
