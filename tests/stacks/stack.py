"""What a stack's file lists: decode functions that people run, and the lines that a user adds to theirs."""

from __future__ import annotations

import importlib
import inspect
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Read once, when Keras is first imported, which others than KerasHub may do.
os.environ["KERAS_BACKEND"] = "jax"

# Stack -> the file here that lists its decode functions.
STACKS = {
    "tunix": "tunix_stack",
    "MaxText": "maxtext_stack",
    "gemma": "gemma_stack",
    "KerasHub": "keras_hub_stack",
    "penzai": "penzai_stack",
    "tpu-inference": "tpu_inference_stack",
}


@dataclass(frozen=True)
class Run:
    """A decode function on a small model with random weights.

    Attributes:
      dense: the stack's own function.
      sparse: the same with the lines that a user adds; given settings.
      call: makes the arguments of a call, ``(args, kwargs)``, anew: some are donated.
      weights: which of them hold weights, by positions or names.
      tokens: of a result the tokens that were decoded; None where it has none.
    """

    dense: Callable[..., Any]
    sparse: Callable[[Any], Any]
    call: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    weights: tuple[int | str, ...]
    tokens: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Stack:
    """One decode function of a stack.

    Attributes:
      stack: a key of ``STACKS``.
      function: its name, as the stack has it.
      model: what runs in it.
      build: makes a ``Run``.
      ffn, vocab: blocks and vocabulary projections there are in the program, one in a loop's body counted once. From
        the model's own description, never from what was found.
      lines: that a user adds, as docs/stacks.md has them.
      proved: how many of them are rewritten by default, which is losslessly: units of none of these models are zero.
      stays: why a head is not among these.
      tolerance: largest difference at full width, over the largest entry.
    """

    stack: str
    function: str
    model: str
    build: Callable[[], Run]
    ffn: int
    vocab: int
    lines: int = 1
    proved: int = 1
    stays: str = ""
    tolerance: float = 5e-5

    def __repr__(self) -> str:
        return f"{self.stack}-{self.function}-{self.model}".replace(" ", "_")


def stacks_of(name: str) -> list[Stack]:
    """The decode functions of a stack.

    Raises:
      ImportError: the stack is not installed.
    """
    found: list[Stack] = importlib.import_module(STACKS[name]).CASES
    return found


def why_missing(name: str, error: ImportError) -> str:
    """The reason to skip a stack that is not installed.

    Raises:
      ImportError: ``HIRE_REQUIRE_STACKS``, as ``make stacks`` sets it, names it among those that have to be there.
    """
    if name in os.environ.get("HIRE_REQUIRE_STACKS", "").split():
        raise error
    return f"needs make stacks: {error}"


def lines_of(sparse: Callable[[Any], Any]) -> str:
    """The lines that a user adds: the body of a function of settings, which returns what they make."""
    _, body = inspect.getsource(sparse).split(":\n", 1)
    return textwrap.dedent(body).strip()


def randomised(weights: Any, seed: int = 0) -> Any:
    """Weights of the same shapes and dtypes, normally distributed with deviation 0.2 about what vectors are."""
    rng = np.random.default_rng(seed)

    def made(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        offset = leaf if leaf.ndim < 2 else 0
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.2, leaf.dtype) + offset

    return jax.tree.map(made, weights)
