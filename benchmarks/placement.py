"""Whether it matters which device has which vocabulary rows: recall of DA-TOP-k on the bundled model's own logits.

    python benchmarks/placement.py

Vocabulary ids are ordered by frequency, so contiguous shards are skewed; spread, id v is on device v modulo their
number. The formula is the expectation for rows placed at random (``hire_xform.mesh_plan.da_top_k_recall``). Selection
alone is measured: the scores are the exact logits.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from hire_xform.lowering import da_top_k
from hire_xform.mesh_plan import da_top_k_recall

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from tiny_lm import model as lm  # noqa: E402

WINDOWS, LENGTH, WANTED = 32, 128, 32


def recalls(logits, best, taken, shards):
    """Of the wanted ids ``best [P, WANTED]``, the share found; and the share of positions whose arg max is found."""
    vocab = logits.shape[1]
    spread = np.arange(vocab).reshape(-1, shards).T.reshape(-1)  # id at each place, one device after another
    found = []
    for order in (np.arange(vocab), spread):
        places = np.asarray(da_top_k(logits[:, order], taken, shards)[1])
        ids = np.sort(order[places], axis=1)
        hit = np.stack([np.isin(b, i, assume_unique=True) for b, i in zip(best, ids, strict=True)])
        found.append((hit.mean(), hit[:, 0].mean()))
    return found


def main():
    """Prints the table."""
    params = lm.load(EXAMPLES / "tiny_lm" / "weights.safetensors")
    tokens = np.load(EXAMPLES / "tiny_lm" / "heldout.npy")[: WINDOWS * LENGTH].reshape(WINDOWS, LENGTH)
    logits = jnp.concatenate([jax.jit(lm.forward)(params, jnp.asarray(window)[None])[0] for window in tokens])
    best = np.asarray(jax.lax.top_k(logits, WANTED)[1])
    table = Table(title=f"{len(best):,} positions, {logits.shape[1]:,} logits, the {WANTED} largest wanted")
    for name in ("devices", "taken", "contiguous", "spread", "formula", "arg max: contiguous", "spread"):
        table.add_column(name, justify="right")
    for shards in (4, 8, 16):
        for taken in (32, 64, 128, 256):
            (near, first), (far, first_far) = recalls(logits, best, taken, shards)
            formula = da_top_k_recall(logits.shape[1], WANTED, taken, shards)
            table.add_row(
                str(shards), str(taken), *(f"{v:.4f}" for v in (near, far, formula)), f"{first:.4f}", f"{first_far:.4f}"
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
