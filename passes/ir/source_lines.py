"""The line of the user's program that an equation came from."""

from __future__ import annotations

import re

from jax.extend import source_info_util

from hire_xform.passes.ir import compat

UNKNOWN_SOURCE = "unknown"
# Packages of layers: a line inside one of them is the same for every layer, so the line that called it is told instead.
_LAYERS = re.compile(r"[/\\](?:site|dist)-packages[/\\](?:flax|equinox|haiku|keras|jaxtyping|einops)[/\\]")
_MANY_FRAMES = 100


def source_line(eqn: compat.Eqn) -> str:
    """The user's ``file:line (function)`` that an equation came from; "unknown" when JAX kept no traceback."""
    text = source_info_util.summarize(eqn.source_info)
    if not _LAYERS.search(text):
        return text or UNKNOWN_SOURCE
    lines = source_info_util.summarize(eqn.source_info, num_frames=_MANY_FRAMES).splitlines()
    return next((line for line in reversed(lines) if not _LAYERS.search(line)), text)
