"""Calls of one shape of arguments: what jit traces, and the fast way through Python to it."""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from hire_xform.call.calls import Abstract, abstract_call
from hire_xform.call.counting import Counts, count_rungs
from hire_xform.call.leaves import aval_of, platform_in, stated_sharding
from hire_xform.call.signature import argument_of, keyed, unwrap_statics
from hire_xform.call.traced_weights import pack_traced
from hire_xform.call.trial import Trial
from hire_xform.passes.ir import compat
from hire_xform.passes.pack.packed import Packed, PackedToken
from hire_xform.passes.plan.decisions import PackKey
from hire_xform.passes.plan.placement import placement_of, token_axes_of
from hire_xform.passes.weights.recipe import Root

if TYPE_CHECKING:
    from hire_xform.api import Sparsified
    from hire_xform.call.stages import Traced


class _OtherWayError(Exception):
    """Ends a trace whose program reads more than the way passes on, before anything of it is traced; see ``run``."""


@dataclass(frozen=True)
class _Situation:
    """What of a call's weights and data is known when packing, and not seen under jit: all that is traced hangs on it.

    Attributes:
      avals: abstract values of the plain weights: under jit those that are not read are not there.
      placed: where they are, of those over several devices: under jit, axes are automatic.
      token_axes: mesh axes that data comes in sharded over.
      platform: where the call runs, if one of its leaves says so.
    """

    avals: tuple[Any, ...]
    placed: tuple[Any, ...]
    token_axes: tuple[str, ...]
    platform: str | None


@dataclass(frozen=True, eq=False)
class _Way:
    """What calls in one situation are passed on to. It never changes: other shapes that read more get another.

    Attributes:
      situation: of the weights.
      keys: the packed forms that the traced programs read, of plain weights and of arrays that are closed over.
      passed: positions of the plain weights that they read; the others are not passed on, which costs time at every
        call.
      jitted: the function.
      tried: the function, which also returns the counts of its sites that are on trial.
      counted: the function, which also counts the sizes that certified sites take.
    """

    situation: _Situation
    keys: tuple[PackKey, ...]
    passed: tuple[int, ...]
    jitted: Callable[..., Any]
    tried: Callable[..., Any]
    counted: Callable[..., Any]


@dataclass(frozen=True, eq=False)
class _Current:
    """A way, with the packed forms of some weights.

    Attributes:
      ids: identities of the weights; None when they are not to be remembered.
      way: the way.
      forms: packed forms of its keys.
      watch: weak references, whose callbacks tell when an identity is free again.
    """

    ids: tuple[int, ...] | None
    way: _Way
    forms: list[Any]
    watch: list[Any]


@dataclass(frozen=True)
class _Wants:
    """What a traced program reads of plain weights: packed forms, and the positions of leaves read as they are."""

    keys: tuple[PackKey, ...]
    passed: frozenset[int]

    def within(self, keys: Sequence[PackKey], passed: Sequence[int]) -> bool:
        """Whether a way that passes these on serves it."""
        return self.passed.issubset(passed) and set(self.keys).issubset(keys)


