"""Runtime values while the rewritten program is evaluated: an environment, and views of packed arrays."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hire_xform.lowering.predict.predictors import Predictor
from hire_xform.lowering.primitives.stack_entry import StackEntry
from hire_xform.passes.ir.graph import Operand, Value
from hire_xform.passes.plan.decisions import Need
from hire_xform.passes.weights.recipe import Recipe, Stack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedView:
    """A packed form and the stack indices known so far.

    Attributes:
      arrays: an array, or a predictor's dictionary of arrays, each led by the stack axes.
      index: one int32 scalar for each resolved stack axis, outermost first; all are in range.
      factor: what products with this matrix are multiplied by, when it may have been indexed out of range by an
        indexing that fills with NaN: one, or NaN. None where none did.
      recipe: of a leaf as it is, how the matrix is made of it; None for packed forms.
    """

    arrays: Any
    index: tuple[Any, ...] = ()
    factor: Any = None
    recipe: Recipe | None = dataclasses.field(default=None, metadata={"static": True})

    def at(self, index: Any, fills: bool = False) -> PackedView:
        """The view with one more stack axis resolved.

        Args:
          index: the index, a scalar. Out of range, the nearest slice is taken, as a dynamic slice does.
          fills: out of range, the matrix is NaN instead.
        """
        number = len(self.index)
        if self.recipe is None:
            size = jax.tree.leaves(self.arrays)[0].shape[number]
        else:
            size = [step.size for step in self.recipe.steps if isinstance(step, Stack)][number]
        factor = self.factor
        if fills:
            known = jnp.where((index >= 0) & (index < size), jnp.float32(1), jnp.float32(jnp.nan))
            factor = known if factor is None else factor * known
        inside = jnp.clip(index, 0, size - 1).astype(jnp.int32)
        return dataclasses.replace(self, index=(*self.index, inside), factor=factor)

    def filled(self, value: Any) -> Any:
        """A product with this matrix, or an operand of one, made NaN where the matrix is."""
        return value if self.factor is None else value * self.factor.astype(value.dtype)

    def whole(self) -> Any:
        """The packed form of the one matrix."""

        return jax.tree.map(lambda array: StackEntry(array, self.index).whole(), self.arrays)

    def for_predictor(self, spec: Predictor) -> Any:
        """As :meth:`whole`, but for the matrices that a predictor's steps read where they lie in the stack."""
        if not self.index:
            return self.arrays
        entries = {name: StackEntry(array, self.index) for name, array in self.arrays.items()}
        return {name: entry if name in spec.in_place else entry.whole() for name, entry in entries.items()}

    def matrix(self) -> Any:
        """The weight as the program's own product takes it, made of its leaf."""
        assert self.recipe is not None
        return self.recipe.one(self.arrays, self.index)

    def rows(self) -> tuple[Any, Any]:
        """The whole stack's rows as one matrix, and the number of this matrix's first row in it.

        Reading some rows of one layer through this copies nothing, where slicing the layer out first would copy all.
        """
        return StackEntry(self.arrays, self.index).laid_out() if self.index else (self.arrays, 0)


Env = dict[Value, Any]
# Where an environment, that of a call which like ones share, holds the list of what its sites tell.
TOLD: Any = "told"
Views = dict[Need, PackedView]


def read(env: Env, operand: Operand, missing_ok: bool = False) -> Any:
    """The runtime value of an operand; None (or an error) when it is not there.

    Raises:
      AssertionError: it is not there and ``missing_ok`` is False: liveness and evaluation disagree, a defect here.
    """
    if not isinstance(operand, Value):
        return operand.val
    # The environment first: inside a call that others share, a closed-over array is that call's operand.
    if operand in env:
        return env[operand]
    if operand.const is not None:
        return operand.const
    if missing_ok:
        return None
    where = operand.node.path if operand.node is not None else "an input"
    raise AssertionError(f"the rewritten program reads {where}, which was dropped; please report this program")
