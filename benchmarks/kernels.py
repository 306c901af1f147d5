"""Times the portable lowering against the best dense spelling, on matrices far larger than the last-level cache.

    python benchmarks/kernels.py                 # about 6 GB of memory, two minutes
    python benchmarks/kernels.py --copies 2 --repeats 3

Every row of the tables comes from one run. Each timed call takes other weights and another input than the one before
it, so no cache serves twice; a feed-forward row is the mean over a stack of layers run as one program.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from hire_xform.lowering.engine.block import UpProduct, ffn
from hire_xform.lowering.engine.bytes_read import ffn_bytes, vocab_bytes
from hire_xform.lowering.engine.head import vocab_logits
from hire_xform.lowering.predict.low_rank import LowRank
from hire_xform.lowering.predict.predictors import Predictor, pack_predictor
from hire_xform.lowering.predict.quantized import Quantized


def median_ms(fun: Callable[..., Any], calls: Sequence[tuple[Any, ...]], repeats: int) -> float:
    """Median wall time of a call in milliseconds, cycling through ``calls``, compilation and first touch left out."""
    fun = jax.jit(fun)
    for args in calls:
        jax.block_until_ready(fun(*args))
    times = []
    for _ in range(repeats):
        for args in calls:
            start = time.perf_counter()
            jax.block_until_ready(fun(*args))
            times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def _normal(seed: int, shape: tuple[int, ...], scale: float) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32) * scale


def _spec_name(spec: Predictor) -> str:
    if isinstance(spec, Quantized):
        return f"int{spec.bits}"
    return f"low rank {spec.rank:g} d" + (", int8" if spec.bits else "")


def _packed_copies(rows: Sequence[jax.Array], spec: Predictor) -> list[dict[str, jax.Array]]:
    """A predictor for each matrix. The decomposition is made once: timing needs the shapes, not the quality."""
    first = jax.jit(pack_predictor, static_argnums=1)(rows[0], spec)
    return [first, *(jax.tree.map(lambda a: jnp.roll(a, 1, axis=0), first) for _ in rows[1:])]


def _add(table: Table, name: str, read: int, ms: float, dense_ms: float) -> None:
    table.add_row(name, f"{read / 1e6:.1f}", f"{ms:.3f}", f"{dense_ms / ms:.2f}x", f"{read / ms / 1e6:.1f}")


def _table(title: str) -> Table:
    table = Table(title=title)
    table.add_column("what is run")
    for column in ("MB read", "ms (median)", "times dense", "GB/s"):
        table.add_column(column, justify="right")
    return table


def head_table(vocab: int, d: int, candidates: int, copies: int, repeats: int) -> Table:
    """One token's hidden state to the id of the largest logit."""
    rows = [_normal(seed, (vocab, d), 0.02) for seed in range(copies)]
    xs = [_normal(100 + seed, (1, d), 1.0) for seed in range(3 * copies)]
    # Predictors are smaller than the matrix, so they need more copies to outgrow the cache.
    calls = [(x, rows[i % copies]) for i, x in enumerate(xs)]
    dense = {
        "dense, W @ x": lambda x, w: jnp.argmax(w @ x[0]),
        "dense, x @ W.T": lambda x, w: jnp.argmax(x @ w.T, axis=-1),
    }
    best = min((median_ms(fun, calls, repeats), name) for name, fun in dense.items())
    # The other storage, [d, V]: one copy at a time beside the first.
    turned = [(x, w) for x, w in zip(xs, [jnp.asarray(rows[0].T), jnp.asarray(rows[1 % copies].T)], strict=False)]
    best = min(best, (median_ms(lambda x, w: jnp.argmax(x @ w, axis=-1), turned, repeats * 2), "dense, x @ W (d x V)"))
    del turned
    table = _table(f"head {vocab} x {d}, f32, one token, to the token id; {candidates} candidates")
    _add(table, best[1], vocab * d * 4, best[0], best[0])
    specs = (Quantized(8), Quantized(4), LowRank(0.25), LowRank(0.125), LowRank(0.25, bits=8), LowRank(0.125, bits=8))
    for spec in specs:
        packed = _packed_copies([rows[0]] * len(xs), spec)

        def to_id(x: jax.Array, w: jax.Array, p: Any, spec: Predictor = spec) -> jax.Array:
            logits = vocab_logits(x, w, p, spec, candidates=candidates, out_dtype=jnp.float32)
            return jnp.argmax(logits, axis=-1)

        ms = median_ms(to_id, [(x, w, p) for (x, w), p in zip(calls, packed, strict=True)], repeats)
        read = vocab_bytes(1, vocab, d, jnp.float32, spec, candidates=candidates)
        _add(table, _spec_name(spec), read, ms, best[0])
        del packed
    return table


