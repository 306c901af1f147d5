"""A decoder cut over devices, dense and sparse, in one process or in several.

    python examples/sharded_decoder.py                  # one process with four CPU devices
    python examples/sharded_decoder.py --processes 4    # four processes with one device each, on this machine

Attention heads, hidden units and the vocabulary are cut over the mesh axis "model", as in Megatron-LM: each device
computes its part, and one sum over devices ends every attention and every feed-forward block. `hire_xform` rewrites the
device's part where it stands: each device predicts and picks among its own units and logits, so that no score travels.
Of a checkpoint each process reads the parts that its own devices hold, and no device ever holds a whole matrix.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import save_file

import hire_xform as hx

LAYERS, WIDTH, HEADS, HIDDEN, VOCAB, LENGTH = 4, 64, 8, 1024, 4096, 32
HEAD = WIDTH // HEADS

SPECS = {
    "embedding": P(),
    "query_key_value": P(None, None, None, "model"),
    "attention_out": P(None, "model"),
    "up": P(None, None, "model"),
    "down": P(None, "model"),
    "unembedding": P("model"),
}
SHAPES = {
    "embedding": (VOCAB, WIDTH),
    "query_key_value": (LAYERS, WIDTH, 3, HEADS, HEAD),
    "attention_out": (LAYERS, HEADS, HEAD, WIDTH),
    "up": (LAYERS, WIDTH, HIDDEN),
    "down": (LAYERS, HIDDEN, WIDTH),
    "unembedding": (VOCAB, WIDTH),
}
# Keys and values: [layers, 2, length, heads, head].
CACHE_SPEC = P(None, None, None, "model")


def norm(x: jax.Array) -> jax.Array:
    """Root mean square norm."""
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def own_part(w: dict[str, jax.Array], cache: jax.Array, position: jax.Array, token: jax.Array) -> Any:
    """What each device runs for one token: its heads, its hidden units, its logits. Returns the next token."""
    x = w["embedding"][token][None]

    def layer(x: jax.Array, slices: Any) -> Any:
        w, cache = slices
        query, key, value = jnp.einsum("td,dchk->chk", norm(x), w["query_key_value"])
        cache = lax.dynamic_update_slice(cache, jnp.stack([key, value])[:, None], (0, position, 0, 0))
        score = jnp.einsum("hk,shk->hs", query, cache[0]) / HEAD**0.5
        weight = jax.nn.softmax(jnp.where(jnp.arange(LENGTH) <= position, score, -jnp.inf))
        x = x + lax.psum(jnp.einsum("hs,shk,hkd->d", weight, cache[1], w["attention_out"]), "model")
        return x + lax.psum(jax.nn.relu(norm(x) @ w["up"]) @ w["down"], "model"), cache

    stacked = {name: w[name] for name in ("query_key_value", "attention_out", "up", "down")}
    x, cache = lax.scan(layer, x, (stacked, cache))
    logits = (norm(x) @ w["unembedding"].T)[0]
    # Each device offers its best: one value and one number of a token travel.
    best, number = logits.max(), logits.argmax() + lax.axis_index("model") * logits.shape[0]
    return lax.pmin(jnp.where(best == lax.pmax(best, "model"), number, VOCAB), "model"), cache


def decode_step(mesh: Mesh) -> Any:
    """The step over a mesh: (weights, cache, position, token) to (next token, cache)."""
    return jax.shard_map(own_part, mesh=mesh, in_specs=(SPECS, CACHE_SPEC, P(), P()), out_specs=(P(), CACHE_SPEC))


def write_checkpoint(path: Path) -> None:
    """Weights of a model that nobody trained."""
    rng = np.random.default_rng(0)
    made = {name: rng.normal(size=shape) / WIDTH**0.5 for name, shape in SHAPES.items()}
    save_file({name: array.astype(np.float32) for name, array in made.items()}, path)


def read_checkpoint(path: Path, mesh: Mesh) -> dict[str, jax.Array]:
    """The weights, of which this process reads what its own devices hold."""
    with safe_open(path, framework="numpy") as file:

        def load(name: str) -> jax.Array:
            stored = file.get_slice(name)
            return jax.make_array_from_callback(
                tuple(stored.get_shape()), NamedSharding(mesh, SPECS[name]), lambda index: stored[index]
            )

        return {name: load(name) for name in SPECS}


def generate(step: Any, weights: Any, mesh: Mesh, count: int) -> list[int]:
    """Greedy tokens."""
    shape = (LAYERS, 2, LENGTH, HEADS, HEAD)
    cache = jax.jit(lambda: jnp.zeros(shape), out_shardings=NamedSharding(mesh, CACHE_SPEC))()
    token: Any = np.int32(1)
    found: list[int] = []
    for position in range(count):
        token, cache = step(weights, cache, np.int32(position), token)
        found.append(int(token))
    return found


def run(checkpoint: Path, count: int) -> None:
    """Decodes dense and sparse over all devices of all processes, and prints both."""
    mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    weights = read_checkpoint(checkpoint, mesh)
    step = decode_step(mesh)
    # Toy sizes: a rule rewrites what the cost model would leave dense. The blocks are ReLU, but were not trained.
    config = hx.Config(vocab=hx.Vocab(candidates=256), ffn=hx.Ffn(active=0.75), rules=(hx.Rule("*", force=True),))
    sparse = hx.sparsify(step, config=config)
    shape = jax.ShapeDtypeStruct((LAYERS, 2, LENGTH, HEADS, HEAD), jnp.float32)
    traced = sparse.trace(weights, shape, np.int32(0), np.int32(0))
    packed = traced.pack(weights)
    if jax.process_index() == 0:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices")
        print(traced.explain())
    print("dense ", generate(jax.jit(step), weights, mesh, count))
    print("sparse", generate(sparse, packed, mesh, count), flush=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> int:
    """Runs, or starts the processes that do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine, one device each")
    parser.add_argument("--devices", type=int, default=4, help="devices of a single process")
    parser.add_argument("--tokens", type=int, default=16, help=f"tokens to decode, up to {LENGTH}")
    parser.add_argument("--checkpoint", type=Path, help="where the weights are; made if left out")
    parser.add_argument("--process", type=int, help="run as this one of the processes")
    parser.add_argument("--port", type=int, help="with --process: where the processes meet")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if options.process is not None:
        jax.config.update("jax_num_cpu_devices", 1)
        jax.distributed.initialize(f"127.0.0.1:{options.port}", options.processes, options.process)
        run(options.checkpoint, options.tokens)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or Path(folder) / "model.safetensors"
        if options.checkpoint is None:
            write_checkpoint(checkpoint)
        if options.processes == 1:
            jax.config.update("jax_num_cpu_devices", options.devices)
            run(checkpoint, options.tokens)
            return 0
        command = [sys.executable, __file__, "--processes", str(options.processes), "--port", str(free_port())]
        command += ["--tokens", str(options.tokens), "--checkpoint", str(checkpoint)]
        numbers = range(options.processes)
        children = [
            subprocess.Popen([*command, "--process", str(i)], stdout=subprocess.PIPE, text=True) for i in numbers
        ]
        for child in children:
            print(child.communicate()[0], end="")
        return max(child.returncode for child in children)


if __name__ == "__main__":
    sys.exit(main())
