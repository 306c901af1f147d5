"""Evaluates the program under a trace, equation by equation, with the subgraphs where the sites were.

A call or loop with a treated equation inside is emitted again through public JAX, with packed arrays as further
operands; one without is bound unchanged. Calls of one jitted function stay calls of one function: its rewritten form is
made once and used for every call that is treated alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_xform.lowering.primitives.proved_for import proved_for
from hire_xform.lowering.primitives.rungs import mark_rung
from hire_xform.lowering.xla.promotion import usual_promotion
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.graph import Frame, Graph, Node, Operand, Scope, Value, levels
from hire_xform.passes.ir.recursion import room_for
from hire_xform.passes.plan.decisions import Decision, Need
from hire_xform.passes.prove.certifiable import platforms_proved
from hire_xform.passes.rewrite import control
from hire_xform.passes.rewrite.actions import Treatment
from hire_xform.passes.rewrite.cyclic_lookups import CyclicLookup, look_up
from hire_xform.passes.rewrite.environment import TOLD, Env, PackedView, Views, read
from hire_xform.passes.rewrite.liveness import Liveness
from hire_xform.passes.rewrite.merge_top_k import Merged, merge
from hire_xform.passes.rewrite.splice import dense_rows, site_function, site_operands, site_signature
from hire_xform.passes.rewrite.splice_sharded import sharded_function
from hire_xform.passes.rewrite.top_groups import TopGroups, top_groups_product
from hire_xform.passes.weights.products import precision_asked
from hire_xform.passes.weights.provenance import IndexSlice


@dataclass(frozen=True)
class Told:
    """What a site tells of one call of it (``lowering/primitives/rungs.py``), not yet marked.

    Attributes:
      rung: the number.
      path: the site's.
      rungs: what the number means; see ``mark_rung``.
    """

    rung: Any
    path: str
    rungs: int


def tell(env: Env, told: Told) -> None:
    """Marks it here; or, in a call that like ones share, adds it to what the call tells, to be marked outside."""
    if TOLD in env:
        env[TOLD].append(told)
    else:
        mark_rung(told.rung, told.path, told.rungs)


@dataclass(eq=False, repr=False)
class Rewriter:
    """One rewriting of a graph.

    Args:
      graph: the program.
      treated: what to do where.
    """

    graph: Graph
    treated: dict[Node, Treatment]
    live: Liveness = field(init=False)
    _calls: dict[Any, Callable] = field(init=False, default_factory=dict)
    _shared: dict[Any, tuple[Callable, list[tuple[str, int]]]] = field(init=False, default_factory=dict)
    _needs: dict[Any, list[Need]] = field(init=False, default_factory=dict)
    _alive: dict[Frame, bool] = field(init=False, default_factory=dict)
    _inside: dict[Frame, list[Treatment]] = field(init=False, default_factory=dict)
    _marking: dict[Frame, bool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Marks calls whose boundary a site spans, and what is live."""
        for treatment in self.treated.values():
            _open_frames(treatment)
        self.live = Liveness(self.graph, self.treated)

    def needed_inputs(self) -> list[bool]:
        """Which operands of the program are still read."""
        return [value in self.live.values for value in self.graph.top.inputs]

    def evaluate(self, operands: Sequence[Any], packed: Callable[[Need], Any]) -> list[Any]:
        """Runs the rewritten program.

        Args:
          operands: the program's operands; those no longer read may be None.
          packed: the packed arrays a need's key stands for.
        """
        top = self.graph.top
        env = {v: o for v, o in zip(top.inputs, operands, strict=True) if o is not None}
        views = {
            need: PackedView(packed(need), recipe=need.key.recipe if need.key.form == "leaf" else None)
            for need in self._scope_needs(top)
        }
        with usual_promotion(), room_for(levels(self.graph)):
            self._frame(top.root, env, views)
        return [read(env, o) for o in top.outputs]

    def run_scope(self, scope: Scope, env: Env, views: Views) -> list[Any]:
        """Runs a scope's body with its live inputs in ``env``; None for outputs that are not there."""
        self._frame(scope.root, env, views)
        return [read(env, o, missing_ok=True) for o in scope.outputs]

    def views_for(self, node: Node, scope: Scope, env: Env, views: Views) -> Views:
        """The views that treatments inside a loop's body need, with indices known here applied."""
        return {need: self._resolve(need, node.frame, env, views) for need in self._scope_needs(scope)}

    def _frame(self, frame: Frame, env: Env, views: Views) -> None:
        with compat.EquationContexts() as contexts:
            for item in frame.items:
                if isinstance(item, Frame):
                    if self._is_alive(item):
                        contexts.enter(item.eqn)
                        self._call(item, env, views)
                elif item in self.live.nodes:
                    contexts.enter(item.eqn)
                    if item.children or item in self.treated:
                        self._node(item, env, views)
                    else:
                        results = compat.bind(item.eqn, [read(env, o) for o in item.inputs])
                        for value, result in zip(item.outputs, results, strict=True):
                            env[value] = result

    def _node(self, node: Node, env: Env, views: Views) -> None:
        treatment = self.treated.get(node)
        if treatment is not None:
            seen = [self._resolve(need, node.frame, env, views) for need in treatment.needs]
            with jax.named_scope(f"hire/{node.path}"):
                if isinstance(treatment, Decision):
                    env[node.outputs[0]] = self._site(treatment, env, seen)
                elif isinstance(treatment, Merged):
                    env.update(zip(node.outputs, merge(treatment, read(env, treatment.operand)), strict=True))
                elif isinstance(treatment, CyclicLookup):
                    operands = [read(env, o) for o in node.inputs[1:]]
                    env[node.outputs[0]] = look_up(treatment, seen[0].whole(), operands)
                elif isinstance(treatment, TopGroups):
                    env[node.outputs[0]] = top_groups_product(treatment, lambda o: read(env, o))
                else:
                    env[node.outputs[0]] = dense_rows(treatment, lambda o: read(env, o), seen[0])
            return
        if node.children and any(child in self.live.changed for child in node.children):
            results = control.EMIT[node.primitive](self, node, env, views)
        else:
            results = compat.bind(node.eqn, [read(env, o) for o in node.inputs])
        env.update((v, r) for v, r in zip(node.outputs, results, strict=True) if r is not None)

    def _site(self, decision: Decision, env: Env, seen: list[PackedView]) -> Any:
        """A site's value. Sites that are rewritten alike call one function: it is traced and lowered once."""
        key = site_signature(decision)
        if key not in self._calls:
            function = (site_function if decision.placement is None else sharded_function)(decision)
            function = _as_precise(function, precision_asked(decision.match.products))
            function.__name__ = function.__qualname__ = f"hire_{decision.site.kind}"
            self._calls[key] = jax.jit(function)
        local = _with_sides(decision, env)
        result = self._calls[key](site_operands(decision, lambda o: read(local, o)), seen)
        if not decision.marks:
            return result
        value, rung = result
        tell(env, Told(rung, decision.site.path, decision.marks))
        if not decision.settings.certify:
            return value
        # Where like calls share a function, the path is that of the first of them.
        return proved_for(value, platforms_proved(decision.match, decision.input_bits), decision.site.path)

    def _call(self, frame: Frame, env: Env, views: Views) -> None:
        needs = self._frame_needs(frame)
        operands = [read(env, o, missing_ok=True) for o in frame.inputs]
        if not self._frame_treatments(frame) and not frame.inline and not any(o is None for o in operands):
            results = compat.bind(frame.eqn, operands)
        elif frame.inline or frame.kind == "call" or (frame.kind == "jit" and compat.jit_is_inlined(frame.eqn)):
            self._frame(frame, env, views)
            return
        else:
            seen = [self._resolve(need, frame, env, views) for need in needs]
            results = self._emit_call(frame, operands, env, needs, seen)
        for output, result in zip(frame.outputs, results, strict=True):
            if isinstance(output, Value) and result is not None:
                env[output] = result

    def _emit_call(
        self, frame: Frame, operands: list[Any], around: Env, needs: list[Need], seen: list[PackedView]
    ) -> list[Any]:
        def body(operands: list[Any], seen: list[PackedView], told: list[Told] | None = None) -> list[Any]:
            env = {v: o for v, o in zip(frame.inputs, operands, strict=True) if isinstance(v, Value) and o is not None}
            if told is not None:
                env[TOLD] = told
            self._frame(frame, env, dict(zip(needs, seen, strict=True)))
            return [read(env, o, missing_ok=True) if self._wanted(o) else None for o in frame.outputs]

        def telling(operands: list[Any], seen: list[PackedView]) -> tuple[list[Any], list[Any]]:
            told: list[Told] = []
            results = body(operands, seen, told)
            names[:] = [(t.path[len(frame.path) :], t.rungs) for t in told]
            return results, [t.rung for t in told]

        # What sites inside tell: the rest of their paths, which is the same in every call that shares the function.
        names: list[tuple[str, int]] = []
        passed = [o if isinstance(v, Value) else None for v, o in zip(frame.inputs, operands, strict=True)]
        if frame.kind == "custom":
            return _with_own_derivative(frame, body, operands, passed, seen)
        if frame.kind == "remat":
            params = frame.eqn.params
            run = jax.checkpoint(telling, prevent_cse=params["prevent_cse"], policy=params["policy"])
        else:
            key = self._call_key(frame, passed, needs, seen)
            if key not in self._shared:
                telling.__name__ = telling.__qualname__ = frame.eqn.params.get("name") or "call"
                self._shared[key] = jax.jit(_constrained(frame, telling), inline=compat.jit_inlining(frame.eqn)), names
            run, names = self._shared[key]
        results, rungs = run(passed, seen)
        for rung, (rest, count) in zip(rungs, names, strict=True):
            tell(around, Told(rung, frame.path + rest, count))
        return results

    def _call_key(self, frame: Frame, passed: list[Any], needs: list[Need], seen: list[PackedView]) -> Any:
        """Two calls with one key may share one rewritten function."""
        first: dict[Any, int] = {}
        pattern: list[Any] = []
        for i, operand in enumerate(frame.inputs):
            if isinstance(operand, Value):
                # Which operands are one and the same value is baked into the layout of the body.
                pattern.append((first.setdefault(operand, i), passed[i] is None))
            else:
                number = np.asarray(operand.val)
                pattern.append((str(number.dtype), number.tobytes()))
        wanted = tuple(self._wanted(o) for o in frame.outputs)
        inside = tuple(
            (treatment.node.path[len(frame.path) :], _signature(treatment))
            for treatment in self._frame_treatments(frame)
        )
        resolved = tuple(
            (len(need.refs), len(view.index), view.factor is None, str(need.key.form))
            for need, view in zip(needs, seen, strict=True)
        )
        # A mark carries the path of its site: calls with one inside are functions of their own. What sites of the call
        # itself tell is a result of it and marked outside, so that like layers share one function.
        path = frame.path if self._marks_inside(frame) else ""
        return id(frame.jaxpr), tuple(pattern), wanted, inside, resolved, path

    def _marks_inside(self, frame: Frame) -> bool:
        """Whether anything is marked in a call's own body: in loops and branches in it, and custom derivatives."""
        if frame not in self._marking:
            found = False
            for item in frame.items:
                if isinstance(item, Frame):
                    own = item.kind == "custom" and not item.inline
                    found |= self._tells(item) if own else self._marks_inside(item)
                elif item in self.live.nodes:
                    found |= any(self._tells(child.root) for child in item.children)
            self._marking[frame] = found
        return self._marking[frame]

    def _tells(self, frame: Frame) -> bool:
        return any(isinstance(t, Decision) and t.marks for t in self._frame_treatments(frame))

    def _wanted(self, operand: Operand) -> bool:
        return isinstance(operand, Value) and operand in self.live.values

    def _resolve(self, need: Need, frame: Frame, env: Env, views: Views) -> PackedView:
        """Applies the stack indices that are known in this frame to a view."""
        view = views[need]
        while len(view.index) < len(need.refs):
            ref = need.refs[len(view.index)]
            if not isinstance(ref, IndexSlice) or ref.node.scope is not frame.scope:
                break
            index = read(env, ref.index, missing_ok=True)
            if index is None:
                break
            view = view.at(jnp.reshape(index, -1)[ref.entry], ref.fills)
        return view

    def _is_alive(self, frame: Frame) -> bool:
        if frame not in self._alive:
            self._alive[frame] = any(
                self._is_alive(i) if isinstance(i, Frame) else i in self.live.nodes for i in frame.items
            )
        return self._alive[frame]

    def _frame_treatments(self, frame: Frame) -> list[Treatment]:
        if frame not in self._inside:
            found: list[Treatment] = []
            for item in frame.items:
                if isinstance(item, Frame):
                    found += self._frame_treatments(item)
                elif item in self.live.nodes:
                    if item in self.treated:
                        found.append(self.treated[item])
                    for child in item.children:
                        found += self._frame_treatments(child.root)
            self._inside[frame] = found
        return self._inside[frame]

    def _frame_needs(self, frame: Frame) -> list[Need]:
        if frame not in self._needs:
            self._needs[frame] = [n for t in self._frame_treatments(frame) for n in t.needs]
        return self._needs[frame]

    def _scope_needs(self, scope: Scope) -> list[Need]:
        return self._frame_needs(scope.root)


