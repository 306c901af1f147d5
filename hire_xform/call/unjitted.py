"""Takes a function that is jitted already for the function that was, with what ``jax.jit`` was told of it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hire_xform.passes.ir.jitted import jitted

_DONATE = ("donate_argnums", "donate_argnames")


def unjitted(fun: Callable, stated: Mapping[str, Any]) -> tuple[Callable, dict[str, Any]]:
    """A function as it was before ``jax.jit``, and the options of ``jax.jit`` for it.

    Static arguments are those that were stated for either; of all else what is stated here wins. A method that is bound
    to an object stays so: positions are those of its own arguments. One that states ``in_shardings``, or layouts, stays
    jitted inside, and its options are to be stated again.

    Args:
      fun: any function.
      stated: options of ``jax.jit`` that ``sparsify`` was told.
    """
    owner = fun.__self__ if isinstance(fun, types.MethodType) else None
    known = jitted(fun if owner is None else fun.__func__)  # type: ignore[attr-defined]
    if known is None:
        return fun, dict(stated)
    plain, own = known
    if owner is not None:
        own = _without_first(own, next(iter(inspect.signature(plain).parameters), None))
        plain = types.MethodType(plain, owner)
    if any(stated.get(name) is not None for name in _DONATE):
        own = {name: value for name, value in own.items() if name not in _DONATE}
    options = {**own, **stated}
    for name in ("static_argnums", "static_argnames"):
        both = tuple(dict.fromkeys((*own.get(name, ()), *_several(stated.get(name)))))
        if both:
            options[name] = both
    return plain, options


def _several(value: Any) -> Sequence[Any]:
    """One position or name, or several, as several. What is neither is refused later, by its name."""
    if value is None:
        return ()
    return value if isinstance(value, (tuple, list)) else (value,)


def _without_first(options: Mapping[str, Any], first: str | None) -> dict[str, Any]:
    """Options for a function whose first argument, of this name, is given already."""
    found = dict(options)
    for kind in ("static", "donate"):
        numbers, names = f"{kind}_argnums", f"{kind}_argnames"
        found[numbers] = tuple(n - 1 for n in options.get(numbers, ()) if n > 0)
        found[names] = tuple(name for name in options.get(names, ()) if name != first)
    return found
