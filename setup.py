"""The native kernels, built where there is a compiler and left out where there is none; pyproject.toml has the rest."""

import importlib.util
import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("lowering", "kernels", "cpu")


def headers() -> Path | None:
    """Where jaxlib keeps the headers of XLA's FFI; None where it isn't installed."""
    found = importlib.util.find_spec("jaxlib")
    include = Path(found.origin).parent / "include" if found and found.origin else None
    return include if include and (include / "xla" / "ffi" / "api" / "ffi.h").exists() else None


def api_version(include: Path) -> str | None:
    """The version of XLA's FFI that these headers are of, such as ``0_5``: it refuses libraries of a later one."""
    text = (include / "xla" / "ffi" / "api" / "c_api.h").read_text()
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    return "_".join(match[1] for match in found if match) if all(found) else None


def extensions() -> list[Extension]:
    """The one extension: a shared library that is loaded by name, not a module of Python."""
    include = headers()
    version = api_version(include) if include else None
    if os.name != "posix" or version is None or os.environ.get("HIRE_BUILD_KERNELS") == "0":
        print("hire_xform: without native kernels", file=sys.stderr)
        return []
    return [
        Extension(
            f"hire_xform.lowering.kernels.cpu._native_{version}",
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
            ],
            language="c++",
            # A build that fails is told, and leaves the portable form.
            optional=True,
        )
    ]


setup(ext_modules=extensions())
