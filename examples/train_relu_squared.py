"""Trains a language model of 23 million parameters whose blocks decode with an eighth of their units, and one without.

    python examples/train_relu_squared.py              # two cores; stop it when you like, the same line continues
    python examples/train_relu_squared.py --decode     # then: what decoding reads and loses

The model is a decoder with squared ReLU in plain JAX, its text the source code of the Python library that runs this,
with whole files held out. It is trained dense first. From there, with the same batches at the same rates, it is trained
on in branches: dense, and with ``hx.topk_ffn`` keeping fewer and fewer units of each block. The branches take turns, so
that what the top-k costs, in nats, can be read off by steps, whenever the run ends. Everything is in
``--checkpoints``: a state for each branch, and the losses so far in ``losses.json``.
"""

import argparse
import functools
import itertools
import json
import os
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from library_corpus import read_corpus

import hire_xform as hx

VOCABULARY, WIDTH, HIDDEN, LAYERS, HEADS = 8192, 512, 2048, 6, 8
LENGTH, BATCH, RATE, WARMUP = 256, 4, 1e-3, 100


# --- the model --------------------------------------------------------------------------------------------------------


def init(key):
    """Random parameters: a dictionary, with a list of layers."""
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}

    def layer(key):
        keys = jax.random.split(key, len(shapes))
        drawn = {n: jax.random.normal(k, s) * s[0] ** -0.5 for k, (n, s) in zip(keys, shapes.items(), strict=True)}
        return {**drawn, "out": drawn["out"] / 4, "down": drawn["down"] / 4, "norms": jnp.ones((2, WIDTH))}

    embedding, *keys = jax.random.split(key, 1 + LAYERS)
    layers = [layer(key) for key in keys]
    return {
        "embed": 0.02 * jax.random.normal(embedding, (VOCABULARY, WIDTH)),
        "layers": layers,
        "norm": jnp.ones(WIDTH),
    }


def norm(x, scale):
    """Root mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def rotate(x, positions):
    """Rotary positions, of x [B, S, H, K]."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)], -1)


def layer(weights, x, cache, start):
    """One layer of tokens x [B, S, WIDTH] behind the ``start`` ones in the cache [2, B, L, H, K]; x and new cache."""
    batch, new = x.shape[:2]
    positions, places = start + jnp.arange(new), jnp.arange(cache.shape[2])
    q, k, v = jnp.moveaxis((norm(x, weights["norms"][0]) @ weights["qkv"]).reshape(batch, new, 3, HEADS, -1), 2, 0)
    cache = jax.lax.dynamic_update_slice(cache, jnp.stack([rotate(k, positions), v]), (0, 0, start, 0, 0))
    scores = jnp.einsum("bshk,bthk->bhst", rotate(q, positions), cache[0]) * q.shape[-1] ** -0.5
    seen = jax.nn.softmax(jnp.where(positions[:, None] >= places, scores, -jnp.inf))
    x = x + jnp.einsum("bhst,bthk->bshk", seen, cache[1]).reshape(x.shape) @ weights["out"]
    hidden = jnp.square(jax.nn.relu(norm(x, weights["norms"][1]) @ weights["up"]))
    return x + hidden @ weights["down"], cache


