"""Rows looked up by id where a cyclic distribution over devices has put them: of an embedding that is the head too."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.graph import Node, Operand
from hire_xform.passes.plan.decisions import Decision, Need
from hire_xform.passes.rewrite.action import Action, Context
from hire_xform.passes.weights.lookups import Lookup
from hire_xform.passes.weights.recipe import Cyclic, Recipe


@dataclass(frozen=True, eq=False, repr=False)
class CyclicLookup(Action):
    """A lookup in rows that are packed in cyclic distribution. What is out of range stays out of range.

    Attributes:
      lookup: the lookup.
      rows: the packed rows.
      parts: over how many devices they are distributed.
    """

    lookup: Lookup
    rows: Need
    parts: int

    @property
    def node(self) -> Node:
        """The lookup."""
        return self.lookup.node

    @property
    def key(self) -> Hashable:
        """Of its equation and the distribution."""
        return "lookup", self.parts

    @property
    def needs(self) -> tuple[Need, ...]:
        """The packed rows."""
        return (self.rows,)

    @property
    def operands(self) -> Sequence[Operand]:
        """All but the weight."""
        return self.node.inputs[1:]

    def emit(self, context: Context) -> Sequence[Any]:
        """The rows of the ids."""
        return [self.found(context.view(self.rows).whole(), [context.read(o) for o in self.operands])]

    def found(self, rows: Any, operands: Sequence[Any]) -> Any:
        """Of packed rows those that the operands ask for, where these lie."""
        ids, *others = operands
        vocab, parts = rows.shape[0], self.parts
        if self.node.primitive is prims.dynamic_slice_p:
            ids = jnp.clip(ids, 0, vocab - 1)
        places = (ids % parts) * (vocab // parts) + ids // parts
        places = jnp.where((ids >= 0) & (ids < vocab), places, ids).astype(ids.dtype)
        (found,) = compat.bind(self.node.eqn, [rows, places, *others])
        return found.astype(self.node.outputs[0].aval.dtype)


def cyclic_lookups(lookups: Iterable[Lookup], decisions: Iterable[Decision]) -> list[CyclicLookup]:
    """Those of weights whose rows some decisions have in cyclic distribution."""
    cyclic: dict[Recipe, tuple[Need, int]] = {}
    for decision in decisions:
        if not decision.cyclic:
            continue
        rows = decision.forms.head.rows
        key = rows.key
        parts = [step.parts for step in key.recipe.steps if isinstance(step, Cyclic)]
        if not rows.refs:
            before = tuple(step for step in key.recipe.steps if not isinstance(step, Cyclic))
            cyclic[Recipe(key.recipe.root, before)] = Need(key, ()), parts[0]
    return [
        CyclicLookup(one, need, parts)
        for one in lookups
        for need, parts in [cyclic.get(one.origin.recipe.as_stored, (None, 0))]
        if need is not None and not _fills_widened(one)
    ]


def _fills_widened(lookup: Lookup) -> bool:
    """True for a lookup that puts a number of its own for ids out of range, which narrower rows may not have."""
    recipe = lookup.origin.recipe
    return recipe != recipe.as_stored and lookup.node.params.get("fill_value") is not None
