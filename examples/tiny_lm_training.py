"""What a training run of the bundled model is made of: its recipe, batches, step, validation and checkpoints."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny_lm
from library_corpus import Corpus, read_corpus
from safetensors import safe_open
from safetensors.numpy import save as to_bytes
from tiny_lm.model import flatten, unflatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run must agree on to continue another: everything that shapes its course but the number of steps."""

    model: tiny_lm.Config  # sizes of the model
    length: int  # tokens of context in training and validation
    batch: int  # sequences per step
    learning_rate: float  # peak, reached after the warmup
    warmup: int  # steps of linear warmup
    weight_decay: float  # decoupled, on matrices only
    clip: float  # largest allowed global norm of the gradient
    heldout_percent: float  # share of files kept back for validation
    seed: int  # of the initial weights and of the data order


# --- data -------------------------------------------------------------------------------------------------------------


def corpus_for(source: Path, recipe: Recipe, tokenizer_path: Path) -> Corpus:
    """The text that a recipe trains on."""
    return read_corpus(
        source,
        tokenizer_path,
        vocab_size=recipe.model.vocab_size,
        length=recipe.length,
        heldout_percent=recipe.heldout_percent,
        seed=recipe.seed,
    )


def batch_at(tokens: np.ndarray, recipe: Recipe, step: int) -> np.ndarray:
    """Returns the windows [batch, length + 1] of a step: each pass is a new cut and a new order of the same tokens."""
    windows = (len(tokens) - 1 - recipe.length) // recipe.length
    rows = []
    for index in range(step * recipe.batch, (step + 1) * recipe.batch):
        epoch, place = divmod(index, windows)
        rng = np.random.default_rng([recipe.seed, epoch])
        offset = rng.integers(recipe.length)
        start = offset + rng.permutation(windows)[place] * recipe.length
        rows.append(tokens[start : start + recipe.length + 1])
    return np.stack(rows).astype(np.int32)


# --- optimisation -----------------------------------------------------------------------------------------------------


# (params, windows [B, S + 1]) -> nats per token.
Loss = Callable[[tiny_lm.Params, jax.Array], jax.Array]


def cross_entropy(params: tiny_lm.Params, windows: jax.Array) -> jax.Array:
    """Mean loss in nats per token over windows [B, S + 1]."""
    logits = tiny_lm.forward(params, windows[:, :-1])
    targets = jnp.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - targets)


def learning_rate_at(recipe: Recipe, steps: int, step: int) -> float:
    """Linear warmup, then a cosine down to a fiftieth of the peak."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = min(1.0, (step - recipe.warmup) / max(1, steps - recipe.warmup))
    return recipe.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_train_step(recipe: Recipe, loss_of: Loss = cross_entropy) -> Any:
    """Returns the jitted step: (state, windows, learning rate) -> (state, loss)."""
    beta1, beta2, epsilon = 0.9, 0.95, 1e-8

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: dict[str, Any], windows: jax.Array, rate: jax.Array) -> tuple[dict[str, Any], jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(state["params"], windows)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
        scale = jnp.minimum(1.0, recipe.clip / (norm + 1e-6))
        count = state["count"] + 1
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count
        mean = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * scale * g, state["mean"], gradients)
        square = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * jnp.square(scale * g), state["square"], gradients)

        def update(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            decay = recipe.weight_decay if p.ndim > 1 else 0.0
            return p - rate * (m / correction1 / (jnp.sqrt(v / correction2) + epsilon) + decay * p)

        params = jax.tree.map(update, state["params"], mean, square)
        return {"params": params, "mean": mean, "square": square, "count": count}, loss

    return train_step


def initial_state(recipe: Recipe) -> dict[str, Any]:
    """Returns fresh parameters and an empty optimizer state."""
    params = tiny_lm.init(recipe.model, jax.random.key(recipe.seed))
    return {
        "params": params,
        "mean": jax.tree.map(jnp.zeros_like, params),
        "square": jax.tree.map(jnp.zeros_like, params),
        "count": jnp.zeros((), jnp.float32),
    }


def validate(
    params: tiny_lm.Params,
    tokens: np.ndarray,
    length: int,
    limit: int | None = None,
    loss_of: Loss = cross_entropy,
) -> tuple[float, int]:
    """Returns the loss in nats per token over consecutive windows, and how many tokens were scored."""
    count = (len(tokens) - 1) // length
    count = count if limit is None else min(count, limit)
    windows = np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(count)]).astype(np.int32)
    loss = jax.jit(loss_of)
    batches = np.split(windows, range(8, count, 8))
    total = sum(float(loss(params, batch)) * len(batch) for batch in batches)
    return total / count, count * length


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, state: dict[str, Any], header: dict[str, Any]) -> None:
    """Writes the whole state in one move."""
    arrays: dict[str, np.ndarray] = {}
    for part in ("params", "mean", "square"):
        arrays |= {f"{part}.{name}": np.asarray(leaf) for name, leaf in flatten(state[part]).items()}
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_bytes(to_bytes(arrays, metadata={"header": json.dumps(header)}))
    os.replace(partial_path, path)


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the state and the header that were saved."""
    parts: dict[str, dict[str, jax.Array]] = {"params": {}, "mean": {}, "square": {}}
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["header"])
        for key in file.keys():  # noqa: SIM118 (not a dict)
            part, _, name = key.partition(".")
            parts[part][name] = jnp.asarray(file.get_tensor(key))
    state: dict[str, Any] = {part: unflatten(arrays) for part, arrays in parts.items()}
    state["count"] = jnp.asarray(header["step"], jnp.float32)
    return state, header


def check_same_recipe(recipe: Recipe, saved: dict[str, Any]) -> None:
    """Refuses to continue a run of another recipe, naming what differs."""
    mine = json.loads(json.dumps(dataclasses.asdict(recipe)))
    names = [name for name in mine if mine[name] != saved.get(name)]
    if names:
        differences = ", ".join(f"{name}: {saved.get(name)} there, {mine[name]} here" for name in names)
        raise ValueError(f"the checkpoint is of another run ({differences}); give its values, or --fresh")
