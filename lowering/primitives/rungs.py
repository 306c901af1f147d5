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
    """The number itself, marked as the one that the site at ``path`` took.

    Args:
      rung: int32, the number of the size that was computed, or ``rungs`` for the dense form; where there is one size a
        bool says whether the dense form was run, or, of a block that is not certified, whether it was short. Of a
        predictor in stages int32 ``[stages]``: that number, and how many rows each stage after the first has read.
      path: the site's.
      rungs: how many sizes the site has.
    """
    number, *rows = jnp.asarray(rung, jnp.int32) if jnp.ndim(rung) else (jnp.asarray(rung, jnp.int32),)
    return rung_p.bind(*rows, number, path=path, rungs=rungs)


def _batch(args: Sequence[jax.Array], dims: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    return rung_p.bind(*args, **params), dims[-1]


def _jvp(primals: Sequence[jax.Array], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    return rung_p.bind(*primals, **params), ad.Zero(ShapedArray(primals[-1].shape, jax.dtypes.float0))


rung_p = Primitive("hire_rung")
# The operands are what each further stage has read, and the number, which is the result.
rung_p.def_impl(lambda *given, path, rungs: given[-1])
rung_p.def_abstract_eval(lambda *given, path, rungs: given[-1])
batching.primitive_batchers[rung_p] = _batch
ad.primitive_jvps[rung_p] = _jvp
mlir.register_lowering(rung_p, lambda ctx, *given, path, rungs: [given[-1]])
