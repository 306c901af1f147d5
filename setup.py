"""The native kernels, built where there is a compiler and left out where there is none; pyproject.toml has the rest."""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("lowering", "kernels", "cpu")
sys.path.insert(0, str(SOURCES))
from ffi_version import ffi_version  # noqa: E402 - the package itself may lack what it imports


def headers() -> Path | None:
    """Where jaxlib keeps the headers of XLA's FFI; None where it isn't installed."""
    found = importlib.util.find_spec("jaxlib")
    return Path(found.origin).parent / "include" if found and found.origin else None


def extensions() -> list[Extension]:
    """The one extension: a shared library that is loaded by name, not a module of Python."""
    include = headers()
    version = ffi_version(include) if include else None
    if os.name != "posix" or version is None or os.environ.get("HIRE_BUILD_KERNELS") == "0":
        print("hire_xform: without native kernels", file=sys.stderr)
        return []
    return [
        Extension(
            "hire_xform.lowering.kernels.cpu._native_{}_{}".format(*version),
            sources=sorted(str(path) for path in SOURCES.glob("*.cc")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            # XLA's headers are not ours to warn of. Sums are added up in the order that is written.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-g0",
                f"-isystem{include}",
                *os.environ.get("HIRE_BUILD_FLAGS", "").split(),
            ],
            language="c++",
            # A build that fails is told, and leaves the portable form.
            optional=True,
        )
    ]


setup(ext_modules=extensions())
