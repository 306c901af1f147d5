"""Draws tokens with a language model, dense and certified with the same keys, and counts what differs and is read.

    python benchmarks/sampled.py                              # 20,000 tokens each way, on the bundled model
    python benchmarks/sampled.py --ways temperature --tokens 1000000
    python benchmarks/sampled.py --model smollm2 --ways temperature --tokens 50000 --calibrate 2048 --staged

The dense model draws its own text, many sequences at once: at a temperature, or from the k likeliest tokens, the
nucleus, or those that are likely beside the likeliest. The certified head is then given what the dense head was given
at each position, and the same key, one token a call, and must draw the same token. A token that differs is drawn by the
dense head again, one token a call as well: two dense sums of other orders may draw differently, too, which is told
apart. Bytes are those of the head, dense runs included. A row is open where it could be what is drawn, by the bounds of
all stages: how many are is counted where all are drawn from.

``--state FILE`` keeps what was counted after each round, and goes on from it. Prompts and keys of a round are those of
its number: ``--seed N`` begins with round N, so that two runs need not draw the same text.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

import hire_xform as hx
from hire_xform.lowering.prove.proofs import pack_proof, scores_with_bounds

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

PROMPT = 32
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


def by_inverse(logits, key):
    """Of all, by the place of a uniform number among the running sums of shares."""
    return jax.random.choice(key, logits.shape[-1], p=jax.nn.softmax(logits, axis=-1)[0])[None]


WAYS = {
    "temperature": of_all,
    "top-k": of_top_k,
    "top-p": of_nucleus,
    "top-k and top-p": of_top_k_and_nucleus,
    "min-p": of_min_p,
    "choice": by_inverse,
}


class Read:
    """An embedding that is tied to the output projection, which leaves what that reads as it is."""

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, tokens):
        """Rows by id."""
        return self.rows[tokens]

    @property
    def T(self):  # noqa: N802
        """The identity, in the place of the projection: sums with zeros are exact."""
        return jnp.eye(self.rows.shape[1], dtype=self.rows.dtype)


class Tiny:
    """The bundled model, with text to begin with."""

    def __init__(self, weights):
        from tiny_lm import model

        self.name, self.model = weights.name, model
        self.params = model.load(weights)
        self.text = np.load(ROOT / "examples" / "tiny_lm" / "heldout.npy").astype(np.int32)

    def cache(self, batch, length):
        """An empty one."""
        return self.model.init_cache(self.model.config_of(self.params), batch=batch, length=length)


class SmolLM2:
    """SmolLM2-135M-Instruct, with English prose to begin with."""

    def __init__(self):
        from pydoc_data import topics

        import smollm2

        self.name, self.model = "SmolLM2-135M-Instruct", smollm2
        loaded = smollm2.load()
        self.params = loaded.params
        prose = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
        self.text = np.asarray(loaded.tokenizer.encode(prose).ids, np.int32)

    def cache(self, batch, length):
        """An empty one."""
        return self.model.init_cache(self.params, batch, length)


def draws(draw, temperature, rows, x, keys):
    """Tokens ``[B]`` drawn from inputs of the head ``[B, d]``, each with its own key."""
    logits = (x @ rows.T) / temperature
    return jax.vmap(lambda own, key: draw(own[None], key)[0])(logits, keys).astype(jnp.int32)


def one_by_one(draw, temperature, rows, xs, keys):
    """The same, one token a call: the function that is certified."""
    return lax.map(lambda given: draw((given[0][None] @ rows.T) / temperature, given[1])[0], (xs, keys))


def generate(step, draw, temperature, params, cache, prompts, keys):
    """Reads prompts ``[B, PROMPT]``, then what is drawn with keys ``[n, B]``: inputs of the head, and tokens drawn."""
    open_params = {**params, "embedding": Read(params["embedding"])}

    def body(state, given):
        cache, previous = state
        prompted, keys = given
        token = jnp.where(prompted >= 0, prompted, previous)
        x, cache = step(open_params, cache, token)
        drawn = draws(draw, temperature, params["embedding"], x, keys)
        return (cache, drawn), (x, drawn)

    rest = jnp.full((len(keys) - PROMPT, prompts.shape[0]), -1, jnp.int32)
    inputs = jnp.concatenate([prompts.T, rest])
    return lax.scan(body, (cache, jnp.zeros(prompts.shape[0], jnp.int32)), (inputs, keys))[1]


def open_rows(spec, temperature, proof, rows, xs, keys):
    """How many rows could be what is drawn, of each token, by the bounds of all stages."""
    found = scores_with_bounds(xs, proof, spec)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (1, rows.shape[0]))[0])(keys)
    floor = jnp.max((xs @ rows.T - found.exact_error) / temperature + noise, axis=1, keepdims=True)
    return jnp.sum(found.upper / temperature + noise >= floor, axis=1)


class Bench:
    """One way of drawing at one temperature: what is counted, round by round."""

    def __init__(self, model, way, temperature, options, config, calibration):
        self.model, self.way, self.temperature, self.options = model, way, temperature, options
        self.draw = WAYS[way]
        self.generated = jax.jit(functools.partial(generate, model.model.decode_step, self.draw, temperature))
        alone = functools.partial(one_by_one, self.draw, temperature)
        self.dense = jax.jit(alone)
        self.step = hx.sparsify(alone, config=config, calibration=calibration)
        self.rows = model.params["embedding"]
        self.each = options.batch * options.length
        x, key = jnp.zeros((self.each, self.rows.shape[1])), jax.random.split(jax.random.key(0), self.each)
        traced = self.step.trace(self.rows, x, key)
        if not traced.plan.sites:
            raise SystemExit(traced.explain())
        (self.site,) = traced.plan.sites
        assert not self.site.unproved, self.site.unproved
        self.packed = traced.pack(self.rows)
        self.spec = self.site.settings.spec
        self.proof = pack_proof(self.rows, self.spec)
        self.opened = jax.jit(functools.partial(open_rows, self.spec, temperature))

    def inputs(self, number):
        """Inputs of the head ``[n, d]``, keys, and the tokens that the dense model drew with them, of one round."""
        options = self.options
        starts = np.random.default_rng(number).integers(0, len(self.model.text) - PROMPT, size=options.batch)
        prompts = jnp.asarray(np.stack([self.model.text[s : s + PROMPT] for s in starts]))
        keys = jax.random.split(jax.random.key(number), (options.length, options.batch))
        cache = self.model.cache(options.batch, options.length)
        xs, drawn = self.generated(self.model.params, cache, prompts, keys)
        return xs.reshape(self.each, -1), keys.reshape(-1), np.asarray(drawn).reshape(-1)

    def round(self, number, state):
        """Adds one round to what was counted."""
        xs, keys, want = self.inputs(number)
        got, counts = self.step.with_rungs(self.packed, xs, keys)
        got, (taken,) = np.asarray(got), counts.values()
        differ = np.flatnonzero(got != want)
        state["tokens"] += len(want)
        state["batched"] += len(differ)
        if len(differ):
            alone = np.asarray(self.dense(self.rows, xs[differ], keys[differ]))
            state["differ"] += int((alone != got[differ]).sum())
        state["taken"] = [a + int(b) for a, b in zip(state["taken"] or [0] * len(taken), taken, strict=True)]
        if self.way == "temperature":
            some = slice(0, self.each, self.options.every)
            parts = np.array_split(np.arange(self.each)[some], max(1, self.each // self.options.every // 64))
            for part in parts:
                for n in np.asarray(self.opened(self.proof, self.rows, xs[part], keys[part])):
                    state["open"][str(n)] = state["open"].get(str(n), 0) + 1
        state["rounds"] += 1


def fresh():
    """Nothing counted yet."""
    return {"tokens": 0, "differ": 0, "batched": 0, "taken": [], "open": {}, "rounds": 0}


def opened(histogram):
    """Mean, median and 99th percentile of the rows that are open."""
    if not histogram:
        return [""] * 3
    values = np.asarray(sorted(map(int, histogram)))
    counts = np.asarray([histogram[str(v)] for v in values])
    within = np.cumsum(counts) / counts.sum()
    mean = float((values * counts).sum() / counts.sum())
    return [f"{mean:,.1f}", *(f"{values[np.searchsorted(within, share)]:,}" for share in (0.5, 0.99))]


def row_of(bench, state):
    """A line of the table."""
    site, tokens = bench.site, state["tokens"]
    read = sum(n * rung.bytes for n, rung in zip(state["taken"], site.rungs, strict=True)) / tokens
    dense = site.dense_bytes / bench.each
    proved = 1.0 - state["taken"][-1] / tokens
    counted = (f"{tokens:,}", str(state["differ"]), str(state["batched"] - state["differ"]), f"{proved:.3%}")
    return [
        bench.way,
        str(bench.temperature),
        *counted,
        *opened(state["open"]),
        f"{read / dense:.1%}",
        f"{2 * read / dense:.1%}",
    ]


def settings_of(model, options):
    """What the head is certified with: settings, and a calibration if one is asked for."""
    vocab = hx.Vocab(certify=True) if options.calibrate else hx.Vocab(certify=True, candidates=options.candidates)
    # The head alone: blocks have their own benchmark.
    config = hx.Config(ffn=None, rules=(hx.Rule("*", force=True, vocab=vocab),))
    if not options.calibrate:
        return config, None
    # On inputs of text that the model draws at temperature 1, with seeds of their own.
    bench = Bench(model, "temperature", 1.0, options, config, None)
    found = [bench.inputs(10_000_000 + n) for n in range(-(-options.calibrate // bench.each))]
    xs = jnp.concatenate([x for x, _, _ in found])[: options.calibrate]

    def fun(rows, x):
        return jnp.argmax(x @ rows.T, axis=-1)

    batches = [(bench.rows, part) for part in jnp.split(xs, max(1, len(xs) // 256))]
    only = [hx.Staged((hx.LowRank(0.75, bits=4), hx.Quantized(8)))] if options.staged else None
    return config, hx.calibrate(fun, batches, config=config, predictors=only, progress=False)


def main() -> None:
    """Prints one table, and one line of it after each round to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens to draw each way")
    parser.add_argument("--model", choices=("tiny", "topk", "smollm2"), default="tiny")
    parser.add_argument("--temperatures", default="1.0,0.7")
    parser.add_argument("--length", type=int, default=256, help="tokens of one sequence, prompt included")
    parser.add_argument("--batch", type=int, default=16, help="sequences that the dense model draws at once")
    parser.add_argument("--ways", default=",".join(WAYS), help="which ways of drawing")
    parser.add_argument("--candidates", type=int, default=256, help="rows that may be computed exactly, uncalibrated")
    parser.add_argument("--calibrate", type=int, default=0, help="tokens to calibrate on; 0: no calibration")
    parser.add_argument("--staged", action="store_true", help="calibrate a head in two stages, and no other predictor")
    parser.add_argument("--every", type=int, default=16, help="of how many tokens one has its open rows counted")
    parser.add_argument("--seed", type=int, default=0, help="number of the first round")
    parser.add_argument("--state", type=Path, help="a file that what was counted is kept in, and gone on from")
    options = parser.parse_args()
    if unknown := {way.strip() for way in options.ways.split(",")} - set(WAYS):
        parser.error(f"--ways: {', '.join(sorted(unknown))}; expected some of {', '.join(WAYS)}")
    weights = {"tiny": "weights.safetensors", "topk": "topk_weights.safetensors"}
    model = SmolLM2() if options.model == "smollm2" else Tiny(ROOT / "examples" / "tiny_lm" / weights[options.model])
    known = json.loads(options.state.read_text()) if options.state and options.state.exists() else {}
    config, calibration = settings_of(model, options)
    console = Console(width=150)
    rows, told = [], ""
    for way in options.ways.split(","):
        for temperature in map(float, options.temperatures.split(",")):
            bench = Bench(model, way.strip(), temperature, options, config, calibration)
            told = str(bench.spec)
            state = known.setdefault(f"{model.name}, {bench.way}, {temperature}", fresh())
            while state["tokens"] < options.tokens:
                bench.round(options.seed + state["rounds"], state)
                if options.state:
                    options.state.write_text(json.dumps(known))
                print(*row_of(bench, state), sep=" | ", file=sys.stderr, flush=True)
            rows.append(row_of(bench, state))
    table = Table(title=f"{model.name}, {told}, JAX {jax.__version__}, {jax.default_backend()}")
    names = (
        "way",
        "T",
        "tokens",
        "differ",
        "dense differ",
        "proved",
        "open: mean",
        "p50",
        "p99",
        "of f32",
        "of bf16",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
