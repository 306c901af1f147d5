"""Trains the bundled language model on the source code of the Python standard library.

    python examples/train_tiny_lm.py --minutes 60

It trains a tokenizer and the model on the running interpreter's own library, keeps whole files back for validation,
writes checkpoints as it goes and continues from them with ``--resume`` (an interrupted run saves one first). At the
end the weights, rounded to bfloat16, go to ``examples/tiny_lm/`` with the tokenizer, the held-out tokens, a prompt of
held-out code and a record of the run.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import sysconfig
import time
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tiny_lm
from library_corpus import Corpus
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tiny_lm_training import (
    Loss,
    Recipe,
    batch_at,
    check_same_recipe,
    corpus_for,
    cross_entropy,
    initial_state,
    learning_rate_at,
    load_checkpoint,
    make_train_step,
    save_checkpoint,
    validate,
)

EXAMPLES = Path(__file__).resolve().parent


def machine() -> str:
    """Describes the machine in a line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return f"{os.cpu_count()} cores, {name}, {platform.system()}; JAX on {devices}"


def export(
    output: Path, corpus: Corpus, state: dict[str, Any], recipe: Recipe, header: dict[str, Any], steps: int
) -> dict[str, Any]:
    """Writes the weights and all that goes with them; returns the record of the run."""
    output.mkdir(parents=True, exist_ok=True)
    tiny_lm.save(output / "weights.safetensors", state["params"], dtype=ml_dtypes.bfloat16)
    stored = corpus.heldout[:65_537]
    np.save(output / "heldout.npy", stored)
    corpus.tokenizer.save(str(output / "tokenizer.json"))
    (output / "prompt.txt").write_text(corpus.prompt, encoding="utf-8")

    params = tiny_lm.load(output / "weights.safetensors")
    loss, scored = validate(params, corpus.heldout, recipe.length)
    stored_loss, stored_scored = validate(params, stored, recipe.length)
    done = header["step"]
    record = {
        "config": dataclasses.asdict(recipe.model),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "stored_dtype": "bfloat16",
        "validation_loss": round(loss, 4),
        "validation_tokens": scored,
        "heldout_file_loss": round(stored_loss, 4),
        "heldout_file_tokens": stored_scored,
        "context_length": recipe.length,
        "steps": done,
        "planned_steps": steps,
        "tokens_seen": done * recipe.batch * recipe.length,
        "training_tokens": len(corpus.train),
        "data": (
            f"standard library of CPython {platform.python_version()} (Python Software Foundation License):"
            f" {corpus.files} files, {corpus.heldout_files} of them held out"
        ),
        "training": {k: v for k, v in dataclasses.asdict(recipe).items() if k != "model"},
        "wall_seconds": round(header["seconds"]),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "command": header["command"],
        "units": "losses are nats per token of the stored, rounded weights, with at most context_length tokens in view",
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def steps_in(minutes: float, recipe: Recipe, corpus: Corpus) -> int:
    """Measures a few steps and returns how many fit in the minutes."""
    train_step, state = make_train_step(recipe), initial_state(recipe)
    seconds = []
    for step in range(6):
        start = time.perf_counter()
        state, loss = train_step(state, batch_at(corpus.train, recipe, step), 0.0)
        loss.block_until_ready()
        seconds.append(time.perf_counter() - start)
    return max(recipe.warmup + 1, int(60 * minutes / float(np.median(seconds[1:]))))


def train(args: argparse.Namespace, recipe: Recipe, console: Console) -> None:
    """Trains, from the start or from a checkpoint, and exports at the end."""
    folder: Path = args.checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, tokenizer_path = folder / "state.safetensors", folder / "tokenizer.json"
    command = " ".join(["python", "examples/train_tiny_lm.py", *map(shlex.quote, sys.argv[1:])])

    if args.resume or args.export:
        if not checkpoint.exists():
            raise FileNotFoundError(f"nothing to resume: no checkpoint at {checkpoint}")
        state, header = load_checkpoint(checkpoint)
        check_same_recipe(recipe, header["recipe"])
        corpus = corpus_for(args.source, recipe, tokenizer_path)
        if len(corpus.train) != header["training_tokens"]:
            raise ValueError(
                f"--source has {len(corpus.train)} training tokens, the checkpoint was made with"
                f" {header['training_tokens']}: is it the library of the same Python version?"
            )
        steps = args.steps or header["steps"]
    else:
        if checkpoint.exists() and not args.fresh:
            raise FileExistsError(f"there is a checkpoint at {checkpoint}: give --resume to continue it, or --fresh")
        checkpoint.unlink(missing_ok=True)
        tokenizer_path.unlink(missing_ok=True)
        corpus = corpus_for(args.source, recipe, tokenizer_path)
        steps = args.steps or steps_in(args.minutes, recipe, corpus)
        state = initial_state(recipe)
        header = {
            "recipe": dataclasses.asdict(recipe),
            "training_tokens": len(corpus.train),
            "step": 0,
            "seconds": 0.0,
            "command": command,
        }
    header["steps"] = steps
    console.print(
        f"{corpus.files} files, {corpus.heldout_files} held out; {len(corpus.train):,} training and"
        f" {len(corpus.heldout):,} held-out tokens; steps {header['step']} to {steps}"
        f" of {recipe.batch * recipe.length} tokens, {steps * recipe.batch * recipe.length / len(corpus.train):.1f}"
        " passes over the text"
    )

    if not args.export:
        finished = loop(args, recipe, console, corpus, state, header, checkpoint)
        if not finished:
            console.print(f"stopped after {header['step']} steps; continue with --resume")
            return
        state, header = load_checkpoint(checkpoint)
    record = export(args.output, corpus, state, recipe, header, steps)
    console.print(
        f"wrote {args.output}: {record['validation_loss']:.4f} nats per token over {record['validation_tokens']:,}"
        f" held-out tokens after {record['steps']} steps"
    )


def loop(
    args: argparse.Namespace,
    recipe: Recipe,
    console: Console,
    corpus: Corpus,
    state: dict[str, Any],
    header: dict[str, Any],
    checkpoint: Path,
    trained: Loss = cross_entropy,
    validated: Loss = cross_entropy,
) -> bool:
    """Takes the steps, keeping header and checkpoint up to date; returns whether all were taken."""
    stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

    train_step = make_train_step(recipe, trained)
    steps, first, before = header["steps"], header["step"], header["seconds"]
    last = min(steps, first + args.stop_after) if args.stop_after else steps
    began = saved = reported = time.monotonic()
    reported_step, losses = first, []

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, completed=first, loss=float("nan"), speed=0.0)
        for step in range(first, last):
            rate = learning_rate_at(recipe, steps, step)
            state, loss = train_step(state, batch_at(corpus.train, recipe, step), rate)
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} at step {step}; try a smaller --learning-rate")

            now, done = time.monotonic(), step + 1
            speed = (done - reported_step) * recipe.batch * recipe.length / max(now - reported, 1e-9)
            progress.update(task, completed=done, loss=float(np.mean(losses[-50:])), speed=speed)
            if done % args.report_every == 0 or done == last:
                line = f"step {done}/{steps}  loss {np.mean(losses):.4f}  rate {rate:.2e}  {speed:,.0f} tokens/s"
                if done % (5 * args.report_every) == 0:
                    found, _ = validate(state["params"], corpus.heldout, recipe.length, 32, validated)
                    line += f"  validation {found:.4f}"
                console.print(f"{line}  {(now - began) / 60:.1f} min")
                reported, reported_step, losses = time.monotonic(), done, []
            if now - saved > 60 * args.checkpoint_minutes or stopping or done == last:
                header |= {"step": done, "seconds": before + now - began}
                save_checkpoint(checkpoint, state, header)
                saved = time.monotonic()
            if stopping:
                break
    return header["step"] >= steps