def empty_cache(batch, length):
    """Keys and values of each layer, and how many tokens they are of."""
    return [jnp.zeros((2, batch, length, HEADS, WIDTH // HEADS))] * LAYERS, jnp.int32(0)


def forward(params, cache, tokens):
    """Logits [B, S, VOCABULARY] behind each of tokens [B, S], and the cache with them."""
    layers, start = cache
    x, kept = params["embed"][tokens], []
    for weights, one in zip(params["layers"], layers, strict=True):
        x, one = layer(weights, x, one, start)
        kept.append(one)
    return norm(x, params["norm"]) @ params["embed"].T, (kept, start + tokens.shape[1])


def loss(params, windows):
    """Nats per token of windows [B, S + 1]."""
    logits, _ = forward(params, empty_cache(windows.shape[0], windows.shape[1] - 1), windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def decode_step(params, cache, token):
    """One token to the logits [VOCABULARY] of the next."""
    logits, cache = forward(params, cache, token[None, None])
    return logits[0, 0], cache


# --- training ---------------------------------------------------------------------------------------------------------


def optimizer(trunk, branch):
    """AdamW: its rate rises, stays for the trunk, and falls to nothing over a branch."""
    falls = optax.linear_schedule(RATE, 0.0, branch)
    rate = optax.join_schedules([optax.linear_schedule(0.0, RATE, WARMUP), lambda _: RATE, falls], [WARMUP, trunk])
    matrices = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, 0.9, 0.95, weight_decay=0.1, mask=matrices))


@functools.cache
def loss_with(active, group):
    """The loss with a top-k in every block, or as it is."""
    return loss if active >= 1 else hx.topk_ffn(loss, active=active, group_size=group)


@functools.cache
def stepper(active, group, trunk, branch):
    """The jitted step: (state, windows) -> (state, loss)."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, windows):
        value, gradients = jax.value_and_grad(loss_with(active, group))(state["params"], windows)
        updates, moments = optimizer(trunk, branch).update(gradients, state["moments"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "moments": moments}, value

    return step


def batch_at(tokens, step):
    """The windows [BATCH, LENGTH + 1] of a step; each pass over the text cuts it elsewhere, and in another order."""
    per_pass = (len(tokens) - 1 - LENGTH) // (LENGTH * BATCH)
    epoch, place = divmod(step, per_pass)
    rng = np.random.default_rng(epoch)
    offset, order = rng.integers(LENGTH), rng.permutation(per_pass * BATCH)
    starts = offset + LENGTH * order[place * BATCH : (place + 1) * BATCH]
    return np.stack([tokens[start : start + LENGTH + 1] for start in starts]).astype(np.int32)


@functools.cache
def validator(active, group):
    """The loss with a top-k, jitted."""
    return jax.jit(loss_with(active, group))


def validate(params, heldout, active, group, windows):
    """Nats per token over so many held-out windows."""
    windows = min(windows, (len(heldout) - 1) // LENGTH) // BATCH * BATCH
    rows = np.stack([heldout[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(windows)]).astype(np.int32)
    return float(np.mean([validator(active, group)(params, part) for part in np.split(rows, windows // BATCH)]))


def save(path, state, step):
    """The whole state, in one move."""
    with open(f"{path}.partial", "wb") as file:
        np.savez(file, *jax.tree.leaves(state), step=step)
    os.replace(f"{path}.partial", path)


def load(path, like):
    """What was saved, and its step."""
    with np.load(path) as file:
        leaves = [jnp.asarray(file[f"arr_{i}"]) for i in range(len(jax.tree.leaves(like)))]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), int(file["step"])


class Branch:
    """One course of training: its name, what it keeps of each block at the end, and its state, in a file."""

    def __init__(self, args, name, active, group):
        """Continues from its own checkpoint, or begins where the trunk has ended, or begins."""
        self.args, self.name, self.active, self.group = args, name, active, group
        self.path = args.checkpoints / f"{name}.npz"
        params = init(jax.random.key(0))
        self.state = {"params": params, "moments": optimizer(args.trunk, args.branch).init(params)}
        self.step = 0
        begun = next((path for path in (self.path, args.checkpoints / "trunk.npz") if path.exists()), None)
        if begun is not None:
            self.state, self.step = load(begun, self.state)

    def active_at(self, step):
        """What is kept at a step: halved stage by stage in the first third of the branch."""
        if self.active >= 1:
            return 1.0
        stages = [share for share in (0.5, 0.25, 0.125, 0.0625) if share > self.active]
        stage = int(max(0, step - self.args.trunk) / (self.args.branch / 3) * len(stages))
        return stages[stage] if stage < len(stages) else self.active

    def advance(self, tokens, last):
        """Takes the steps up to ``last``, and saves."""
        began, losses = time.monotonic(), []
        first = self.step
        while self.step < last:
            step = stepper(self.active_at(self.step), self.group, self.args.trunk, self.args.branch)
            self.state, value = step(self.state, batch_at(tokens, self.step))
            losses.append(float(value))
            self.step += 1
        save(self.path, self.state, self.step)
        speed = (last - first) * BATCH * LENGTH / (time.monotonic() - began)
        print(f"{self.name:10} step {last:5}  loss {np.mean(losses):.4f}  {speed:,.0f} tokens/s", flush=True)


def noted(args, corpus, step, name, params, active, group, windows):
    """The losses of the run at a step with this one among them: that of held-out text, unless it is known already."""
    path = args.checkpoints / "losses.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    here = found.setdefault(str(step), {})
    if name not in here:
        here[name] = round(validate(params, corpus.heldout, active, group, windows), 4)
        path.write_text(json.dumps(found, indent=1))
        over = {n: round(v - here["dense"], 4) for n, v in here.items() if n != "dense"}
        print(f"step {step}: validation {here}" + (f", over dense {over}" if over else ""), flush=True)
    return here


def train(args, corpus):
    """The trunk, then the branches in turns."""
    trunk = Branch(args, "trunk", 1.0, 1)
    while trunk.step < args.trunk:
        trunk.advance(corpus.train, min(args.trunk, trunk.step + args.turn))
        if trunk.step % (4 * args.turn) == 0:
            noted(args, corpus, trunk.step, "dense", trunk.state["params"], 1.0, 1, args.windows)
    # What a top-k costs without training for it.
    for active, group in [(1.0, 1), *args.topk]:
        noted(args, corpus, args.trunk, name_of(active, group), trunk.state["params"], active, group, args.windows)
    del trunk
    branches = [Branch(args, name_of(active, group), active, group) for active, group in [(1.0, 1), *args.topk]]
    for last in range(args.trunk, args.trunk + args.branch, args.turn):
        last = min(args.trunk + args.branch, last + args.turn)
        for branch in branches:
            if branch.step < last:
                branch.advance(corpus.train, last)
        for branch in branches:
            if branch.step == last:
                active = branch.active_at(last)
                noted(args, corpus, last, branch.name, branch.state["params"], active, branch.group, args.windows)
    for branch in branches:
        noted(args, corpus, "end", branch.name, branch.state["params"], branch.active, branch.group, 10**6)


def name_of(active, group):
    """Of a branch: share kept, and units in a group; or that it keeps all."""
    return "dense" if active >= 1 else f"{100 * active:g}%x{group}"


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(args, corpus):
    """Decodes held-out text a token at a time, and prints what is read and what it costs."""
    text = corpus.heldout[: args.windows * LENGTH].astype(np.int32)[: 4 * LENGTH]
    configs = {"dense": None}
    for active, group in args.topk:
        # Whatever is left out: it was trained for that.
        ffn = hx.Ffn(active=active, group_size=group, certify=False, activations="any")
        configs[name_of(active, group)] = hx.Config(ffn=ffn, vocab=None)
    for name, config in configs.items():
        params = Branch(args, name, 1.0, 1).state["params"]
        step = jax.jit(decode_step) if config is None else hx.sparsify(decode_step, config=config)
        total, seconds, seen = 0.0, [], 0
        for window in text.reshape(-1, LENGTH):
            cache = empty_cache(1, LENGTH)
            for token, target in itertools.pairwise(window):
                began = time.perf_counter()
                logits, cache = step(params, cache, token)
                logits = np.asarray(logits)
                seconds.append(time.perf_counter() - began)
                total, seen = total + float(np.logaddexp.reduce(logits) - logits[target]), seen + 1
        line = f"{name:10} {total / seen:.4f} nats over {seen} tokens, median {1e3 * np.median(seconds):.2f} ms"
        if config is not None:
            sites = step.trace(params, empty_cache(1, LENGTH), text[0]).plan.sites
            read, dense = sum(s.sparse_bytes for s in sites), sum(s.dense_bytes for s in sites)
            line += f"; blocks read {read / 1e6:.1f} MB of {dense / 1e6:.1f} MB"
        print(line, flush=True)


def topk(text):
    """``0.125x8``: the share to keep, and the units of a group."""
    active, _, group = text.partition("x")
    return float(active), int(group or 1)


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, description="See the file."
    )
    parser.add_argument("--trunk", type=int, default=2400, help="dense steps before the branches")
    parser.add_argument("--branch", type=int, default=800, help="steps of each branch")
    parser.add_argument("--topk", type=topk, nargs="+", default=[(0.125, 8)], help="share kept x units in a group")
    parser.add_argument("--turn", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--windows", type=int, default=48, help="held-out windows of a validation on the way")
    parser.add_argument("--checkpoints", type=Path, default=Path(__file__).parent / "checkpoints" / "relu_squared")
    parser.add_argument("--source", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of the text")
    parser.add_argument("--decode", action="store_true", help="decode with the checkpoints there are")
    args = parser.parse_args()
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    tokenizer = args.checkpoints / "tokenizer.json"
    corpus = read_corpus(args.source, tokenizer, vocab_size=VOCABULARY, length=LENGTH, heldout_percent=5.0, seed=0)
    print(f"{len(corpus.train):,} training tokens, {len(corpus.heldout):,} held out", flush=True)
    (decode if args.decode else train)(args, corpus)


if __name__ == "__main__":
    main()
