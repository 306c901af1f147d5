"""What a site reads, and what it costs besides reading."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.match.matches import Match
from hire_xform.passes.plan.forms import PackedPredictor
from hire_xform.passes.plan.machine import Machine, machine_here
from hire_xform.passes.plan.settings import Settings
from hire_xform.passes.weights.products import Product, normal_form
from hire_xform.passes.weights.recipe import Transpose

# Bytes of rows up to which an array that they are gathered into is the same at every call; see `Machine.gathered`.
GATHERED = 8 << 20
# What predicting and selecting costs besides reading, as the bytes a dense product would read in that time: once, and
# on a CPU for each row and token that is chosen from, and more where each is bounded.
FIXED_BYTES = {"cpu": 1 << 20, "gpu": 4 << 20, "tpu": 4 << 20}
CHOOSING, BOUNDING = 64, 96

# Where a product of narrow weights has the whole of them widened to f32 first, at every call: the dense form then costs
# as much as one of f32 weights at least (six to sixty times as much, bfloat16 on two cores). Others widen as they go.
WIDENS_FIRST = frozenset({"cpu"})


def dense_cost(match: Match, platform: str) -> int:
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
    match: Match,
    settings: Settings,
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
        each = CHOOSING + (BOUNDING if settings.certify else 0) if kind_of(match).chooses else 0
        cost += tokens * (match.units // shards - static) * each
    for share, rows, dense in taken:
        cost += share * (_rows_cost(match, settings, rows, platform) + (dense_cost(match, platform) / shards) * dense)
    return cost


def row_cost(platform: str) -> float:
    """What a byte of a row that is read out of order costs, of those of a dense product.

    Accelerators read rows of a kilobyte or more about as fast as anything else.
    """
    return machine_here().row if platform == "cpu" else 1.0


def _rows_cost(match: Match, settings: Settings, rows: int, platform: str) -> float:
    """What so many bytes of rows computed exactly cost."""
    cost = rows * row_cost(platform)
    if platform != "cpu" or not kind_of(match).gathers:
        return cost
    machine = machine_here()
    cost += max(0, rows - GATHERED) * (machine.gathered - machine.row)
    # A proof multiplies the rows twice, by their values and by their magnitudes.
    return 2 * cost if settings.certify else cost


def _narrow_cost(match: Match, settings: Settings, machine: Machine, shards: int, static: int) -> float:
    """What a predictor's products of few bits cost more than reading it."""
    speeds = {np.dtype(np.int8): machine.int8, np.dtype(np.uint8): machine.int4}
    cost = 0.0
    n = match.units // shards - static
    for matrix, forms in zip(match.matrices, kind_of(match).forms(match, settings).products, strict=True):
        if not isinstance(forms.predictor, PackedPredictor):
            continue
        for kept in forms.predictor.shapes(n, matrix.columns, matrix.dtype).values():
            speed = speeds.get(np.dtype(kept.dtype), 1.0)
            cost += kept.size * kept.dtype.itemsize * (1.0 / speed - 1.0)
    return cost


def why_slower(
    match: Match,
    settings: Settings,
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
            f": on this CPU ({machine.name}) {machine.whose}products of {bits} bits run at {speed:g} of the speed at "
            f"which the dense product reads{other}"
        )
    rows = sum(share * size for share, size, _ in taken)
    more = sum(share * _rows_cost(match, settings, size, platform) for share, size, _ in taken) - rows
    if rows and narrow + more > excess:
        return f": rows chosen one by one cost {1.0 + more / rows:.0f} times what they cost in a dense product"
    return ""


def bytes_read(match: Match, settings: Settings, computed: int, shards: int = 1, static: int = 0) -> tuple[int, int]:
    """Bytes per execution on one device: of the predictor (and norms), and of the rows computed exactly.

    Args:
      match, settings: the site.
      computed: rows computed exactly, those that always are included.
      shards: over how many devices it is.
      static: units that are always computed.
    """
    n = match.units // shards - static
    held = zip(match.matrices, kind_of(match).forms(match, settings).products, strict=True)
    predicted = sum(form.nbytes(n, matrix.columns, matrix.dtype) for matrix, forms in held for form in forms)
    return predicted, computed * sum(matrix.row_nbytes for matrix in match.matrices)
