"""Whether it matters which device has which vocabulary rows: recall of sharded selection on the bundled model.

    python benchmarks/placement.py

Vocabulary ids are ordered by frequency, so contiguous blocks of rows are skewed; distributed cyclically, id v is on
device v modulo their number. One step that takes the 32 largest logits is run with weights packed either way: what the
library does with that step, and what it does with one whose logits are read by their place. Recall is the share of the
dense 32 among those it finds. The formula is the expectation for rows placed at random
(``hire_xform.mesh_plan.da_top_k_recall``).
"""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=16"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import hire_xform as hx
from hire_xform.mesh_plan import da_top_k_recall

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from observe import observe  # noqa: E402
from tiny_lm import model as lm  # noqa: E402

WINDOWS, LENGTH, WANTED = 32, 128, 32
FORCE = (hx.Rule("*", force=True),)


def projected(params, window):
    """What the model projects to its vocabulary, ``[LENGTH, d]``: the operand of its last product."""
    program = jax.make_jaxpr(lm.forward)(params, window)
    _, seen = observe(program, jax.tree.leaves((params, window)), lambda path, eqn: "dot_general" in path)
    return seen[-1][0][0].reshape(LENGTH, -1)


def largest(w, x):
    """The wanted logits of one token ``[d]``."""
    return jax.lax.top_k(x @ w["head"].T, WANTED)


def every(w, x):
    """All logits of one token."""
    return x @ w["head"].T


def recalls(head, xs, best, taken, shards):
    """Of the wanted ids ``best [P, WANTED]``, the share found, and the share of positions whose arg max is found."""
    mesh = jax.make_mesh((shards,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:shards])
    w = {"head": jax.device_put(head, NamedSharding(mesh, PartitionSpec("model")))}
    one = jax.ShapeDtypeStruct(xs.shape[1:], xs.dtype)
    step = hx.sparsify(largest, config=hx.Config(vocab=hx.Vocab(candidates=taken, fill="-inf"), rules=FORCE))
    by_place = hx.sparsify(every, config=hx.Config(vocab=hx.Vocab(candidates=taken), rules=FORCE))
    run = jax.jit(jax.vmap(step, in_axes=(None, 0)))
    found = []
    for packing, layout in ((by_place, "contiguous"), (step, "cyclically")):
        traced = packing.trace(w, one)
        assert layout in traced.explain()
        values, ids = (np.asarray(part) for part in run(traced.pack(w), xs))
        hit = [np.isin(b, i[np.isfinite(v)]) for b, i, v in zip(best, ids, values, strict=True)]
        found.append((np.mean(hit), np.mean([h[0] for h in hit])))
    return found


def main():
    """Prints the table."""
    params = lm.load(EXAMPLES / "tiny_lm" / "weights.safetensors")
    tokens = np.load(EXAMPLES / "tiny_lm" / "heldout.npy")[: WINDOWS * LENGTH].reshape(WINDOWS, LENGTH)
    xs = jnp.concatenate([projected(params, jnp.asarray(window)[None]) for window in tokens])
    head = jnp.asarray(params["embedding"])
    best = np.asarray(jax.lax.top_k(xs @ head.T, WANTED)[1])
    table = Table(title=f"{len(best):,} positions, {len(head):,} logits, the {WANTED} largest wanted, int8 predictor")
    for name in ("devices", "taken", "contiguous", "cyclic", "formula", "arg max: contiguous", "cyclic"):
        table.add_column(name, justify="right")
    for shards in (4, 8, 16):
        for taken in (32, 64, 128, 256):
            (near, first), (far, first_far) = recalls(head, np.asarray(xs), best, taken, shards)
            formula = da_top_k_recall(len(head), WANTED, taken, shards)
            table.add_row(
                str(shards), str(taken), *(f"{v:.4f}" for v in (near, far, formula)), f"{first:.4f}", f"{first_far:.4f}"
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
