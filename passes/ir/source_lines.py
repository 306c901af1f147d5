"""The line of the user's program that an equation came from."""

from __future__ import annotations

import functools
import re
import sys
from itertools import takewhile

from jax.extend import source_info_util

from hire_xform.passes.ir import compat

UNKNOWN_SOURCE = "unknown"
# What is installed, and Python's own modules.
_INSTALLED = re.compile(r"[/\\](?:site|dist)-packages[/\\]|[/\\]lib[/\\]python\d[^/\\]*[/\\]|^<frozen ")
# Packages of layers, or of what stands between layers and JAX: a line inside one of them is the same for every layer,
# so where all of a program is installed the line that called it is told instead.
_LAYERS = re.compile(r"-packages[/\\](?:flax|equinox|haiku|keras|jaxtyping|einops|qwix|penzai[/\\]core)[/\\]")
_MANY_FRAMES = 100


def source_line(eqn: compat.Eqn) -> str:
    """The user's ``file:line (function)`` that an equation came from; "unknown" when JAX kept no traceback.

    That is the innermost line that is not inside an installed package. Of a function whose lines are all inside of
    some, it is the innermost, and the line of another function that called it.
    """
    text = source_info_util.summarize(eqn.source_info)
    if not _INSTALLED.search(text) and not _is_ours(text):
        return text or UNKNOWN_SOURCE
    lines = source_info_util.summarize(eqn.source_info, num_frames=_MANY_FRAMES).splitlines()[::-1]
    inside = list(takewhile(lambda line: not _is_ours(line), lines))
    mine = next((line for line in inside if not _INSTALLED.search(line)), None)
    return mine or _of_packages(inside) or text


def _of_packages(inside: list[str]) -> str:
    """What is told of a function whose lines, innermost first, are all inside packages."""
    told = [line for line in inside if not _LAYERS.search(line)] or inside
    callers = [line for line in told if _function(line) != _function(told[0])]
    return ", called at ".join(map(_short, [*told[:1], *callers[:1]]))


def _is_ours(line: str) -> bool:
    """Whether a line is of this package."""
    return line.startswith(_own_folders())


@functools.cache
def _own_folders() -> tuple[str, ...]:
    """Where this package's files are, as lines begin with."""
    folders = [folder for name in _PACKAGES if name in sys.modules for folder in sys.modules[name].__path__]
    return tuple(f"{folder}{end}" for folder in folders for end in "/\\")


_ROOT = __name__.partition(".")[0]
_PACKAGES = (_ROOT, f"{_ROOT}.passes", f"{_ROOT}.lowering")


def _short(line: str) -> str:
    """A line with its file as it lies in the folder of packages."""
    return re.split(r"-packages[/\\]", line)[-1]


def _function(line: str) -> str:
    """Its file and function, of ``file:line:column (function)``."""
    return re.sub(r":\d+(:\d+)?(?= \(|$)", "", line)
