"""What a site reads, and what it costs besides reading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from hire_xform.lowering.engine.subgraph import ffn_bytes, vocab_bytes
from hire_xform.lowering.predict.predictors import packed_shapes, predictor_bytes
from hire_xform.lowering.primitives.ranks import moments_bytes
from hire_xform.lowering.prove.moment_bounds import bounded_moments_bytes
from hire_xform.lowering.prove.proofs import proof_bytes, proof_shapes
from hire_xform.passes.match.matches import FfnMatch, VocabMatch
from hire_xform.passes.plan.forms import Proving, down_forms, up_forms
from hire_xform.passes.plan.machine import Machine, machine_here
from hire_xform.passes.plan.settings import Ffn, Vocab
from hire_xform.passes.weights.products import Product, normal_form
from hire_xform.passes.weights.provenance import Transpose

# A row read out of order costs this many times what it costs in a streamed product. Measured by
# `benchmarks/kernels.py` on a CPU; accelerators read rows of a kilobyte or more about as fast as anything else.
ROW_COST = {"cpu": 1.5}
# A CPU gathers the rows of a head into one array first. Beyond so many bytes its pages are new at every call, and each
# costs this many times what it costs in a streamed product: measured 7 to 18 times.
GATHERED, GATHERED_COST = 8 << 20, 8.0
# What predicting and selecting costs besides reading, as the bytes a dense product would read in that time: once, and
# on a CPU for each row and token that is chosen from, and more where each is bounded.
FIXED_BYTES = {"cpu": 1 << 20, "gpu": 4 << 20, "tpu": 4 << 20}
CHOOSING, BOUNDING = 64, 96

# Where a product of narrow weights has the whole of them widened to f32 first, at every call: the dense form then costs
# as much as one of f32 weights at least (six to sixty times as much, bfloat16 on two cores). Others widen as they go.
WIDENS_FIRST = frozenset({"cpu"})


def dense_cost(match: VocabMatch | FfnMatch, platform: str) -> int:
    """What the dense form costs in an execution, as bytes read."""
    if platform not in WIDENS_FIRST:
        return sum(p.nbytes for p in match.products)
    return sum(p.nbytes if _reads_as_stored(p) else max(p.widened_nbytes, _wide(p)) for p in match.products)


def _wide(product: Product) -> int:
    return math.prod(product.weight.shape) * 4


def _reads_as_stored(product: Product) -> bool:
    """Whether XLA's CPU backend reads bfloat16 weights at the speed of memory, which hangs on how they are used.

    Measured on JAX 0.10, rows stored as they are multiplied: one token if the result is of the dtype that is
    multiplied, and two to eight of bfloat16 if it is f32. All else is widened whole.
    """
    if product.stored != jnp.bfloat16:
        return False
    if any(isinstance(step, Transpose) for step in normal_form(product.rows_free().as_stored).steps):
        return False
    used, made = product.weight.aval.dtype, product.out.aval.dtype
    return used == made if product.tokens == 1 else (used, made) == (jnp.bfloat16, jnp.float32)


def sparse_cost(
    match: VocabMatch | FfnMatch,
    settings: Vocab | Ffn,
    tokens: int,
    predicted: int,
    taken: Sequence[tuple[float, int, bool]],
    platform: str,
    shards: int = 1,
    static: int = 0,
) -> float:
    """What the rewritten form costs in an execution on one device, as bytes that the dense one reads in that time.

    Args:
      match, settings: the site.
      tokens: of one execution.
      predicted: bytes of the predictor.
      taken: of each size that may be taken how often it is, the bytes of its rows, and whether it then runs dense.
      platform: "cpu", "gpu" or "tpu".
      shards: over how many devices it is.
      static: units that are always computed.
    """
    cost = float(predicted + FIXED_BYTES.get(platform, 1 << 20))
    if platform == "cpu":
        cost += _narrow_cost(match, settings, machine_here(), shards, static)
        each = CHOOSING + (BOUNDING if settings.certify else 0)
        cost += tokens * (match.units // shards - static) * each
    for share, rows, dense in taken:
        cost += share * (_rows_cost(match, settings, rows, platform) + (dense_cost(match, platform) / shards) * dense)
    return cost


def _rows_cost(match: VocabMatch | FfnMatch, settings: Vocab | Ffn, rows: int, platform: str) -> float:
    """What so many bytes of rows computed exactly cost."""
    cost = rows * ROW_COST.get(platform, 1.0)
    if platform != "cpu" or isinstance(match, FfnMatch):
        return cost
    cost += max(0, rows - GATHERED) * (GATHERED_COST - ROW_COST["cpu"])
    # A proof multiplies the rows twice, by their values and by their magnitudes.
    return 2 * cost if settings.certify else cost


def _narrow_cost(
    match: VocabMatch | FfnMatch, settings: Vocab | Ffn, machine: Machine, shards: int, static: int
) -> float:
    """What a predictor's products of few bits cost more than reading it."""
    speeds = {np.dtype(np.int8): machine.int8, np.dtype(np.uint8): machine.int4}
    cost = 0.0
    for n, d, dtype in _predicted(match, settings, shards, static):
        shapes = proof_shapes if settings.certify else packed_shapes
        for kept in shapes(n, d, settings.spec, dtype).values():
            speed = speeds.get(np.dtype(kept.dtype), 1.0)
            cost += kept.size * kept.dtype.itemsize * (1.0 / speed - 1.0)
    return cost


