"""What sharded decoding sends: bytes that each device puts into collectives for a token, read off compiled programs.

    python benchmarks/sharded.py

Nothing is timed: the devices are parts of one CPU. The middle row is the same subgraph with one ``lax.top_k`` over all
scores where the sparse one has DA-TOP-k, partitioned by the compiler.
"""

import os
import sys
from functools import partial
from pathlib import Path

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import jax
import jax.numpy as jnp
from collectives import collectives
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hire_xform as hx
from hire_xform.lowering.predict.predictors import pack_predictor, predict_scores
from hire_xform.lowering.primitives.combine_rows import combine_rows
from hire_xform.lowering.primitives.select_rows import select_rows_dot

D, M, V = 256, 1024, 8192
ACTIVE, CANDIDATES = 0.125, 64
P = PartitionSpec


def block(w, x):
    """A dense feed-forward block."""
    return jax.nn.relu(x @ w["up"]) @ w["down"]


def block_of_all(packed, w, x):
    """The sparse block, its units chosen by one top-k over all scores."""
    scores = jax.nn.relu(predict_scores(x, packed["up"], hx.Quantized(8), M)) * packed["norms"]
    index = lax.top_k(jnp.square(scores[0]), int(ACTIVE * M))[1]
    return combine_rows(jax.nn.relu(select_rows_dot(x, w["up"].T, index)), w["down"], index)


def head(w, x):
    """The dense arg max."""
    return jnp.argmax(x @ w["head"], axis=-1)


def head_of_all(packed, w, x):
    """The sparse arg max, its candidates chosen by one top-k over all scores."""
    scores = predict_scores(x, packed["head"], hx.Quantized(8), V)
    index = lax.top_k(scores[0], CANDIDATES)[1]
    return jnp.argmax(scores.at[:, index].set(select_rows_dot(x, w["head"].T, index)), axis=-1)


def sent(jitted, *operands):
    """Bytes a device sends, and the collectives."""
    found = collectives(jitted.lower(*operands).compile())
    names = ", ".join(f"{sum(c.op == op for c in found)} {op}" for op in dict.fromkeys(c.op for c in found))
    return f"{sum(c.sent for c in found):>9,d} B  {names}"


def main():
    """Prints the table."""
    print(f"f32, one token; block {D} x {M}, {ACTIVE:.1%} of the units; head {V} x {D}, {CANDIDATES} candidates")
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"up": (D, M), "down": (M, D), "head": (D, V)}
    plain = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    specs = {"up": P(None, "model"), "down": P("model", None), "head": P(None, "model")}
    config = hx.Config(
        vocab=hx.Vocab(candidates=CANDIDATES), ffn=hx.Ffn(active=ACTIVE), rules=(hx.Rule("*", force=True),)
    )
    for count in (2, 4, 8):
        mesh = jax.make_mesh((count,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
        put = partial(lambda mesh, a, spec: jax.device_put(a, NamedSharding(mesh, spec)), mesh)
        w = {name: put(a, specs[name]) for name, a in plain.items()}
        x = put(jnp.ones((1, D)), P())
        packed = {
            name: jax.tree.map(lambda a, put=put: put(a, P("model")), pack_predictor(plain[name].T, hx.Quantized(8)))
            for name in ("up", "head")
        }
        packed["norms"] = put(jnp.linalg.norm(plain["down"], axis=1), P("model"))
        print(f"{count} devices")
        for name, dense, of_all in (("block", block, block_of_all), ("arg max", head, head_of_all)):
            step = hx.sparsify(dense, config=config)
            jitted, operands = step.program(w, x)
            print(f"  {name:8s} dense               {sent(jax.jit(dense), w, x)}")
            print(f"  {name:8s} one lax.top_k       {sent(jax.jit(of_all), packed, w, x)}")
            print(f"  {name:8s} DA-TOP-k            {sent(jitted, *operands)}")
            jitted, operands = hx.sparsify(dense, config=hx.lossless(rules=config.rules)).program(w, x)
            print(f"  {name:8s} certified           {sent(jitted, *operands)}")


if __name__ == "__main__":
    main()
