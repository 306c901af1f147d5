"""The only module that names something of JAX that differs between versions.

Each entry says which versions it serves, and has its test in ``tests/passes/ir/test_compat.py``, which runs on every
supported JAX. Nothing outside this file may depend on the JAX version or touch a private module, and no entry here
needs a private module either.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core
from jax.extend.core import primitives as prims

Eqn = jex_core.JaxprEqn
Var = jex_core.Var
Literal = jex_core.Literal
Jaxpr = jex_core.Jaxpr
ClosedJaxpr = jex_core.ClosedJaxpr
Atom = Var | Literal


def close(jaxpr: Any, consts: Sequence[Any] = ()) -> tuple[Any, tuple[Any, ...]]:
    """Splits a jaxpr of any kind into (open jaxpr, constants).

    Up to 0.10 a ``ClosedJaxpr`` wraps a ``Jaxpr``; from 0.11 both names are one class that carries its constants.
    ``remat2`` and ``shard_map`` carry an open jaxpr on every version.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    found = tuple(getattr(jaxpr, "consts", ()) or ())
    if not found and inner.constvars:
        found = tuple(consts)
    return inner, found


def is_jaxpr(value: Any) -> bool:
    """True for a ``Jaxpr`` or a ``ClosedJaxpr`` (two classes up to 0.10, one from 0.11)."""
    return isinstance(value, (Jaxpr, ClosedJaxpr))


def sub_jaxprs(eqn: Eqn) -> list[tuple[str, Any]]:
    """All jaxprs in an equation's parameters, as (parameter name, jaxpr); tuples of jaxprs are flattened."""
    found: list[tuple[str, Any]] = []
    for name, value in eqn.params.items():
        if is_jaxpr(value):
            found.append((name, value))
        elif isinstance(value, (tuple, list)):
            found.extend((f"{name}[{i}]", v) for i, v in enumerate(value) if is_jaxpr(v))
    return found


# Equations whose one sub-jaxpr is simply applied to their operands.
CALL_PRIMITIVES: dict[Any, str] = {
    prims.jit_p: "jit",  # named "pjit" before 0.7: match the object, never the name
    prims.closed_call_p: "call",
    prims.call_p: "call",
    prims.remat_p: "remat",
    prims.custom_jvp_call_p: "custom",
    prims.custom_vjp_call_p: "custom",
}


def call_jaxpr(eqn: Eqn) -> Any:
    """The jaxpr that a call-like equation applies: the only parameter that is a jaxpr, on every version."""
    found = [value for value in eqn.params.values() if is_jaxpr(value)]
    if len(found) != 1:
        raise AssertionError(f"{eqn.primitive} was expected to hold one jaxpr, holds {len(found)}")
    return found[0]


@dataclass(frozen=True)
class ScanParts:
    """A scan equation taken apart; counts are numbers of operands."""

    jaxpr: Any
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int


def scan_parts(eqn: Eqn) -> ScanParts:
    """Reads a scan's parameters: ``num_consts``/``num_carry`` up to 0.10, ``ft_in`` (a tree of three) from 0.11."""
    params = eqn.params
    if "num_consts" in params:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    else:
        consts, carry, xs = params["ft_in"].unpack()
        num_consts, num_carry = len(consts), len(carry)
        if num_consts + num_carry + len(xs) != len(eqn.invars):
            raise AssertionError("scan: ft_in does not add up to the operands")
    return ScanParts(
        jaxpr=params["jaxpr"],
        num_consts=num_consts,
        num_carry=num_carry,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )


@dataclass(frozen=True)
class WhileParts:
    """A while equation taken apart."""

    cond_jaxpr: Any
    body_jaxpr: Any
    cond_nconsts: int
    body_nconsts: int


def while_parts(eqn: Eqn) -> WhileParts:
    """Reads a while's parameters (the same on 0.9 to 0.12)."""
    p = eqn.params
    return WhileParts(p["cond_jaxpr"], p["body_jaxpr"], p["cond_nconsts"], p["body_nconsts"])


def is_unspecified(sharding: Any) -> bool:
    """True for jit's "no sharding was given" marker, whose class is not public on any version."""
    return sharding is None or type(sharding).__name__ in ("UnspecifiedValue", "AUTO")


