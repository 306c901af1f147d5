"""Fine-tunes the bundled model to decode with few hidden units: a top-k in its feed-forward blocks, by hire_xform.

    python examples/finetune_tiny_lm.py            # 41 minutes of two busy cores

It begins with the dense weights, puts hidden units that fire together next to each other (which changes nothing that
the model computes), and trains the model with only the top groups of units of each block to say what the dense model
says (the KL divergence from the dense model's next-token distribution). Text, split, checkpoints and ``--resume`` are
those of ``train_tiny_lm.py``. At the end the weights, rounded to bfloat16, go to ``examples/tiny_lm/`` beside the dense
ones, with a record of the run.
"""

import argparse
import dataclasses
import json
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tiny_lm
import tiny_lm_training as training
import train_tiny_lm as base
from library_corpus import Corpus
from observe import observe
from rich.console import Console

import hire_xform as hx

MODEL = Path(__file__).resolve().parent / "tiny_lm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(training.Recipe):
    """What a run must agree on to continue another."""

    active: tuple[float, ...]  # share of the groups that each block keeps, first block first
    group_size: int  # hidden units in a group


# --- the model with a top-k -------------------------------------------------------------------------------------------


def config_for(paths: list[str], active: tuple[float, ...], group_size: int, **ffn: Any) -> hx.Config:
    """Settings that give each block its share of groups.

    Args:
      paths: the paths of the blocks in the program, first block first.
      active: their shares.
      group_size: units in a group.
      **ffn: more settings of ``hx.Ffn``.
    """
    sizes = [hx.Ffn(active=share, group_size=group_size, **ffn) for share in active]
    rules = tuple(hx.Rule(path, ffn=size) for path, size in zip(paths, sizes, strict=True))
    return hx.Config(ffn=sizes[0], rules=rules)


