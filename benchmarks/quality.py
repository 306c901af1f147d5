"""What sparse decoding costs in quality on the bundled model, trained densely and with a top-k: a table and two plots.

    make quality                        # or: python benchmarks/quality.py

Decodes held-out text a token at a time, every position with the tokens before it, and writes ``docs/quality.md`` and
two plots. Bytes are those of head and feed-forward blocks together, as the plan counts them.
"""

import argparse
import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import hire_xform as hx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from finetune_tiny_lm import topk_forward  # noqa: E402
from tiny_lm import model as lm  # noqa: E402

CANDIDATES = 256
INT8, FINE, QUARTER = hx.Quantized(8), hx.LowRank(0.75, bits=4), hx.LowRank(0.25, bits=8)
# Name, predictor of the head, predictor of the blocks.
PREDICTORS = (
    ("int8", INT8, INT8),
    ("head rank 3d/4 in 4 bits, blocks int8", FINE, INT8),
    ("head and blocks rank 3d/4 in 4 bits", FINE, FINE),
    ("head rank d/4 in 8 bits, blocks int8", QUARTER, INT8),
)


@dataclass(frozen=True)
class Model:
    """A set of weights and the sizes to decode them with.

    Attributes:
      name: for the table.
      params: the weights.
      group_size: hidden units chosen together.
      sizes: by name, the share of the groups each block computes.
      exact: what the model says by itself, ``(params, tokens) -> logits``.
    """

    name: str
    params: lm.Params
    group_size: int
    sizes: dict[str, tuple[float, ...]]
    exact: object


@dataclass(frozen=True)
class Row:
    """One line of the table; losses and divergences in nats a token, shares of one."""

    model: str
    predictor: str
    sizes: str
    bytes: float
    loss: float
    divergence: float
    same_as_dense: float
    same_as_own: float


def models() -> list[Model]:
    """The dense-trained model, by single units and by groups, and the top-k-trained one."""
    folder = ROOT / "examples" / "tiny_lm"
    record = json.loads((folder / "topk_training.json").read_text(encoding="utf-8"))
    trained, group = tuple(record["active"]), record["group_size"]
    topk = lm.load(folder / "topk_weights.safetensors")
    sizes = {f"{', '.join(f'{100 * a:g}' for a in shares)} %": shares for shares in ((0.125,) * 4, trained)}
    dense = lm.load(folder / "weights.safetensors")
    return [
        Model("dense-trained", dense, 1, sizes, lm.forward),
        Model("dense-trained, groups", dense, group, dict([list(sizes.items())[-1]]), lm.forward),
        Model("top-k-trained", topk, group, sizes, topk_forward(topk, trained, group)),
    ]


def score(params, cache, tokens, following, taught):
    """Decodes a window: loss, divergence from ``taught``, and most likely token of each position."""

    def body(cache, at):
        token, target, dense = at
        logits, cache = lm.decode_step(params, cache, token[None])
        said = jax.nn.log_softmax(logits[0])
        return cache, (-said[target], jnp.sum(jnp.exp(dense) * (dense - said)), jnp.argmax(said))

    return jax.lax.scan(body, cache, (tokens, following, taught))[1]


@jax.jit
def compared(said, taught, following):
    """The same of log-probabilities that are there already."""
    loss = -jnp.take_along_axis(said, following[:, None], axis=1)[:, 0]
    return loss, jnp.sum(jnp.exp(taught) * (taught - said), axis=1), jnp.argmax(said, axis=1)


FORCE = hx.Rule("*", force=True)


def blocks_of(operands) -> list[str]:
    """Paths of the blocks of ``score``, first block first."""
    sites = hx.sparsify(score, config=hx.Config(rules=(FORCE,))).trace(*operands).plan.sites
    return [site.path for site in sites if site.kind == "ffn"]


