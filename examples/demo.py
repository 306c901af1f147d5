"""What ``hire-xform demo`` runs: the bundled model dense and sparse, then time at a size where bytes count."""

from __future__ import annotations

import json
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny_lm
from observe import observe
from rich.console import Console
from rich.rule import Rule as Line
from rich.table import Table
from rich.text import Text

from hire_xform.api import sparsify
from hire_xform.call.stages import Traced
from hire_xform.config import Config, Rule, approximate, lossless
from hire_xform.explain import size
from hire_xform.loading import LoadError, load
from hire_xform.lowering.primitives.da_top_k import da_top_k_p
from hire_xform.passes.match.matches import FfnMatch

EXAMPLES = Path(__file__).resolve().parent
# The best logits of the dense step that the predictor should have among its candidates.
_TOP = 8
# Steps before timing counts.
_WARMUP = 5


@dataclass(frozen=True)
class Model:
    """The bundled model and what goes with it."""

    params: Any
    tokenizer: Any
    prompt: str
    heldout: np.ndarray
    context: int
    parameters: int


def run(*, tokens: int = 300, positions: int = 1536, assets: Path | None = None, half: str = "both") -> None:
    """Runs the demonstration and prints it.

    Args:
      tokens: tokens to decode greedily.
      positions: held-out positions at which dense and sparse are compared.
      assets: folder of the weights; None takes ``examples/tiny_lm``.
      half: "first", "second" or "both".

    Raises:
      LoadError: a file or the tokenizers package is missing.
    """
    console = Console(highlight=False)
    if half in ("both", "first"):
        _small(console, load_model(assets or EXAMPLES / "tiny_lm"), tokens, positions)
    if half in ("both", "second"):
        _large(console, EXAMPLES.parent)


def load_model(assets: Path) -> Model:
    """Loads the bundled model.

    Raises:
      LoadError: a file or the tokenizers package is missing.
    """
    names = ("weights.safetensors", "training.json", "tokenizer.json", "heldout.npy", "prompt.txt")
    missing = [name for name in names if not (assets / name).is_file()]
    if missing:
        raise LoadError(f"{assets} lacks {', '.join(missing)}; examples/train_tiny_lm.py writes them")
    try:
        import tokenizers
    except ImportError:
        raise LoadError("the demo needs the package tokenizers; install hire-xform[examples]") from None
    params = tiny_lm.load(assets / "weights.safetensors")
    record = json.loads((assets / "training.json").read_text(encoding="utf-8"))
    return Model(
        params=params,
        tokenizer=tokenizers.Tokenizer.from_file(str(assets / "tokenizer.json")),
        prompt=(assets / "prompt.txt").read_text(encoding="utf-8"),
        heldout=np.load(assets / "heldout.npy").astype(np.int32),
        context=record["context_length"],
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
    )


# --- first half: the bundled model ---


def _small(console: Console, model: Model, tokens: int, positions: int) -> None:
    console.print(Line(f"A language model of {model.parameters / 1e6:.1f} million parameters, unedited", align="left"))
    prompt = np.asarray(model.tokenizer.encode(model.prompt).ids, np.int32)[None]
    tokens = min(tokens, model.context - prompt.shape[1])
    if tokens < 1:
        raise LoadError(f"the prompt takes all of the {model.context} tokens of context")
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    cache = tiny_lm.init_cache(tiny_lm.config_of(model.params), 1, model.context)
    step, traced, forced = _sparse_step(model, cache, token, approximate)
    proved, proved_traced, _ = _sparse_step(model, cache, token, lossless)
    with console.status("packing the weights"):
        packed = jax.block_until_ready(traced.pack(model.params))
        proving = jax.block_until_ready(proved_traced.pack(model.params))
    with console.status("decoding"):
        logits, cache = jax.jit(tiny_lm.prefill)(model.params, cache, prompt)
        first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        dense_step = jax.jit(tiny_lm.decode_step, donate_argnums=1)
        dense = _decode(dense_step, model.params, cache, first, tokens)
        lossless_run = _decode(proved, proving, cache, first, tokens)
        sparse = _decode(step, packed, cache, first, tokens)
    _print_text(console, model, dense[0], sparse[0])
    with console.status("comparing on held-out text"):
        compared = _compare(model, traced, packed, positions)
    console.print(_table((proved_traced, traced), compared, dense, lossless_run, sparse))
    console.print("\nWhat the lossless step rewrites, which is the default, and what not:\n")
    console.print(Text(textwrap.indent(proved_traced.explain(), "  ")), soft_wrap=True)
    _say(
        console,
        "What this half shows: the answers. What it does not show: time. A model of "
        f"{size(4 * model.parameters)} fits in a processor's cache: reading less of it saves little, and "
        "predicting has a cost of its own. "
        + (
            "The cost model knows and would have left sites dense; a rule forced them here."
            if forced
            else "The cost model rewrote these sites of its own accord."
        ),
    )


