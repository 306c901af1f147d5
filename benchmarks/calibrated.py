"""What calibration gives on the bundled model: loss, agreement and bytes, beside dense and the default sizes.

    python benchmarks/calibrated.py              # ten minutes on two cores

Calibrates on windows of the held-out text and measures on others: every position is decoded with the tokens before it.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import hire_xform as hx
from hire_xform.lowering.predict.predictors import pack_predictor, predict_scores

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from observe import observe  # noqa: E402
from tiny_lm import model as lm  # noqa: E402

FORCE = (hx.Rule("*", force=True),)
CALIBRATED = hx.Config(rules=FORCE)


def score(params, cache, tokens):
    """Decodes a window: the loss of each next token, and the most likely one."""

    def body(cache, pair):
        token, following = pair
        logits, cache = lm.decode_step(params, cache, token[None])
        return cache, (-jax.nn.log_softmax(logits[0])[following], jnp.argmax(logits[0]))

    return jax.lax.scan(body, cache, (tokens[:-1], tokens[1:]))[1]


def sizes_table(params, fitting, unseen, recall: float) -> Table:
    """Dense, default sizes and calibrated sizes."""
    length = len(unseen[0])
    cache = lm.init_cache(lm.config_of(params), batch=1, length=length)
    batches = [(params, w[None]) for w in fitting]
    rows = {
        "default sizes": None,
        f"recall {recall}, Quantized(8)": hx.calibrate(
            lm.forward, batches, recall=recall, predictors=[hx.Quantized(8)]
        ),
        f"recall {recall}": hx.calibrate(lm.forward, batches, recall=recall),
        f"recall {recall}, head_kl=None": hx.calibrate(lm.forward, batches, recall=recall, head_kl=None),
    }
    table = Table(title=f"{len(unseen) * (length - 1):,} held-out positions; calibrated on {fitting.size:,} others")
    for name in ("", "loss", "added", "same arg max", "MB of head and blocks", "exact units and rows"):
        table.add_column(name, justify="left" if not name else "right")
    dense = [jax.jit(score)(params, cache, w) for w in unseen]
    base = float(np.mean([loss for loss, _ in dense]))
    plan = None
    for name, given in rows.items():
        step = hx.sparsify(
            score, config=hx.approximate(rules=FORCE) if given is None else CALIBRATED, calibration=given
        )
        plan = step.trace(params, cache, unseen[0]).plan
        found = [step(params, cache, w) for w in unseen]
        loss = float(np.mean([one for one, _ in found]))
        same = np.mean([np.asarray(a[1] == b[1]).mean() for a, b in zip(found, dense, strict=True)])
        read = plan.sparse_bytes / (length - 1) / 1e6
        exact = ", ".join(f"{s.computed} {_short(s.settings.predictor)}" for s in plan.sites)
        table.add_row(name, f"{loss:.5f}", f"{loss - base:+.5f}", f"{same:.2%}", f"{read:.2f}", exact)
    table.add_row("dense", f"{base:.5f}", "", "", f"{plan.dense_bytes / (length - 1) / 1e6:.2f}", "")
    return table


def _short(predictor) -> str:
    """A predictor in a few letters."""
    if isinstance(predictor, hx.Quantized):
        return f"q{predictor.bits}"
    return f"{'lr' if isinstance(predictor, hx.LowRank) else 'p'}{predictor.rank:g} in {predictor.bits}"


def rank_table(params, fitting, unseen) -> Table:
    """Low rank fitted to the inputs and not: how often the dense arg max is among 64 candidates."""
    table = Table(title="dense arg max among 64 candidates, low rank of the head")
    for name in ("rank", "fitted to the inputs", "plain SVD"):
        table.add_column(name, justify="right")
    for rank in (0.25, 0.125):
        spec = hx.LowRank(rank)
        config = hx.Config(vocab=hx.Vocab(predictor=spec, certify=False), ffn=None)
        calibration = hx.calibrate(lm.forward, [(params, w[None]) for w in fitting], config=config, head_kl=None)
        (site,) = (s for s in calibration.sites.values() if s.kind == "vocab")
        program = jax.make_jaxpr(lm.forward)(params, unseen[0][None])

        def inputs(window, program=program, site=site):
            operands = jax.tree.leaves((params, window[None]))
            _, seen = observe(program, operands, lambda path, eqn: path == site.path)
            return seen[0][0][0].reshape(-1, site.width)

        x = jnp.concatenate([jax.jit(inputs)(w) for w in unseen])
        best = jnp.argmax(x @ params["embedding"].T, axis=1)
        cells = []
        for covariance in (jnp.asarray(site.inputs[0].covariance), None):
            packed = pack_predictor(params["embedding"], spec, covariance)
            chosen = jax.lax.top_k(predict_scores(x, packed, spec, site.units), 64)[1]
            cells.append(f"{float((chosen == best[:, None]).any(1).mean()):.1%}")
        table.add_row(f"{rank} d", *cells)
    return table


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recall", type=float, default=0.99, help="recall to calibrate for")
    parser.add_argument("--windows", type=int, default=24, help="windows of 256 tokens to calibrate on")
    options = parser.parse_args()
    params = lm.load(EXAMPLES / "tiny_lm" / "weights.safetensors")
    tokens = np.load(EXAMPLES / "tiny_lm" / "heldout.npy").astype(np.int32)
    windows = jnp.asarray(tokens[: 256 * (options.windows + 16)].reshape(-1, 256))
    fitting, unseen = windows[: options.windows], list(windows[options.windows :])
    console = Console()
    console.print(sizes_table(params, fitting, unseen, options.recall))
    console.print(rank_table(params, fitting, unseen))


if __name__ == "__main__":
    main()
