"""Evaluates a program and adds up which of its sizes each certified site in it took, and where blocks were short."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hire_xform.call.folding import Marks, Totals, fold
from hire_xform.lowering.primitives.rungs import rung_p

# Of each site by its path, int32: rows that each further stage of its predictor has read, times that it took each of
# its sizes, and last its dense form.
Counts = dict[str, jax.Array]


def count_rungs(jaxpr: Any, operands: Sequence[Any]) -> tuple[list[Any], Counts]:
    """Evaluates a closed jaxpr; works under a trace. Calls, loops and branches are entered.

    Returns:
      The program's results, and for each certified site how many rows each further stage of its predictor has read,
      how often it took each of its sizes, and last its dense form; for a block that tells whether it was short how
      often it was not, and how often it was.
    """
    return fold(jaxpr, operands, _RUNGS)


def count_last(
    jaxpr: Any, operands: Sequence[Any], sites: Collection[str]
) -> tuple[list[Any], dict[str, tuple[jax.Array, jax.Array]]]:
    """As ``count_rungs``, of the sites at some paths: how often each was executed, and how often it ran its last size.

    Two int32 scalars each, made of few operations: this is part of what a step's first calls trace and compile. A
    program that stands in this one and has a site of another kind at such a path is left alone.
    """

    def names(eqn: Any) -> tuple[Any, Any]:
        key = eqn.params["path"], eqn.params["rungs"]
        return (*key, "executed"), (*key, "last")

    def shapes(eqn: Any) -> dict[Any, jax.ShapeDtypeStruct]:
        return dict.fromkeys(names(eqn), jax.ShapeDtypeStruct((), jnp.int32)) if eqn.params["path"] in sites else {}

    def add(eqn: Any, given: Sequence[Any], totals: Totals) -> Totals:
        executed, last = names(eqn)
        if last not in totals:
            return totals
        rung = given[-1]
        found = lax.convert_element_type(lax.eq(rung, lax.full_like(rung, eqn.params["rungs"])), jnp.int32)
        found = found if rung.ndim == 0 else jnp.sum(found, dtype=jnp.int32)
        return {**totals, executed: totals[executed] + np.int32(rung.size), last: totals[last] + found}

    results, totals = fold(jaxpr, operands, Marks(rung_p, shapes, add, True))
    kinds = [key for *key, what in totals if what == "last"]
    return results, {path: (totals[path, rungs, "executed"], totals[path, rungs, "last"]) for path, rungs in kinds}


def _shapes(eqn: Any) -> dict[str, jax.ShapeDtypeStruct]:
    counted = len(eqn.invars) + eqn.params["rungs"]
    return {eqn.params["path"]: jax.ShapeDtypeStruct((counted,), jnp.int32)}


def _add(eqn: Any, given: Sequence[Any], totals: Totals) -> Totals:
    path, (*rows, rung) = eqn.params["path"], given
    taken = rung.reshape(-1, 1) == jnp.arange(eqn.params["rungs"] + 1)
    counts = jnp.sum(taken, axis=0, dtype=jnp.int32)
    read = jnp.asarray([jnp.sum(count) for count in rows], jnp.int32)
    return {**totals, path: totals[path] + jnp.concatenate([read, counts])}


_RUNGS = Marks(rung_p, _shapes, _add, True)