def _predicted(
    match: VocabMatch | FfnMatch, settings: Vocab | Ffn, shards: int, static: int
) -> list[tuple[int, int, Any]]:
    """Rows, columns and dtype of each matrix that is predicted."""
    if isinstance(match, VocabMatch):
        product = match.product
        return [(product.width // shards, product.contracted, product.weight.aval.dtype)]
    assert isinstance(settings, Ffn)
    return [
        (match.units // shards - static, up.product.contracted, up.product.weight.aval.dtype)
        for up, read in zip(match.region.ups, up_forms(match.region, settings), strict=True)
        if settings.spec in read or Proving(settings.spec) in read
    ]


def why_slower(
    match: VocabMatch | FfnMatch,
    settings: Vocab | Ffn,
    excess: float,
    taken: Sequence[tuple[float, int, bool]],
    platform: str,
    shards: int = 1,
    static: int = 0,
) -> str:
    """What a report says of why a site that reads less on a CPU would not be faster; empty where bytes say it.

    Args:
      match, settings, taken, platform, shards, static: as in :func:`sparse_cost`.
      excess: by how much that is above the dense form's cost, on one device.
    """
    if platform != "cpu":
        return ""
    machine, bits = machine_here(), settings.spec.bits
    narrow = _narrow_cost(match, settings, machine, shards, static)
    if bits is not None and narrow > excess:
        speed = machine.int8 if bits == 8 else machine.int4
        other = f"; {settings.spec.instead}" if settings.spec.instead else ""
        return (
            f": on this CPU ({machine.name}) XLA's products of {bits} bits run at {speed:g} of the speed at which the "
            f"dense product reads{other}"
        )
    rows = sum(share * size for share, size, _ in taken)
    more = sum(share * _rows_cost(match, settings, size, platform) for share, size, _ in taken) - rows
    if narrow + more > excess:
        return f": rows chosen one by one cost {1.0 + more / rows:.0f} times what they cost in a dense product"
    return ""


def bytes_read(
    match: VocabMatch | FfnMatch,
    settings: Vocab | Ffn,
    count: int,
    tokens: int,
    computed: int,
    shards: int = 1,
    static: int = 0,
) -> tuple[int, int]:
    """Bytes per execution on one device: of the predictor (and norms), and of the rows computed exactly.

    Args:
      match, settings: the site.
      count: rows, or groups of units, that each token may have of those predicted.
      tokens: of one execution.
      computed: rows computed exactly, those that always are included.
      shards: over how many devices it is.
      static: units that are always computed.
    """
    spec = settings.spec
    if isinstance(match, VocabMatch):
        product = match.product
        dtype = product.weight.aval.dtype
        total = vocab_bytes(tokens, product.width // shards, product.contracted, dtype, spec, candidates=count)
        predicted = total - computed * product.contracted * np.dtype(dtype).itemsize
        predicted += _proof_bytes(settings, product.width // shards, product.contracted, dtype)
        return predicted, computed * product.contracted * product.stored.itemsize
    assert isinstance(settings, Ffn)
    region, down = match.region, match.down
    forms = up_forms(region, settings)
    ups = [
        (up.product.contracted, up.product.weight.aval.dtype, spec if spec in read or Proving(spec) in read else None)
        for up, read in zip(region.ups, forms, strict=True)
    ]
    total = ffn_bytes(
        tokens,
        match.units // shards,
        ups,
        down.width,
        down.weight.aval.dtype,
        active=count,
        group_size=settings.group_size,
        norms="norms" in down_forms(region, settings),
        static=static,
    )
    total += sum(moments_bytes(up[0]) for up, read in zip(ups, forms, strict=True) if "moments" in read)
    total += sum(bounded_moments_bytes(up[0]) for up, read in zip(ups, forms, strict=True) if "bounded_moments" in read)
    total += sum(
        _proof_bytes(settings, match.units // shards, d, dtype) for d, dtype, predicted in ups if predicted is not None
    )
    rows = sum(d * np.dtype(dtype).itemsize for d, dtype, _ in ups)
    rows += down.width * np.dtype(down.weight.aval.dtype).itemsize
    stored = sum(up.product.contracted * up.product.stored.itemsize for up in region.ups)
    return total - computed * rows, computed * (stored + down.width * down.stored.itemsize)


def _proof_bytes(settings: Vocab | Ffn, n: int, d: int, dtype: Any) -> int:
    """What a proof reads more than its predictor alone; nothing where none is asked for."""
    if not settings.certify:
        return 0
    return proof_bytes(n, d, settings.spec, dtype) - predictor_bytes(n, d, settings.spec, dtype)
