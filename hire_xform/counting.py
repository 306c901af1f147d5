"""Evaluates a program and adds up how often each certified site in it ran its dense product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_xform.folding import Marks, Totals, fold
from hire_xform.lowering import fallback_p

# Times that each site ran its dense product, int32, by the site's path.
Counts = dict[str, jax.Array]


def count_fallbacks(jaxpr: Any, operands: Sequence[Any]) -> tuple[list[Any], Counts]:
    """Evaluates a closed jaxpr; works under a trace. Calls, loops and branches are entered.

    Returns:
      The program's results, and for each certified site how often it fell back.
    """
    return fold(jaxpr, operands, _FALLBACKS)


def _add(eqn: Any, given: Sequence[Any], totals: Totals) -> Totals:
    path = eqn.params["path"]
    return {**totals, path: totals[path] + jnp.sum(given[0]).astype(jnp.int32)}


_FALLBACKS = Marks(fallback_p, lambda eqn: {eqn.params["path"]: jax.ShapeDtypeStruct((), jnp.int32)}, _add, True)