def ffn_table(d: int, m: int, layers: int, repeats: int) -> Table:
    """A stack of ReLU feed-forward blocks, one token; figures are per layer."""
    ups = [_normal(seed, (m, d), d**-0.5) for seed in range(layers)]
    downs = [_normal(1000 + seed, (m, d), m**-0.5) for seed in range(layers)]
    norms = [jnp.linalg.norm(down, axis=1) for down in downs]
    xs = [_normal(2000 + seed, (1, d), 1.0) for seed in range(4)]
    dense = {
        "dense, up m x d, down m x d": lambda x, a, b: jax.nn.relu(x @ a.T) @ b,
        "dense, up d x m, down m x d": lambda x, a, b: jax.nn.relu(x @ a) @ b,
    }

    def dense_stack(block: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def run(x: jax.Array, ups: list[jax.Array], downs: list[jax.Array]) -> jax.Array:
            for up, down in zip(ups, downs, strict=True):
                x = x + 0.1 * block(x, up, down)
            return x

        return run

    timed = []
    for i, (name, block) in enumerate(dense.items()):
        stored = ups if i == 0 else [jnp.asarray(up.T) for up in ups]
        timed.append((median_ms(dense_stack(block), [(x, stored, downs) for x in xs], repeats) / layers, name))
        del stored
    best_ms, best_name = min(timed)
    table = _table(f"feed-forward block d {d}, m {m}, ReLU, f32, one token; per layer of {layers}")
    _add(table, best_name, 2 * m * d * 4, best_ms, best_ms)
    for spec in (Quantized(8), LowRank(0.25), LowRank(0.25, bits=8), LowRank(0.125, bits=8)):
        packed = _packed_copies(ups, spec)
        for share in (0.0625, 0.125, 0.25):
            active = int(share * m)

            def run(
                x: jax.Array, ups: Any, downs: Any, norms: Any, packed: Any, spec: Predictor = spec, k: int = active
            ) -> jax.Array:
                for up, down, norm, pack in zip(ups, downs, norms, packed, strict=True):
                    product = UpProduct(x=x, rows=up, packed=pack, spec=spec, dtype=jnp.float32)
                    result, _ = ffn(
                        [product],
                        lambda hiddens, gather: jax.nn.relu(hiddens[0]),
                        down,
                        down_norms=norm,
                        active=k,
                        out_dtype=jnp.float32,
                    )
                    x = x + 0.1 * result
                return x

            ms = median_ms(run, [(x, ups, downs, norms, packed) for x in xs], repeats) / layers
            read = ffn_bytes(1, m, [(d, jnp.float32, spec)], d, jnp.float32, active=active)
            _add(table, f"{_spec_name(spec)}, {share:.2%} active", read, ms, best_ms)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--d", type=int, default=1024, help="columns of the head")
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--copies", type=int, default=3, help="distinct heads, cycled")
    parser.add_argument("--layers", type=int, default=12, help="feed-forward blocks run one after the other")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("head", "ffn"))
    args = parser.parse_args(argv)
    console = Console(width=110)
    console.print(f"jax {jax.__version__}, {jax.default_backend()}, {jax.devices()[0].device_kind}")
    if args.only != "ffn":
        console.print(head_table(args.vocab, args.d, args.candidates, args.copies, args.repeats))
    if args.only != "head":
        console.print(ffn_table(2048, 8192, args.layers, args.repeats))


if __name__ == "__main__":
    main()
