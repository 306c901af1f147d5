"""What a framework's file lists: models as that framework's users write and call them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Framework -> (the file here that lists its models, the extra of this project that installs it).
FRAMEWORKS = {
    "plain JAX": ("plain_models", "test"),
    "Flax Linen": ("linen_models", "flax"),
    "Flax NNX": ("nnx_models", "flax"),
    "Equinox": ("equinox_models", "equinox"),
    "Haiku": ("haiku_models", "haiku"),
    "Keras": ("keras_models", "keras"),
    "transformers": ("huggingface_models", "transformers"),
    "Qwix": ("qwix_models", "qwix"),
}


@dataclass(frozen=True)
class Case:
    """One model, called one way.

    Attributes:
      framework: a key of ``FRAMEWORKS``.
      model: what it is: "decoder, tied head", "GPT-2".
      nesting: how it is put together or called: "nn.scan(nn.remat)", "filter_jit".
      build: makes the function and its arguments; argument 0 holds the weights unless ``weights`` says otherwise.
        The function is what a user has before `hire_xform`: nothing in it knows of the library.
      ffn: feed-forward blocks there are in the program, one in a loop's body counted once. From the model's own
        description, never from what was found.
      vocab: vocabulary projections there are.
      refusals: weight products that are neither (attention's, for the most part).
      missed: blocks or projections among the above that are known not to be rewritten, and why, for the table; each is
        a refusal.
      weights: weights_argnums.
      options: further options of ``sparsify``, as for ``jax.jit``.
      tolerance: largest difference at full width, over the largest entry; a 16-bit model needs a wider one.
    """

    framework: str
    model: str
    nesting: str
    build: Callable[[], tuple[Callable, tuple[Any, ...]]]
    ffn: int
    vocab: int
    refusals: int
    missed: tuple[str, ...] = ()
    weights: Any = 0
    options: tuple[tuple[str, Any], ...] = ()
    tolerance: float = 5e-5

    def __repr__(self) -> str:
        return f"{self.framework}-{self.model}-{self.nesting}".replace(" ", "_")


def cases_of(framework: str) -> list[Case]:
    """The models of a framework.

    Raises:
      ImportError: the framework is not installed.
    """
    return importlib.import_module(FRAMEWORKS[framework][0]).CASES
