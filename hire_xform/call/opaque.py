"""Refuses arguments whose contents JAX does not see: they would be frozen at what the first call finds in them."""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy as np

# Objects of these are told apart by identity, and what one is never changes.
_FIXED = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    functools.partial,
    np.ufunc,
)
_LIBRARIES = ("jax", "jaxlib")


def check_static(leaf: Any, where: str, in_weights: bool) -> None:
    """Raises TypeError for a leaf that can be neither traced nor compared by value, or that hides an array.

    A leaf that is no array is a constant of the program, and another one has another program. That is right for what
    never changes: functions, strings, dtypes, enumerations, whatever has a hash of its own. An object that is told
    apart by its identity alone is the same when its contents change.

    Args:
      leaf: a leaf of a call that is not traced.
      where: its name, for the message.
      in_weights: it is inside a weights argument, of which functions and settings are parts.
    """
    kind = type(leaf).__name__
    if hasattr(leaf, "__jax_array__") and not isinstance(leaf, type):
        raise TypeError(
            f"sparsify: the leaf at {where} is a {kind}, which stands for an array but which JAX does not trace; "
            "expected the array (of a Keras variable, its .value)"
        )
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(f"sparsify: the leaf at {where} is a {kind}; expected an array, or a hashable value") from None
    if _is_told_by_identity(leaf) and (_has_state(leaf) or not (in_weights or callable(leaf))):
        raise TypeError(
            f"sparsify: the leaf at {where} is a {kind}, an object whose contents JAX does not see: changes to it, and "
            "arrays in it, would be frozen at the first call. Expected an array, a pytree, a function, or a value with "
            "a hash of its own, which never changes. Register its class (jax.tree_util.register_dataclass), pass what "
            "it holds, or make it a static argument"
        )


def _is_told_by_identity(leaf: Any) -> bool:
    """True for objects that are the same object or not the same, other than functions and what JAX itself makes."""
    kind = type(leaf)
    if kind.__hash__ is not object.__hash__ or isinstance(leaf, _FIXED):
        return False
    if kind.__module__.partition(".")[0] in _LIBRARIES:
        return False
    return not (callable(leaf) and hasattr(leaf, "__wrapped__"))  # a wrapper made of a function


def _has_state(leaf: Any) -> bool:
    """True for an object with attributes of its own."""
    if getattr(leaf, "__dict__", None):
        return True
    slots = [name for kind in type(leaf).__mro__ for name in _names_of(getattr(kind, "__slots__", ()))]
    return any(hasattr(leaf, name) for name in slots if name not in ("__dict__", "__weakref__"))


def _names_of(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