def _with_sides(decision: Decision, env: Env) -> Env:
    """The values here, and those that readers of a site's logits take besides, which may be made further on."""
    if not any(chain.ahead for chain in decision.reads.chains):
        return env
    local = dict(env)
    for chain in decision.reads.chains:
        for node in chain.ahead:
            if node.outputs[0] not in local:
                operands = [read(local, chain.resolved(o)) for o in node.inputs]
                with compat.equation_context(node.eqn):
                    local.update(zip(node.outputs, compat.bind(node.eqn, operands), strict=True))
    return local


def _signature(treatment: Treatment) -> Any:
    if isinstance(treatment, Decision):
        settings = treatment.settings, treatment.rungs, treatment.levels
        chains = tuple(chain.signature() for chain in treatment.reads.chains)
        return *settings, treatment.site.tokens, treatment.placement, treatment.cyclic, chains
    if isinstance(treatment, TopGroups):
        return treatment.active, treatment.group_size
    if isinstance(treatment, CyclicLookup):
        return "lookup", treatment.parts
    if isinstance(treatment, Merged):
        return "merged", treatment.k, treatment.vocab, treatment.placement, treatment.cyclic
    return "dense", treatment.contracted_first


def _open_frames(treatment: Treatment) -> None:
    """Marks the calls that can't stay calls: the site's equations stand on both sides of their boundary."""
    nodes = [treatment.node]
    if isinstance(treatment, Decision):
        nodes += [p.node for p in treatment.match.products]
        nodes += list(getattr(getattr(treatment.match, "region", None), "nodes", ()))
        if treatment.reads.sides:
            _widen(treatment.node.frame, [n for chain in treatment.reads.chains for n in chain.nodes])
    if isinstance(treatment, Merged) and treatment.operand not in treatment.node.inputs and treatment.operand.node:
        nodes.append(treatment.operand.node)
    for need in treatment.needs:
        for ref in need.refs:
            if isinstance(ref, IndexSlice):
                user = treatment.node
                while user.scope is not ref.node.scope and user.scope.node is not None:
                    user = user.scope.node
                _join([ref.node], user.frame)
    _join(nodes, treatment.node.frame)


