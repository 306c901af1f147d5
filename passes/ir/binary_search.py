"""Equations of ``jnp.searchsorted``, known by what the installed JAX makes of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat


@dataclass(frozen=True)
class SearchParts:
    """An equation of ``jnp.searchsorted``'s binary search taken apart.

    Attributes:
      right: whether entries that are equal to what is sought come before its place.
      batched: whether its operands have a leading axis of searches that are independent.
      result: which of its results is the place, as a number of any kind.
      state: what its other operands have to be.
    """

    right: bool
    batched: bool
    result: int
    state: tuple[int, ...]


def search_parts(eqn: compat.Eqn) -> SearchParts | None:
    """Whether an equation is ``jnp.searchsorted``'s: the one that JAX makes for such operands.

    Up to 0.11 it is a loop whose body is known by its equations; from 0.12 it is an equation of its own.
    """
    if eqn.primitive is not prims.scan_p and not _is_a_search_of_its_own(eqn):
        return None
    if len(eqn.invars) not in (2, 4):
        return None
    entries, sought = (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars[:2])  # type: ignore[attr-defined]
    if entries.dtype != sought.dtype or entries.dtype.kind not in "fV":
        return None
    written = _told_params(eqn)
    for batched in (False, True):
        if entries.ndim == 1 + batched and sought.shape[:batched] == entries.shape[:batched]:
            for right in (False, True):
                if written == _search_written(entries.shape, sought.shape, entries.dtype.name, right, batched):
                    loop = eqn.primitive is prims.scan_p
                    return SearchParts(right, batched, int(loop), (0, entries.shape[-1]) if loop else ())
    return None


def _told_params(eqn: compat.Eqn) -> str:
    return str(sorted((name, str(value)) for name, value in eqn.params.items()))


@functools.cache
def _search_written(entries: Any, sought: Any, dtype: str, right: bool, batched: bool) -> str:
    return _told_params(_search_eqn(entries, sought, dtype, right, batched))


def _search_eqn(entries: Any, sought: Any, dtype: str, right: bool, batched: bool) -> compat.Eqn:
    def search(entries: Any, sought: Any) -> Any:
        return jnp.searchsorted(entries, sought, side="right" if right else "left")

    given = (jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in (entries, sought))
    jaxpr = jax.make_jaxpr(jax.vmap(search) if batched else search)(*given)
    while True:
        found = [eqn for eqn in jaxpr.eqns if len(eqn.invars) > 1]
        if found[-1].primitive not in compat.CALL_PRIMITIVES:
            return found[-1]
        jaxpr = compat.close(compat.call_jaxpr(found[-1]))[0]


@functools.cache
def _search_kind() -> Any:
    eqn = _search_eqn((2,), (), "float32", False, False)
    return None if eqn.primitive is prims.scan_p else type(eqn.params["_prim"])


def _is_a_search_of_its_own(eqn: compat.Eqn) -> bool:
    own = eqn.params.get("_prim")
    return own is not None and type(own) is _search_kind()