def jit_shardings(eqn: Eqn) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The shardings that a nested jit states, with ``None`` where it states none."""

    def stated(values: Any) -> tuple[Any, ...]:
        return tuple(None if is_unspecified(s) else s for s in values)

    return stated(eqn.params["in_shardings"]), stated(eqn.params["out_shardings"])


def jit_inlining(eqn: Eqn) -> Any:
    """What a nested jit says of inlining, as ``jax.jit`` takes it: a bool up to 0.10, an enum from 0.11."""
    return eqn.params.get("inline", False)


def jit_is_inlined(eqn: Eqn) -> bool:
    """True when JAX itself inlines a nested jit; the members of the enum that says so from 0.11 are all true."""
    inline = jit_inlining(eqn)
    return inline is True or getattr(inline, "value", None) in ("jax_early", "jax_late")


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    """What the traces below are given: an array would start JAX's backends, before a program has configured them."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _optimization_barrier_p() -> Any:
    """No public object exists for ``optimization_barrier_p``: read it off a traced call (all versions)."""
    return jax.make_jaxpr(jax.lax.optimization_barrier)(_array()).eqns[0].primitive


def _split_p() -> Any:
    """No public object exists for ``split_p`` (lax.split, since 0.4.36): read it off a traced call."""
    return jax.make_jaxpr(lambda x: jax.lax.split(x, (1, 1)))(_array(2)).eqns[0].primitive


def _stack_p() -> Any:
    """No public object exists for ``stack_p`` (jnp.stack, since 0.10): read it off a traced call; None before."""
    found = {e.primitive for e in jax.make_jaxpr(lambda x: jnp.stack([x, x]))(_array(2)).eqns}
    return found.pop() if found.isdisjoint({prims.concatenate_p, prims.broadcast_in_dim_p, prims.jit_p}) else None


def _unstack_p() -> Any:
    """No public object exists for ``unstack_p`` (jnp.unstack, since 0.10): read it off a traced call; None before."""
    eqns = jax.make_jaxpr(lambda x: jnp.unstack(x))(_array(2, 3)).eqns
    return eqns[0].primitive if len(eqns) == 1 and "axis" in eqns[0].params and "sizes" not in eqns[0].params else None


def _ragged_dot_p() -> Any:
    """No public object exists for ``ragged_dot_general_p``: read it off a traced call (all versions)."""
    operands = _array(2, 3), _array(1, 3, 4), jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.make_jaxpr(jax.lax.ragged_dot)(*operands).eqns[0].primitive


def _shard_map_eqn() -> Eqn:
    """A traced ``shard_map`` over an abstract mesh of one device, whose body marks its input as varying."""
    mesh = jax.sharding.AbstractMesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(lambda x, y: x + y, mesh=mesh, in_specs=(spec, whole), out_specs=spec)
    return jax.make_jaxpr(mapped)(_array(2), _array(2)).eqns[0]


def _reshard_p() -> Any:
    """No public object exists for ``reshard_p`` (since 0.7): read it off a traced call."""
    mesh = jax.sharding.AbstractMesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    to = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.make_jaxpr(lambda x: jax.sharding.reshard(x, to))(_array(2)).eqns[0].primitive


def _traced_primitives() -> tuple[Any, ...]:
    return _optimization_barrier_p(), _split_p(), _stack_p(), _unstack_p(), _ragged_dot_p(), _reshard_p()


OPTIMIZATION_BARRIER, SPLIT, STACK, UNSTACK, RAGGED_DOT, RESHARD = _traced_primitives()

# No public objects exist for ``shard_map_p`` and ``pvary_p`` (all versions): read off a traced call.
SHARD_MAP, PVARY = (e.primitive for e in (_shard_map_eqn(), call_jaxpr(_shard_map_eqn()).eqns[0]))


@dataclass(frozen=True)
class ShardMapParts:
    """A shard_map equation taken apart: its body and ``jax.shard_map``'s own arguments."""

    jaxpr: Any
    mesh: Any
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    check_vma: bool
    axis_names: frozenset[str]

    def split(self, number: int) -> tuple[tuple[int, int, Any], ...]:
        """Each split dimension of an operand: (dimension, parts, mesh axes as the spec names them)."""
        found = []
        for dim, names in enumerate(self.in_specs[number]):
            axes = () if names is None else (names,) if isinstance(names, str) else tuple(names)
            parts = math.prod(self.mesh.shape[name] for name in axes)
            if axes:
                found.append((dim, parts, names))
        return tuple(found)


def shard_map_parts(eqn: Eqn) -> ShardMapParts:
    """Reads a shard_map's parameters: its own axes are ``manual_axes`` in 0.9, ``newly_manual_axes`` from 0.10."""
    p = eqn.params
    own = p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"]
    return ShardMapParts(p["jaxpr"], p["mesh"], tuple(p["in_specs"]), tuple(p["out_specs"]), p["check_vma"], own)


