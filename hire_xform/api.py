"""``sparsify``: a function that decodes with fewer weight bytes, from one that was never written for it."""

from __future__ import annotations

import functools
import warnings
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from hire_xform.calls import (
    Abstract,
    Signature,
    abstract_call,
    argument_of,
    aval_of,
    expand_packed,
    is_array,
    unwrap_statics,
)
from hire_xform.config import Config
from hire_xform.errors import HireWarning, TracedWeightsError
from hire_xform.packing import pack_keys
from hire_xform.passes import compat
from hire_xform.passes.pack import Packed
from hire_xform.passes.plan import PackKey
from hire_xform.passes.provenance import Root
from hire_xform.stages import Traced

# A weight leaf that was packed this many times is reported once.
REPACK_LIMIT = 3

_JIT_OPTIONS = {
    "static_argnums",
    "static_argnames",
    "donate_argnums",
    "donate_argnames",
    "out_shardings",
    "keep_unused",
    "device",
    "backend",
    "inline",
    "compiler_options",
}


def sparsify(
    fun: Callable | None = None,
    *,
    config: Config | None = None,
    weights_argnums: int | Sequence[int] = 0,
    calibration: Any = None,
    **jit_options: Any,
) -> Any:
    """Rewrites a function so that its feed-forward blocks and vocabulary projections read fewer weight bytes.

    Reads like ``jax.jit``, and returns a function of the same signature, pytrees, shapes and dtypes, jitted::

        step = hx.sparsify(decode_step)
        logits, cache = step(params, cache, token)

    Each block is replaced by a graph that predicts which rows matter from a compressed copy of its weights and computes
    only those exactly (HiRE, arXiv 2402.09360). With nothing to gain the result is that of ``jax.jit(fun)``.

    Args:
      fun: the function; without it, a decorator is returned.
      config: what to rewrite and how; None is ``Config()``.
      weights_argnums: positions of the arguments that hold weights. Arrays that ``fun`` closes over are weights too.
      calibration: not in this version; must be None.
      **jit_options: options of ``jax.jit``: static_argnums, static_argnames, donate_argnums, donate_argnames,
        out_shardings, keep_unused, device, backend, inline, compiler_options.

    Returns:
      A ``Sparsified``: call it, or ask it to ``trace``.

    Raises:
      TypeError, ValueError: an argument is not usable; the message names it.
    """
    if fun is None:
        return functools.partial(
            sparsify, config=config, weights_argnums=weights_argnums, calibration=calibration, **jit_options
        )
    if not callable(fun):
        raise TypeError(f"sparsify: fun={fun!r}; expected a callable")
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"sparsify: config={config!r}; expected hx.Config(...) or None")
    if calibration is not None:
        raise TypeError(f"sparsify: calibration={calibration!r}; expected None, calibration is not in this version")
    unknown = sorted(set(jit_options) - _JIT_OPTIONS)
    if unknown:
        raise TypeError(f"sparsify: unknown option {unknown[0]!r}; expected options of jax.jit: {sorted(_JIT_OPTIONS)}")
    return Sparsified(fun, config or Config(), weights_argnums, jit_options)


