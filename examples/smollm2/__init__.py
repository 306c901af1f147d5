"""SmolLM2-135M-Instruct, a language model that answers questions, in plain JAX."""

from smollm2.model import Cache, Config, Params, decode_step, forward, init_cache, prefill
from smollm2.reading import MissingModelError, Model, load, model_file

__all__ = [
    "Cache",
    "Config",
    "MissingModelError",
    "Model",
    "Params",
    "decode_step",
    "forward",
    "init_cache",
    "load",
    "model_file",
    "prefill",
]
