"""Which arguments of a function hold weights, and which are static or donated, by position or by name."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from hire_xform.call.leaves import is_array
from hire_xform.passes.ir.static_values import value_key


class Static:
    """Wraps a static argument, so that flattening a call takes it for one opaque leaf."""

    __slots__ = ("_key", "value")

    def __init__(self, value: Any):
        self.value = value
        self._key = value_key(value)

    def __eq__(self, other: object) -> bool:
        """Equal when the values are, types included, as for jax.jit: 1 is not 1.0."""
        return isinstance(other, Static) and self._key == other._key

    def __hash__(self) -> int:
        """The value's hash."""
        return hash(self._key)


def unwrap_statics(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments with static ones taken out of their wrappers."""

    def bare(value: Any) -> Any:
        return value.value if isinstance(value, Static) else value

    return [bare(a) for a in args], {k: bare(v) for k, v in kwargs.items()}


class Weights(NamedTuple):
    """Which arguments hold weights, as ``sparsify`` was told: the options of these names."""

    argnums: int | Sequence[int] | None = None
    argnames: str | Sequence[str] | None = None


@dataclass(frozen=True)
class Signature:
    """Which arguments of a function are weights, static and donated.

    An argument is known by its position, or by its name where it has none.

    Raises:
      ValueError, TypeError: the numbers or names do not fit the function or each other.
    """

    fun: Callable
    weights: tuple[int | str, ...]
    static: frozenset[int | str]
    donated: frozenset[int | str]
    names: tuple[str, ...]

    @classmethod
    def of(cls, fun: Callable, weights: Weights, options: Mapping[str, Any]) -> Signature:
        """Reads what is said of weights and jit's static and donate options against the function's own signature."""
        try:
            parameters = list(inspect.signature(fun).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = tuple(p.name for p in parameters if p.kind in positional)
        open_ended = not parameters or any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
        limit = None if open_ended else len(names)
        static = frozenset(_both(options, "static", names, parameters, limit))
        if weights.argnums is None and weights.argnames is None:
            # The first that is traced: a method's own object may be static.
            weights = Weights(next(n for n in itertools.count() if n not in static))
        told = {"weights_argnums": weights.argnums, "weights_argnames": weights.argnames}
        marked = _both(told, "weights", names, parameters, limit)
        donated = frozenset(_both(options, "donate", names, parameters, limit))
        for key in marked:
            if key in static:
                raise ValueError(
                    f"sparsify: argument {key!r} is in weights_argnums and in static_argnums; weights are arrays"
                )
            if key in donated:
                raise ValueError(
                    f"sparsify: argument {key!r} is in weights_argnums and in donate_argnums; weights are remembered "
                    "between calls and can't be donated; state donate_argnums without it, where jax.jit was told so"
                )
        return cls(fun, tuple(marked), static, donated, names)

    @property
    def stated(self) -> str:
        """Which arguments hold weights, as the options that say so."""
        named = tuple(key for key in self.weights if isinstance(key, str))
        numbers = tuple(key for key in self.weights if isinstance(key, int))
        told = [f"weights_argnums={numbers}"] if numbers or not named else []
        return " and ".join(told + ([f"weights_argnames={named}"] if named else []))

    def holds(self, marked: frozenset[int | str], key: int | str) -> bool:
        """True when an argument, given by position or name, is among the marked ones."""
        return self.key_of(key) in marked

    def misfit(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """What is wrong with these as the arguments of a call; empty when nothing is, as far as can be known."""
        try:
            signature = inspect.signature(self.fun)
        except (TypeError, ValueError):
            return ""
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            return str(error)
        return ""

    def key_of(self, argument: int | str) -> int | str:
        """What an argument that is given by position or name is known by."""
        return self.names.index(argument) if isinstance(argument, str) and argument in self.names else argument

    def weight_key(self, argument: int | str) -> int | str | None:
        """What a weights argument that is given by position or name is known by; None for any other argument."""
        key = self.key_of(argument)
        return key if key in self.weights else None

    def name_at(self, key: int | str) -> str | None:
        """The name of the argument at a position; None where it has none."""
        if isinstance(key, str):
            return key
        return self.names[key] if key < len(self.names) else None

    def name_of(self, path: Sequence[Any]) -> str:
        """The name of a leaf of ``(args, kwargs)``, for messages, such as ``params['w']``."""
        key = argument_of(path)
        return (self.name_at(key) or f"argument {key}") + jax.tree_util.keystr(tuple(path[2:]))

    def traces(self, path: Sequence[Any], leaf: Any) -> bool:
        """True for a leaf of ``(args, kwargs)`` that is traced, as opposed to static.

        Arrays are. So is a number that is an argument by itself, as for jax.jit. A number inside a weights argument is
        a setting of the model (a dropout rate, a flag it branches on), as for Equinox's filter_jit.
        """
        setting = isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic)
        if setting and len(path) > 2 and self.weight_key(argument_of(path)) is not None:
            return False
        return is_array(leaf)

    def wrap_statics(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with static arguments wrapped."""
        if not self.static:
            return args, kwargs
        return (
            tuple(_wrap(a) if self.holds(self.static, i) else a for i, a in enumerate(args)),
            {k: _wrap(v) if self.holds(self.static, k) else v for k, v in kwargs.items()},
        )


def _wrap(value: Any) -> Static:
    try:
        hash(value)
    except TypeError:
        raise ValueError(
            f"sparsify: a static argument must be hashable, as for jax.jit; got {type(value).__name__}"
        ) from None
    return Static(value)


def _argnums(name: str, value: Any, limit: int | None) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(numbers, (tuple, list)) or not all(
        isinstance(n, int) and not isinstance(n, bool) for n in numbers
    ):
        raise TypeError(f"sparsify: {name}={value!r}; expected an integer or a tuple of integers")
    for number in numbers:
        # The default, 0, is no promise that there is an argument: arrays closed over are weights too.
        if number < 0 or (limit is not None and number >= max(limit, 1)):
            count = "arguments" if limit is None else f"the function's {limit} positional arguments"
            raise ValueError(f"sparsify: {name}={value!r}; expected positions from 0 among {count}")
    return tuple(numbers)


def _both(
    options: Mapping[str, Any], kind: str, names: Sequence[str], parameters: Sequence[Any], limit: int | None
) -> list[int | str]:
    """What the arguments of ``<kind>_argnums`` and ``<kind>_argnames`` are known by, in this order."""
    numbers = options.get(f"{kind}_argnums")
    texts = options.get(f"{kind}_argnames")
    found: list[int | str] = list(_argnums(f"{kind}_argnums", numbers, limit) if numbers is not None else ())
    if texts is not None:
        texts = (texts,) if isinstance(texts, str) else texts
        if not isinstance(texts, Iterable):
            raise TypeError(f"sparsify: {kind}_argnames={texts!r}; expected a name or a tuple of names")
        known = {p.name for p in parameters}
        variadic = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters) or not parameters
        for text in texts:
            if not isinstance(text, str) or (text not in known and not variadic):
                raise ValueError(f"sparsify: {kind}_argnames has {text!r}; expected names among {sorted(known)}")
            found.append(names.index(text) if text in names else text)
    return list(dict.fromkeys(found))


def keyed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[int | str, Any]]:
    """The arguments of a call with their positions or names."""
    return [*enumerate(args), *kwargs.items()]


def arguments_of(call: Sequence[Any] | dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call that is written as a tuple, or as a dictionary by name."""
    return ((), call) if isinstance(call, dict) else (tuple(call), {})


def argument_of(path: Sequence[Any]) -> int | str:
    """The position or name of the argument that a leaf of ``(args, kwargs)`` belongs to."""
    return path[1].idx if path[0].idx == 0 else path[1].key
