"""Remembers packed forms of plain weights between calls."""

from __future__ import annotations

import threading
import warnings
import weakref
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from hire_xform.call.packing import Told, pack_keys
from hire_xform.call.stages import Traced
from hire_xform.errors import HireWarning
from hire_xform.passes.ir import compat
from hire_xform.passes.plan.decisions import PackKey
from hire_xform.passes.weights.recipe import Root

# A weight leaf that was packed this many times is reported once.
REPACK_LIMIT = 3


class PackMemory:
    """Packed forms of plain weights, remembered by the identity of the leaf they were made from.

    ``jax.Array``s are immutable, so identity is sound; NumPy arrays are not, so they are fingerprinted by content. Only
    the latest leaf of each form is remembered, and it is not kept alive. Threads may share it.
    """

    def __init__(self) -> None:
        """Empty."""
        # Marks with the form that was made of what they mark: replaced as one, and read without the lock.
        self._made: dict[PackKey, tuple[list[Any], Any]] = {}
        self._times: dict[PackKey, int] = {}
        self._told = False
        # Held while packing, so that threads do not pack the same weights at once. No user's code runs under it.
        self._lock = threading.RLock()

    def forms(
        self, keys: Sequence[PackKey], plain: dict[Root, Any], traced: Traced, progress: Told | None = None
    ) -> dict[PackKey, Any]:
        """The packed forms of these keys of these weights, made or remembered; see ``pack_keys`` for ``progress``."""
        leaves = {root: plain.get(root) for key in keys for root in key.recipe.roots}
        leaves = {root: traced.const(root) if root.kind == "const" else leaf for root, leaf in leaves.items()}
        marks = {root: _mark(leaf) for root, leaf in leaves.items()}
        found: dict[PackKey, Any] = {}
        if not self._recall(keys, marks, found):
            with self._lock:  # whoever held it may have packed these very weights
                self._recall(keys, marks, found)
                often = self._make([key for key in keys if key not in found], leaves, marks, found, progress)
            if often is not None:
                self._tell(often, traced)
        return {key: found[key] for key in keys}

    def drop(self, keys: Iterable[PackKey]) -> None:
        """Forgets packed forms that are read no more; who reads one after all gets it made again."""
        with self._lock:
            for key in keys:
                self._made.pop(key, None)

    def _recall(self, keys: Sequence[PackKey], marks: dict[Root, Any], found: dict[PackKey, Any]) -> bool:
        """Puts what is remembered of these weights into ``found``; True when that is all of it."""
        for key in keys:
            made = self._made.get(key)
            if made is not None and all(map(_same, made[0], _marks(key, marks))):
                found[key] = made[1]
        return len(found) == len(keys)

    def _make(
        self,
        missing: list[PackKey],
        leaves: dict[Root, Any],
        marks: dict[Root, Any],
        found: dict[PackKey, Any],
        progress: Told | None,
    ) -> PackKey | None:
        """Packs what is missing; returns what has been packed too often, unless that was told."""
        for key in missing:
            self._made.pop(key, None)  # free the old form before the new one is made
        for key, form in pack_keys(missing, leaves.__getitem__, progress).items():
            self._times[key] = self._times.get(key, 0) + 1
            self._made[key] = _marks(key, marks), form
            found[key] = form
        often = [key for key in missing if self._times[key] >= REPACK_LIMIT]
        if not often or self._told:
            return None
        self._told = True
        return often[0]

    def _tell(self, key: PackKey, traced: Traced) -> None:
        warnings.warn(
            f"{traced.name(key.recipe.root)} was packed {self._times[key]} times because it was another array each "
            "time; packing reads all of it. The result is right. Pass the same array again, or pack once with "
            "step.trace(...).pack(weights)",
            HireWarning,
            stacklevel=6,
        )


def _marks(key: PackKey, marks: dict[Root, Any]) -> list[Any]:
    """Those of all leaves that a form is made of."""
    return [marks[root] for root in key.recipe.roots]


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
