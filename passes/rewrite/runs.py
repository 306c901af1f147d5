"""Stretches of a program in which nothing is rewritten, taken over as JAX traced them.

Types, name stacks, contexts and the user's lines are those of the original program, and nothing is computed again that
JAX had computed: to bind equations one by one takes several times as long. A run is bound as one call of its equations.
Runs that are alike, as those between like layers are, call one function, which is lowered once; in the place of the
call of one that is like no other its equations are put, once the program is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.graph import Frame, Node, Operand, Value, nodes_in
from hire_xform.passes.rewrite.environment import Env, read

Item = Node | Frame

# Fewer equations are bound one by one; and so are those that are like no others, where these are not so many in all.
FEWEST, FEWEST_ALONE = 16, 256
# A run is looked for among so many kinds of the same length, the latest: layers take turns at most.
_KINDS = 3


def may_run(eqn: Any) -> bool:
    """Whether an equation may be part of a run: it has no effect, and what it reads and makes are arrays."""
    for atoms in (eqn.invars, eqn.outvars):
        for atom in atoms:
            if not isinstance(atom.aval, jax.core.ShapedArray):
                return False
    return not eqn.effects


@dataclass(frozen=True, eq=False)
class Run:
    """A run.

    Attributes:
      items: its equations.
      reads: the variables that it reads and does not make, and what they are.
      exports: those that it makes and others read.
      jaxpr: what is called.
    """

    items: Sequence[Item]
    reads: dict[Any, Operand]
    exports: dict[Any, Value]
    jaxpr: Any

    @classmethod
    def of(cls, items: Sequence[Item], base: Any, asked: set[Value]) -> Run:
        """The run of some equations; see ``Runs``."""
        reads: dict[Any, Operand] = {}
        made: dict[Any, Operand] = {}
        inside: set[Node] = set()
        for item in items:
            for atom, operand in zip(item.eqn.invars, item.inputs, strict=True):
                if not isinstance(atom, compat.Literal) and atom not in made and atom not in reads:
                    reads[atom] = operand
            made.update(zip(item.eqn.outvars, item.outputs, strict=True))
            inside.update([item] if isinstance(item, Node) else nodes_in(item))
        exports: dict[Any, Value] = {}
        for var, value in made.items():
            if isinstance(value, Value) and (
                value.is_output or value in asked or not inside.issuperset(value.consumers)
            ):
                exports[var] = value
        eqns = [item.eqn for item in items]
        fields = {"constvars": [], "invars": [*reads], "outvars": [*exports], "eqns": eqns, "effects": frozenset()}
        return cls(items, reads, exports, compat.replaced(base, **fields))

    def bind(self, jaxpr: Any, like: Any, env: Env) -> bool:
        """Binds it as a call of a jaxpr that is like its own, and puts what others read of it into ``env``.

        Returns:
          Whether that was done: what it reads is of the types that it was traced for.
        """
        given = [read(env, operand) for operand in self.reads.values()]
        if any(jax.typeof(value) != var.aval for var, value in zip(self.reads, given, strict=True)):
            return False
        env.update(zip(self.exports.values(), compat.bind_call(like, jaxpr, "unchanged", given), strict=True))
        return True

    def is_alike(self, other: Run) -> bool:
        """Whether its equations are those of another, of the same lines and in the same scopes, but for variables."""
        sizes = [(len(run.items), len(run.reads), len(run.exports)) for run in (self, other)]
        if sizes[0] != sizes[1] or any(a.aval != b.aval for a, b in zip(self.reads, other.reads, strict=True)):
            return False
        same: dict[Any, Any] = dict(zip(self.reads, other.reads, strict=True))
        for mine, theirs in zip(self.items, other.items, strict=True):
            eqn, also = mine.eqn, theirs.eqn
            if eqn.primitive is not also.primitive or len(eqn.invars) != len(also.invars):
                return False
            for one, another in zip(eqn.invars, also.invars, strict=True):
                if isinstance(one, compat.Literal):
                    if not isinstance(another, compat.Literal) or not _same_number(one, another):
                        return False
                elif same[one] is not another:
                    return False
            if not _stands_alike(eqn, also):
                return False
            same.update(zip(eqn.outvars, also.outvars, strict=True))
        return [same[var] for var in self.exports] == [*other.exports]


def _same_number(one: Any, other: Any) -> bool:
    """Whether two literals are the same; of arrays only one array is."""
    if one.val is other.val:
        return True
    return not getattr(one.val, "ndim", 0) and one.aval == other.aval and bool(one.val == other.val)


def _stands_alike(one: Any, other: Any) -> bool:
    """Whether two equations of one primitive have the same parameters, context, scopes and lines."""
    if getattr(one, "ctx", None) is not getattr(other, "ctx", None):
        return False
    info, also = one.source_info, other.source_info
    if info is not also and (info.traceback != also.traceback or info.name_stack != also.name_stack):
        return False
    try:
        return bool(one.params == other.params)
    except ValueError:  # arrays among them
        return False


class Runs:
    """The runs of a program's own body.

    Args:
      body: its equations, those that are not live left out.
      stays: whether an equation stays as it is.
      base: the program.
      asked: values that are read by other than the equations that read them in the program.
    """

    def __init__(self, body: Sequence[Item], stays: Callable[[Item], bool], base: Any, asked: set[Value]) -> None:
        """Finds them, and which are alike."""
        # By the first equation of each; of those that are alike all call the jaxpr of the first.
        self._runs: dict[Item, Run] = {}
        self._called: dict[Item, Any] = {}
        alike: dict[int, list[list[Run]]] = {}
        for items in _stretches(body, stays):
            run = Run.of(items, base, asked)
            groups = alike.setdefault(len(items), [])
            group = next((group for group in groups[-_KINDS:] if group[0].is_alike(run)), None)
            if group is None:
                groups.append(group := [])
            group.append(run)
        found = [group for groups in alike.values() for group in groups]
        alone = [group[0] for group in found if len(group) == 1]
        if sum(len(run.items) for run in alone) < FEWEST_ALONE:
            found, alone = [group for group in found if len(group) > 1], []
        for group in found:
            for run in group:
                self._runs[run.items[0]], self._called[run.items[0]] = run, group[0].jaxpr
        self._alone = {id(run.jaxpr): run.jaxpr for run in alone}

    def at(self, item: Item) -> tuple[Run, Any] | None:
        """The run that begins with an equation, and what it calls."""
        run = self._runs.get(item)
        return None if run is None else (run, self._called[item])

    @property
    def any_alone(self) -> bool:
        """Whether any is to be put in the place of its call."""
        return bool(self._alone)

    def inlined(self, jaxpr: Any) -> Any:
        """A closed jaxpr with runs that are like no other in the place of their calls."""
        inner, _ = compat.close(jaxpr)
        renamed: dict[Any, Any] = {}

        def now(atoms: Sequence[Any]) -> list[Any]:
            return [a if isinstance(a, compat.Literal) else renamed.get(a, a) for a in atoms]

        eqns: list[Any] = []
        for eqn in inner.eqns:
            found, _ = compat.close(self._alone.get(id(eqn.params.get("jaxpr")), inner))
            own = [eqn] if found is inner else found.eqns
            if found is not inner:
                renamed.update(zip(found.invars, now(eqn.invars), strict=True))
            for one in own:
                for atom in one.invars:
                    if not isinstance(atom, compat.Literal) and atom in renamed:
                        one = one.replace(invars=now(one.invars))
                        break
                eqns.append(one)
            if found is not inner:
                renamed.update(zip(eqn.outvars, now(found.outvars), strict=True))
        return compat.replaced(jaxpr, outvars=now(inner.outvars), eqns=eqns)


def _stretches(body: Sequence[Item], stays: Callable[[Item], bool]) -> list[list[Item]]:
    found: list[list[Item]] = [[]]
    for item in body:
        if stays(item):
            found[-1].append(item)
        elif found[-1]:
            found.append([])
    return [items for items in found if len(items) >= FEWEST]