def configured(paths: list[str], model: Model, head, blocks, shares: tuple[float, ...]) -> hx.Config:
    """Settings that give each block its share, at every site whatever its size."""
    sizes = [hx.Ffn(active=share, group_size=model.group_size, predictor=blocks) for share in shares]
    rules = (FORCE, *(hx.Rule(path, ffn=size) for path, size in zip(paths, sizes, strict=True)))
    return hx.Config(vocab=hx.Vocab(candidates=CANDIDATES, predictor=head), ffn=sizes[0], rules=rules)


def measure(fitting: np.ndarray, unseen: np.ndarray, console: Console) -> list[Row]:
    """All rows: for each model itself, then predictors by sizes."""
    followed, before = jnp.asarray(unseen[:, 1:]), jnp.asarray(unseen[:, :-1])
    logs = jax.jit(lambda logits: jax.nn.log_softmax(logits))
    rows: list[Row] = []
    taught: list[jax.Array] = []
    paths: list[str] = []
    calibrations: dict = {}
    for model in models():
        exact = jax.jit(model.exact)
        own = [logs(exact(model.params, window[None])[0]) for window in before]
        taught = taught or own
        own_best = np.stack([np.argmax(np.asarray(o), axis=1) for o in own])
        dense_best = np.stack([np.argmax(np.asarray(t), axis=1) for t in taught])
        itself = [compared(*three) for three in zip(own, taught, followed, strict=True)]
        if model.name != "dense-trained, groups":
            rows.append(_row(model.name, "none: exact", "", 1.0, itself, dense_best, own_best))
        stacked = jnp.stack(taught)
        cache = lm.init_cache(lm.config_of(model.params), batch=1, length=before.shape[1])
        operands = (model.params, cache, before[0], followed[0], taught[0])
        paths = paths or blocks_of(operands)
        for name, head, blocks in PREDICTORS:
            key = id(model.params)
            if (head, blocks) != (INT8, INT8) and key not in calibrations:
                asked = hx.Config(vocab=hx.Vocab(predictor=FINE), ffn=hx.Ffn(predictor=FINE))
                batches = [(model.params, jnp.asarray(window[None])) for window in fitting]
                calibrations[key] = hx.calibrate(lm.forward, batches, config=asked)
            for label, shares in model.sizes.items():
                config = configured(paths, model, head, blocks, shares)
                step = hx.sparsify(score, config=config, calibration=calibrations.get(key))
                plan = step.trace(*operands).plan
                packed = step.trace(*operands).pack(model.params)
                # Windows side by side: each is still a decode of one token a call, with its own choice of rows.
                over = jax.jit(jax.vmap(step, in_axes=(None, None, 0, 0, 0)))
                found = [list(one) for one in zip(*over(packed, cache, before, followed, stacked), strict=True)]
                share = plan.sparse_bytes / plan.dense_bytes
                rows.append(_row(model.name, name, label, share, found, dense_best, own_best))
                done = rows[-1]
                console.print(f"{done.model}; {done.predictor}; {done.sizes}: {done.loss:.4f}, {done.same_as_own:.2%}")
    return rows


def _row(model, predictor, sizes, share, found, dense_best, own_best) -> Row:
    loss, divergence, best = (np.stack([np.asarray(one[i]) for one in found]) for i in range(3))
    return Row(
        model,
        predictor,
        sizes,
        share,
        float(loss.mean()),
        float(divergence.mean()),
        float((best == dense_best).mean()),
        float((best == own_best).mean()),
    )