def _sparse_step(model: Model, cache: Any, token: Any, settings: Callable[..., Config]) -> tuple[Any, Traced, bool]:
    """The sparsified step, its trace, and whether sites had to be forced."""
    plain = sparsify(tiny_lm.decode_step, config=settings(), donate_argnums=1)
    traced = plain.trace(model.params, cache, token)
    config = settings(rules=(Rule("*", force=True),))
    step = sparsify(tiny_lm.decode_step, config=config, donate_argnums=1)
    every = step.trace(model.params, cache, token)
    if len(every.plan.sites) == len(traced.plan.sites):
        return plain, traced, False
    return step, every, True


def _decode(step: Callable, params: Any, cache: Any, token: jax.Array, count: int) -> tuple[np.ndarray, float]:
    """Greedy tokens ``[count]``, and the median seconds of a step."""
    cache = jax.tree.map(jnp.copy, cache)  # steps donate theirs
    pick = jax.jit(lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32))
    found, seconds = [token], []
    for _ in range(count - 1):
        start = time.perf_counter()
        logits, cache = step(params, cache, found[-1])
        logits.block_until_ready()
        seconds.append(time.perf_counter() - start)
        found.append(pick(logits))
    timed = seconds[_WARMUP:] or seconds or [float("nan")]
    return np.asarray(jnp.concatenate(found)), statistics.median(timed)


@dataclass(frozen=True)
class Comparison:
    """Dense and sparse on the same held-out history, averaged over positions.

    Attributes:
      positions: how many.
      agree: share at which both have the same most likely token.
      loss: nats per token, dense and sparse.
      top_found: share at which the dense arg max is among the candidates.
      tops_found: share of the dense best eight among them.
      nonzero: share of hidden units that are not zero in the dense step.
      nonzero_found: share of those that the sparse step selects.
      weight_found: the same, each unit counted with the size of what it adds.
    """

    positions: int
    agree: float
    loss: tuple[float, float]
    top_found: float
    tops_found: float
    nonzero: float
    nonzero_found: float
    weight_found: float


