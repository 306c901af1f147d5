"""Emits loops, branches and shard_maps again through public JAX, with packed arrays reaching their bodies.

Packed arrays enter a loop whole, as constants of it; a scan's slices of them are taken inside by a counter. Slicing
them as scanned operands would copy every row of a layer to read a few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.extend.core import primitives as prims
from jax.sharding import PartitionSpec

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.graph import Node, Value, carried_inputs
from hire_xform.passes.rewrite.environment import Env, PackedView, Views, read
from hire_xform.passes.rewrite.liveness import state_read
from hire_xform.passes.weights.origins import ScanSlice, ShardSlice

if TYPE_CHECKING:
    from hire_xform.passes.rewrite.rewriter import Rewriter


def _known(env: Env, value: Value) -> Any:
    """What is passed in for an unchanging input of a body, if it is there."""
    assert value.outer is not None
    return read(env, value.outer, missing_ok=True)


def emit_scan(rewriter: Rewriter, node: Node, env: Env, views: Views) -> list[Any]:
    """A scan. Carries that never change become constants of the body."""
    scan, child = compat.scan_parts(node.eqn), node.inner
    carry = carried_inputs(node)
    changing = [v for v in carry if v.outer is None]
    constant = {
        v: k for v in child.inputs if v.outer is not None and not v.scanned and (k := _known(env, v)) is not None
    }
    scanned = {
        v: k for v in child.inputs if v.scanned and v in rewriter.live.values and (k := _known(env, v)) is not None
    }
    start = dict(zip(child.inputs, node.inputs, strict=True))
    inside = rewriter.views_for(node, child, env, views)
    counted = any(isinstance(ref, ScanSlice) and ref.scope is child for need in inside for ref in need.refs)

    def body(state: list[Any], slices: tuple[list[Any], Any]) -> tuple[list[Any], list[Any]]:
        xs, count = slices
        local = {**constant, **dict(zip(changing, state, strict=True)), **dict(zip(scanned, xs, strict=True))}
        seen = {
            need: view.at(count)
            if len(view.index) < len(need.refs) and _is_slice_of(need.refs[len(view.index)], child)
            else view
            for need, view in inside.items()
        }
        results = rewriter.run_scope(child, local, seen)
        new_state = [r for v, r in zip(carry, results, strict=False) if v.outer is None]
        return new_state, results[len(carry) :]

    counter = jnp.arange(scan.length, dtype=jnp.int32) if counted else None
    init = [read(env, start[v]) for v in changing]
    final, ys = lax.scan(
        body, init, (list(scanned.values()), counter), length=scan.length, reverse=scan.reverse, unroll=scan.unroll
    )
    done = dict(zip(changing, final, strict=True))
    return [done[v] if v in done else constant.get(v) for v in carry] + list(ys)


def _is_slice_of(ref: Any, scope: Any) -> bool:
    return isinstance(ref, ScanSlice) and ref.scope is scope


def emit_while(rewriter: Rewriter, node: Node, env: Env, views: Views) -> list[Any]:
    """A while. State that never changes becomes a constant of the body and the condition."""
    loop, child = compat.while_parts(node.eqn), node.inner
    carry = carried_inputs(node)
    changing = [v for v in carry if v.outer is None]
    constant = {v: k for v in child.inputs if v.outer is not None and (k := _known(env, v)) is not None}
    inside = rewriter.views_for(node, child, env, views)
    start = dict(zip(child.inputs, node.inputs[loop.cond_nconsts :], strict=True))
    tested = [read(env, o) for o in node.inputs[: loop.cond_nconsts]]
    reads = state_read(loop)
    unread = {
        v: jnp.zeros(v.shape, v.aval.dtype) for i, v in enumerate(carry) if v.outer is not None and i not in reads
    }

    def going(state: list[Any]) -> Any:
        known = {**unread, **constant, **dict(zip(changing, state, strict=True))}
        return jaxpr_as_fun(loop.cond_jaxpr)(*tested, *(known[v] for v in carry))[0]

    def body(state: list[Any]) -> list[Any]:
        results = rewriter.run_scope(child, {**constant, **dict(zip(changing, state, strict=True))}, inside)
        after = [r for v, r in zip(carry, results, strict=True) if v.outer is None]
        if not batched:
            return after
        turning = going(state)
        return [jnp.where(_lead(turning, jnp.ndim(r)), r, before) for r, before in zip(after, state, strict=True)]

    # A while that was batched by its condition has one for each element: those that are done wait for the others.
    batched = bool(loop.cond_jaxpr.out_avals[0].shape)
    condition = (lambda state: jnp.any(going(state))) if batched else going
    final = lax.while_loop(condition, body, [read(env, start[v]) for v in changing])
    done = dict(zip(changing, final, strict=True))
    return [done[v] if v in done else constant.get(v) for v in carry]


def _lead(mask: Any, ndim: int) -> Any:
    """A mask over the leading axes, with as many axes as what it chooses."""
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def emit_cond(rewriter: Rewriter, node: Node, env: Env, views: Views) -> list[Any]:
    """A cond or switch; branches close over what they read."""

    def branch(child: Any) -> Callable[[], list[Any]]:
        known = {v: k for v in child.inputs if (k := _known(env, v)) is not None}
        inside = rewriter.views_for(node, child, env, views)
        return lambda: rewriter.run_scope(child, dict(known), inside)

    return lax.switch(read(env, node.inputs[0]), [branch(child) for child in node.children])


def emit_shard_map(rewriter: Rewriter, node: Node, env: Env, views: Views) -> list[Any]:
    """A shard_map. Packed arrays are operands of it; each device has its part of those that its specs cut."""
    mapped, child = compat.shard_map_parts(node.eqn), node.inner
    inside = rewriter.views_for(node, child, env, views)
    needs = list(inside)
    live = [i for i, v in enumerate(child.inputs) if v in rewriter.live.values]

    def body(operands: list[Any], seen: list[PackedView]) -> list[Any]:
        own = {need: _own_part(view, need, child) for need, view in zip(needs, seen, strict=True)}
        return rewriter.run_scope(child, {child.inputs[i]: o for i, o in zip(live, operands, strict=True)}, own)

    specs = [_cut(inside[need], need, child) for need in needs]
    run = jax.shard_map(
        body,
        mesh=mapped.mesh,
        in_specs=([mapped.in_specs[i] for i in live], specs),
        out_specs=list(mapped.out_specs),
        axis_names=mapped.axis_names,
        check_vma=mapped.check_vma,
    )
    return run([read(env, node.inputs[i]) for i in live], list(inside.values()))


def _is_part_of(ref: Any, scope: Any) -> bool:
    return isinstance(ref, ShardSlice) and ref.scope is scope


def _cut(view: PackedView, need: Any, scope: Any) -> Any:
    """Specs of a view's arrays and indices: stack axes that ``scope`` cuts are cut, all else is whole everywhere."""
    stack = [ref.axes if _is_part_of(ref, scope) else None for ref in need.refs]
    arrays = jax.tree.map(lambda _: PartitionSpec(*stack), view.arrays)
    whole = jax.tree.map(lambda _: PartitionSpec(), (view.index, view.factor))
    return PackedView(arrays, *whole)


def _own_part(view: PackedView, need: Any, scope: Any) -> PackedView:
    """The view in a device's body: of stack axes that are cut there is one entry."""
    while len(view.index) < len(need.refs) and _is_part_of(need.refs[len(view.index)], scope):
        view = view.at(0)
    return view


EMIT: dict[Any, Callable[[Rewriter, Node, Env, Views], list[Any]]] = {
    prims.scan_p: emit_scan,
    prims.while_p: emit_while,
    prims.cond_p: emit_cond,
    compat.SHARD_MAP: emit_shard_map,
}
