"""DA-TOP-k (arXiv 2402.09360): the largest k of an array, each of several equal shards picking its own share.

    values, indices = da_top_k(scores, 256, shards=4)     # the best 64 of each quarter of the last axis

With one shard this is ``jax.lax.top_k``, but for two things: a NaN counts as the largest value whatever its sign (what
cannot be ranked must be computed), and no dtype falls onto the slow full sort that XLA's CPU backend runs for all but
f32. With the last axis split over ``shards`` devices, or fewer, no score leaves its device: each picks from the blocks
it holds, and its picks stay with it. Over more devices than ``shards`` scores are gathered until devices hold whole
blocks. Other axes may be sharded at will.

The primitive carries the partitioned form as a jaxpr, ``split_form``: JAX looks for ``custom_partitioning`` in the
parameters of an equation to know that a program must be lowered with its devices at hand. On one device, inside a
``shard_map``, where a mesh with explicit axes is set, and on TPU, whose compiler splits a top-k along batch axes by
itself, the plain form is lowered.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, get_abstract_mesh, use_abstract_mesh

from hire_xform.lowering.primitives.kernels import has_kernels, lower_kernel
from hire_xform.lowering.xla.eager import compiled_alone
from hire_xform.lowering.xla.promotion import usual_promotion

__all__ = ["best_rows", "da_top_k", "da_top_k_p"]


def da_top_k(scores: jax.Array, k: int, shards: int = 1) -> tuple[jax.Array, jax.Array]:
    """The best ``ceil(k / shards)`` of each of ``shards`` contiguous blocks of ``ceil(n / shards)`` of the last axis.

    Ties go to the lower index, NaN is larger than everything. Differentiable in ``scores``; usable under ``jit``,
    ``vmap``, ``scan``, ``shard_map`` and ``jax.export``. Where the last axis is split over as many devices as there are
    ``shards``, or fewer, none sends a score::

        >>> scores = jnp.array([3.0, 9.0, 1.0, 2.0, 8.0, 7.0])
        >>> values, indices = hx.da_top_k(scores, 2)  # the best two of all
        >>> print(values, indices)
        [9. 8.] [1 4]
        >>> values, indices = hx.da_top_k(scores, 4, shards=2)  # the best two of each half
        >>> print(values, indices)
        [9. 3. 8. 7.] [1 0 4 5]

    Args:
      scores: ``[..., n]``, real.
      k: how many to take over all blocks, ``1 <= k <= n``.
      shards: how many blocks. Where they do not divide ``n``, the last block is shorter, and some may be empty.

    Returns:
      ``(values, indices)``, both ``[..., shards * ceil(k / shards)]``: block after block, each block's from best to
      worst; ``values`` has the scores' dtype, ``indices`` is int32 and counts along the whole axis. No index appears
      twice. A block with fewer scores than it is to give fills up with indices from ``n`` on, of the lowest value its
      dtype has: a scatter with ``mode="drop"`` passes over them.

    Raises:
      ValueError: ``k`` or ``shards`` does not fit ``n``, or ``scores`` is a scalar.
      TypeError: ``scores`` is complex or boolean, or ``k`` or ``shards`` is no integer.
    """
    scores = jnp.asarray(scores)
    for name, value in (("k", k), ("shards", shards)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"da_top_k: {name}={value!r}; expected an integer, which is compiled in")
    # Here too, since an eager call runs the implementation without the abstract rule.
    _check(scores.shape, scores.dtype, k, shards)
    values, indices = _bind(_filled_up(scores, -scores.shape[-1] % shards), int(k), int(shards))
    return values, indices


def best_rows(scores: jax.Array, k: int) -> jax.Array:
    """The indices that ``da_top_k`` gives of ``[..., n]``, int32 ``[..., k]``, in whatever order is least work."""
    return _bind(scores, k, 1, ordered=False)[1]


def _filled_up(scores: jax.Array, missing: int) -> jax.Array:
    """Scores with so many more behind them, that equal scores stand before."""
    if not missing:
        return scores
    lowest: float
    if jnp.issubdtype(scores.dtype, jnp.integer):
        lowest = jnp.iinfo(scores.dtype).min
    else:
        # Some narrow types have no infinity.
        infinite = np.isneginf(np.asarray(-np.inf, scores.dtype).astype(np.float32))
        lowest = -np.inf if infinite else float(jnp.finfo(scores.dtype).min)
    return jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, missing)], constant_values=lowest)


def _bind(scores: Any, k: int, shards: int, ordered: bool = True) -> list[Any]:
    own_form = _partitioned(scores.shape, jnp.dtype(scores.dtype), k, shards)
    return da_top_k_p.bind(scores, k=k, shards=shards, ordered=ordered, split_form=own_form)


def _check(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, k: int, shards: int) -> None:
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"da_top_k: scores of dtype {dtype} have no order; expected floating or integer scores")
    if not shape:
        raise ValueError("da_top_k: scores is a scalar; expected an array of one axis or more")
    n = shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"da_top_k: k={k} does not fit the last axis; expected 1 <= k <= {n}")
    if shards < 1:
        raise ValueError(f"da_top_k: shards={shards}; expected at least 1")


def _abstract(
    scores: ShapedArray, *, k: int, shards: int, ordered: bool, split_form: ClosedJaxpr
) -> tuple[ShapedArray, ShapedArray]:
    _check(scores.shape, scores.dtype, k, shards)
    devices = _devices_along(scores.sharding, len(scores.shape) - 1)
    if shards % devices:
        raise ValueError(
            f"da_top_k: shards={shards}, but the last axis is sharded over {devices} devices, which have to hold whole "
            f"blocks of it; expected a multiple of {devices}"
        )
    shape = (*scores.shape[:-1], shards * -(-k // shards))
    # `update` keeps the operand's sharding: along the last axis each device's share stays with it.
    return scores.update(shape=shape), scores.update(shape=shape, dtype=jnp.dtype(jnp.int32), weak_type=False)


def _devices_along(sharding: Any, axis: int) -> int:
    """How many devices a type says an axis is split over; 1 where it says nothing, as under Auto axes."""
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    names = names if isinstance(names, tuple) else () if names is None else (names,)
    size = 1
    for name in names:
        size *= sharding.mesh.shape[name]
    return size


@usual_promotion()
def _portable(scores: jax.Array, *, k: int, shards: int) -> tuple[jax.Array, jax.Array]:
    """``lax.top_k`` of f32 keys over the blocks as one more batch axis."""
    n = scores.shape[-1]
    keys = scores
    if jnp.issubdtype(scores.dtype, jnp.floating):
        # lax.top_k orders as IEEE totalOrder does: a positive NaN is above +inf, a negative one below -inf.
        keys = lax.select(lax.ne(scores, scores), lax.full_like(scores, jnp.nan), scores)
    # f32 holds these exactly, so the cast keeps the order; wider types keep their own (slower) sort.
    if scores.dtype.itemsize <= 2:
        keys = keys.astype(jnp.float32)
    lead = scores.shape[:-1]
    values, indices = lax.top_k(keys.reshape(*lead, shards, n // shards), -(-k // shards))
    if shards > 1:
        indices = indices + (jnp.arange(shards, dtype=jnp.int32) * (n // shards))[:, None]
    size = shards * -(-k // shards)
    return values.astype(scores.dtype).reshape(*lead, size), indices.reshape(*lead, size)


@functools.lru_cache(maxsize=1024)
def _partitioned(shape: tuple[int, ...], dtype: jnp.dtype, k: int, shards: int) -> ClosedJaxpr:
    """``_portable`` for these sizes with its partition rule, for Shardy."""
    fun = custom_partitioning(lambda scores: _portable(scores, k=k, shards=shards))
    sizes = {"shard": shards, "score": shape[-1] // shards, "pick": -(-k // shards)}
    lead = tuple(f"batch{i}" for i in range(len(shape) - 1))
    given, picked = (_factors(sizes, "shard", last) for last in ("score", "pick"))
    alone = {names[0] for names in (given, picked) if len(names) == 1}  # their sizes are those of a dimension
    fun.def_partition(
        partition=functools.partial(_partition, k=k, shards=shards),
        # The blocks are what is split; inside a block, and among its picks, nothing is.
        sharding_rule=SdyShardingRule(
            (ArrayMapping(*lead, _dimension(given)),),
            (ArrayMapping(*lead, _dimension(picked)),) * 2,
            need_replication_factors=tuple(name for name in ("score", "pick") if name in (*given, *picked)),
            **{name: sizes[name] for name in {*given, *picked} - alone},  # type: ignore[arg-type]
        ),
        decode_shardings=False,  # parts of mesh axes can't be decoded
        infer_sharding_from_operands=lambda mesh, arguments, result: (arguments[0].sharding,) * 2,
    )
    # Of no mesh: it is traced once for all, whatever mesh or manual axes it is used under.
    with use_abstract_mesh(AbstractMesh((), ())):
        return jax.make_jaxpr(fun)(jax.ShapeDtypeStruct(shape, dtype))


def _factors(sizes: dict[str, int], *names: str) -> list[str]:
    """The factors a dimension is made of: those of one element may not stand beside others."""
    return [name for name in names if sizes[name] > 1] or [names[0]]


def _dimension(factors: list[str]) -> Any:
    return factors[0] if len(factors) == 1 else CompoundFactor(*factors)


def _partition(mesh: Any, arguments: Sequence[Any], results: Any, *, k: int, shards: int) -> tuple[Any, ...]:
    """What one device runs: the plain form on the blocks it holds, its indices moved to where they stand.

    Over more devices than shards the results are split over part of a mesh axis, which a spec has no name for, and the
    scores are gathered to be split as they are. So where a device's scores begin is looked up.
    """
    (scores,), n = arguments, arguments[0].shape[-1]
    block, own = n // shards, -(-k // shards)
    split = (scores.sharding, *(result.sharding for result in results))
    sharding = next((s for s in split if s.shard_shape(scores.shape)[-1] % block == 0), None)
    if sharding is None:
        raise ValueError(
            f"da_top_k: shards={shards} blocks are not whole on any device; expected a multiple of devices"
        )
    held = sharding.shard_shape(scores.shape)[-1]
    of_device = sharding.devices_indices_map(scores.shape)
    first = np.array([of_device[device][-1].indices(n)[0] for device in mesh.devices.flat], np.int32)

    def local(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, indices = _portable(scores, k=held // block * own, shards=held // block)
        if held < n:
            indices = indices + jnp.asarray(first)[lax.axis_index(mesh.axis_names)]
        return values, indices

    return mesh, local, (sharding, sharding), (sharding,)


def _is_split(ctx: Any) -> bool:
    """Whether scores may be over several devices, so that the partition rule has to be asked."""
    around = ctx.module_context.axis_context
    # Inside a shard_map the jaxpr, which was traced outside of one, would lack the manual axes of its constants. Where
    # there are several devices and no operand says of which mesh, the partition rule would not know where it runs.
    # Under explicit axes of a mesh that is set, what the rule gives would be traced with types of that mesh, and JAX
    # 0.11 lowers those to constraints that nothing removes.
    several = getattr(around, "num_devices", None)
    nowhere = several == 1 or (several and around.abstract_mesh is None)
    explicit = AxisType.Explicit in get_abstract_mesh().axis_types
    return not (getattr(around, "manual_axes", ()) or nowhere or explicit)


def _lower(ctx: Any, scores: Any, *, k: int, shards: int, ordered: bool, split_form: ClosedJaxpr) -> Any:
    if not _is_split(ctx):
        return _lower_plain(ctx, scores, k=k, shards=shards, ordered=ordered, split_form=split_form)
    return mlir.lower_fun(jaxpr_as_fun(split_form), multiple_results=True)(ctx, scores)


def _lower_kernel(
    platform: str, ctx: Any, scores: Any, *, k: int, shards: int, ordered: bool, split_form: ClosedJaxpr
) -> Any:
    """The kernel of a platform, where the plain form would be lowered."""
    settings: dict[str, Any] = {"k": k, "shards": shards, "ordered": ordered}
    alone = platform == "tpu" or not _is_split(ctx)
    made = lower_kernel("da_top_k", platform, ctx, [scores], **settings) if alone else None
    plain = _lower_plain if platform == "tpu" else _lower
    return plain(ctx, scores, **settings, split_form=split_form) if made is None else made


def _lower_plain(ctx: Any, scores: Any, *, k: int, shards: int, ordered: bool, split_form: ClosedJaxpr) -> Any:
    return mlir.lower_fun(functools.partial(_portable, k=k, shards=shards), multiple_results=True)(ctx, scores)


@usual_promotion()
def _batch(
    args: Sequence[jax.Array], dims: Sequence[Any], *, k: int, shards: int, ordered: bool, split_form: Any
) -> tuple[Any, Any]:
    (scores,), (dim,) = args, dims
    return _bind(jnp.moveaxis(scores, dim, 0), k, shards, ordered), (0, 0)


@usual_promotion()
def _jvp(
    primals: Sequence[jax.Array],
    tangents: Sequence[Any],
    *,
    k: int,
    shards: int,
    ordered: bool,
    split_form: ClosedJaxpr,
) -> tuple[Any, Any]:
    """As for a gather of the chosen scores; the choice itself is constant almost everywhere."""
    values, indices = _bind(primals[0], k, shards, ordered)
    zero_indices = ad.Zero(ShapedArray(indices.shape, jax.dtypes.float0))
    if isinstance(tangents[0], ad.Zero):
        return (values, indices), (ad.Zero(tangents[0].aval.update(shape=values.shape)), zero_indices)
    moved = jnp.take_along_axis(tangents[0], indices, axis=-1, mode="promise_in_bounds")
    return (values, indices), (moved, zero_indices)


# Unused, it is dropped: it has no effects, which is the rule that JAX applies by itself.
da_top_k_p = Primitive("da_top_k")
da_top_k_p.multiple_results = True
da_top_k_p.def_impl(compiled_alone(da_top_k_p, "k", "shards", "ordered", "split_form"))
da_top_k_p.def_abstract_eval(_abstract)
batching.primitive_batchers[da_top_k_p] = _batch
ad.primitive_jvps[da_top_k_p] = _jvp
mlir.register_lowering(da_top_k_p, _lower)
# Programs compiled ahead of time for a described TPU could not call back to be partitioned, either.
mlir.register_lowering(da_top_k_p, _lower_plain, platform="tpu")
# A kernel: rule(scores, *, k, shards) -> what da_top_k returns, where `shards` divide the last axis. One that is told
# whether it is to be `ordered` may return it in another order where it is not.
has_kernels(da_top_k_p, _lower_kernel)