class Sparsified:
    """A sparsified function. Call it like the original; ``trace`` shows what is done to it."""

    def __init__(self, fun: Callable, config: Config, weights_argnums: Any, jit_options: dict[str, Any]):
        """Use :func:`sparsify`."""
        functools.update_wrapper(self, fun, updated=())
        self._signature = Signature.of(fun, weights_argnums, jit_options)
        self._config = config
        named = ("static_argnums", "static_argnames", "donate_argnums", "donate_argnames")
        self._kept_options = dict(jit_options)
        self._options = {k: v for k, v in jit_options.items() if k not in named}
        self._shapes: dict[Any, dict[Any, _Entry]] = {}
        self._traces: dict[Abstract, Traced] = {}
        self.memory = PackMemory()

    def __repr__(self) -> str:
        """Names the function."""
        return f"sparsify({getattr(self._signature.fun, '__qualname__', self._signature.fun)!s})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the rewritten function."""
        if self._signature.static:
            args, kwargs = self._signature.wrap_statics(args, kwargs)
        leaves, treedef = jax.tree_util.tree_flatten((args, kwargs))
        types = tuple(map(type, leaves))
        known = self._shapes.get((treedef, types))
        if known is None:
            known = self._shapes[treedef, types] = {}
            positions = tuple(i for i, leaf in enumerate(leaves) if not is_array(leaf))
            known[None] = positions
        positions = known[None]
        statics = tuple([leaves[i] for i in positions]) if positions else ()
        entry = known.get(statics) if positions else known.get(())
        if entry is None:
            entry = known[statics] = _Entry(self, args, kwargs)
        return entry.run(leaves)

    def trace(self, *args: Any, **kwargs: Any) -> Traced:
        """Traces for these arguments: arrays, or ``jax.ShapeDtypeStruct``; computes nothing.

        Raises:
          Whatever the function raises when traced.
        """
        args, kwargs = self._signature.wrap_statics(args, kwargs)
        return self.traced(abstract_call(self._signature, args, kwargs))

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """``trace(...).lower()``."""
        return self.trace(*args, **kwargs).lower()

    def traced(self, call: Abstract) -> Traced:
        """The trace of a call, made once for each structure, shapes and static values."""
        if call not in self._traces:
            backend = self._options.get("backend") or jax.default_backend()
            platform = "gpu" if backend in ("gpu", "cuda", "rocm") else str(backend)
            self._traces[call] = Traced(self._signature, self._config, call, platform, self._kept_options)
        return self._traces[call]


class _NeedsPackingError(Exception):
    """Raised while jit traces for new shapes whose plan reads packed forms that were not passed."""


