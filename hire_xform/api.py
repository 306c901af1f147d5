"""``sparsify``: a function that decodes with fewer weight bytes, from one that was never written for it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import sys
import threading
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from hire_xform.calibration.calibration import Calibration
from hire_xform.call.calls import Abstract, abstract_call
from hire_xform.call.entry import Entry, take_packed
from hire_xform.call.memory import PackMemory
from hire_xform.call.signature import Signature, Weights
from hire_xform.call.stages import Traced
from hire_xform.call.trial import LeavingDense, Reasons
from hire_xform.call.unjitted import unjitted
from hire_xform.config import Config
from hire_xform.errors import HireWarning
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.static_values import value_key
from hire_xform.passes.pack.packed import Packed
from hire_xform.passes.plan.decisions import PackKey
from hire_xform.passes.plan.placement import platform_named

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
    weights_argnums: int | Sequence[int] | None = None,
    weights_argnames: str | Sequence[str] | None = None,
    calibration: Calibration | None = None,
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
      weights_argnums: positions of the arguments that hold weights; None is the first that is not static, or none
        where there are ``weights_argnames``. Arrays that ``fun`` closes over are weights too.
      weights_argnames: names of arguments that hold weights, keyword-only ones too.
      calibration: from ``hx.calibrate`` on the same model. Its sizes take the place of the defaults, ``LowRank`` is
        fitted to the inputs it saw, and ``Projected`` is possible; what ``config`` states wins.
      **jit_options: options of ``jax.jit``: static_argnums, static_argnames, donate_argnums, donate_argnames,
        out_shardings, keep_unused, device, backend, inline, compiler_options. Those of a ``fun`` that is jitted already
        are taken over; what is stated here wins, and static arguments are those stated for either.

    Returns:
      A ``Sparsified``: call it, or ask it to ``trace``.

    Raises:
      TypeError, ValueError: an argument is not usable; the message names it.
    """
    if fun is None:
        return functools.partial(
            sparsify,
            config=config,
            weights_argnums=weights_argnums,
            weights_argnames=weights_argnames,
            calibration=calibration,
            **jit_options,
        )
    config = check_function("sparsify", fun, config, jit_options)
    if calibration is not None and not isinstance(calibration, Calibration):
        raise TypeError(f"sparsify: calibration={calibration!r}; expected what hx.calibrate returns, or None")
    return Sparsified(fun, config, Weights(weights_argnums, weights_argnames), jit_options, calibration)


def check_function(owner: str, fun: Any, config: Any, jit_options: dict[str, Any]) -> Config:
    """The settings, the default ones for None.

    Raises:
      TypeError: an argument is of the wrong type; the message names it after ``owner``.
    """
    if not callable(fun):
        raise TypeError(f"{owner}: fun={fun!r}; expected a callable")
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"{owner}: config={config!r}; expected hx.Config(...) or None")
    unknown = sorted(set(jit_options) - _JIT_OPTIONS)
    if unknown:
        raise TypeError(f"{owner}: unknown option {unknown[0]!r}; expected options of jax.jit: {sorted(_JIT_OPTIONS)}")
    return config or Config()


