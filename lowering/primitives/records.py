"""Marks values in a program that are to be added up over all its executions; the base of calibration.

A mark names the totals its values belong to. ``hire_xform.call.folding`` evaluates a program and adds each marked value
to its total, through calls, loops and branches, in the entry of the matrix it belongs to where matrices are stacked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

__all__ = ["record", "record_p"]


def record(
    values: Mapping[str, jax.Array], path: str, stack: Sequence[int] = (), index: Sequence[jax.Array] = ()
) -> None:
    """Marks values to be added to the totals of a site.

    Args:
      values: what to add, by the name of the total.
      path: the site.
      stack: lengths of the stack axes that lead the totals.
      index: for each of them, an integer scalar: the entry that the values are added to.
    """
    names = tuple(values)
    known = [jnp.asarray(i, jnp.int32) for i in index]
    record_p.bind(*known, *(values[name] for name in names), path=path, names=names, stack=tuple(stack))


def _abstract(*avals: Any, path: str, names: tuple[str, ...], stack: tuple[int, ...]) -> list[Any]:
    if len(avals) != len(stack) + len(names):
        raise TypeError(f"record: {len(avals)} operands; expected {len(stack)} indices and {len(names)} values")
    return list(avals)


record_p = Primitive("hire_record")
record_p.multiple_results = True
record_p.def_impl(lambda *operands, path, names, stack: list(operands))
record_p.def_abstract_eval(_abstract)