class _Entry:
    """Calls of one tree structure, leaf types and static values: the fast way through."""

    def __init__(self, owner: Sparsified, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._owner = owner
        signature = owner._signature
        call = abstract_call(signature, args, kwargs)
        self._treedef, self._statics, self._roots = call.treedef, call.statics, call.roots
        self._weights: list[int] = []
        self._weight_roots: list[Root] = []
        self._rest: list[int] = []
        self._donated: list[int] = []
        self._packed_leaves: list[int] = []
        self._any_traced = False
        self._hashed = False
        found, self._call_treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
        self._packed = {key: value for key, value in [*enumerate(args), *kwargs.items()] if isinstance(value, Packed)}
        self._check_packed()
        # Order of this call's array leaves among the plain call's: weights under a Packed have none.
        plain_roots = iter([r for r in self._roots if r is None or int(r.kind[3:]) not in self._packed_numbers()])
        for position, (path, leaf) in enumerate(found):
            if not is_array(leaf):
                continue
            key = argument_of(path)
            if key in self._packed:
                self._packed_leaves.append(position)
                continue
            root = next(plain_roots)
            if root is not None:
                self._weights.append(position)
                self._weight_roots.append(root)
                self._any_traced |= compat.is_tracer(leaf)
                self._hashed |= not isinstance(leaf, jax.Array)
            elif signature.holds(signature.donated, key):
                self._donated.append(position)
            else:
                self._rest.append(position)
        # Plain types only: the packed structure and the function never change for this entry.
        self._skeleton = self._call_treedef
        self._static_leaves = {i: leaf for i, (_, leaf) in enumerate(found) if not is_array(leaf)}
        donate = (4,) if self._donated else ()
        body = self._body
        body.__func__.__name__ = getattr(signature.fun, "__name__", "sparsified")
        self._jitted = jax.jit(_named(self._body, signature.fun), donate_argnums=donate, **owner._options)
        self._ids: tuple[int, ...] | None = None
        self._watch: list[Any] = []
        self._forms: dict[str, Any] = {}

    def _packed_numbers(self) -> set[int]:
        return {p.layout.argnum for p in self._packed.values()}

    def _check_packed(self) -> None:
        for key, packed in self._packed.items():
            number = self._owner._signature.weight_number(key)
            if number is None:
                raise TypeError(
                    f"argument {key!r} is Packed, but it is not in weights_argnums={self._owner._signature.weights}"
                )
            if number != packed.layout.argnum:
                raise TypeError(f"argument {key!r} is Packed for argument {packed.layout.argnum}")

    def run(self, leaves: list[Any]) -> Any:
        """One call; ``leaves`` are all leaves of it, in order."""
        weights = [leaves[i] for i in self._weights]
        if self._hashed or tuple(map(id, weights)) != self._ids:
            self._prepare(leaves, weights)
        packed = [leaves[i] for i in self._packed_leaves]
        rest = [leaves[i] for i in self._rest]
        donated = [leaves[i] for i in self._donated]
        try:
            return self._jitted(weights, self._forms, packed, rest, donated)
        except _NeedsPackingError:
            self._prepare(leaves, weights)
            return self._jitted(weights, self._forms, packed, rest, donated)

    def _prepare(self, leaves: list[Any], weights: list[Any]) -> None:
        """Packs what the plan for these shapes reads and remembers whose weights they are."""
        traced = self._owner.traced(self._abstract(leaves))
        plain = dict(zip(self._weight_roots, weights, strict=True))
        keys = [k for k in traced.needed_keys() if k.recipe.root.kind == "const" or k.recipe.root in plain]
        if self._any_traced:
            for key in keys:
                if compat.is_tracer(plain.get(key.recipe.root)):
                    raise TracedWeightsError(
                        f"{self._owner!r} was called under a trace with plain weights: {traced.name(key.recipe.root)} is a "
                        "tracer, and packing it inside the trace would read every weight at every call. Pack once outside, "
                        "packed = step.trace(...).pack(weights), and pass that in its place"
                    )
        memory = self._owner.memory
        for key, form in memory.forms(keys, plain, traced).items():
            self._forms[memory.number(key)] = form
        self._ids = tuple(map(id, weights)) if not self._hashed else None
        self._watch = (
            [weakref.ref(w, self._forget) for w in weights if isinstance(w, jax.Array)] if not self._any_traced else []
        )
        if self._any_traced:
            self._ids = None

    def _forget(self, _: Any) -> None:
        """A weight died: its identity may be used again by another array."""
        self._ids = None

    def _abstract(self, leaves: list[Any]) -> Abstract:
        """The abstract plain call for this call's array leaves."""
        avals = [aval_of(leaf) for i, leaf in enumerate(leaves) if i not in self._static_leaves]
        merged = [self._static_leaves.get(i) for i in range(len(leaves))]
        found = iter(avals)
        merged = [v if i in self._static_leaves else next(found) for i, v in enumerate(merged)]
        args, kwargs = self._skeleton.unflatten(merged)
        return abstract_call(self._owner._signature, args, kwargs)

    def _body(
        self, weights: list[Any], forms: dict[str, Any], packed: list[Any], rest: list[Any], donated: list[Any]
    ) -> Any:
        """What jit traces: finds the plan for the shapes it is given, and evaluates the rewritten program."""
        leaves: list[Any] = [None] * (len(weights) + len(packed) + len(rest) + len(donated) + len(self._static_leaves))
        groups = (
            (self._weights, weights), (self._packed_leaves, packed), (self._rest, rest), (self._donated, donated)
        )  # fmt: skip
        for positions, values in groups:
            for position, value in zip(positions, values, strict=True):
                leaves[position] = value
        for position, value in self._static_leaves.items():
            leaves[position] = value
        args, kwargs = self._skeleton.unflatten(leaves)
        traced = self._owner.traced(self._abstract(leaves))
        if not traced.plan.sites and not self._packed:
            args, kwargs = unwrap_statics(args, kwargs)
            return self._owner._signature.fun(*args, **kwargs)
        held = {p.layout.argnum: p for p in [*args, *kwargs.values()] if isinstance(p, Packed)}
        plain = dict(zip(self._weight_roots, weights, strict=True))
        memory = self._owner.memory
        given = {memory.key(number): form for number, form in forms.items()}
        for key in traced.needed_keys():
            root = key.recipe.root
            if (root.kind == "const" or root in plain) and key not in given:
                raise _NeedsPackingError
        data = iter([leaves[i] for i in sorted(self._rest + self._donated)])
        operands = [None if root is not None else next(data) for root in self._roots]
        return traced.evaluate(operands, traced.supply(held, plain, given))


def _named(body: Callable, fun: Callable) -> Callable:
    def call(*args: Any) -> Any:
        return body(*args)

    call.__name__ = call.__qualname__ = getattr(fun, "__name__", "sparsified")
    return call


class PackMemory:
    """Packed forms of plain weights, remembered by the identity of the leaf they were made from.

    ``jax.Array``s are immutable, so identity is sound; NumPy arrays are not, so they are fingerprinted by content. Only
    the latest leaf of each form is remembered, and it is not kept alive.
    """

    def __init__(self) -> None:
        """Empty."""
        self._numbers: dict[PackKey, str] = {}
        self._keys: dict[str, PackKey] = {}
        self._made: dict[PackKey, tuple[Any, Any]] = {}
        self._times: dict[PackKey, int] = {}
        self._told = False

    def number(self, key: PackKey) -> str:
        """A short name for a key, stable for this memory."""
        if key not in self._numbers:
            name = f"{len(self._numbers):06d}"
            self._numbers[key] = name
            self._keys[name] = key
        return self._numbers[key]

    def key(self, number: str) -> PackKey:
        """The key of a short name."""
        return self._keys[number]

    def forms(self, keys: Sequence[PackKey], plain: dict[Root, Any], traced: Traced) -> dict[PackKey, Any]:
        """The packed forms of these keys, made or remembered."""

        def leaf_of(root: Root) -> Any:
            return traced.const(root) if root.kind == "const" else plain[root]

        marks = {root: _mark(leaf_of(root)) for root in dict.fromkeys(k.recipe.root for k in keys)}
        missing = [k for k in keys if k not in self._made or not _same(self._made[k][0], marks[k.recipe.root])]
        for key in missing:
            self._made.pop(key, None)  # free the old form before the new one is made
        made = pack_keys(missing, leaf_of, None)
        for key, form in made.items():
            self._times[key] = self._times.get(key, 0) + 1
            self._made[key] = (marks[key.recipe.root], form)
        often = [k for k in missing if self._times[k] >= REPACK_LIMIT]
        if often and not self._told:
            self._told = True
            warnings.warn(
                f"{traced.name(often[0].recipe.root)} was packed {self._times[often[0]]} times because it was another array "
                "each time; packing reads all of it. The result is right. Pass the same array again, or pack once with "
                "step.trace(...).pack(weights)",
                HireWarning,
                stacklevel=4,
            )
        return {k: self._made[k][1] for k in keys}


def _mark(leaf: Any) -> Any:
    """What a leaf is recognised by: a weak reference, or a fingerprint of mutable content."""
    if isinstance(leaf, jax.Array) and not compat.is_tracer(leaf):
        return weakref.ref(leaf)
    array = np.ascontiguousarray(leaf)
    data = array.view(np.uint8).reshape(-1)
    return array.shape, str(array.dtype), zlib.crc32(data), zlib.adler32(data), len(data)


def _same(mark: Any, other: Any) -> bool:
    if isinstance(mark, weakref.ref) and isinstance(other, weakref.ref):
        return mark() is not None and mark() is other()
    return not isinstance(mark, weakref.ref) and not isinstance(other, weakref.ref) and mark == other


__all__ = ["PackMemory", "Sparsified", "expand_packed", "sparsify"]
