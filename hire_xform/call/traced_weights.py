"""Plain weights that are traced: packing them stands in the trace, to be looked at, but not to be lowered or run.

``jax.eval_shape`` and ``jax.make_jaxpr`` read nothing, so there they are fine; a program that is lowered would read
every weight at every call. The two are traced alike, so what tells them apart is a mark that has no lowering.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from hire_xform.call.stages import Traced
from hire_xform.errors import TracedWeightsError
from hire_xform.passes.pack.make import pack_array
from hire_xform.passes.plan.decisions import PackKey
from hire_xform.passes.weights.recipe import Root

__all__ = ["pack_traced", "traced_weights_p"]


def pack_traced(owner: str, keys: Sequence[PackKey], plain: dict[Root, Any], traced: Traced) -> dict[PackKey, Any]:
    """Packed forms of weights that are tracers, for shapes only.

    Args:
      owner: what was called, for the message.
      keys: of these weights.
      plain: the weights.
      traced: names them.

    Raises:
      TracedWeightsError: they can't be packed where they are traced.
    """
    marked: dict[Root, Any] = {}
    made = {}
    for key in keys:
        name = traced.name(key.recipe.root)
        for root in key.recipe.roots:
            if root not in marked:
                marked[root] = traced_weights_p.bind(plain[root], step=owner, weight=traced.name(root))
        try:
            made[key] = pack_array(key, *(marked[root] for root in key.recipe.roots))
        except Exception as error:  # a packer is written for arrays: some traces have what it does not take
            raise _error(owner, name) from error
    return made


def _error(step: str, weight: str) -> TracedWeightsError:
    return TracedWeightsError(
        f"{step} was called under a trace with plain weights: {weight} is a tracer, and packing it inside the trace "
        "would read every weight at every call. Pack once outside, packed = step.trace(...).pack(weights), and pass "
        "that in its place"
    )


def _refuse(*_: Any, step: str, weight: str) -> Any:
    raise _error(step, weight)


def _batch(args: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    return traced_weights_p.bind(args[0], **params), dims[0]


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    return traced_weights_p.bind(primals[0], **params), tangents[0]


traced_weights_p = Primitive("hire_traced_weights")
traced_weights_p.def_impl(_refuse)
traced_weights_p.def_abstract_eval(lambda aval, **_: aval)
batching.primitive_batchers[traced_weights_p] = _batch
ad.primitive_jvps[traced_weights_p] = _jvp
mlir.register_lowering(traced_weights_p, _refuse)
