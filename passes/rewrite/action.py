"""What is done at an equation in its place: the protocol, and what an action is given where it is emitted."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax

from hire_xform.lowering.primitives.rungs import mark_rung
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.equation_contexts import equation_context
from hire_xform.passes.ir.graph import Node, Operand
from hire_xform.passes.plan.decisions import Need
from hire_xform.passes.rewrite.environment import TOLD, Env, PackedView, read


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


@dataclass(frozen=True, eq=False)
class Context:
    """Where an action is emitted.

    Attributes:
      env: the values that are there.
      view: of a packed form that is needed, what is known of it there.
      functions: those made so far, by what they are equal by.
    """

    env: Env
    view: Callable[[Need], PackedView]
    functions: dict[Hashable, Callable[..., Any]]

    def read(self, operand: Operand) -> Any:
        """The value of an operand."""
        return read(self.env, operand)

    def views(self, forms: Any) -> Any:
        """Of a tree of needs that of views."""
        return jax.tree.map(self.view, forms)

    def shared(self, key: Hashable, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """A jitted function, made once for a key: it is traced and lowered once."""
        if key not in self.functions:
            self.functions[key] = jax.jit(make())
        return self.functions[key]

    def with_results(self, nodes: Sequence[Node], operand: Callable[[Operand], Operand]) -> Context:
        """With the results of equations further on, which are evaluated here too.

        Args:
          nodes: the equations, in order.
          operand: what to read for an operand of theirs.
        """
        local = dict(self.env)
        for node in nodes:
            if node.outputs[0] not in local:
                operands = [read(local, operand(o)) for o in node.inputs]
                with equation_context(node.eqn):
                    local.update(zip(node.outputs, compat.bind(node.eqn, operands), strict=True))
        return replace(self, env=local)

    def tell(self, rung: Any, path: str, rungs: int) -> None:
        """Marks what a site says of this call of it."""
        tell(self.env, Told(rung, path, rungs))


class Action(Protocol):
    """What is done in the place of one equation, or in that of several that end in it.

    Attributes:
      node: the equation whose results are replaced.
    """

    @property
    def node(self) -> Node: ...  # noqa: D102

    @property
    def key(self) -> Hashable:
        """Equal for two that emit the same where they are given alike: the one thing that "rewritten alike" means."""

    @property
    def operands(self) -> Sequence[Operand]:
        """The values of the program that it reads."""

    def emit(self, context: Context) -> Sequence[Any]:
        """The results of the equation, under a trace."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """The packed forms that it reads."""
        return ()

    @property
    def nodes(self) -> Sequence[Node]:
        """The equations that have to be in one body for it: calls whose boundary comes between them are opened."""
        return (self.node,)

    @property
    def reached_by(self) -> Sequence[Node]:
        """Equations further on that it reads values of: calls around it that end before are opened."""
        return ()

    @property
    def marks(self) -> int:
        """How many outcomes a call of it tells besides the worst; 0 where it tells none."""
        return 0
