"""Evaluates a program and adds up which of its sizes each certified site in it took, and where blocks were short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_xform.folding import Marks, Totals, fold
from hire_xform.lowering import rung_p

# Times that each site took each of its sizes, and last its dense form, int32 ``[rungs + 1]``, by the site's path.
Counts = dict[str, jax.Array]


def count_rungs(jaxpr: Any, operands: Sequence[Any]) -> tuple[list[Any], Counts]:
    """Evaluates a closed jaxpr; works under a trace. Calls, loops and branches are entered.

    Returns:
      The program's results, and for each certified site how often it took each of its sizes, and last its dense form;
      for a block that tells whether it was short how often it was not, and how often it was.
    """
    return fold(jaxpr, operands, _RUNGS)


def _shapes(eqn: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {eqn.params["path"]: jax.ShapeDtypeStruct((eqn.params["rungs"] + 1,), jnp.int32)}


def _add(eqn: Any, given: Sequence[Any], totals: Totals) -> Totals:
    path = eqn.params["path"]
    taken = given[0].reshape(-1, 1) == jnp.arange(eqn.params["rungs"] + 1)
    return {**totals, path: totals[path] + jnp.sum(taken, axis=0, dtype=jnp.int32)}


_RUNGS = Marks(rung_p, _shapes, _add, True)
