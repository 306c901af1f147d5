"""Draws tokens with the bundled model, dense and certified with the same keys, and counts what differs and is read.

    python benchmarks/sampled.py                    # 20,000 tokens each way of drawing
    python benchmarks/sampled.py --tokens 2000 --ways temperature,top-p

The dense model draws from windows of held-out text, at a temperature, or from the k likeliest tokens, the nucleus, or
those that are likely beside the likeliest. The certified step is given the same tokens and keys, with a cache of its
own, and must draw the same token at every position. Bytes are those of the head, dense runs included, predictor
`Quantized(8)`.
"""

import argparse
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import hire_xform as hx

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from tiny_lm import model as lm  # noqa: E402

PROMPT = 32
TEMPERATURES = (1.0, 0.7)
K, P, MIN_P = 50, 0.9, 0.05


def of_all(logits, key):
    """A token of the whole distribution."""
    return jax.random.categorical(key, logits)


def of_top_k(logits, key):
    """Of the k likeliest."""
    values, index = lax.top_k(logits, K)
    return jnp.take_along_axis(index, jax.random.categorical(key, values)[:, None], axis=-1)[:, 0]


def of_nucleus(logits, key):
    """Of the likeliest that together have a share of P, by a cutoff."""
    falling = jnp.sort(logits, axis=-1)[:, ::-1]
    total = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
    cutoff = jnp.take_along_axis(falling, jnp.sum(total < P, axis=-1, keepdims=True), axis=-1)
    return jax.random.categorical(key, jnp.where(logits < cutoff, -jnp.inf, logits))


def of_top_k_and_nucleus(logits, key):
    """Of the nucleus of the k likeliest, by their shares of all."""
    shares, index = lax.top_k(jax.nn.softmax(logits, axis=-1), K)
    total = jnp.cumsum(shares, axis=-1)
    shares = jnp.where(total - shares > P, 0.0, shares)
    shares /= jnp.sum(shares, axis=-1, keepdims=True)
    return jnp.take_along_axis(index, jax.random.categorical(key, jnp.log(shares))[:, None], axis=-1)[:, 0]


def of_min_p(logits, key):
    """Of those at least so likely, beside the likeliest."""
    shares = jax.nn.softmax(logits, axis=-1)
    kept = shares >= MIN_P * jnp.max(shares, axis=-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(kept, logits, -jnp.inf))


WAYS = {
    "temperature": of_all,
    "top-k": of_top_k,
    "top-p": of_nucleus,
    "top-k and top-p": of_top_k_and_nucleus,
    "min-p": of_min_p,
}


def follow(draw, temperature, params, cache, tokens, keys):
    """Reads tokens one at a time; for each the one that is drawn next."""

    def body(cache, given):
        token, key = given
        logits, cache = lm.decode_step(params, cache, token[None])
        return cache, draw(logits / temperature, key)[0]

    return lax.scan(body, cache, (tokens, keys))[1]


def generate(draw, temperature, params, cache, prompt, keys):
    """Reads a prompt, then what it draws itself: every token read, and drawn."""

    def body(state, given):
        cache, previous = state
        prompted, key = given
        token = jnp.where(prompted >= 0, prompted, previous)
        logits, cache = lm.decode_step(params, cache, token[None])
        drawn = draw(logits / temperature, key)[0].astype(jnp.int32)
        return (cache, drawn), (token, drawn)

    inputs = jnp.concatenate([prompt, jnp.full((len(keys) - len(prompt),), -1, jnp.int32)])
    return lax.scan(body, (cache, jnp.int32(0)), (inputs, keys))[1]


def measured(way, temperature, params, cache, prompts, options):
    """One line of the table: tokens, those that differ, what was taken and read, and dense bytes."""
    decode = jax.jit(functools.partial(generate, WAYS[way], temperature))
    following = functools.partial(follow, WAYS[way], temperature)
    # The head alone: blocks have their own benchmark.
    vocab = hx.Vocab(certify=True, candidates=options.candidates, predictor=hx.Quantized(8))
    config = hx.Config(ffn=None, rules=(hx.Rule("*", force=True, vocab=vocab),))
    step = hx.sparsify(following, config=config)
    keys = [jax.random.split(jax.random.key(n), options.length) for n in range(len(prompts))]
    traced = step.trace(params, cache, jnp.zeros(options.length, jnp.int32), keys[0])
    (site,) = traced.plan.sites
    assert not site.unproved, site.unproved
    packed = traced.pack(params)
    taken, differ, tokens = np.zeros(len(site.rungs), np.int64), 0, 0
    for prompt, own in track(list(zip(prompts, keys, strict=True)), way, console=Console(stderr=True)):
        inputs, want = decode(params, cache, prompt, own)
        got, counts = step.with_rungs(packed, cache, inputs, own)
        differ += int((np.asarray(want) != np.asarray(got)).sum())
        tokens += options.length
        (found,) = counts.values()
        taken += np.asarray(found)
    read = sum(int(n) * rung.bytes for n, rung in zip(taken, site.rungs, strict=True)) / tokens
    return tokens, differ, taken, read, site.dense_bytes / options.length


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens to draw each way")
    parser.add_argument("--length", type=int, default=288, help="tokens of one window, prompt included")
    parser.add_argument("--weights", type=Path, default=EXAMPLES / "tiny_lm" / "weights.safetensors")
    parser.add_argument("--ways", default=",".join(WAYS), help="which ways of drawing")
    parser.add_argument("--candidates", type=int, default=256, help="rows that may be computed exactly")
    options = parser.parse_args()
    params = lm.load(options.weights)
    held_out = np.load(EXAMPLES / "tiny_lm" / "heldout.npy").astype(np.int32)
    cache = lm.init_cache(lm.config_of(params), batch=1, length=options.length)
    starts = np.linspace(0, len(held_out) - PROMPT, -(-options.tokens // options.length)).astype(int)
    prompts = [jnp.asarray(held_out[start : start + PROMPT]) for start in starts]
    console = Console(width=140)
    table = Table(title=f"{options.weights.name}, JAX {jax.__version__}, {jax.default_backend()}")
    for name in ("way", "T", "tokens", "differ", "proved", "of f32 bytes", "of bf16 bytes"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for way in options.ways.split(","):
        for temperature in TEMPERATURES:
            tokens, differ, taken, read, dense = measured(way.strip(), temperature, params, cache, prompts, options)
            share = 1.0 - taken[-1] / tokens
            row = (f"{tokens:,}", str(differ), f"{share:.3%}", f"{read / dense:.1%}", f"{2 * read / dense:.1%}")
            table.add_row(way, str(temperature), *row)
    console.print(table)


if __name__ == "__main__":
    main()
