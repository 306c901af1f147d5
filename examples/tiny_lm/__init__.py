"""A small language model of Python source code, in plain JAX."""

from tiny_lm.model import (
    Cache,
    Config,
    Params,
    config_of,
    decode_step,
    forward,
    generate,
    init,
    init_cache,
    load,
    prefill,
    save,
)

__all__ = [
    "Cache",
    "Config",
    "Params",
    "config_of",
    "decode_step",
    "forward",
    "generate",
    "init",
    "init_cache",
    "load",
    "prefill",
    "save",
]