class Entry:
    """Calls of one tree structure, leaf types and static values.

    A call is taken apart into plain weights, the leaves of ``Packed`` weights, donated data and other data, and passed
    on to one jitted function.
    """

    def __init__(self, owner: Sparsified, args: tuple[Any, ...], kwargs: dict[str, Any], packed: list[Packed]):
        """Sorts the leaves of a first call; ``packed`` are its Packed arguments, of which args hold the tokens."""
        self._owner = owner
        signature = owner.signature
        self._packed_trees: list[Any] = [jax.tree.structure(p) for p in packed]
        # The weights arguments that these stand for, as they came.
        given = keyed(args, kwargs)
        self._packed_keys = [signature.weight_key(key) for key, value in given if isinstance(value, PackedToken)]
        self._held = dict(zip(self._packed_keys, [p.layout for p in packed], strict=True))
        self._roots = abstract_call(signature, args, kwargs).roots
        self._weights: list[int] = []
        self._weight_roots: list[Root] = []
        self._rest: list[int] = []
        self._donated: list[int] = []
        self._any_traced = False
        self._hashed = False
        found, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
        self._treedef: Any = treedef
        self._statics = {i: leaf for i, (path, leaf) in enumerate(found) if not signature.traces(path, leaf)}
        # Roots of this call's own leaves: those that a Packed stands for have none here.
        roots = iter([r for r in self._roots if r is None or r.argument not in self._packed_keys])
        for position, (path, leaf) in enumerate(found):
            if position in self._statics:
                continue
            root = next(roots)
            if root is not None:
                self._weights.append(position)
                self._weight_roots.append(root)
                self._any_traced |= compat.is_tracer(leaf)
                self._hashed |= not isinstance(leaf, jax.Array)
            elif signature.holds(signature.donated, argument_of(path)):
                self._donated.append(position)
            else:
                self._rest.append(position)
        leaves = [*(leaf for _, leaf in found), *(leaf for p in packed for leaf in p.leaves)]
        self._under_trace = any(map(compat.is_tracer, leaves))
        donate = (4,) if self._donated else ()
        self._options = {"donate_argnums": donate, **owner.options}
        self._ways: dict[_Situation, _Way] = {}
        self._left_dense = owner.left_dense
        self._trials: dict[Traced, Trial] = {}
        # Held while a way is looked up or replaced, never while a user's function is traced: that may call this again.
        self._lock = threading.Lock()
        # The latest weights. Replaced as one: threads see forms that belong to the weights, or none.
        self._current: _Current | None = None

    def run(self, leaves: list[Any], packed: list[Packed]) -> Any:
        """One call; ``leaves`` are all leaves of it, in order, and ``packed`` its Packed arguments.

        With the weights of the last call, what jit is given is what the last call was given, and nothing of the shapes
        is looked at here: jit does that. So it is jit that finds shapes (or settings, or a mesh) to be new, and calls
        ``_body`` to trace. Where that finds that their program reads more than this way passes on, it has to go no
        further: what it would trace would be compiled, run, and given what was donated. JAX has one means of leaving a
        trace, an exception. The only other way is to look the shapes of all data up in Python at every call, which is
        jit's own work done twice.
        """
        weights = [leaves[i] for i in self._weights]
        current = self._current
        if current is None or tuple(map(id, weights)) != current.ids:
            current = self._prepare(leaves, weights, packed)
        try:
            return self._call(current, leaves, packed)
        except _OtherWayError:
            return self._call(self._prepare(leaves, weights, packed), leaves, packed)

    def _call(self, current: _Current, leaves: list[Any], packed: list[Packed]) -> Any:
        operands = self._operands(current, leaves, packed)
        if self._under_trace:
            return current.way.jitted(*operands)
        result, counts = current.way.tried(*operands)
        for trial, count in counts.items():
            trial.note(self._owner, count)
        return result

    def program(self, leaves: list[Any], packed: list[Packed]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The jitted function that runs this call, and what it is given."""
        current = self._prepare(leaves, [leaves[i] for i in self._weights], packed)
        return current.way.jitted, self._operands(current, leaves, packed)

    def run_counted(self, leaves: list[Any], packed: list[Packed]) -> tuple[Any, Counts]:
        """The call, and how often each certified site took each of its sizes, and last its dense form."""
        current = self._prepare(leaves, [leaves[i] for i in self._weights], packed)
        return current.way.counted(*self._operands(current, leaves, packed))

    def _operands(self, current: _Current, leaves: list[Any], packed: list[Packed]) -> tuple[Any, ...]:
        held = [p.leaves for p in packed]
        rest = [leaves[i] for i in self._rest]
        donated = [leaves[i] for i in self._donated]
        return [leaves[i] for i in current.way.passed], current.forms, held, rest, donated

    def _prepare(self, leaves: list[Any], weights: list[Any], packed: list[Packed]) -> _Current:
        """The way for these shapes and all seen before, and its packed forms of these weights, made or remembered."""
        situation = self._situation(leaves, weights, packed)
        traced = self._traced(leaves, situation)
        way = self._way(situation, traced)
        plain = dict(zip(self._weight_roots, weights, strict=True))
        inside = [
            k for k in way.keys if self._any_traced and any(map(compat.is_tracer, map(plain.get, k.recipe.roots)))
        ]
        # All forms, not only those of this shape: those of other shapes would be stale once the weights changed.
        made = self._owner.memory.forms([key for key in way.keys if key not in inside], plain, traced)
        if inside:
            made |= pack_traced(repr(self._owner), inside, plain, traced)
        forms = [made[key] for key in way.keys]
        if self._hashed or self._any_traced:
            return _Current(None, way, forms, [])
        current = _Current(tuple(map(id, weights)), way, forms, [])
        current.watch.extend(weakref.ref(w, self.forget) for w in weights)
        self._current = current
        return current

    def _traced(self, leaves: list[Any], situation: _Situation) -> Traced:
        """The trace of a call with these leaves; where ``Packed`` can't serve it, that of all sites."""
        call = self._abstract(leaves, situation)
        traced = self._owner.traced(call, self._left_dense)
        if self._left_dense and self._packed_keys and not traced.served_by(self._held):
            return self._owner.traced(call, {})
        return traced

    def _situation(self, leaves: list[Any], weights: list[Any], packed: list[Packed]) -> _Situation:
        placed = tuple(None if compat.is_tracer(w) else placement_of(w) for w in weights)
        data = [leaves[i] for i in (*self._rest, *self._donated)]
        axes = token_axes_of(None if compat.is_tracer(d) else placement_of(d) for d in data)
        platform = platform_in(map(stated_sharding, [*weights, *data, *(leaf for p in packed for leaf in p.leaves)]))
        return _Situation(tuple(map(aval_of, weights)), placed, axes, platform)

    def _way(self, situation: _Situation, traced: Traced) -> _Way:
        """The way in a situation, which serves this trace too."""
        wants = self._wants(traced)
        with self._lock:
            known = self._ways.get(situation)
            if known is not None and wants.within(known.keys, known.passed):
                return known
            keys, passed = (known.keys, known.passed) if known is not None else ((), ())
            keys, passed = tuple(dict.fromkeys((*keys, *wants.keys))), tuple(sorted({*passed, *wants.passed}))
            way = self._new_way(situation, keys, passed)
            self._ways[situation] = way
            return way

    def _wants(self, traced: Traced) -> _Wants:
        here = set(self._weight_roots)
        keys = [k for k in traced.needed_keys() if k.recipe.root.kind == "const" or k.recipe.root in here]
        read = traced.plain_roots if traced.plan.sites or self._packed_keys else here
        passed = {i for i, root in zip(self._weights, self._weight_roots, strict=True) if root in read}
        return _Wants(tuple(keys), frozenset(passed))

    def _new_way(self, situation: _Situation, keys: tuple[PackKey, ...], passed: tuple[int, ...]) -> _Way:
        body = functools.partial(self._body, situation, keys, passed)
        fun = self._owner.signature.fun
        jitted = jax.jit(_named(body, fun), **self._options)

        def trying(*operands: Any) -> tuple[Any, dict[Trial, Any]]:
            traced = self._traced(self._merged(situation, passed, *operands), situation)
            trial = self._trials.setdefault(traced, Trial(traced))
            return trial.counted(body, operands)

        def counting(*operands: Any) -> tuple[Any, Counts]:
            program, shape = jax.make_jaxpr(jitted, return_shape=True)(*operands)
            results, counts = count_rungs(program, jax.tree.leaves(operands))
            return jax.tree.unflatten(jax.tree.structure(shape), results), counts

        options = dict(self._options)
        if options.get("out_shardings") is not None:
            options["out_shardings"] = options["out_shardings"], None
        tried = jax.jit(_named(trying, fun), **options)
        counted = jax.jit(counting, **{k: v for k, v in self._owner.options.items() if k != "out_shardings"})
        return _Way(situation, keys, passed, jitted, tried, counted)

    def forget(self, _: Any = None) -> None:
        """A weight died, whose identity may be used again by another array; or nobody calls this again."""
        self._current = None

    def _rebuild(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        merged = [self._statics.get(i, leaf) for i, leaf in enumerate(leaves)]
        return self._treedef.unflatten(merged)

    def _abstract(self, leaves: list[Any], situation: _Situation) -> Abstract:
        """The abstract plain call for this call's leaves."""
        avals = [None if i in self._statics else aval_of(leaf) for i, leaf in enumerate(leaves)]
        call = abstract_call(self._owner.signature, *self._rebuild(avals))
        call = dataclasses.replace(call, platform=situation.platform)
        known = {r: p for r, p in zip(self._weight_roots, situation.placed, strict=True) if p is not None}
        if not known and not situation.token_axes:
            return call
        placed = tuple(known.get(r, p) if r is not None else None for r, p in zip(call.roots, call.placed, strict=True))
        return dataclasses.replace(call, placed=placed, token_axes=call.token_axes or situation.token_axes)

    def _merged(self, situation: _Situation, passed: tuple[int, ...], *operands: Any) -> list[Any]:
        """All leaves that are traced, from the operands of a way: abstract where it does not pass them on."""
        weights, _, _, rest, donated = operands
        leaves: list[Any] = [None] * (len(self._weights) + len(rest) + len(donated) + len(self._statics))
        groups = ((self._weights, situation.avals), (passed, weights), (self._rest, rest), (self._donated, donated))
        for positions, values in groups:
            for position, value in zip(positions, values, strict=True):
                leaves[position] = value
        return leaves

    def _body(self, situation: _Situation, keys: tuple[PackKey, ...], passed: tuple[int, ...], *operands: Any) -> Any:
        """What jit traces: finds the plan for the shapes it is given, and evaluates the rewritten program."""
        weights, forms, packed, _, _ = operands
        leaves = self._merged(situation, passed, *operands)
        traced = self._traced(leaves, situation)
        if not self._wants(traced).within(keys, passed):
            raise _OtherWayError
        here = dict(zip(self._weights, self._weight_roots, strict=True))
        plain = {here[i]: w for i, w in zip(passed, weights, strict=True)}
        if not traced.plan.sites and not packed:
            args, kwargs = unwrap_statics(*self._rebuild(leaves))
            return self._owner.signature.fun(*args, **kwargs)
        held = {
            key: tree.unflatten(arrays)
            for key, tree, arrays in zip(self._packed_keys, self._packed_trees, packed, strict=True)
        }
        given = dict(zip(keys, forms, strict=True))
        data = iter([leaves[i] for i in sorted(self._rest + self._donated)])
        given_data = [None if root is not None else next(data) for root in self._roots]
        return traced.evaluate(given_data, traced.supply(held, plain, given))


def take_packed(
    owner: Sparsified, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], list[Packed]]:
    """The call with a token in the place of each Packed argument, and those arguments.

    Raises:
      TypeError: a Packed stands where no weights belong.
    """
    packed: list[Packed] = []

    def taken(key: int | str, value: Any) -> Any:
        if not isinstance(value, Packed):
            return value
        if owner.signature.weight_key(key) is None:
            raise TypeError(f"argument {key!r} is Packed, but it is not in {owner.signature.stated}")
        packed.append(value)
        return PackedToken(value.layout)

    new_args = tuple([taken(i, a) for i, a in enumerate(args)])
    # By name, as the tree of a call has them: another order in the call is no other call.
    new_kwargs = {k: taken(k, kwargs[k]) for k in sorted(kwargs)}
    return new_args, new_kwargs, packed


def _named(body: Callable, fun: Callable) -> Callable:
    def call(*args: Any) -> Any:
        return body(*args)

    call.__name__ = call.__qualname__ = getattr(fun, "__name__", "sparsified")
    return call