def vary(value: Any, axes: Sequence[str]) -> Any:
    """``value`` marked as varying over those of the mesh axes that are manual here and that it does not vary over.

    ``pcast`` refuses a value that varies already, and outside a shard_map there is nothing to mark. A type says along
    which axes it varies in ``vma`` in 0.9, in ``manual_axis_type`` from 0.10.
    """
    manual = getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ())
    kind: Any = getattr(jax.typeof(value), "manual_axis_type", None)
    known: frozenset[str] = kind.varying if kind is not None else getattr(jax.typeof(value), "vma", frozenset())
    missing = tuple(a for a in axes if a in manual and a not in known)
    return jax.lax.pcast(value, missing, to="varying") if missing else value


def public_primitive(name: str) -> Any | None:
    """A primitive by its public name, or None on a version that does not have it."""
    return getattr(prims, name, None)


def primitives_named(names: str) -> frozenset[Any]:
    """The primitives of some names without their ``_p``, apart by blanks, as far as a version has them."""
    return frozenset(p for name in names.split() if (p := public_primitive(f"{name}_p")) is not None)


def bind(eqn: Eqn, operands: Sequence[Any], params: dict[str, Any] | None = None) -> list[Any]:
    """Applies an equation's primitive to new operands and returns the list of its results.

    ``get_bind_params`` returns one dict from 0.9 on (before, a pair with the sub-functions apart).
    """
    if eqn.primitive is PVARY:
        return [vary(operand, eqn.params["axes"]) for operand in operands]
    bind_params = eqn.primitive.get_bind_params(eqn.params if params is None else params)
    out = eqn.primitive.bind(*operands, **bind_params)
    return list(out) if eqn.primitive.multiple_results else [out]


def replaced(jaxpr: Any, **fields: Any) -> ClosedJaxpr:
    """A closed jaxpr with other fields of its open one (one class from 0.11); ``constvars=[]`` drops its constants."""
    inner, consts = close(jaxpr)
    return ClosedJaxpr(inner.replace(**fields), () if "constvars" in fields else consts)


def plain_call() -> Eqn:
    """A call, in the context of here, of a jitted function that states nothing: one operand, one result."""
    return jax.make_jaxpr(jax.jit(lambda x: x + x))(_array()).eqns[0]


def bind_call(like: Eqn, jaxpr: ClosedJaxpr, name: str, operands: Sequence[Any]) -> list[Any]:
    """Calls a closed jaxpr under a trace as a jitted function's, without tracing it again.

    Its other parameters are those of ``plain_call``: of a tuple with an entry for each operand or result one is there
    (0.10 to 0.12).
    """
    params = dict(like.params, jaxpr=jaxpr, name=name)
    for count, kinds in (
        (len(operands), ("in_shardings", "in_layouts", "donated_invars")),
        (len(jaxpr.out_avals), ("out_shardings", "out_layouts")),
    ):
        params.update((kind, params[kind] * count) for kind in kinds)
    return list(prims.jit_p.bind(*operands, **params))


def without_last_outputs(jaxpr: ClosedJaxpr, count: int) -> ClosedJaxpr:
    """The program without its last ``count`` results; what computes them stays."""
    outvars = jaxpr.jaxpr.outvars
    return replaced(jaxpr, outvars=outvars[: len(outvars) - count])


_TRACE_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_threefry_partitionable",
    "jax_disable_jit",
)


def trace_settings() -> tuple[Any, ...]:
    """The settings that change what a function traces to; ``jax.jit`` keys its own cache by them, too."""
    return jax.sharding.get_abstract_mesh(), *(getattr(jax.config, name, None) for name in _TRACE_SETTINGS)


def default_device() -> Any:
    """The device, or the name of the platform, that ``jax.default_device`` sets; None where nothing is set."""
    return getattr(jax.config, "jax_default_device", None)


def outside_of_traces() -> Any:
    """A context in which operations on arrays that are there give arrays, whatever is being traced around it.

    ``jax.ensure_compile_time_eval`` does that too, but reaches into the functions that are traced in it: each constant
    of theirs, however large, is made at once and kept.
    """
    return jax.core.eval_context()


@functools.cache
def few_temporaries() -> dict[str, str]:
    """Compiler options with which a CPU holds fewer temporaries at once; none where XLA does not know of them.

    Known in 0.9 to 0.12: equations are put in an order that holds little at once, instead of one in which as many as
    can be are run at once.
    """
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def is_tracer(value: Any) -> bool:
    """True for a value that an outer transformation is tracing."""
    return isinstance(value, jax.core.Tracer)