def _widen(frame: Frame, nodes: Sequence[Node]) -> None:
    """Inlines the calls around a site that what its readers take besides does not come into."""
    for call in frame.ancestors():
        if all(node.scope is not frame.scope or call in node.frame.ancestors() for node in nodes):
            break
        call.inline = True


def _join(nodes: Sequence[Node], frame: Frame) -> None:
    """Inlines calls so that all nodes stand in one frame with ``frame`` or around it."""
    around = frame.ancestors()
    shared = [f for f in around if all(f in n.frame.ancestors() for n in nodes)]
    for node in nodes:
        for call in node.frame.ancestors():
            if call is shared[0]:
                break
            call.inline = True
    if len(nodes) > 1:
        for call in around[: around.index(shared[0])]:
            call.inline = True


def _constrained(frame: Frame, body: Callable) -> Callable:
    """The body with the shardings its jit stated, as constraints."""
    given, returned = compat.jit_shardings(frame.eqn)
    if not any(s is not None for s in (*given, *returned)):
        return body

    def constrained(operands: list[Any], seen: list[PackedView]) -> tuple[list[Any], list[Any]]:
        operands = [_constrain(o, s) for o, s in zip(operands, given, strict=True)]
        results, told = body(operands, seen)
        return [_constrain(r, s) for r, s in zip(results, returned, strict=True)], told

    constrained.__name__ = constrained.__qualname__ = body.__name__
    return constrained


def _constrain(value: Any, sharding: Any) -> Any:
    if value is None or sharding is None:
        return value
    return jax.lax.with_sharding_constraint(value, sharding)


def _with_own_derivative(
    frame: Frame, body: Callable, operands: list[Any], passed: list[Any], seen: list[PackedView]
) -> list[Any]:
    """A custom-derivative call whose value is the rewritten body's and whose derivative is still its own rule.

    The rule may read the weights, which are then made from their packed rows: only if something differentiates.
    """
    if any(o is None for o in operands):
        return body(passed, seen)
    wrapped = jax.custom_jvp(lambda *flat: body(list(flat), seen))

    @wrapped.defjvp
    def _jvp(primals: Any, tangents: Any) -> Any:
        out, out_dot = jax.jvp(lambda *flat: compat.bind(frame.eqn, list(flat)), primals, tangents)
        return out, out_dot

    return wrapped(*operands)


def _as_precise(function: Callable[..., Any], asked: str | None) -> Callable[..., Any]:
    """A site's function, whose chosen rows are multiplied as precisely as its dense products ask to be."""

    def precisely(operands: list[Any], views: list[PackedView]) -> Any:
        with jax.default_matmul_precision(asked):
            return function(operands, views)

    return function if asked is None else precisely
