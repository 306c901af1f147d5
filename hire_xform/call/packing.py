"""Packs weights, made sure to be those that were traced, with a progress bar when there is much to do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from hire_xform.call.leaves import is_array
from hire_xform.lowering.xla.huge_pages import on_huge_pages
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.static_values import value_key
from hire_xform.passes.pack.make import pack_array, packing_bytes, together
from hire_xform.passes.pack.packed import Packed, PackLayout
from hire_xform.passes.plan.decisions import PackKey
from hire_xform.passes.plan.forms import ROWS
from hire_xform.passes.plan.placement import placement_of
from hire_xform.passes.weights.recipe import Root

# How many bytes are packed, and of how many.
Told = Callable[[int, int], None]
# Below this many bytes packing is over before a bar could be read.
SHOW_FROM = 256 << 20


def pack_keys(
    keys: Sequence[PackKey], leaf_of: Callable[[Root], Any], progress: bool | None | Told
) -> dict[PackKey, Any]:
    """All packed forms of some keys.

    Args:
      keys: what to pack.
      leaf_of: the plain array of a root.
      progress: show a bar; None shows one on a terminal when at least ``SHOW_FROM`` bytes are read. Or what is told how
        many bytes are packed, and of how many.
    """
    total = packing_bytes(keys, leaf_of)
    if progress is not None and not isinstance(progress, bool):
        tell = progress
        return _packed(keys, leaf_of, lambda done: tell(done, total))
    if progress is None:
        progress = sys.stderr.isatty() and total >= SHOW_FROM
    if not progress or not keys:
        return _packed(keys, leaf_of, lambda done: None)
    columns = (TextColumn("packing weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("pack", total=total)
        return _packed(keys, leaf_of, lambda done: bar.update(task, completed=done))


def _packed(keys: Sequence[PackKey], leaf_of: Callable[[Root], Any], tell: Callable[[int], None]) -> dict[PackKey, Any]:
    made: dict[PackKey, Any] = {}
    done = 0
    for some in _alike(sorted(keys, key=lambda key: not key.is_rows), leaf_of):
        # One after the other: the temporaries of one are gone before those of the next are there.
        key = some[0] if len(some) == 1 else together(some)
        rows = made.get(replace(key, form=ROWS))
        leaves = [leaf_of(root) for root in key.recipe.roots]
        packed = jax.block_until_ready(pack_array(key, *leaves, rows=rows))
        made.update(zip(some, [packed] if len(some) == 1 else packed, strict=True))
        # Rows of a leaf may be read in place.
        on_huge_pages((leaves, packed))
        done += packing_bytes(some, leaf_of)
        tell(done)
    return made


def _alike(keys: Sequence[PackKey], leaf_of: Callable[[Root], Any]) -> list[list[PackKey]]:
    """The keys, those beside each other that are packed at once: of one weight that is on one device."""
    found: dict[Any, list[PackKey]] = {}
    for key in keys:
        alone = key.form.alike is None or any(placement_of(leaf_of(root)) is not None for root in key.recipe.roots)
        found.setdefault(key if alone else (key.recipe, key.form.alike), []).append(key)
    return list(found.values())


def make_packed(key: int | str, weight: Any, layout: PackLayout, progress: bool | None) -> Packed:
    """Packs a weights argument.

    Args:
      key: its position or name, for messages.
      weight: the argument.
      layout: what is to be held.
      progress: as for ``pack_keys``.

    Raises:
      TypeError, ValueError: these are not the weights that were traced.
    """
    arrays = check_weights(key, weight, layout)
    forms = pack_keys(layout.keys, lambda root: arrays[root.index], progress)
    kept = [arrays[i] for i in layout.kept]
    on_huge_pages(kept)
    return Packed(kept, [forms[k] for k in layout.keys], layout)


def check_weights(key: int | str, weight: Any, layout: PackLayout) -> list[Any]:
    """The array leaves of a weights argument, checked against what was traced.

    Raises:
      TypeError, ValueError: structure, shape or dtype differ.
    """
    if isinstance(weight, Packed):
        raise TypeError(f"pack: argument {key!r} is already Packed; expected the plain weights")
    leaves, treedef = jax.tree_util.tree_flatten(weight)
    if treedef != layout.treedef:
        raise ValueError(
            f"pack: argument {key!r} has another structure than the weights that were traced; got {treedef}, expected "
            f"{layout.treedef}"
        )
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(weight)[0]]
    static = dict(layout.static)
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        same = is_array(leaf) if i not in static else value_key(leaf) == value_key(static[i])
        if not same:
            expected = f"{static[i]!r}" if i in static else "an array"
            raise TypeError(f"pack: weights{jax.tree_util.keystr(path)} is {leaf!r}; expected {expected} as traced")
    arrays = [(path, leaf) for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)) if i not in static]
    for (path, leaf), aval, placed in zip(arrays, layout.avals, layout.placed, strict=True):
        got = jax.typeof(leaf) if not isinstance(leaf, jax.ShapeDtypeStruct) else leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"pack: weights{jax.tree_util.keystr(path)} is a ShapeDtypeStruct; expected an array")
        if tuple(got.shape) != tuple(aval.shape) or got.dtype != aval.dtype:
            raise ValueError(
                f"pack: weights{jax.tree_util.keystr(path)} is {got.dtype}{list(got.shape)}; expected "
                f"{aval.dtype}{list(aval.shape)} as traced"
            )
        is_placed = None if compat.is_tracer(leaf) else placement_of(leaf)
        same = is_placed == placed or (placed is not None and leaf.sharding.is_equivalent_to(placed, leaf.ndim))
        if not same and not compat.is_tracer(leaf):
            raise ValueError(
                f"pack: weights{jax.tree_util.keystr(path)} is placed as {placed_text(is_placed)}; expected "
                f"{placed_text(placed)}, as traced"
            )
    return [leaf for _, leaf in arrays]


def placed_text(sharding: Any) -> str:
    """Where a leaf is, for messages."""
    return "one device's" if sharding is None else f"{sharding.spec} of {dict(sharding.mesh.shape)}"
