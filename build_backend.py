"""Builds as setuptools does; where there is a C++ compiler, with jaxlib at hand, whose headers the kernels include."""

import os
import shutil
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that are as setuptools has them

JAXLIB = "jaxlib>=0.9.2"


def compiler() -> str | None:
    """The C++ compiler that setuptools will call on this platform; None where there is none that is known to serve."""
    if os.name != "posix":
        return None
    named = os.environ.get("CXX", "").split()
    return next((found for name in (*named[:1], "c++", "g++", "clang++") if (found := shutil.which(name))), None)


def _with_headers(requires: list[str]) -> list[str]:
    return [*requires, JAXLIB] if compiler() else requires


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What building a wheel takes."""
    return _with_headers(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """What an editable installation takes."""
    return _with_headers(build_meta.get_requires_for_build_editable(config_settings))