def page(rows: list[Row], positions: int, fitted: int) -> str:
    """The table and the two plots as Markdown."""
    base = rows[0].loss
    trained = rows[-1].sizes
    mean = next(r.loss for r in rows if r.model == "top-k-trained")
    lines = [
        "# Quality",
        "",
        "Made by `make quality`; do not edit.",
        "",
        f"The bundled model, {positions:,} positions of held-out text, decoded a token at a time with at most 255 "
        f"tokens before. {CANDIDATES} candidates in the head, other logits predicted. Dense-trained: single units are "
        "chosen; with *groups*: of 8 neighbouring units, as they happen to lie. Top-k-trained: "
        "`examples/finetune_tiny_lm.py` from the dense weights; groups of 8 units, "
        f"{trained} of them by block in training. Low rank is fitted to the inputs of other held-out text "
        f"({fitted:,} tokens, `hx.calibrate`).",
        "",
        "- *bytes*: weights read a token by head and blocks together, of the dense model's 16.8 MB in f32.",
        "- *loss*, nats a token, and *added* to the dense model's. KL is from the dense model's distribution.",
        "- *same as dense*: most likely token that of the dense model. *same as own*: that of the row's model computed "
        "exactly (for the top-k-trained one with the exact top-k it was trained with).",
        "",
        "| model | predictor | units computed, by block | bytes | loss | added | KL | same as dense | same as own |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        lines.append(
            f"| {r.model} | {r.predictor} | {r.sizes or '(its own)'} | {r.bytes:.1%} | {r.loss:.4f} | "
            f"{r.loss - base:+.4f} | {r.divergence:.4f} | {r.same_as_dense:.2%} | {r.same_as_own:.2%} |"
        )
    version = f"JAX {jax.__version__}, Python {platform.python_version()}"
    lines += [
        "",
        f"The top-k-trained model itself, all units computed and the top groups kept, is {mean - base:+.4f} nats from "
        "the dense one; what decoding adds is the difference to that row.",
        "",
        "![Loss added against bytes read](quality_loss.svg)",
        "",
        "![Greedy agreement against bytes read](quality_agreement.svg)",
        "",
        f"{version}, {jax.devices()[0].device_kind}.",
        "",
    ]
    return "\n".join(lines)


def plots(rows: list[Row], folder: Path) -> None:
    """Loss added and greedy agreement, each against bytes read."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("quality.py: the plots need matplotlib; install hire-xform[plots]") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hire_xform"
    from matplotlib import pyplot as plt

    base = rows[0].loss
    kinds = (
        ("quality_loss.svg", "loss added, nats a token", lambda r: r.loss - base, 0.01),
        ("quality_agreement.svg", "most likely token that of the dense model, %", lambda r: 100 * r.same_as_dense, 99),
    )
    for name, label, value, target in kinds:
        figure, axes = plt.subplots(figsize=(7, 4.2))
        styles = (("dense-trained", "--", "o"), ("dense-trained, groups", ":", "^"), ("top-k-trained", "-", "s"))
        for i, (predictor, _, _) in enumerate(PREDICTORS):
            for model, style, marker in styles:
                own = [r for r in rows if (r.model, r.predictor) == (model, predictor)]
                own = sorted(own, key=lambda r: r.bytes)
                x, y = [100 * r.bytes for r in own], [value(r) for r in own]
                axes.plot(x, y, style, marker=marker, color=f"C{i}", markersize=4, label=f"{model}, {predictor}")
        axes.axvline(25, color="0.7", linewidth=0.8)
        axes.axhline(target, color="0.7", linewidth=0.8)
        axes.set_xlabel("weight bytes read by head and blocks, % of dense")
        axes.set_ylabel(label)
        axes.legend(fontsize=6.5)
        figure.tight_layout()
        figure.savefig(folder / name, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Writes the page and the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=16, help="windows of 256 held-out tokens to measure on")
    parser.add_argument("--fitting", type=int, default=24, help="windows to fit low-rank predictors to")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the page and the plots")
    options = parser.parse_args()
    tokens = np.load(ROOT / "examples" / "tiny_lm" / "heldout.npy").astype(np.int32)
    windows = tokens[: 256 * (options.fitting + options.windows)].reshape(-1, 256)
    fitting, unseen = windows[: options.fitting], windows[options.fitting :]
    rows = measure(fitting, unseen, Console())
    plots(rows, options.output)
    text = page(rows, unseen.shape[0] * 255, fitting.size)
    (options.output / "quality.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
