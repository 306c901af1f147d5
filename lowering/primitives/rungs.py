"""Marks, in a program, which of its compiled sizes (its rungs) a certified site took; costs nothing where unread.

Of a block that is not certified it is marked whether it was short of units, as a dense run is marked of one that is.

The mark is an identity on a number, without effect. ``hire_xform.call.counting`` evaluates a program and adds up its
marks; in any other evaluation nothing uses the result, and the compiler drops it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ["mark_rung", "rung_p"]


def mark_rung(rung: jax.Array, path: str, rungs: int) -> jax.Array:
    """``rung`` itself, marked as the one that the site at ``path`` took.

    Args:
      rung: int32, the number of the size that was computed, or ``rungs`` for the dense form; where there is one size a
        bool says whether the dense form was run, or, of a block that is not certified, whether it was short.
      path: the site's.
      rungs: how many sizes the site has.
    """
    return rung_p.bind(jnp.asarray(rung, jnp.int32), path=path, rungs=rungs)


def _batch(args: Sequence[jax.Array], dims: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    return rung_p.bind(args[0], **params), dims[0]


def _jvp(primals: Sequence[jax.Array], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    return rung_p.bind(primals[0], **params), ad.Zero(ShapedArray(primals[0].shape, jax.dtypes.float0))


rung_p = Primitive("hire_rung")
rung_p.def_impl(lambda rung, *, path, rungs: rung)
rung_p.def_abstract_eval(lambda rung, *, path, rungs: rung)
batching.primitive_batchers[rung_p] = _batch
ad.primitive_jvps[rung_p] = _jvp
mlir.register_lowering(rung_p, lambda ctx, rung, *, path, rungs: [rung])
