"""How large the model, its parts and the operands of single kernels are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What is run. The model of a step has them all; a head, and a stack of blocks, are parts of it."""

    d: int = 2048
    m: int = 8192
    vocab: int = 131072
    layers: int = 16
    blocks: int = 6
    heads: int = 16
    context: int = 64
    # Of the checks: rows, columns, how many are chosen; of how many scores how many are taken; scores that are open.
    rows: int = 16384
    columns: int = 4096
    chosen: int = 1024
    choices: tuple[tuple[int, int], ...] = ((8192, 512), (131072, 512))
    opened: int = 131072
    # Steps of a loop, bytes that are copied, and bytes of operands that no cache holds.
    steps: int = 32
    copied: int = 2 << 30
    uncached: int = 192 << 20


# By what --sizes says: a billion parameters; blocks and head of eight billion, of few layers; and what takes no time.
SIZES = {
    "1b": Sizes(),
    "8b": Sizes(d=4096, m=14336, vocab=128256, layers=4, blocks=3, heads=32),
    "small": Sizes(256, 512, 1024, 1, 1, 2, 8, 256, 256, 64, ((512, 32), (1024, 32)), 1024, 3, 1 << 20, 1),
}
