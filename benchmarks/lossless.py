"""Decodes with the bundled model, dense and certified, and counts every token that differs and every byte read.

    python benchmarks/lossless.py                    # 100,000 greedy tokens, about ten minutes on two cores
    python benchmarks/lossless.py --tokens 2000
    python benchmarks/lossless.py --weights examples/tiny_lm/topk_weights.safetensors    # those trained with a top-k

Predictors and sizes are those that a calibration chooses on greedy text from the first quarter of the held-out text.
The dense model then decodes greedily from windows of the rest. The certified step is given the same tokens, with a
cache of its own, and must find the same most likely token at every position. Bytes are those of the sizes that were
taken, dense runs included, beside what the calibration expects of them.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import hire_xform as hx

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from tiny_lm import model as lm  # noqa: E402

PROMPT = 32


def follow(params, cache, tokens):
    """Reads tokens one at a time; for each the most likely next one, its logit, and the one after it."""

    def body(cache, token):
        logits, cache = lm.decode_step(params, cache, token[None])
        best = jax.lax.top_k(logits[0], 2)
        return cache, (jnp.argmax(logits[0]), best[0])

    return jax.lax.scan(body, cache, tokens)[1]


def generate(params, cache, prompt, count):
    """Reads a prompt, then its own most likely tokens: every token read, and of each what ``follow`` gives."""

    def body(state, given):
        cache, previous = state
        token = jnp.where(given >= 0, given, previous)
        logits, cache = lm.decode_step(params, cache, token[None])
        best = jnp.argmax(logits[0])
        return (cache, best.astype(jnp.int32)), (token, best, jax.lax.top_k(logits[0], 2)[0])

    inputs = jnp.concatenate([prompt, jnp.full((count,), -1, jnp.int32)])
    return jax.lax.scan(body, (cache, jnp.int32(0)), inputs)[1]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="greedy tokens to decode in all")
    parser.add_argument("--length", type=int, default=288, help="tokens of one window, prompt included")
    parser.add_argument("--weights", type=Path, default=EXAMPLES / "tiny_lm" / "weights.safetensors")
    parser.add_argument("--calibration", type=int, default=96, help="windows to calibrate on")
    options = parser.parse_args()
    params = lm.load(options.weights)
    held_out = np.load(EXAMPLES / "tiny_lm" / "heldout.npy").astype(np.int32)
    cache = lm.init_cache(lm.config_of(params), batch=1, length=options.length)
    windows = -(-options.tokens // (options.length - PROMPT))
    quarter = len(held_out) // 4
    starts = np.linspace(quarter, len(held_out) - PROMPT, windows).astype(int)
    decode = jax.jit(generate, static_argnums=3)

    def greedy(start: int):
        return decode(params, cache, jnp.asarray(held_out[start : start + PROMPT]), options.length - PROMPT)

    fitting = [greedy(s)[0] for s in np.linspace(0, quarter - PROMPT, options.calibration).astype(int)]
    config = hx.lossless(rules=(hx.Rule("*", force=True),))
    calibration = hx.calibrate(lm.forward, [(params, window[None]) for window in fitting], config=config)
    step = hx.sparsify(follow, config=config, calibration=calibration)
    traced = step.trace(params, cache, fitting[0])
    plan, packed = traced.plan, traced.pack(params)

    seconds = {"dense": 0.0, "certified": 0.0}
    taken = {site.path: np.zeros(len(site.rungs), np.int64) for site in plan.sites}
    different: list[str] = []
    near, largest, tokens = 0, 0.0, 0
    for start in track(starts, "windows", console=Console(stderr=True)):
        begun = time.perf_counter()
        inputs, want, want_logits = jax.block_until_ready(greedy(start))
        middle = time.perf_counter()
        (got, got_logits), counts = jax.block_until_ready(step.with_rungs(packed, cache, inputs))
        seconds["dense"] += middle - begun
        seconds["certified"] += time.perf_counter() - middle
        differs = np.asarray(want != got)
        tokens += len(differs)
        gap = np.asarray(want_logits[:, 0] - want_logits[:, 1])
        near += int((gap < 1e-4).sum())
        for at in np.flatnonzero(differs):
            different.append(f"window {start}, position {at}: {got[at]} for {want[at]}, ahead by {gap[at]:.1e}")
        largest = max(largest, float(np.abs(np.asarray(want_logits[:, 0] - got_logits[:, 0])).max()))
        for path, count in counts.items():
            taken[path] += np.asarray(count)

    console = Console()
    table = Table(title=f"{tokens:,} tokens, {options.weights.name}, JAX {jax.__version__}, {jax.default_backend()}")
    names = ("site", "predictor", "exact, and of how many tokens", "of", "dense MB", "read MB", "expected", "read")
    for name in (*names, "dense runs"):
        table.add_column(name, justify="left" if name in names[:3] else "right")
    totals = {"all blocks": np.zeros(3), "all": np.zeros(3)}
    for site in plan.sites:
        counts = taken[site.path]
        read = sum(int(n) * rung.bytes for n, rung in zip(counts, site.rungs, strict=True)) / tokens
        # Inside the scan over a window: bytes of the plan are those of all its tokens.
        found = np.asarray([site.dense_bytes / options.length, read, site.sparse_bytes / options.length])
        totals["all"] += found
        totals["all blocks"] += found * (site.kind == "ffn")
        sizes = ", ".join(
            f"{n / tokens:.0f} in {r.stage}" if r.stage else f"{r.computed} ({n / tokens:.2%})"
            for n, r in zip(counts[:-1], site.rungs[:-1], strict=True)
        )
        cells = (_short(site.settings.spec), sizes, str(site.units), *_cells(found))
        table.add_row(site.kind, *cells, f"{counts[-1] / tokens:.3%}")
    for name, total in totals.items():
        table.add_row(name, "", "", "", *_cells(total), "")
    console.print(table)
    console.print(
        f"calibrated on {sum(len(w) for w in fitting):,} tokens: greedy text from prompts that are not decoded"
    )
    console.print(f"tokens that differ: {len(different)}; tokens whose two best logits are within 1e-4: {near}")
    for line in different:
        console.print(line)
    console.print(f"largest difference of the best logit: {largest:.1e}")
    console.print(
        f"time a token: dense {seconds['dense'] / tokens * 1e3:.2f} ms, certified "
        f"{seconds['certified'] / tokens * 1e3:.2f} ms; the model fits in the cache, where reading less is no gain"
    )


def _short(spec) -> str:
    return f"{type(spec).__name__}({', '.join(str(value) for value in vars(spec).values())})"


def _cells(found: np.ndarray) -> list[str]:
    dense, read, expected = found
    return [f"{dense / 1e6:.2f}", f"{read / 1e6:.2f}", f"{expected / dense:.1%}", f"{read / dense:.1%}"]


if __name__ == "__main__":
    main()
