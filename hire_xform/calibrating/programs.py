"""A batch as a call of a traced function: its data, its weights, and the jitted program that is run on it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from hire_xform.api import Sparsified
from hire_xform.call.calls import abstract_call, call_leaves
from hire_xform.call.folding import Marks, Totals, fold
from hire_xform.call.signature import arguments_of
from hire_xform.call.stages import Traced
from hire_xform.passes.ir import compat
from hire_xform.passes.pack.packed import Packed
from hire_xform.passes.weights.recipe import Root


def taken_apart(step: Sparsified, number: int, batch: Any) -> tuple[Traced, list[Any], dict[Root, Any]]:
    """The trace of a batch, its data, and its weights by root.

    Raises:
      TypeError, ValueError: the batch is no tuple of arguments, or reaches no site; the message names its number.
    """
    named = isinstance(batch, dict) and not step.signature.misfit((), batch)
    if not isinstance(batch, (tuple, list)) and not named:
        raise TypeError(
            f"calibrate: batch {number} is a {type(batch).__name__}; expected a tuple of arguments, or a dictionary of "
            "arguments by name"
        )
    args, kwargs = arguments_of(batch)
    if any(isinstance(a, Packed) for a in (*args, *kwargs.values())):
        raise TypeError(f"calibrate: batch {number} has Packed weights; expected the plain ones")
    args, kwargs = step.signature.wrap_statics(args, kwargs)
    call = abstract_call(step.signature, args, kwargs)
    leaves = call_leaves(step.signature, args, kwargs)
    for leaf in leaves:
        if compat.is_tracer(leaf) or isinstance(leaf, (jax.ShapeDtypeStruct, jax.core.ShapedArray)):
            raise TypeError(f"calibrate: batch {number} holds a {type(leaf).__name__}; expected arrays")
    traced = step.traced(call)
    if not traced.plan.decisions:
        raise ValueError(f"calibrate: batch {number} reaches no site that could be calibrated.\n{traced.explain()}")
    plain = {r: leaf for r, leaf in zip(call.roots, leaves, strict=True) if r is not None}
    return traced, [leaf for r, leaf in zip(call.roots, leaves, strict=True) if r is None], plain


def program(traced: Traced, marks: Marks, results: bool = True) -> Callable:
    """The flat results and the totals of one batch as a jitted function of its data, weights and packed forms.

    Without ``results`` they are left out, and what only they are made of is not computed.
    """
    roots = [r for r in traced.call.roots if r is not None]
    keys = traced.needed_keys()

    def whole(data: list[Any], plain: list[Any], forms: list[Any]) -> Any:
        rest = iter(data)
        leaves = [None if root is not None else next(rest) for root in traced.call.roots]
        given = dict(zip(roots, plain, strict=True))
        return traced.evaluate(leaves, traced.supply({}, given, dict(zip(keys, forms, strict=True))))

    options = compat.few_temporaries() if jax.default_backend() == "cpu" else {}

    @functools.partial(jax.jit, compiler_options=options)
    def folded(*operands: Any) -> tuple[list[Any], Totals]:
        found, totals = fold(jax.make_jaxpr(whole)(*operands), jax.tree.leaves(operands), marks)
        return found if results else [], totals

    return folded
