"""Two ways of reading a jaxpr that know nothing of `hire_xform`: evaluating it, and finding its weight products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.extend.core import primitives as prims

from hire_xform.passes.ir import compat  # what differs between JAX versions, and nothing else of the library


def evaluate(closed: Any, operands: Sequence[Any]) -> list[Any]:
    """Runs a jaxpr equation by equation, loops in Python: each primitive is compiled once for all programs."""
    jaxpr, consts = compat.close(closed)
    return _evaluate(jaxpr, consts, operands)


def _evaluate(jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *operands), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        results = _equation(eqn, [read(a) for a in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(a) for a in jaxpr.outvars]


def _equation(eqn: Any, operands: list[Any]) -> list[Any]:
    if eqn.primitive in compat.CALL_PRIMITIVES:
        return evaluate(compat.call_jaxpr(eqn), operands)
    if eqn.primitive is prims.scan_p:
        return _scan(eqn, operands)
    if eqn.primitive is prims.while_p:
        loop = compat.while_parts(eqn)
        first, second = loop.cond_nconsts, loop.cond_nconsts + loop.body_nconsts
        state = operands[second:]
        while jnp.any(going := evaluate(loop.cond_jaxpr, [*operands[:first], *state])[0]):
            after = evaluate(loop.body_jaxpr, [*operands[first:second], *state])
            # One that was batched by its condition has one for each element: those that are done wait.
            state = _chosen(going, after, state) if jnp.ndim(going) else after
        return state
    if eqn.primitive is prims.cond_p:
        branches = eqn.params["branches"]
        return evaluate(branches[min(max(int(operands[0]), 0), len(branches) - 1)], operands[1:])
    return compat.bind(eqn, operands)


def _chosen(mask: Any, ones: list[Any], others: list[Any]) -> list[Any]:
    shapes = [mask.shape + (1,) * (jnp.ndim(one) - mask.ndim) for one in ones]
    return [jnp.where(mask.reshape(s), a, b) for s, a, b in zip(shapes, ones, others, strict=True)]


def _scan(eqn: Any, operands: list[Any]) -> list[Any]:
    scan = compat.scan_parts(eqn)
    if not scan.length:
        return compat.bind(eqn, operands)
    first, second = scan.num_consts, scan.num_consts + scan.num_carry
    carry, found = operands[first:second], []
    order = range(scan.length)
    for i in reversed(order) if scan.reverse else order:
        results = evaluate(scan.jaxpr, [*operands[:first], *carry, *(xs[i] for xs in operands[second:])])
        carry = results[: scan.num_carry]
        found.append(results[scan.num_carry :])
    if scan.reverse:
        found.reverse()
    return [*carry, *(jnp.stack(ys) for ys in zip(*found, strict=True))]


def count_weight_products(closed: Any, weights: Sequence[bool]) -> int:
    """How many products of a program have a matrix of weights, or a matrix made of weights alone, as an operand.

    A body is counted once for each place where it is called; all products in the condition of a while as one, and so
    those in a custom derivative that hands an operand through. A matrix has two axes longer than one.

    Args:
      closed: the jaxpr.
      weights: for each of its operands, whether it is a weight; all others are data. Constants are weights.
    """
    count, _ = _count(closed, ["weight" if w else "data" for w in weights])
    return count


def _count(closed: Any, given: Sequence[str]) -> tuple[int, list[str]]:
    """The products of a jaxpr whose operands are "weight", "data" or "", and what its results are."""
    jaxpr, consts = compat.close(closed)
    env: dict[Any, str] = dict(zip(jaxpr.invars, given, strict=True))
    env.update((v, "weight" if np.ndim(c) else "") for v, c in zip(jaxpr.constvars, consts, strict=True))
    count = 0

    def read(atom: Any) -> str:
        return ("weight" if np.ndim(atom.val) else "") if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        here = [read(a) for a in eqn.invars]
        found, results = _inside(eqn, here)
        count += found
        env.update(zip(eqn.outvars, results, strict=True))
    return count, [read(a) for a in jaxpr.outvars]


def _inside(eqn: Any, here: list[str]) -> tuple[int, list[str]]:
    if eqn.primitive in compat.CALL_PRIMITIVES:
        count, results = _count(compat.call_jaxpr(eqn), here)
        custom = eqn.primitive in (prims.custom_jvp_call_p, prims.custom_vjp_call_p)
        return (min(count, 1) if custom and any(_passed(eqn)) else count), results
    if eqn.primitive is prims.cond_p:
        each = [_count(branch, here[1:]) for branch in eqn.params["branches"]]
        return sum(count for count, _ in each), [_meet(kinds) for kinds in zip(*(r for _, r in each), strict=True)]
    if eqn.primitive is prims.scan_p:
        scan = compat.scan_parts(eqn)
        carry = slice(scan.num_consts, scan.num_consts + scan.num_carry)
        return _looped(scan.jaxpr, here, carry)
    if eqn.primitive is prims.while_p:
        loop = compat.while_parts(eqn)
        first, second = loop.cond_nconsts, loop.cond_nconsts + loop.body_nconsts
        body = here[first:]
        count, results = _looped(loop.body_jaxpr, body, slice(second - first, len(body)))
        tested, _ = _count(loop.cond_jaxpr, [*here[:first], *results])
        return count + min(tested, 1), results
    product = eqn.primitive is prims.dot_general_p
    has_weight = any(k == "weight" and _is_matrix(a) for k, a in zip(here, eqn.invars, strict=True))
    return int(product and has_weight), [_kind(eqn, here, product)] * len(eqn.outvars)


def _passed(eqn: Any) -> list[Any]:
    """For each result of a call the operand that it is, or None."""
    jaxpr, _ = compat.close(compat.call_jaxpr(eqn))
    same = dict(zip(jaxpr.invars, eqn.invars, strict=True))
    for inner in jaxpr.eqns:
        if inner.primitive in compat.CALL_PRIMITIVES:
            pairs = zip(inner.outvars, _passed(inner), strict=True)
            same.update((v, same[a]) for v, a in pairs if a is not None and not isinstance(a, Literal) and a in same)
    return [None if isinstance(v, Literal) else same.get(v) for v in jaxpr.outvars]


def _looped(jaxpr: Any, given: list[str], carry: slice) -> tuple[int, list[str]]:
    """A loop's body, its state being data where any turn makes it so."""
    given = list(given)
    while True:
        count, results = _count(jaxpr, given)
        state = [_meet(pair) for pair in zip(given[carry], results, strict=False)]
        if state == given[carry]:
            return count, results
        given[carry] = state


def _meet(kinds: Sequence[str]) -> str:
    return "data" if "data" in kinds else "weight" if "weight" in kinds else ""


def _is_matrix(atom: Any) -> bool:
    return sum(n > 1 for n in atom.aval.shape) > 1


def _kind(eqn: Any, here: list[str], product: bool) -> str:
    """What an equation makes: a matrix of weights stays one under scalars and indices that hang on the data."""
    if eqn.primitive in (prims.gather_p, prims.dynamic_slice_p):
        picks = sum(n > 1 for n in eqn.params["slice_sizes"]) > 1
        return here[0] if picks else _meet(here)
    if product or "weight" not in here:
        return _meet(here)
    small = [a.aval.size <= 1 for a in eqn.invars]
    strong = [k for k, s in zip(here, small, strict=True) if not s]
    return _meet(strong) if "weight" in strong else _meet(here)