def topk_forward(params: tiny_lm.Params, active: tuple[float, ...], group_size: int) -> Any:
    """``tiny_lm.forward`` with a top-k in its blocks: exact, all units computed."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    found = hx.topk_ffn(tiny_lm.forward).trace(params, tokens).plan.sites
    return hx.topk_ffn(tiny_lm.forward, config=config_for([site.path for site in found], active, group_size))


def losses(params: tiny_lm.Params, active: tuple[float, ...], group_size: int) -> tuple[training.Loss, training.Loss]:
    """What is trained, the divergence from the dense model, and what is validated, the cross entropy.

    Args:
      params: the dense model.
      active: share of the groups that each block keeps.
      group_size: units in a group.
    """
    forward = topk_forward(params, active, group_size)

    def divergence(student: tiny_lm.Params, windows: jax.Array) -> jax.Array:
        taught = jax.nn.log_softmax(tiny_lm.forward(params, windows[:, :-1]))
        said = jax.nn.log_softmax(forward(student, windows[:, :-1]))
        return jnp.mean(jnp.sum(jnp.exp(taught) * (taught - said), axis=-1))

    def cross_entropy(student: tiny_lm.Params, windows: jax.Array) -> jax.Array:
        said = jax.nn.log_softmax(forward(student, windows[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(said, windows[:, 1:, None], axis=-1))

    return divergence, cross_entropy


# --- neighbours -------------------------------------------------------------------------------------------------------


def contributions(params: tiny_lm.Params, windows: jax.Array) -> list[jax.Array]:
    """What each hidden unit adds for each token: activation times norm of its row, ``[tokens, F]`` for each block."""
    traced = hx.topk_ffn(tiny_lm.forward).trace(params, windows)
    blocks = {site.path for site in traced.plan.sites}
    # The operands of each block's second product: its hidden units, and the matrix.
    _, seen = observe(traced.jaxpr, jax.tree.leaves((params, windows)), lambda path, equation: path in blocks)
    return [hidden.reshape(-1, rows.shape[0]) * jnp.linalg.norm(rows, axis=1) for (hidden, rows), _ in seen]


def neighbours(together: np.ndarray, group_size: int) -> np.ndarray:
    """An order of the units in which each group of neighbours fires together.

    The strongest unit that is left opens a group, and the units most alike to the group so far fill it.

    Args:
      together: ``[F, F]``, the products of what two units add, summed over tokens.
      group_size: units in a group.
    """
    strength = np.sqrt(np.diag(together)) + 1e-9
    alike = together / strength[:, None] / strength
    left, order = np.ones(len(strength), bool), []
    while left.any():
        first = int(np.argmax(np.where(left, strength, -1)))
        group, score = [first], alike[first].copy()
        left[first] = False
        while len(group) < group_size:
            group.append(int(np.argmax(np.where(left, score, -np.inf))))
            left[group[-1]] = False
            score += alike[group[-1]]
        order += group
    return np.array(order)


def regrouped(params: tiny_lm.Params, recipe: Recipe, tokens: np.ndarray, batches: int = 8) -> tiny_lm.Params:
    """The same model with its hidden units in another order: those that fire together are neighbours."""
    noted = jax.jit(lambda windows: [c.T @ c for c in contributions(params, windows)])
    sums = [np.zeros((recipe.model.d_ff, recipe.model.d_ff)) for _ in params["layers"]]
    for step in range(batches):
        for total, found in zip(sums, noted(training.batch_at(tokens, recipe, step)[:, :-1]), strict=True):
            total += np.asarray(found, np.float64)
    layers = []
    for layer, together in zip(params["layers"], sums, strict=True):
        order, ffn = neighbours(together, recipe.group_size), layer["ffn"]
        moved = {"w_in": ffn["w_in"][:, order], "b_in": ffn["b_in"][order], "w_out": ffn["w_out"][order]}
        layers.append({**layer, "ffn": {**ffn, **moved}})
    return {**params, "layers": layers}


# --- the run ----------------------------------------------------------------------------------------------------------


def export(output: Path, corpus: Corpus, state: dict[str, Any], recipe: Recipe, header: dict[str, Any]) -> str:
    """Writes the weights and the record of the run; returns a line about it."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "topk_weights.safetensors"
    tiny_lm.save(path, state["params"], dtype=ml_dtypes.bfloat16)
    dense, params = tiny_lm.load(MODEL / "weights.safetensors"), tiny_lm.load(path)
    _, top_k = losses(dense, recipe.active, recipe.group_size)
    loss, scored = training.validate(params, corpus.heldout, recipe.length, None, top_k)
    dense_loss, _ = training.validate(dense, corpus.heldout, recipe.length)
    done = header["step"]
    record = {
        "active": recipe.active,
        "group_size": recipe.group_size,
        "stored_dtype": "bfloat16",
        "validation_loss": round(loss, 4),
        "validation_loss_of_the_dense_model": round(dense_loss, 4),
        "validation_loss_before_training": round(header["before"], 4),
        "validation_tokens": scored,
        "steps": done,
        "tokens_seen": done * recipe.batch * recipe.length,
        "training": {k: v for k, v in dataclasses.asdict(recipe).items() if k not in ("model", "active", "group_size")},
        "data": f"as in training.json: {corpus.files} files, {corpus.heldout_files} of them held out",
        "wall_seconds": round(header["seconds"]),
        "machine": base.machine(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "hire_xform": hx.__version__},
        "command": header["command"],
        "units": "losses are nats per token, with an exact top-k in every block; that of the dense model without",
    }
    (output / "topk_training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return (
        f"wrote {path}: {loss:.4f} nats per token over {scored:,} held-out tokens after {done} steps, the dense model "
        f"{dense_loss:.4f}"
    )


