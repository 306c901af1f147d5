"""Packs weights with a progress bar when there is much to do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from hire_xform.passes.decisions import PackKey
from hire_xform.passes.pack import pack_array, packing_bytes
from hire_xform.passes.provenance import Root

# Below this many bytes packing is over before a bar could be read.
SHOW_FROM = 256 << 20


def pack_keys(keys: Sequence[PackKey], leaf_of: Callable[[Root], Any], progress: bool | None) -> dict[PackKey, Any]:
    """All packed forms of some keys.

    Args:
      keys: what to pack.
      leaf_of: the plain array of a root.
      progress: show a bar; None shows one on a terminal when at least ``SHOW_FROM`` bytes are read.
    """
    if progress is None:
        progress = sys.stderr.isatty() and packing_bytes(keys, leaf_of) >= SHOW_FROM
    if not progress or not keys:
        return {key: pack_array(key, leaf_of(key.recipe.root)) for key in keys}
    columns = (TextColumn("packing weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("pack", total=packing_bytes(keys, leaf_of))
        made = {}
        for key in keys:
            made[key] = jax.block_until_ready(pack_array(key, leaf_of(key.recipe.root)))
            bar.advance(task, packing_bytes([key], leaf_of))
        return made
