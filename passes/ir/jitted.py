"""What ``jax.jit`` was told of a function: beside ``compat``, what may differ between versions of JAX."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from hire_xform.passes.ir import compat

# The class of what ``jax.jit`` returns has no public name, nor what it is told by default: read off a jitted function,
# which is not traced for it.
_PLAIN = jax.jit(lambda: None)


def jitted(fun: Any) -> tuple[Callable, dict[str, Any]] | None:
    """The function that ``jax.jit`` was given, and its options; None for what is not jitted, or can't be told.

    JAX has no public way to read them. On 0.10 to 0.12 they are attributes of what ``jax.jit`` returns, looked up
    defensively. What states where its arguments lie, or layouts, is left as it is: None.
    """
    info, plain = getattr(fun, "_jit_info", None), getattr(fun, "_fun", None)
    if not isinstance(fun, type(_PLAIN)) or info is None or plain is None:
        return None
    try:
        if info.user_specified_in_shardings or any(leaf is not None for leaf in info.out_layouts_leaves):
            return None
        kinds = [p.kind for p in inspect.signature(plain).parameters.values()]
        return plain, _options(info, sum(kind in _POSITIONAL for kind in kinds))
    except (AttributeError, TypeError, ValueError):  # another version of JAX may have them elsewhere
        return None


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _options(info: Any, positions: int) -> dict[str, Any]:
    """Those that are not as without them, for a function of so many positional parameters."""

    def from_front(numbers: Sequence[int]) -> tuple[int, ...]:
        return tuple(n if n >= 0 else n + positions for n in numbers)

    options = {
        "static_argnums": from_front(info.static_argnums),
        "static_argnames": tuple(info.static_argnames),
        "donate_argnums": from_front(info.donate_argnums),
        "donate_argnames": tuple(info.donate_argnames),
        "keep_unused": info.keep_unused,
        "device": info.device,
        "backend": info.backend,
        "inline": info.inline,
        "compiler_options": dict(info.compiler_options_kvs),
    }
    # How a call inside another function is inlined has a default that is no false value, from 0.11.
    usual = getattr(_PLAIN, "_jit_info", None)
    stated = {name: value for name, value in options.items() if value and value != getattr(usual, name, None)}
    out = [None if compat.is_unspecified(leaf) else leaf for leaf in info.out_shardings_leaves]
    if any(leaf is not None for leaf in out):
        stated["out_shardings"] = info.out_shardings_treedef.unflatten(out)
    return stated