class Sparsified:
    """A sparsified function. Call it like the original; ``trace`` shows what is done to it."""

    traced_class: Callable[..., Traced] = Traced

    def __init__(
        self,
        fun: Callable,
        config: Config,
        weights: Weights,
        jit_options: dict[str, Any],
        calibration: Calibration | None = None,
    ):
        """Use :func:`sparsify`."""
        functools.update_wrapper(self, fun, updated=())
        # As they were given, for copies.
        self.fun, self.jit_options = fun, dict(jit_options)
        plain, options = unjitted(fun, jit_options)
        self.signature = Signature.of(plain, weights, options)
        self.config = config
        self.calibration = calibration
        self.weights = weights
        named = ("static_argnums", "static_argnames", "donate_argnums", "donate_argnames")
        self.options = {k: v for k, v in options.items() if k not in named}
        # Tree structure and leaf types -> (positions of static leaves, floats among them, their values -> entry).
        self._shapes: dict[Any, tuple[tuple[int, ...], bool, dict[Any, Entry]]] = {}
        self._traces: dict[Any, Traced] = {}
        self.memory = PackMemory()
        # Sites that failed in first calls, and why. Replaced, never changed: an entry keeps to what it began with.
        self.left_dense: Reasons = MappingProxyType({})
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        """Names the function."""
        fun = self.fun
        return f"sparsify({getattr(fun, '__qualname__', None) or type(fun).__qualname__})"

    def __copy__(self) -> Sparsified:
        """The same function, sparsified anew: what this one remembers is not copied."""
        return _sparsified_anew(type(self), self.fun, *self._made_of)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsified:
        """As a copy, with a copy of the function where that is an object; settings and options never change."""
        return _sparsified_anew(type(self), copy.deepcopy(self.fun, memo), *self._made_of)

    def __reduce__(self) -> Any:
        """Pickles what it is made of: the function as pickle takes it, which is by its name, settings and options.

        Raises:
          TypeError: one of them can't be pickled.
        """
        name, module = getattr(self, "__qualname__", ""), sys.modules.get(getattr(self, "__module__", ""))
        if module is not None and getattr(module, name, None) is self:
            return name  # decorated: this is what stands in the module under that name
        made_of = type(self), self.fun, *self._made_of
        try:
            pickle.dumps(made_of)
        except Exception as error:
            raise TypeError(
                f"{self!r} can't be pickled: {error}. Expected a function that pickle finds by its name in a module, "
                "and options that it takes. Otherwise pickle the parts, and call hx.sparsify again where they are "
                "loaded: an hx.Config, a calibration (or its file), the leaves of a Packed"
            ) from error
        return _sparsified_anew, made_of

    @property
    def _made_of(self) -> tuple[Any, ...]:
        return self.config, self.weights, self.jit_options, self.calibration, self.traced_class

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the rewritten function."""
        entry, leaves, packed = self._entry(args, kwargs)
        return entry.run(leaves, packed)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Decorates a method as well: called on an instance, that is the first argument, and so the weights.

        As for ``jax.jit``, only calls are bound: it is ``type(model).step.trace(model, x)``.
        """
        return self if instance is None else types.MethodType(self, instance)

    def program(self, *args: Any, **kwargs: Any) -> tuple[Callable, tuple[Any, ...]]:
        """The jitted function that a call with these arguments runs, and the operands it is given.

        Weights are packed if they have not been. What a call costs above ``jitted(*operands)`` is Python of this
        library; the function's own ``lower`` shows what it compiles to.
        """
        entry, leaves, packed = self._entry(args, kwargs)
        return entry.program(leaves, packed)

    def with_fallbacks(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, jax.Array]]:
        """A call that also says how often each certified site ran its dense product, and which blocks were short.

        A block that is not certified, and whose activation is to leave zeros (``Ffn(activations="zeroing")``), is short
        where more units are not zero, going by its predictor, than it may compute: its result is then off.

        Returns:
          What the call returns, and for each such site's path an int32 count: 0 or 1, inside a loop up to its
          iterations, and in a shard_map the sum over its devices.
        """
        entry, leaves, packed = self._entry(args, kwargs)
        result, counts = entry.run_counted(leaves, packed)
        return result, {path: taken[-1] for path, taken in counts.items()}

    def with_rungs(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, jax.Array]]:
        """A call that also says how often each certified site took each of its compiled sizes, and what stages read.

        Returns:
          What the call returns, and for each certified site's path int32 counts, one for each of ``Site.rungs``: how
          many rows each further stage of a head has read, and how often each size was taken, of which the last is that
          of ``with_fallbacks``. Counts times the rungs' ``bytes`` are the weight bytes truly read. For a
          block that is not certified there are two: how often it held its units, and how often it was short.
        """
        entry, leaves, packed = self._entry(args, kwargs)
        return entry.run_counted(leaves, packed)

    def _entry(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Entry, list[Any], list[Packed]]:
        """The way through for calls of this shape, all leaves of this one, and its Packed arguments."""
        if self.signature.static:
            args, kwargs = self.signature.wrap_statics(args, kwargs)
        packed: list[Packed] = []
        if Packed in map(type, args) or Packed in map(type, kwargs.values()):
            args, kwargs, packed = take_packed(self, args, kwargs)
        leaves, treedef = jax.tree_util.tree_flatten((args, kwargs))
        types = tuple(map(type, leaves))
        known = self._shapes.get((treedef, types))
        if known is None:
            found = jax.tree_util.tree_leaves_with_path((args, kwargs))
            statics = tuple(i for i, (path, leaf) in enumerate(found) if not self.signature.traces(path, leaf))
            floats = any(issubclass(types[i], (float, complex)) for i in statics)
            known = self._shapes.setdefault((treedef, types), (statics, floats, {}))
        positions, floats, entries = known
        values = tuple([leaves[i] for i in positions])
        if floats:
            values = tuple(map(value_key, values))
        try:
            entry = entries.get(values)
        except TypeError:
            abstract_call(self.signature, args, kwargs)  # says which leaf can't be hashed
            raise
        if entry is None:
            entry = entries.setdefault(values, Entry(self, args, kwargs, packed))
        return entry, leaves, packed

    def trace(self, *args: Any, **kwargs: Any) -> Traced:
        """Traces for these arguments: arrays, or ``jax.ShapeDtypeStruct``; computes nothing.

        What is bound to devices by its sharding is planned and lowered for those devices, which may be described by a
        topology and not be here.

        Raises:
          Whatever the function raises when traced.
        """
        return self.traced_for(None, args, kwargs)

    def traced_for(
        self, platform: str | None, args: Sequence[Any], kwargs: Mapping[str, Any], elsewhere: str | None = None
    ) -> Traced:
        """As ``trace``, planned for "cpu", "gpu" or "tpu", whatever the arguments say; None goes by them.

        Args:
          platform: which.
          args, kwargs: of the call.
          elsewhere: the kind of its device, if that is not here.
        """
        plain, named = self.signature.wrap_statics(tuple(args), dict(kwargs))
        call = abstract_call(self.signature, plain, named)
        if platform is not None:
            call = dataclasses.replace(call, platform=platform, elsewhere=elsewhere)
        return self.traced(call).at(call.where)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """``trace(...).lower()``."""
        return self.trace(*args, **kwargs).lower()

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """``trace(...).explain()``: what is rewritten in a call with these arguments, what is not, and why."""
        self._check_call("explain", args, kwargs)
        return self.trace(*args, **kwargs).explain()

    def pack(self, *args: Any, progress: bool | None = None, **kwargs: Any) -> Any:
        """``trace(...).pack(weights)``, of the weights among these arguments of a call.

        Args:
          *args, **kwargs: all arguments of a call, plain weights included.
          progress: show a progress bar; None shows one on a terminal when there is much to pack.

        Returns:
          A ``Packed``; a tuple of them for several weights arguments.

        Raises:
          TypeError: these are not the arguments of a call.
        """
        self._check_call("pack", args, kwargs)
        traced = self.trace(*args, **kwargs)
        return traced.pack(*[traced.argument((args, kwargs), key) for key in self.signature.weights], progress=progress)

    def _check_call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises TypeError when the arguments are not those of a call, such as the weights alone."""
        wrong = self.signature.misfit(args, kwargs)
        if wrong:
            raise TypeError(
                f"{self!r}.{name}: {wrong}; expected all arguments of a call, since what is read of the weights "
                f"hangs on its shapes, as for step.trace(...).{name}(...)"
            )

    def leave_dense(self, reasons: Reasons, keys: Sequence[PackKey]) -> bool:
        """From now on sites are left dense.

        Args:
          reasons: why, by kind and path.
          keys: packed forms that are read no more.

        Returns:
          False when all of them were left dense before.
        """
        with self._lock:
            if all(site in self.left_dense for site in reasons):
                return False
            self.left_dense = MappingProxyType({**self.left_dense, **reasons})
            # Calls under way go on with what they have; what they still add to the old ones is dropped with them.
            before, self._shapes, self._traces = self._shapes, {}, {}
        self.memory.drop(keys)
        for *_, entries in list(before.values()):
            for entry in list(entries.values()):
                entry.forget()
        return True

    def traced(self, call: Abstract, left_dense: Reasons | None = None) -> Traced:
        """The trace of a call, made once for each structure, shapes and static values.

        Args:
          call: the call.
          left_dense: sites that are left dense; None is those that have failed so far.
        """
        left_dense = self.left_dense if left_dense is None else left_dense
        call = dataclasses.replace(call, platform=call.platform or self._default_platform())
        key = (call, compat.trace_settings(), frozenset(left_dense))
        known = self._traces.get(key)
        if known is None:
            # No lock: tracing runs the user's function, which may call this. Threads that trace at once keep the first.
            config: Any = LeavingDense(self.config, left_dense) if left_dense else self.config
            made = self.traced_class(self.signature, config, call, call.platform, self.options, self.calibration)
            known = self._traces.setdefault(key, made)
            if known is made and not left_dense:
                self._tell_unmatched(known)
        return known

    def _default_platform(self) -> str:
        """Where a call runs whose arguments say nothing of it."""
        device = self.options.get("device") or compat.default_device()
        named = getattr(device, "platform", device) or self.options.get("backend") or jax.default_backend()
        return platform_named(str(named))

    def _tell_unmatched(self, traced: Traced) -> None:
        """Warns once, at the first trace, of rules that match nothing in it."""
        plan = traced.plan
        if not plan.unmatched_rules or len(self._traces) > 1:
            return
        rules = ", ".join(map(repr, plan.unmatched_rules))
        paths = traced.product_paths if self.config.compresses else traced.rule_paths
        other = ", and no other product" if self.config.compresses else ""
        there = ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "") or "none"
        warnings.warn(
            f"{self!r}: rules that match no feed-forward block and no vocabulary projection{other}: {rules}. A block "
            f"goes by the path of its last product. Paths there are: {there}",
            HireWarning,
            stacklevel=4,
        )


def _sparsified_anew(kind: type[Sparsified], fun: Callable, *made_of: Any) -> Sparsified:
    """A step that remembers nothing yet."""
    *settings, traced_class = made_of
    step = kind(fun, *settings)
    step.traced_class = traced_class
    return step
