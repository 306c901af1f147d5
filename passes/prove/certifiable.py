"""Whether a site can be certified on a platform, and how exact its dense form is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.lax import Precision

from hire_xform.lowering.primitives.stored_rows import Operation
from hire_xform.lowering.prove.arithmetic import kept_bits
from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.match.matches import Match
from hire_xform.passes.weights.few_bits import in_few_bits
from hire_xform.passes.weights.products import Product

_PROVED = ("float32", "bfloat16", "float16")
_PLATFORMS = ("cpu", "gpu", "tpu")


def not_certifiable(match: Match, platform: str) -> str | None:
    """Why a site can't be certified; None when it can."""
    why = _not_anywhere(match)
    if why is not None:
        return why
    if input_bits(match, platform) is None:
        return f"certify=True does not know what precision={_precision(match)} rounds to on {platform}"
    return kind_of(match).unproved(match, platform)


def _not_anywhere(match: Match) -> str | None:
    """Why no platform proves anything of its products."""
    for product in match.products:
        dtypes = [v.aval.dtype for v in (product.x, product.out)]
        # Integers of eight bits are multiplied as they are, being exact in all of these.
        dtypes += [] if _is_exact(product) else [product.weight.aval.dtype]
        other = next((dtype.name for dtype in dtypes if dtype.name not in _PROVED), None)
        if other is not None:
            return f"certify=True is proved for float32, bfloat16 and float16; this has {other}"
        why = _unsure(product.origin.recipe.operations)
        if why is not None:
            return f"certify=True is not proved of weights that are made {why}"
    return None


def _is_exact(product: Product) -> bool:
    return jnp.issubdtype(product.weight.aval.dtype, jnp.integer) and in_few_bits(product.weight.aval.dtype)


def _unsure(operations: Sequence[Operation]) -> str | None:
    """Why it is not known to the last bit which weights a program makes of what is stored; None where it is.

    Integers are added exactly, and f32 is rounded at each operation: XLA keeps its roundings, but for those of bfloat16
    and float16 that are widened again, for a product that is added to (which may be fused), and for a division (which
    may be by a reciprocal).
    """
    multiplied = False
    for operation in operations:
        dtype = np.dtype(operation.dtype)
        if jnp.issubdtype(dtype, jnp.integer):
            continue
        if dtype != np.float32:
            return f"of scales in {dtype.name}: whether they are rounded is the compiler's choice"
        if operation.name == "div":
            return "by a division, which a compiler may make a product of"
        if operation.name in ("add", "sub") and multiplied:
            return f"by {'an addition to' if operation.name == 'add' else 'a subtraction from'} a product"
        multiplied |= operation.name == "mul"
    return None


def input_bits(match: Match, platform: str) -> int | None:
    """Significant bits that are sure to be kept of inputs of the products to be bounded on a platform; None: not known.

    What that says of their sums, and where it is from: ``lowering/prove/arithmetic.py``.
    """
    precision = _precision(match)
    stated = set(precision) if isinstance(precision, (tuple, list)) else {precision}
    if not stated <= {None, *Precision}:
        return None
    inputs = {v.aval.dtype.name for p in kind_of(match).bounded(match) for v in (p.x, p.weight)}
    if inputs == {"bfloat16"}:
        return kept_bits("bf16", platform)
    if inputs <= {"bfloat16", "float16"} and stated != {Precision.HIGHEST}:
        return kept_bits("f16", platform)
    if stated == {Precision.HIGHEST}:
        return kept_bits("f32, HIGHEST", platform)
    return kept_bits("f32, HIGH" if stated == {Precision.HIGH} else "f32", platform)


def platforms_proved(match: Match, bits: int) -> tuple[str, ...]:
    """Where a match is certified that was planned for products that keep ``bits`` of their inputs."""
    if _not_anywhere(match) is not None:
        return ()
    unproved = kind_of(match).unproved
    return tuple(p for p in _PLATFORMS if (input_bits(match, p) or 0) >= bits and unproved(match, p) is None)


def _precision(match: Match) -> Any:
    stated = [product.node.params["precision"] for product in kind_of(match).bounded(match)]
    if len(stated) == 1:
        return stated[0]
    return tuple(p for each in stated for p in (each if isinstance(each, (tuple, list)) else (each,)))
