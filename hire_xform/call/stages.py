"""A traced call: what was found, what will be done, and the rewritten program. Named after ``jax.stages``."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from hire_xform import explain as _explain
from hire_xform.calibration.calibration import Calibration
from hire_xform.call.bound import Bound
from hire_xform.call.calls import ABSENT, Abstract, call_leaves
from hire_xform.call.collector import collector_paused
from hire_xform.call.packing import make_packed
from hire_xform.call.platforms import checked_platforms, platforms_of
from hire_xform.call.program import Program, struct
from hire_xform.call.signature import Signature, keyed
from hire_xform.call.supply import Supply
from hire_xform.config import Config
from hire_xform.errors import HireWarning
from hire_xform.passes.ir.graph import Node
from hire_xform.passes.pack.make import pack_shapes
from hire_xform.passes.pack.packed import Packed, PackLayout
from hire_xform.passes.plan.decisions import Decision, PackKey, Plan
from hire_xform.passes.plan.experts import dense_experts, with_reasons
from hire_xform.passes.plan.machine import built_in_for
from hire_xform.passes.plan.make import make_plan
from hire_xform.passes.plan.measurement import MeasurementOf
from hire_xform.passes.plan.placement import place
from hire_xform.passes.plan.row_order import distribute_rows
from hire_xform.passes.rewrite.action import Action
from hire_xform.passes.rewrite.actions import actions_of, rewritten
from hire_xform.passes.rewrite.holding import Holding, Reader, decide_holding
from hire_xform.passes.rewrite.rewriter import Rewriter
from hire_xform.passes.rewrite.site import SiteAction
from hire_xform.passes.weights.recipe import Root
from hire_xform.tuning.keeping import profile_for


class Traced(Program):
    """A function traced for arguments of given shapes. ``step.trace(...)`` makes one; it computes nothing.

    Attributes:
      plan: ``plan.sites`` and ``plan.refusals``, and ``plan.to_json()``.
      jaxpr: the original program.
    """

    # Whether the program stays dense, sites being measured only.
    runs_dense = False

    def __init__(
        self,
        signature: Signature,
        config: Config,
        call: Abstract,
        platform: str,
        options: dict[str, Any],
        calibration: Calibration | None = None,
    ):
        """Traces, detects and plans; see ``Sparsified.trace``."""
        super().__init__(signature, call)
        self._options = options
        self._rewriters: dict[Any, Rewriter] = {}
        self._told = False
        with collector_paused():
            plan, reasons = self._timed_plan(config, platform, calibration), {}
            if dense := dense_experts(self._experts, plan, self.runs_dense):
                nodes = [experts.match.node for experts in dense]
                self._find_all({node.path for node in nodes})
                self._rewriters.clear()
                reasons = dict(zip((node.source for node in nodes), dense.values(), strict=True))
                plan = self._timed_plan(config, platform, calibration)
            plan = with_reasons(plan, {**self._no_experts, **reasons})
            unmatched = config.unmatched(self.rule_texts(config.compresses))
            self.plan: Plan = replace(plan, unmatched_rules=tuple(rule.path_glob for rule in unmatched))
        if os.environ.get("HIRE_DUMP"):
            from hire_xform.dump.stage_files import dump_stages  # which is for whoever develops the pass: rarely loaded

            dump_stages(self)

    def _timed_plan(self, config: Config, platform: str, calibration: Calibration | None) -> Plan:
        measured = [calibration.measurement_of(self._detection.matches, self.name)] if calibration else []
        with self.timed("plan"):
            return self._plan(config, platform, *measured)

    def _plan(self, config: Config, platform: str, *measured: MeasurementOf) -> Plan:
        measure = measured[0] if measured else _no_measurement
        profile = built_in_for(platform) if self.runs_dense else profile_for(platform, self.call.elsewhere)
        plan = make_plan(self._detection, config.choose, profile, self.name, measure, self._place, self.runs_dense)
        return distribute_rows(plan, self._read_as_they_are)

    def _read_as_they_are(self, plan: Plan) -> list[Root]:
        """The weights that the program of a plan reads besides its packed forms, lookups in cyclic rows being there."""
        cyclic = {need.key.recipe.root for d in plan.decisions if d.cyclic for need in d.needs}
        keys = {need.key for d in plan.decisions for need in d.needs}
        todo = self._actions(lambda root: root not in cyclic, lambda key: key in keys, plan)
        needed = self._rewriter(todo).needed_inputs()
        return [root for root, read in zip(self.call.roots, needed, strict=True) if root is not None and read]

    def action_of(self, decision: Decision, has_leaf: Callable[[Root], bool]) -> SiteAction:
        """What is done in the place of a site, given which leaves are there."""
        return rewritten(decision, has_leaf)

    @functools.cached_property
    def _is_placed(self) -> bool:
        """Whether any weight is over several devices."""
        return any(sharding is not None for sharding in self.call.placed)

    def _place(self, match: Any) -> Any:
        """Where a match runs: where its weights are."""
        if not self._is_placed:
            return None
        return place(match, self._leaf, self.call.token_axes)

    def _leaf(self, root: Root) -> Any:
        """Shape and sharding of a weight; a closed-over array is a constant of the program, and on no mesh."""
        number = self.call.roots.index(root) if root.kind != "const" else None
        placed = None if number is None else self.call.placed[number]
        return struct(self.aval(root), placed)

    def at(self, where: tuple[Any, ...]) -> Traced:
        """The same for leaves that are elsewhere: nothing but what ``lower`` compiles for hangs on it."""
        if where == self.call.where:
            return self
        moved = copy.copy(self)
        moved.call = replace(self.call, where=where)
        return moved

    def explain(self) -> str:
        """Each site and each refusal as text: path, source line, kind, bytes before and after, reasons."""
        text = _explain.explain(self.plan)
        if self.plan.sites:
            return text
        by_name = self._arrays_by_name()
        if by_name:
            text += (
                f"\nArrays came by keyword, which are data, in {', '.join(by_name)}. If these hold weights, name them: "
                f"weights_argnames={tuple(by_name)}"
            )
        if self.plan.refusals:
            return text
        weights = sum(root is not None for root in self.call.roots) + len(self._provenance.consts)
        return (
            f"{text}\nNo product with a weight was found. Weights are the arrays in {self.signature.stated} and those "
            f"that are closed over: {weights or 'none'} here."
        )

    def _arrays_by_name(self) -> list[str]:
        """The arguments that came by keyword, are no weights, and hold arrays."""
        _, kwargs = self.call.rebuild([ABSENT] * len(self.call.avals))
        data = {name: value for name, value in kwargs.items() if self.signature.weight_key(name) is None}
        return [name for name, value in data.items() if any(leaf is ABSENT for leaf in jax.tree.leaves(value))]

    @functools.cached_property
    def sparse_jaxpr(self) -> Any:
        """The rewritten program, over the leaves of the call with ``Packed`` weights."""
        return self._bound(in_runs=False).jaxpr()

    @property
    def platforms(self) -> tuple[str, ...]:
        """What it can be lowered for, alone or together, as JAX names it: "cpu", "cuda", "rocm" and "tpu".

        Fewer where a site is certified for the platform that it was traced for, and others round differently.
        """
        return platforms_of(self.plan)

    def lower(self, lowering_platforms: Sequence[str] | None = None, **others: Any) -> jax.stages.Lowered:
        """Lowers the rewritten program, with ``Packed`` in the place of the weights; as ``jax.stages.Traced.lower``.

        Every operand is where the traced arguments said, so that it compiles for their devices. As for ``jax.jit``,
        what is compiled is called without the static arguments: ``lower().compile()(packed, cache, token)``.

        Args:
          lowering_platforms: some of :attr:`platforms`, such as ``("tpu",)``; None is the default backend's. What is
            lowered for several, or for another than the arguments are on, is to be read, or exported, and not to be
            compiled: JAX compiles it for the devices that it has.
          **others: none; ``jax.export`` of the function itself has some.

        Raises:
          ValueError: there is no such platform, or a site is not certified for it.
          TypeError: it is called by ``jax.export``.
        """
        if others:
            raise TypeError(
                f"lower: {', '.join(others)} given, as jax.export does; expected jax.export.export(jitted)(*operands) "
                "with jitted, operands = step.program(...), since Packed weights are not written down"
            )
        asked = checked_platforms(lowering_platforms)
        with collector_paused():
            bound = self._bound()
            traced = jax.jit(bound.run, **self._options, **bound.donated).trace(*bound.args, **bound.kwargs)
            return traced.lower(lowering_platforms=asked)

    def pack(self, *weights: Any, progress: bool | None = None) -> Any:
        """Compresses weights once.

        Args:
          *weights: the weights arguments, in the order of ``weights_argnums`` and then ``weights_argnames``, of the
            shapes that were traced.
          progress: show a progress bar; None shows one on a terminal when there is much to pack.

        Returns:
          A ``Packed``, which stands where the weights stood; a tuple of them for several weights arguments.

        Raises:
          TypeError, ValueError: the weights are not those that were traced; the message names the first difference.
        """
        keys = self.signature.weights
        if len(weights) != len(keys):
            raise TypeError(
                f"pack: got {len(weights)} arguments; expected {len(keys)}, one for each of {self.signature.stated}"
            )
        made = zip(keys, weights, self.layouts(self._holdings), strict=True)
        packed = tuple(make_packed(key, weight, layout, progress) for key, weight, layout in made)
        return packed[0] if len(packed) == 1 else packed

    # What follows serves `Sparsified`.

    @functools.cached_property
    def reader(self) -> Reader:
        """The rewritten program as it reads weights; their arguments are numbered as ``pack`` takes them."""
        slots = {Root.of(key, 0).kind: slot for slot, key in enumerate(self.signature.weights)}
        return Reader(self._actions, self.plan, self.call.roots, slots, self._rewriter)

    @functools.cached_property
    def _holdings(self) -> dict[int, Holding]:
        with collector_paused():
            return decide_holding([self.reader])

    def layouts(self, holdings: Mapping[int, Holding]) -> list[PackLayout]:
        """The layouts of the weights arguments, in their order, when they hold what is given for the number of each."""
        return [self._layout(key, holdings.get(n, Holding())) for n, key in enumerate(self.signature.weights)]

    def _actions(
        self, has_leaf: Callable[[Root], bool], has_key: Callable[[PackKey], bool], plan: Plan | None = None
    ) -> dict[Node, Action]:
        """What is done where by the plan, given which leaves and packed forms are there."""
        return actions_of(self._detection, plan or self.plan, has_leaf, has_key, self.action_of)

    def _rewriter(self, todo: dict[Node, Action]) -> Rewriter:
        """The rewriter of some actions, made once."""
        key = tuple((node, action.key) for node, action in todo.items())
        return self._rewriters.get(key) or self._rewriters.setdefault(key, Rewriter(self._graph, todo))

    def needed_keys(self) -> list[PackKey]:
        """Packed forms the plan reads, rows that are plain leaves left out."""
        keys = dict.fromkeys(n.key for d in self.plan.decisions for n in d.needs)
        return [k for k in keys if not k.is_leaf]

    @functools.cached_property
    def plain_roots(self) -> frozenset[Root]:
        """Weights that a call with plain weights reads as they are, packed forms being there."""
        keys = set(self.needed_keys())
        todo = self._actions(lambda root: True, lambda key: key in keys)
        needed = self._rewriter(todo).needed_inputs()
        found = {root for root, read in zip(self.call.roots, needed, strict=True) if root is not None and read}
        found |= {n.key.recipe.root for one in todo.values() for n in one.needs if n.key not in keys}
        return frozenset(found)

    def served_by(self, layouts: Mapping[Any, PackLayout]) -> bool:
        """Whether ``Packed`` arguments of these layouts, by their keys, hold all that the program reads whole."""

        def has_leaf(root: Root) -> bool:
            held = layouts.get(root.argument)
            return held is None or root.index in held.kept

        def has_key(key: PackKey) -> bool:
            held = layouts.get(key.recipe.root.argument)
            return held is None or held.number_of(key.anywhere) is not None

        todo = self._actions(has_leaf, has_key)
        read = zip(self.call.roots, self._rewriter(todo).needed_inputs(), strict=True)
        whole = [root for root, needed in read if root is not None and needed and not has_leaf(root)]
        return all(root.index in dict(layouts[root.argument].restored) for root in whole)

    def const(self, root: Root) -> Any:
        """A closed-over array."""
        return self._provenance.consts[root.index]

    def aval(self, root: Root) -> Any:
        """The abstract value of a weight."""
        return self.const(root) if root.kind == "const" else self.call.avals[self.call.roots.index(root)]

    def evaluate(self, leaves: Sequence[Any], supply: Supply, in_runs: bool = True) -> Any:
        """Runs the rewritten program on tracers; returns the function's result.

        Args:
          leaves: one for each array leaf of the call; None for weights, which ``supply`` gives.
          supply: the weights.
          in_runs: whether long stretches that are not rewritten are calls of functions, which takes less time.
        """
        todo = self._actions(supply.has_leaf, supply.has_form)
        rewriter = self._rewriter(todo)
        operands = []
        for leaf, root, needed in zip(leaves, self.call.roots, rewriter.needed_inputs(), strict=True):
            if root is not None:
                leaf = supply.whole(root, self.name) if needed else supply.leaf(root)
            operands.append(leaf)
        if supply.packed:
            self._tell_dense([d.site.path for d in self.plan.decisions if d.node not in todo])

        with collector_paused():
            in_runs = in_runs and not jax.config.jax_disable_jit  # type: ignore[attr-defined]
            results = rewriter.evaluate(operands, supply.read, in_runs)
        return jax.tree.unflatten(self.out_tree, results)

    def _tell_dense(self, paths: Sequence[str]) -> None:
        """Warns once of sites that run dense, since ``Packed`` arguments were packed for other programs."""
        if not paths or self._told:
            return
        self._told = True
        more = f" and {len(paths) - 1} more run" if len(paths) > 1 else " runs"
        warnings.warn(
            f"{paths[0]}{more} dense: the Packed weights, made for other programs, do not hold what this call reads of "
            "them in packed form. The result is right. Pack with a trace of each program that they are for, this one "
            "too: hx.pack(weights, [traced, ...])",
            HireWarning,
            stacklevel=2,
        )

    def _layout(self, key: int | str, holding: Holding) -> PackLayout:
        argument = self.argument(self.call.rebuild([ABSENT] * len(self.call.avals)), key)
        leaves, treedef = jax.tree.flatten(argument)
        static = tuple((i, v) for i, v in enumerate(leaves) if v is not ABSENT)
        mine = [i for i, root in enumerate(self.call.roots) if root is not None and root.argument == key]
        avals, placed = (tuple(of[i] for i in mine) for of in (self.call.avals, self.call.placed))
        held = holding.kept, holding.keys, holding.restored
        return PackLayout(treedef, avals, static, *held, placed, self.call.token_axes)

    def argument(self, call: tuple[Any, Any], key: int | str) -> Any:
        """The weights argument of a call, ``(args, kwargs)``, that is known by a position or name."""
        args, kwargs = call
        if isinstance(key, int) and key < len(args):
            return args[key]
        name = self.signature.name_at(key)
        if name in kwargs:
            return kwargs[name]
        raise TypeError(f"{self.signature.stated}: the traced call has no such argument as {key!r}")

    def packed_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments as shapes, with abstract ``Packed`` weights; static ones are wrapped."""
        where, roots = self.call.where, self.call.roots
        given = zip(self.call.avals, where, roots, strict=True)
        plain, kwargs = self.call.rebuild([ABSENT if root is not None else struct(a, s) for a, s, root in given])
        args = list(plain)
        for slot, key in enumerate(self.signature.weights):
            if slot not in self._holdings:
                continue
            layout = self._layout(key, self._holdings[slot])
            there = [s for s, root in zip(where, roots, strict=True) if root is not None and root.argument == key]
            kept = [struct(layout.avals[i], layout.placed[i] or there[i]) for i in layout.kept]
            forms = []
            for form in layout.keys:
                leaf, avals = form.recipe.root.index, [layout.avals[root.index] for root in form.recipe.roots]
                forms.append(pack_shapes(form, *avals, sharding=layout.placed[leaf] or there[leaf]))
            packed = Packed(kept, forms, layout)
            if isinstance(key, int) and key < len(args):
                args[key] = packed
            else:
                kwargs[str(self.signature.name_at(key))] = packed
        return tuple(args), kwargs

    def _bound(self, in_runs: bool = True) -> Bound:
        run = functools.partial(self._run, in_runs)
        return Bound(run, self.signature, *self.packed_call())

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The rewritten program on a call with ``Packed`` weights; inlines into whatever traces it."""
        return self._run(True, *args, **kwargs)

    def _run(self, in_runs: bool, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.signature.wrap_statics(args, kwargs)
        given = keyed(args, kwargs)
        packed = {self.signature.weight_key(key): p for key, p in given if isinstance(p, Packed)}
        leaves = call_leaves(self.signature, args, kwargs)
        return self.evaluate(leaves, self.supply(packed, {}, {}), in_runs)

    def supply(self, packed: Mapping[Any, Packed], plain: dict[Root, Any], forms: dict[PackKey, Any]) -> Supply:
        """The weights of one call; arguments as of ``Supply``."""
        return Supply(packed, plain, forms, self._const_keys, self.const)

    @functools.cached_property
    def _const_keys(self) -> list[PackKey]:
        return [k for k in self.needed_keys() if k.recipe.root.kind == "const"]


def _no_measurement(match: Any, names: Any) -> None:
    return None