def _compare(model: Model, traced: Traced, packed: Any, positions: int) -> Comparison:
    """Runs both steps over held-out windows, each with its own cache, and looks inside both."""
    count = min(max(1, round(positions / model.context)), (len(model.heldout) - 1) // model.context)
    length = min(model.context, positions)
    windows = np.stack([model.heldout[i * length : (i + 1) * length + 1] for i in range(count)])
    empty = tiny_lm.init_cache(tiny_lm.config_of(model.params), 1, model.context)
    ffns = [d.match for d in traced.plan.decisions if isinstance(d.match, FfnMatch)]
    kinds = [site.kind for site in traced.plan.sites]
    downs = {match.node.path: match.down.weight_left for match in ffns}
    original, rewritten = traced.jaxpr, traced.sparse_jaxpr

    def position(caches: Any, pair: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        token, target = pair[:1], pair[1]
        out, inside = observe(
            original, jax.tree.leaves((model.params, caches[0], token)), lambda path, eqn: path in downs
        )
        dense, cache = jax.tree.unflatten(traced.out_tree, out)
        out, selected = observe(
            rewritten, jax.tree.leaves((packed, caches[1], token)), lambda path, eqn: eqn.primitive is da_top_k_p
        )
        sparse, sparse_cache = jax.tree.unflatten(traced.out_tree, out)
        # One selection for each site, in the order of the sites.
        chosen = [(kind, results[1].reshape(-1)) for kind, (_, results) in zip(kinds, selected, strict=True)]
        counts = {"agree": jnp.argmax(dense) == jnp.argmax(sparse)}
        counts["dense_loss"] = -jax.nn.log_softmax(dense[0])[target]
        counts["sparse_loss"] = -jax.nn.log_softmax(sparse[0])[target]
        for kind, index in chosen:
            if kind == "vocab":
                best = jax.lax.top_k(dense[0], _TOP)[1]
                among = jnp.isin(best, index)
                counts["top"], counts["tops"] = among[0], among.mean()
        units = [index for kind, index in chosen if kind == "ffn"]
        counts.update(_hidden(list(zip(inside, downs.values(), units, strict=True))))
        return (cache, sparse_cache), counts

    @jax.jit
    def over(window: jax.Array) -> dict[str, jax.Array]:
        pairs = jnp.stack([window[:-1], window[1:]], axis=1)
        return jax.tree.map(lambda v: v.mean(), jax.lax.scan(position, (empty, empty), pairs)[1])

    per_window = [jax.device_get(over(jnp.asarray(window))) for window in windows]
    mean = {key: float(np.mean([w[key] for w in per_window])) for key in per_window[0]}
    return Comparison(
        positions=count * length,
        agree=mean["agree"],
        loss=(mean["dense_loss"], mean["sparse_loss"]),
        top_found=mean.get("top", float("nan")),
        tops_found=mean.get("tops", float("nan")),
        nonzero=mean.get("nonzero", float("nan")),
        nonzero_found=mean.get("kept", float("nan")) / (mean.get("nonzero", 0) or float("nan")),
        weight_found=mean.get("kept_weight", float("nan")) / (mean.get("weight", 0) or float("nan")),
    )


def _hidden(seen: list[tuple[tuple[list[Any], list[Any]], bool, jax.Array]]) -> dict[str, jax.Array]:
    """Of all blocks: the share of units that are not zero, those selected too, and the same by size of contribution."""
    found: dict[str, list[jax.Array]] = {"nonzero": [], "kept": [], "weight": [], "kept_weight": []}
    for (operands, _), weight_left, index in seen:
        weight, hidden = operands if weight_left else (operands[1], operands[0])
        hidden = jnp.abs(hidden.reshape(-1))
        adds = hidden * jnp.linalg.norm(weight, axis=1)
        kept = jnp.zeros(hidden.shape, bool).at[index].set(True)
        found["nonzero"].append((hidden > 0).mean())
        found["kept"].append(((hidden > 0) & kept).mean())
        found["weight"].append(adds.sum())
        found["kept_weight"].append(jnp.where(kept, adds, 0).sum())
    return {key: jnp.stack(values).mean() for key, values in found.items() if values}


def _print_text(console: Console, model: Model, dense: np.ndarray, sparse: np.ndarray) -> None:
    """The prompt and both continuations: once, as far as they are the same."""
    same = _same(dense, sparse)
    text = Text(model.prompt, style="dim", overflow="fold")
    text.append(model.tokenizer.decode(dense[:same].tolist()), style="bold")
    console.print(text)
    if same < len(dense):
        for name, tokens in (("dense", dense), ("sparse", sparse)):
            console.print(Text(f"[{name} goes on]", style="cyan"))
            console.print(Text(model.tokenizer.decode(tokens[same:].tolist()), overflow="fold"))
    console.print()


def _same(dense: np.ndarray, sparse: np.ndarray) -> int:
    """How many tokens agree before the first that does not."""
    return int(np.argmin(np.append(dense == sparse, False)))


def _table(
    traced: tuple[Traced, Traced],
    compared: Comparison,
    dense: tuple[np.ndarray, float],
    proved: tuple[np.ndarray, float],
    sparse: tuple[np.ndarray, float],
) -> Table:
    plans = [one.plan for one in traced]
    read = [plans[0].dense_bytes + plans[0].refused_bytes, *(p.sparse_bytes + p.refused_bytes for p in plans)]
    table = Table(show_header=True, header_style="bold", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name in ("dense", "lossless", "approximate"):
        table.add_column(name, justify="right")
    runs = (dense, proved, sparse)
    same = [str(_same(dense[0], tokens)) for tokens, _ in runs[1:]]
    rows = [
        (f"greedy tokens, as far as the same ({len(dense[0])})", "", *same),
        ("milliseconds per token, median", *(f"{1e3 * seconds:.2f}" for _, seconds in runs)),
        ("weight bytes per token, where all is proved", *map(size, read)),
        (f"on {compared.positions:,} held-out positions:", "", "", ""),
        ("  same most likely token", "", "proved", f"{compared.agree:.2%}"),
        ("  loss, nats per token", f"{compared.loss[0]:.4f}", "", f"{compared.loss[1]:.4f}"),
        ("  dense arg max among the candidates", "", "proved", f"{compared.top_found:.2%}"),
        (f"  dense best {_TOP} logits among the candidates", "", "", f"{compared.tops_found:.2%}"),
        (
            "  hidden units not zero; of them selected",
            f"{compared.nonzero:.1%}",
            "all",
            f"{compared.nonzero_found:.2%}",
        ),
        ("  the same, by size of contribution", "", "all", f"{compared.weight_found:.2%}"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


# --- second half: a size at which bytes are what counts ---


def _large(console: Console, root: Path) -> None:
    console.print()
    console.print(Line("A billion parameters, random weights", align="left"))
    if not (root / "benchmarks" / "speed").is_dir():
        _say(console, f"The second half is left out: there is no benchmarks/speed in {root}.")
        return
    sys.path.insert(0, str(root))
    # All frameworks that take part are JAX's, so there is no need of a process for each.
    load("benchmarks.speed.__main__:main")(["--billion", "--peers=ours,int8", "--rounds=5", "--in-process"])


def _say(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text))