def parse_arguments() -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(
        description="Train the bundled language model on the Python standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def positive(kind: type) -> Any:
        def parse(text: str) -> Any:
            value = kind(text)
            if not value > 0:
                raise argparse.ArgumentTypeError(f"must be positive, got {text}")
            return value

        return parse

    run = parser.add_argument_group("the run")
    run.add_argument("--minutes", type=positive(float), default=60.0, help="time to fit the steps to, by measuring")
    run.add_argument("--steps", type=positive(int), help="steps in all, instead of --minutes; may change on --resume")
    run.add_argument("--stop-after", type=positive(int), help="stop with a checkpoint after so many steps")
    run.add_argument("--checkpoint-minutes", type=positive(float), default=3.0, help="time between checkpoints")
    run.add_argument("--report-every", type=positive(int), default=50, help="steps between lines of report")
    start = run.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    start.add_argument("--fresh", action="store_true", help="start anew, discarding the checkpoint")
    start.add_argument("--export", action="store_true", help="no training: write the output from the checkpoint")

    paths = parser.add_argument_group("paths")
    paths.add_argument("--source", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder to read")
    paths.add_argument("--checkpoints", type=Path, default=EXAMPLES / "checkpoints", help="folder of checkpoints")
    paths.add_argument("--output", type=Path, default=EXAMPLES / "tiny_lm", help="folder of the result")

    recipe = parser.add_argument_group("the recipe (a resumed run must repeat it)")
    recipe.add_argument("--vocab-size", type=positive(int), default=8192)
    recipe.add_argument("--d-model", type=positive(int), default=256)
    recipe.add_argument("--d-ff", type=positive(int), default=1024)
    recipe.add_argument("--num-layers", type=positive(int), default=4)
    recipe.add_argument("--num-heads", type=positive(int), default=4)
    recipe.add_argument("--length", type=positive(int), default=512, help="tokens of context")
    recipe.add_argument("--batch", type=positive(int), default=4, help="sequences per step")
    recipe.add_argument("--learning-rate", type=positive(float), default=2e-3, help="peak")
    recipe.add_argument("--warmup", type=positive(int), default=200, help="steps")
    recipe.add_argument("--weight-decay", type=float, default=0.1, help="on matrices")
    recipe.add_argument("--clip", type=positive(float), default=1.0, help="global norm of the gradient")
    recipe.add_argument("--heldout-percent", type=positive(float), default=5.0, help="files kept back")
    recipe.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.vocab_size > 65_536:
        parser.error(f"--vocab-size must be at most 65536 (tokens are stored in 16 bits), got {args.vocab_size}")
    if args.vocab_size < 257:
        parser.error(f"--vocab-size must be at least 257 (the bytes and an end of file), got {args.vocab_size}")
    if args.heldout_percent >= 100:
        parser.error(f"--heldout-percent must be below 100, got {args.heldout_percent}")
    return args


def main() -> int:
    """Runs the command line."""
    args = parse_arguments()
    width = None if sys.stdout.isatty() else max(120, shutil.get_terminal_size().columns)
    console = Console(width=width, highlight=False, soft_wrap=True)
    try:
        sizes = {name: getattr(args, name) for name in ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads")}
        shared = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if f.name != "model"}
        recipe = Recipe(model=tiny_lm.Config(**sizes), **shared)
        train(args, recipe, console)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"train_tiny_lm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
