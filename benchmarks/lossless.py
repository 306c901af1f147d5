"""Decodes with the bundled model, dense and certified, and counts every token that differs and every fallback.

    python benchmarks/lossless.py                    # 100,000 greedy tokens, about ten minutes on two cores
    python benchmarks/lossless.py --tokens 2000 --active 0.25

The dense model decodes greedily from windows of the held-out text. The certified step is given the same tokens, with a
cache of its own, and must find the same most likely token at every position. Sizes are one for each block, in order.
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
    """Greedy tokens after a prompt, with all their inputs: ``[len(prompt) + count]``."""

    def body(state, given):
        cache, previous = state
        token = jnp.where(given >= 0, given, previous)
        logits, cache = lm.decode_step(params, cache, token[None])
        return (cache, jnp.argmax(logits[0]).astype(jnp.int32)), token

    inputs = jnp.concatenate([prompt, jnp.full((count,), -1, jnp.int32)])
    return jax.lax.scan(body, (cache, jnp.int32(0)), inputs)[1]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="greedy tokens to decode in all")
    parser.add_argument("--length", type=int, default=288, help="tokens of one window, prompt included")
    parser.add_argument("--candidates", type=int, default=64, help="rows of the head computed exactly")
    parser.add_argument("--active", default="0.56,0.18,0.27,0.3", help="share of the units of each block")
    options = parser.parse_args()
    params = lm.load(EXAMPLES / "tiny_lm" / "weights.safetensors")
    held_out = np.load(EXAMPLES / "tiny_lm" / "heldout.npy").astype(np.int32)
    cache = lm.init_cache(lm.config_of(params), batch=1, length=options.length)
    windows = -(-options.tokens // (options.length - PROMPT))
    starts = np.linspace(0, len(held_out) - PROMPT, windows).astype(int)

    vocab = hx.Vocab(certify=True, candidates=options.candidates)
    rules = [hx.Rule("*", force=True)]
    sample = jnp.zeros(options.length, jnp.int32)
    found = hx.sparsify(follow, config=hx.Config(vocab=vocab, ffn=hx.Ffn(certify=True), rules=tuple(rules)))
    blocks = [site.path for site in found.trace(params, cache, sample).plan.sites if site.kind == "ffn"]
    shares = [float(share) for share in options.active.split(",")]
    shares = shares * len(blocks) if len(shares) == 1 else shares
    rules += [hx.Rule(p, ffn=hx.Ffn(certify=True, active=a)) for p, a in zip(blocks, shares, strict=True)]
    step = hx.sparsify(follow, config=hx.Config(vocab=vocab, ffn=hx.Ffn(certify=True), rules=tuple(rules)))
    plan = step.trace(params, cache, sample).plan
    packed = step.trace(params, cache, sample).pack(params)

    dense, decode = jax.jit(follow), jax.jit(generate, static_argnums=3)
    seconds = {"dense": 0.0, "certified": 0.0}
    fallbacks: dict[str, int] = {}
    different, near, largest, tokens = 0, 0, 0.0, 0
    for start in track(starts, "windows", console=Console(stderr=True)):
        inputs = decode(params, cache, jnp.asarray(held_out[start : start + PROMPT]), options.length - PROMPT)
        begun = time.perf_counter()
        want, want_logits = jax.block_until_ready(dense(params, cache, inputs))
        middle = time.perf_counter()
        (got, got_logits), counts = jax.block_until_ready(step.with_fallbacks(packed, cache, inputs))
        seconds["dense"] += middle - begun
        seconds["certified"] += time.perf_counter() - middle
        differs = np.asarray(want != got)
        tokens += len(differs)
        different += int(differs.sum())
        gap = np.asarray(want_logits[:, 0] - want_logits[:, 1])
        near += int((gap[differs] < 1e-4).sum())
        largest = max(largest, float(np.abs(np.asarray(want_logits[:, 0] - got_logits[:, 0])).max()))
        for path, count in counts.items():
            fallbacks[path] = fallbacks.get(path, 0) + int(count)

    console = Console()
    table = Table(title=f"{tokens:,} tokens, the bundled model, JAX {jax.__version__}, {jax.default_backend()}")
    for name in ("site", "exact", "of", "dense MB", "ours MB", "share", "with dense runs", "dense runs"):
        table.add_column(name, justify="left" if name == "site" else "right")
    totals = np.zeros(3)
    for site in plan.sites:
        # Inside the scan over a window: bytes are those of all its tokens.
        read, sparse = site.dense_bytes / options.length, site.sparse_bytes / options.length
        rate = fallbacks[site.path] / tokens
        bytes_read = np.asarray([read, sparse, sparse + rate * read])
        totals += bytes_read
        table.add_row(site.kind, *_cells(site.computed, site.units, bytes_read), f"{rate:.3%}")
    table.add_row("all", *_cells("", "", totals), "")
    console.print(table)
    console.print(f"tokens that differ: {different} ({near} of them where the two best dense logits are within 1e-4)")
    console.print(f"largest difference of the best logit: {largest:.1e}")
    console.print(
        f"time a token: dense {seconds['dense'] / tokens * 1e3:.2f} ms, certified "
        f"{seconds['certified'] / tokens * 1e3:.2f} ms; the model fits in the cache, where reading less is no gain"
    )


def _cells(computed, units, read: np.ndarray) -> list[str]:
    dense, sparse, total = read
    return [
        str(computed),
        str(units),
        f"{dense / 1e6:.2f}",
        f"{sparse / 1e6:.2f}",
        f"{sparse / dense:.1%}",
        f"{total / dense:.1%}",
    ]


if __name__ == "__main__":
    main()
