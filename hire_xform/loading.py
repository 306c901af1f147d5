"""Finds what a command line names, ``package.module:name`` or ``path/to/file.py:name``, or says in a line why not."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

# Frames in these folders are never where a user's mistake is.
_NOT_THE_USERS = (
    os.path.dirname(os.path.abspath(__file__)),
    os.path.dirname(os.path.abspath(jax.__file__)),
    os.path.dirname(os.path.abspath(inspect.__file__)),
)
_INSTALLED = ("site-packages", "dist-packages", "<frozen ")
# A message longer than this is cut; JAX's can be a page.
_LONGEST_MESSAGE = 300
# Containers inside each other in a tuple of arguments.
_DEEPEST = 100


class LoadError(Exception):
    """What was named can't be used; the message is one line."""


def load(target: str) -> Any:
    """The object that a target names.

    Args:
      target: ``package.module:name`` or ``path/to/file.py:name``; a name may be dotted.

    Raises:
      LoadError: there is no such thing, or importing it fails.
    """
    where, colon, name = target.rpartition(":")
    if not colon or not where or not all(name.split(".")):
        lacks = "no colon" if not colon else "no module or file before its colon" if not where else "no name at its end"
        raise LoadError(f"{target!r} has {lacks}; expected package.module:name or path/to/file.py:name")
    is_file = where.endswith(".py") or os.sep in where or "/" in where
    found: Any = _load_file(where) if is_file else _load_module(where)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            if _users_frame(error):  # a property of that name is there
                raise LoadError(f"{target!r}: reading {part!r} raised {blame(error)}") from error
            raise LoadError(f"{target!r}: {_described(found, where)} has no {part!r}{_near(found, part)}") from None
        except (Exception, SystemExit) as error:
            raise LoadError(f"{target!r}: reading {part!r} raised {blame(error)}") from error
    return found


def _near(found: Any, part: str) -> str:
    """What may have been meant by a name that is not there."""
    try:
        names = [n for n in dir(found) if not n.startswith("__")]
    except Exception:
        return ""
    near = difflib.get_close_matches(part, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def demonstration() -> Any:
    """What runs the demo, ``run`` of ``examples/demo.py`` of a checkout, of which wheels have none.

    It is looked for in the current folder and those above it, and beside this package, as for an editable installation.

    Raises:
      LoadError: there is no checkout; the message says where it was looked for.
    """
    here, beside = Path.cwd(), Path(__file__).resolve().parents[1]
    for folder in (here, *here.parents, beside):
        # Other projects may have an examples/demo.py as well.
        if (folder / "examples" / "tiny_lm" / "model.py").is_file():
            return load(f"{folder / 'examples' / 'demo.py'}:run")
    raise LoadError(
        f"there is no examples/tiny_lm in {here}, above it or in {beside}; run the demo in a checkout of the project"
    )


def load_function(target: str) -> Any:
    """A function; otherwise as ``load``."""
    found = load(target)
    if not callable(found):
        raise LoadError(f"{target!r} is a {type(found).__name__}; expected a function")
    return found


def load_inputs(target: str) -> tuple[Any, ...] | dict[str, Any]:
    """The arguments that a target names, or that the function it names returns: a tuple, or a dictionary by name."""
    found = load(target)
    what = f"{target!r}"
    if callable(found) and not isinstance(found, (tuple, dict)):
        what += " returned"
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise LoadError(f"{target!r} was called without arguments and raised {blame(error, found)}") from error
    else:
        what += " is"
    named = isinstance(found, dict) and all(isinstance(name, str) and name.isidentifier() for name in found)
    if not isinstance(found, tuple) and not named:
        hint = "; write (x,) for a single argument" if hasattr(found, "shape") else ""
        raise LoadError(f"{what} a {type(found).__name__}; expected the tuple of arguments{hint}")
    if _nests_too_deep(found):
        raise LoadError(f"{what} a {type(found).__name__} that holds itself, or nests deeper than {_DEEPEST}")
    return found


def _nests_too_deep(value: Any) -> bool:
    """True for containers inside containers without an end. JAX is not to see them: it does not recover from that."""
    todo, seen = [(value, 0)], set()
    while todo:
        one, depth = todo.pop()
        if depth > _DEEPEST:
            return True
        if isinstance(one, (tuple, list, dict)) and (id(one), depth) not in seen:
            seen.add((id(one), depth))
            todo += [(part, depth + 1) for part in (one.values() if isinstance(one, dict) else one)]
    return False


def _load_module(name: str) -> ModuleType:
    _importable(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise LoadError(f"there is no module {error.name!r}, here or installed") from None
        raise LoadError(f"importing {name!r} raised {blame(error)}") from error
    except (Exception, SystemExit) as error:
        raise LoadError(f"importing {name!r} raised {blame(error)}") from error


def _load_file(where: str) -> ModuleType:
    path = Path(where).resolve()
    if not path.is_file():
        raise LoadError(f"there is no file {where!r}")
    for module in list(sys.modules.values()):
        # A file named twice, for the function and for its inputs, is one module.
        if getattr(module, "__file__", None) == str(path):
            return module
    _importable(os.getcwd())
    _importable(str(path.parent))
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"_file_{abs(hash(path)):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{where!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise LoadError(f"importing {where!r} raised {blame(error)}") from error
    return module


def _importable(folder: str) -> None:
    if folder not in sys.path and not ("" in sys.path and folder == os.getcwd()):
        sys.path.insert(0, folder)


def _described(found: Any, where: str) -> str:
    return f"module {where!r}" if isinstance(found, ModuleType) else f"{getattr(found, '__qualname__', type(found))!s}"


def blame(error: BaseException, fun: Any = None) -> str:
    """An exception in a line: its type, the first line of its message, and where the user's code raised it.

    Args:
      error: the exception.
      fun: whose definition to name when no frame is the user's, as when it is called with the wrong arguments.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, SyntaxError):
        lines, place = [error.msg], f"{error.filename}:{error.lineno}"
    else:
        place = _users_frame(error) or _definition(fun)
    message = lines[0][:_LONGEST_MESSAGE] if lines else ""
    return type(error).__name__ + (f": {message}" if message else "") + (f" ({place})" if place else "")


def _users_frame(error: BaseException) -> str:
    """``file:line in function`` of the innermost frame that is neither JAX's, nor the standard library's, nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        file = os.path.abspath(frame.filename) if not frame.filename.startswith("<") else frame.filename
        ours = any(file.startswith(folder + os.sep) for folder in _NOT_THE_USERS)
        if not ours and not any(part in file for part in _INSTALLED) and os.path.exists(file):
            return f"{file}:{frame.lineno} in {frame.name}"
    return ""


def _definition(fun: Any) -> str:
    fun = inspect.unwrap(fun) if fun is not None else None
    code = getattr(fun, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""
