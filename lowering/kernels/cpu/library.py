"""The native library: found beside this file, loaded, and made known to XLA; or the reason why it is not."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import re
from pathlib import Path

import jax

from hire_xform.lowering.kernels.cpu.ffi_version import ffi_version
from hire_xform.lowering.kernels.switch import switched_off

__all__ = ["instruction_sets", "load", "targets", "use"]

# What the library has for XLA to call; each a function of ``handlers.cc``.
targets = (
    "hire_scores",
    "hire_fine_scores",
    "hire_products",
    "hire_select_rows_dot",
    "hire_combine_rows",
    "hire_largest",
    "hire_arg_max",
    "hire_open_rows",
)

# Which targets there are and what they take: one more wherever that changes, here and in `hire_interface`. A library
# that an older installation left beside these sources has another, or none.
INTERFACE = 7


def _built() -> dict[tuple[int, int], Path]:
    """The libraries beside this file, by the version of XLA's FFI that they were built for."""
    found = {}
    for path in Path(__file__).parent.glob("_native_*"):
        match = re.fullmatch(r"_native_(\d+)_(\d+)(\..*)", path.name)
        if match and match[3] in importlib.machinery.EXTENSION_SUFFIXES:
            found[int(match[1]), int(match[2])] = path
    return found


def _fitting(built: dict[tuple[int, int], Path]) -> Path | str:
    """The library to load, or why there is none.

    XLA refuses handlers of a later version of its FFI, and does so when it starts: JAX could not be used at all. So
    they are compared before anything is registered, with the headers of the jaxlib at hand.
    """
    if not built:
        return "they are not built, as an installation does where it finds a C++ compiler"
    here = ffi_version(Path(jax.ffi.include_dir()))
    if here is None:
        return f"jaxlib does not say which version its FFI is: there is none in {jax.ffi.include_dir()}"
    major, minor = here
    fitting = [version for version in built if version[0] == major and version[1] <= minor]
    if not fitting:
        versions = ", ".join(f"{a}.{b}" for a, b in sorted(built))
        return f"they are built for version {versions} of XLA's FFI, and this jaxlib has {major}.{minor}: install again"
    return built[max(fitting)]


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library, its targets registered; or why there is none. Set ``HIRE_KERNELS=off`` to do without.

    Nothing here starts JAX's backends.
    """
    if switched_off():
        return "HIRE_KERNELS is off"
    path = _fitting(_built())
    if isinstance(path, str):
        return path
    try:
        library = ctypes.CDLL(str(path))
        if getattr(library, "hire_interface", lambda: 1)() != INTERFACE:
            return f"{path.name} was built of other sources than these: install again"
        library.hire_instruction_set.restype = ctypes.c_char_p
        for name in targets:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except Exception as error:
        # Whatever stands in its way, the portable form does without; the reason is told by `hx.backends()`.
        return f"{path.name} can't be loaded: {error}"
    return library


def instruction_sets() -> tuple[str, ...]:
    """The names of the instruction sets that this processor has loops for, the fastest first; empty without library."""
    library = load()
    if isinstance(library, str):
        return ()
    return tuple(library.hire_instruction_set(i).decode() for i in range(library.hire_instruction_sets()))


def use(name: str | None = None) -> None:
    """Has all later calls run the loops of one instruction set; of the fastest where no name is given.

    Raises:
      ValueError: this processor does not have it, or there is no library.
    """
    library, names = load(), instruction_sets()
    if isinstance(library, str) or (name is not None and name not in names):
        raise ValueError(f"use: name={name!r}; expected one of {', '.join(names) or 'none: there is no library'}")
    library.hire_use(0 if name is None else names.index(name))