def finetune(args: argparse.Namespace, recipe: Recipe, console: Console) -> None:
    """Trains, from the dense weights or from a checkpoint, and exports at the end."""
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint = args.checkpoints / "topk_state.safetensors"
    corpus = training.corpus_for(args.source, recipe, MODEL / "tokenizer.json")
    dense = tiny_lm.load(MODEL / "weights.safetensors")
    trained, validated = losses(dense, recipe.active, recipe.group_size)
    if args.resume or args.export:
        if not checkpoint.exists():
            raise FileNotFoundError(f"nothing to resume: no checkpoint at {checkpoint}")
        state, header = training.load_checkpoint(checkpoint)
        training.check_same_recipe(recipe, header["recipe"])
        if len(corpus.train) != header["training_tokens"]:
            raise ValueError(f"--source has {len(corpus.train)} training tokens, not {header['training_tokens']}")
    else:
        if checkpoint.exists() and not args.fresh:
            raise FileExistsError(f"there is a checkpoint at {checkpoint}: give --resume to continue it, or --fresh")
        params = regrouped(dense, recipe, corpus.train)
        before, _ = training.validate(params, corpus.heldout, recipe.length, None, validated)
        console.print(f"with the top-k, before training: {before:.4f} nats per held-out token")
        zeros = {part: jax.tree.map(jnp.zeros_like, params) for part in ("mean", "square")}
        state = {"params": params, **zeros, "count": jnp.zeros((), jnp.float32)}
        header = {
            "recipe": dataclasses.asdict(recipe),
            "training_tokens": len(corpus.train),
            "before": before,
            "step": 0,
            "seconds": 0.0,
            "command": " ".join(["python", "examples/finetune_tiny_lm.py", *map(shlex.quote, sys.argv[1:])]),
        }
    header["steps"] = args.steps
    if not args.export:
        if not base.loop(args, recipe, console, corpus, state, header, checkpoint, trained, validated):
            console.print(f"stopped after {header['step']} steps; continue with --resume")
            return
        state, header = training.load_checkpoint(checkpoint)
    console.print(export(args.output, corpus, state, recipe, header))


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tune the bundled language model with a top-k in its feed-forward blocks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=1000, help="steps in all; may change on --resume")
    parser.add_argument("--stop-after", type=int, help="stop with a checkpoint after so many steps")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0, help="time between checkpoints")
    parser.add_argument("--report-every", type=int, default=20, help="steps between lines of report")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    start.add_argument("--fresh", action="store_true", help="start anew, discarding the checkpoint")
    start.add_argument("--export", action="store_true", help="no training: write the output from the checkpoint")
    source = Path(sysconfig.get_paths()["stdlib"])
    parser.add_argument("--source", type=Path, default=source, help="folder of the text")
    parser.add_argument("--checkpoints", type=Path, default=base.EXAMPLES / "checkpoints", help="their folder")
    parser.add_argument("--output", type=Path, default=MODEL, help="folder of the result")
    parser.add_argument("--active", type=float, nargs="+", default=[0.25, 0.125, 0.1875, 0.3125], help="for each block")
    parser.add_argument("--group-size", type=int, default=8, help="units in a group")
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="peak")
    parser.add_argument("--warmup", type=int, default=10, help="steps")
    return parser.parse_args()


def main() -> int:
    """Runs the command line."""
    args = parse_arguments()
    width = None if sys.stdout.isatty() else max(120, shutil.get_terminal_size().columns)
    console = Console(width=width, highlight=False, soft_wrap=True)
    try:
        record = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
        given = {"batch": args.batch, "learning_rate": args.learning_rate, "warmup": args.warmup}
        recipe = Recipe(
            model=tiny_lm.Config(**record["config"]),
            active=tuple(args.active),
            group_size=args.group_size,
            **{**record["training"], **given},
        )
        if len(recipe.active) != recipe.model.num_layers:
            raise ValueError(f"--active has {len(recipe.active)} shares; expected {recipe.model.num_layers}")
        finetune(args, recipe, console)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"finetune_tiny_lm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
