"""Evaluates the program under a trace, equation by equation, with the subgraphs where the sites were.

A call or loop with an action inside is emitted again through public JAX, with packed arrays as further
operands; one without is bound unchanged. Calls of one jitted function stay calls of one function: its rewritten form is
made once and used for every call that is treated alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_xform.lowering.xla.promotion import usual_promotion
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.equation_contexts import EquationContexts
from hire_xform.passes.ir.graph import Frame, Graph, Node, Operand, Scope, Value, levels
from hire_xform.passes.ir.recursion import room_for
from hire_xform.passes.plan.decisions import Need
from hire_xform.passes.plan.forms import Leaf
from hire_xform.passes.rewrite import control
from hire_xform.passes.rewrite.action import Action, Context, Told, tell
from hire_xform.passes.rewrite.calls import constrained, with_own_derivative
from hire_xform.passes.rewrite.environment import TOLD, Env, PackedView, Views, read
from hire_xform.passes.rewrite.inlining import inlined_frames
from hire_xform.passes.rewrite.liveness import Liveness
from hire_xform.passes.rewrite.runs import Runs, may_run
from hire_xform.passes.weights.origins import IndexSlice


@dataclass(eq=False, repr=False)
class Rewriter:
    """One rewriting of a graph.

    Args:
      graph: the program.
      actions: what to do where.
      keeps_unused: whether what nothing reads stays; what is replaced does not.
    """

    graph: Graph
    actions: dict[Node, Action]
    keeps_unused: bool = False
    live: Liveness = field(init=False)
    _inlined: frozenset[Frame] = field(init=False)
    _functions: dict[Any, Callable] = field(init=False, default_factory=dict)
    _shared: dict[Any, tuple[Callable, list[tuple[str, int]]]] = field(init=False, default_factory=dict)
    _needs: dict[Any, list[Need]] = field(init=False, default_factory=dict)
    _alive: dict[Frame, bool] = field(init=False, default_factory=dict)
    _inside: dict[Frame, list[Action]] = field(init=False, default_factory=dict)
    _marking: dict[Frame, bool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Finds the calls whose boundary an action spans, and what is live."""
        self._inlined = inlined_frames(self.actions.values())
        self.live = Liveness(self.graph, self.actions, self._inlined, self.keeps_unused)

    def needed_inputs(self) -> list[bool]:
        """Which operands of the program are still read."""
        return [value in self.live.values for value in self.graph.top.inputs]

    def evaluate(self, operands: Sequence[Any], packed: Callable[[Need], Any], in_runs: bool = False) -> list[Any]:
        """Runs the rewritten program.

        Args:
          operands: the program's operands; those no longer read may be None.
          packed: the packed arrays a need's key stands for.
          in_runs: whether stretches of the program's own body that stay as they are become calls (``runs.py``).
        """
        top = self.graph.top
        env = {v: o for v, o in zip(top.inputs, operands, strict=True) if o is not None}
        views = {
            need: PackedView(packed(need), recipe=need.key.recipe if isinstance(need.key.form, Leaf) else None)
            for need in self._scope_needs(top)
        }
        if not in_runs:
            return self._evaluate(env, views)
        runs = self._runs
        if not runs.any_alone:
            return self._evaluate(env, views, runs)
        arrays, tree = jax.tree.flatten(([*env.values()], [*views.values()]))

        def traced(*arrays: Any) -> list[Any]:
            values, seen = jax.tree.unflatten(tree, arrays)
            given = dict(zip(env, values, strict=True)), dict(zip(views, seen, strict=True))
            return self._evaluate(*given, runs)

        made = runs.inlined(jax.make_jaxpr(traced)(*arrays))
        inner, consts = compat.close(made)
        whole = compat.replaced(made, constvars=[], invars=[*inner.constvars, *inner.invars])
        return compat.bind_call(compat.plain_call(), whole, "rewritten", [*consts, *arrays])

    def _evaluate(self, env: Env, views: Views, runs: Runs | None = None) -> list[Any]:
        top = self.graph.top
        with usual_promotion(), room_for(levels(self.graph)):
            self._frame(top.root, env, views, runs)
        return [read(env, o) for o in top.outputs]

    @cached_property
    def _runs(self) -> Runs:
        """Those of the program's own body."""
        asked = {o for o in self._read_besides() if isinstance(o, Value)}
        return Runs(self._body(self.graph.top.root), self._stays, self.graph.jaxpr, asked)

    def run_scope(self, scope: Scope, env: Env, views: Views) -> list[Any]:
        """Runs a scope's body with its live inputs in ``env``; None for outputs that are not there."""
        self._frame(scope.root, env, views)
        return [read(env, o, missing_ok=True) for o in scope.outputs]

    def views_for(self, node: Node, scope: Scope, env: Env, views: Views) -> Views:
        """The views that actions inside a loop's body need, with indices known here applied."""
        return {need: self._resolve(need, node.frame, env, views) for need in self._scope_needs(scope)}

    def _frame(self, frame: Frame, env: Env, views: Views, runs: Runs | None = None) -> None:
        like = None if runs is None else compat.plain_call()
        body, at = self._body(frame), 0
        with EquationContexts() as contexts:
            while at < len(body):
                item = body[at]
                if runs is not None and (found := runs.at(item)) is not None:
                    contexts.leave()
                    run, jaxpr = found
                    if run.bind(jaxpr, like, env):
                        at += len(run.items)
                        continue
                contexts.enter(item.eqn)
                if isinstance(item, Frame):
                    self._call(item, env, views)
                else:
                    self._node(item, env, views)
                at += 1

    def _body(self, frame: Frame) -> list[Node | Frame]:
        """The equations of a body that are live."""
        nodes = self.live.nodes
        return [item for item in frame.items if (item in nodes if isinstance(item, Node) else self._is_alive(item))]

    def _stays(self, item: Node | Frame) -> bool:
        """Whether nothing is rewritten in an equation that is live."""
        if isinstance(item, Node):
            if item in self.actions:
                return False
            return self.live.changed.isdisjoint(item.children) and may_run(item.eqn)
        return (
            not self._actions_in(item)
            and item not in self._inlined
            and all(not isinstance(o, Value) or o in self.live.values for o in item.inputs)
            and may_run(item.eqn)
        )

    def _read_besides(self) -> list[Operand]:
        """What is read by others than the equations that read it in the program."""
        read_so: list[Operand] = []
        for action in self.actions.values():
            read_so += action.operands
            read_so += [ref.index for need in action.needs for ref in need.refs if isinstance(ref, IndexSlice)]
            read_so += [o for node in action.reached_by for o in (*node.inputs, *node.outputs)]
        left = [*self.graph.top.root.items]
        while left:
            item = left.pop()
            if isinstance(item, Frame) and not self._stays(item):
                read_so += item.inputs
                left += item.items
        return read_so

    def _node(self, node: Node, env: Env, views: Views) -> None:
        action = self.actions.get(node)
        if action is not None:
            context = Context(env, lambda need: self._resolve(need, node.frame, env, views), self._functions)
            with jax.named_scope(f"hire/{node.path}"):
                env.update(zip(node.outputs, action.emit(context), strict=True))
            return
        if node.children and any(child in self.live.changed for child in node.children):
            results = control.EMIT[node.primitive](self, node, env, views)
        else:
            results = compat.bind(node.eqn, [read(env, o) for o in node.inputs])
        env.update((v, r) for v, r in zip(node.outputs, results, strict=True) if r is not None)

    def _call(self, frame: Frame, env: Env, views: Views) -> None:
        needs = self._frame_needs(frame)
        operands = [read(env, o, missing_ok=True) for o in frame.inputs]
        if not self._actions_in(frame) and frame not in self._inlined and not any(o is None for o in operands):
            results = compat.bind(frame.eqn, operands)
        elif (
            frame in self._inlined or frame.kind == "call" or (frame.kind == "jit" and compat.jit_is_inlined(frame.eqn))
        ):
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
            return with_own_derivative(frame, body, operands, passed, seen)
        if frame.kind == "remat":
            params = frame.eqn.params
            run = jax.checkpoint(telling, prevent_cse=params["prevent_cse"], policy=params["policy"])
        else:
            key = self._call_key(frame, passed, needs, seen)
            if key not in self._shared:
                telling.__name__ = telling.__qualname__ = frame.eqn.params.get("name") or "call"
                self._shared[key] = jax.jit(constrained(frame, telling), inline=compat.jit_inlining(frame.eqn)), names
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
        inside = tuple((action.node.path[len(frame.path) :], action.key) for action in self._actions_in(frame))
        resolved = tuple(
            (len(need.refs), len(view.index), view.factor is None, need.key.form)
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
                    own = item.kind == "custom" and item not in self._inlined
                    found |= self._tells(item) if own else self._marks_inside(item)
                elif item in self.live.nodes:
                    found |= any(self._tells(child.root) for child in item.children)
            self._marking[frame] = found
        return self._marking[frame]

    def _tells(self, frame: Frame) -> bool:
        return any(action.marks for action in self._actions_in(frame))

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
            self._alive[frame] = bool(self._body(frame))
        return self._alive[frame]

    def _actions_in(self, frame: Frame) -> list[Action]:
        if frame not in self._inside:
            found: list[Action] = []
            for item in frame.items:
                if isinstance(item, Frame):
                    found += self._actions_in(item)
                elif item in self.live.nodes:
                    if item in self.actions:
                        found.append(self.actions[item])
                    for child in item.children:
                        found += self._actions_in(child.root)
            self._inside[frame] = found
        return self._inside[frame]

    def _frame_needs(self, frame: Frame) -> list[Need]:
        if frame not in self._needs:
            self._needs[frame] = [n for t in self._actions_in(frame) for n in t.needs]
        return self._needs[frame]

    def _scope_needs(self, scope: Scope) -> list[Need]:
        return self._frame_needs(scope.root)
