"""Marks, in a program, whether a certified site ran its dense product; costs nothing where nobody reads it.

The mark is an identity on a bool, without effect. ``hire_xform.counting`` evaluates a program and adds up its marks; in
any other evaluation nothing uses the result, and the compiler drops it.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ["fallback_p", "mark_fallback"]


def mark_fallback(fallback: jax.Array, path: str) -> jax.Array:
    """``fallback`` itself, marked as the one of the site at ``path``."""
    return fallback_p.bind(fallback, path=path)


def _batch(args: Sequence[jax.Array], dims: Sequence[Any], *, path: str) -> tuple[Any, Any]:
    return fallback_p.bind(args[0], path=path), dims[0]


def _jvp(primals: Sequence[jax.Array], tangents: Sequence[Any], *, path: str) -> tuple[Any, Any]:
    return fallback_p.bind(primals[0], path=path), ad.Zero(ShapedArray(primals[0].shape, jax.dtypes.float0))


fallback_p = Primitive("hire_fallback")
fallback_p.def_impl(lambda fallback, *, path: fallback)
fallback_p.def_abstract_eval(lambda fallback, *, path: fallback)
batching.primitive_batchers[fallback_p] = _batch
ad.primitive_jvps[fallback_p] = _jvp
mlir.register_lowering(fallback_p, lambda ctx, fallback, *, path: [fallback])
