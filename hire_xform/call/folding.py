"""Evaluates a program and adds up what is marked in it, through calls, loops, branches and shard_maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.extend.core import primitives as prims
from jax.sharding import PartitionSpec

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.equation_contexts import EquationContexts

# Running totals by name.
Totals = dict[Any, jax.Array]


@dataclass(frozen=True)
class Marks:
    """What is marked in a program and how it is added up.

    Attributes:
      primitive: marks; its results are the last of its operands.
      shapes: for a mark, its totals' names with their shapes and dtypes.
      add: from a mark, its operands and the totals so far, the totals after it; it changes those of ``shapes`` only.
      over_devices: True when totals of the devices of a ``shard_map`` add up.
    """

    primitive: Any
    shapes: Callable[[Any], dict[Any, jax.ShapeDtypeStruct]]
    add: Callable[[Any, Sequence[Any], Totals], Totals]
    over_devices: bool = False


def fold(jaxpr: Any, operands: Sequence[Any], marks: Marks) -> tuple[list[Any], Totals]:
    """Evaluates a closed jaxpr; works under a trace. Calls, loops and branches are entered.

    Totals go along with a loop's state, so they take the same memory however often it turns.

    Returns:
      The program's results, and the totals.

    Raises:
      NotImplementedError: a mark is inside an equation that is not entered; the message names it.
    """
    return _Fold(marks).evaluate(jaxpr, operands)


class _Fold:
    """One evaluation."""

    def __init__(self, marks: Marks):
        self._marks = marks
        self._loops = {prims.scan_p: self._scan, prims.while_p: self._while, prims.cond_p: self._cond}
        if marks.over_devices:
            self._loops[compat.SHARD_MAP] = self._shard_map

    def evaluate(self, jaxpr: Any, operands: Sequence[Any]) -> tuple[list[Any], Totals]:
        """The results, and the totals from zero."""
        zeros = {name: jnp.zeros(s.shape, s.dtype) for name, s in self._shapes([jaxpr]).items()}
        return self._run(jaxpr, operands, zeros)

    def _marked(self, jaxpr: Any) -> Iterator[Any]:
        for eqn in compat.close(jaxpr)[0].eqns:
            if eqn.primitive is self._marks.primitive:
                yield eqn
            for _, sub in compat.sub_jaxprs(eqn):
                yield from self._marked(sub)

    def _shapes(self, jaxprs: Sequence[Any]) -> dict[Any, jax.ShapeDtypeStruct]:
        found: dict[Any, jax.ShapeDtypeStruct] = {}
        for jaxpr in jaxprs:
            for eqn in self._marked(jaxpr):
                found.update(self._marks.shapes(eqn))
        return found

    def _run(self, jaxpr: Any, operands: Sequence[Any], totals: Totals) -> tuple[list[Any], Totals]:
        inner, consts = compat.close(jaxpr)
        env = dict(zip((*inner.constvars, *inner.invars), (*consts, *operands), strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, compat.Literal) else env[atom]

        with EquationContexts() as contexts:
            for eqn in inner.eqns:
                contexts.enter(eqn)
                given = [read(a) for a in eqn.invars]
                inside = [sub for _, sub in compat.sub_jaxprs(eqn)]
                if eqn.primitive is self._marks.primitive:
                    results = given[len(given) - len(eqn.outvars) :]
                    totals = self._marks.add(eqn, given, totals)
                elif not any(True for sub in inside for _ in self._marked(sub)):
                    results = compat.bind(eqn, given)
                elif eqn.primitive in compat.CALL_PRIMITIVES:
                    results, totals = self._run(compat.call_jaxpr(eqn), given, totals)
                elif eqn.primitive in self._loops:
                    own = {name: totals[name] for name in self._shapes(inside)}
                    results, own = self._loops[eqn.primitive](eqn, given, own)
                    totals = {**totals, **own}
                else:
                    raise NotImplementedError(f"sites inside {eqn.primitive} can't be measured; expected jax.lax loops")
                env.update(zip(eqn.outvars, results, strict=True))
        return [read(a) for a in inner.outvars], totals

    def _scan(self, eqn: Any, given: list[Any], totals: Totals) -> tuple[list[Any], Totals]:
        scan = compat.scan_parts(eqn)
        lead = scan.num_consts + scan.num_carry
        consts, carry = given[: scan.num_consts], given[scan.num_consts : lead]

        def body(state: tuple[list[Any], Totals], xs: list[Any]) -> tuple[tuple[list[Any], Totals], list[Any]]:
            outs, totals = self._run(scan.jaxpr, [*consts, *state[0], *xs], state[1])
            return (outs[: scan.num_carry], totals), outs[scan.num_carry :]

        (carry, totals), ys = lax.scan(
            body, (carry, totals), given[lead:], length=scan.length, reverse=scan.reverse, unroll=scan.unroll
        )
        return [*carry, *ys], totals

    def _while(self, eqn: Any, given: list[Any], totals: Totals) -> tuple[list[Any], Totals]:
        loop = compat.while_parts(eqn)
        tested = given[: loop.cond_nconsts]
        consts = given[loop.cond_nconsts : loop.cond_nconsts + loop.body_nconsts]

        def going(state: tuple[list[Any], Totals]) -> Any:
            return jaxpr_as_fun(loop.cond_jaxpr)(*tested, *state[0])[0]

        def body(state: tuple[list[Any], Totals]) -> tuple[list[Any], Totals]:
            return self._run(loop.body_jaxpr, [*consts, *state[0]], state[1])

        return lax.while_loop(going, body, (given[loop.cond_nconsts + loop.body_nconsts :], totals))

    def _shard_map(self, eqn: Any, given: list[Any], totals: Totals) -> tuple[list[Any], Totals]:
        mapped = compat.shard_map_parts(eqn)
        axes = tuple(mapped.axis_names)

        def body(operands: list[Any]) -> tuple[list[Any], Totals]:
            # Over the axes of a shard_map around this one, too.
            manual = jax.sharding.get_abstract_mesh().manual_axes
            zeros = {name: compat.vary(jnp.zeros(t.shape, t.dtype), manual) for name, t in totals.items()}
            outs, own = self._run(mapped.jaxpr, operands, zeros)
            return outs, {name: lax.psum(t, axes) for name, t in own.items()}

        whole = dict.fromkeys(totals, PartitionSpec())
        run = jax.shard_map(
            body,
            mesh=mapped.mesh,
            in_specs=(list(mapped.in_specs),),
            out_specs=(list(mapped.out_specs), whole),
            axis_names=mapped.axis_names,
            check_vma=mapped.check_vma,
        )
        outs, own = run(given)
        return outs, {name: totals[name] + own[name] for name in totals}

    def _cond(self, eqn: Any, given: list[Any], totals: Totals) -> tuple[list[Any], Totals]:
        def run(branch: Any) -> Any:
            return lambda totals, *operands: self._run(branch, operands, totals)

        return lax.switch(given[0], [run(branch) for branch in eqn.params["branches"]], totals, *given[1:])
