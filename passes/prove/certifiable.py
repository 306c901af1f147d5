"""Whether a site can be certified on a platform, and how exact its dense form is there."""

from __future__ import annotations

from typing import Any

from jax.lax import Precision

from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.match.matches import Match

# Significant bits of an f32 input: all of them. Fewer where a product rounds its inputs first.
ALL_BITS = 24
_PROVED = ("float32", "bfloat16", "float16")


def not_certifiable(match: Match, platform: str) -> str | None:
    """Why a site can't be certified; None when it can."""
    for product in match.products:
        values = (product.x, product.weight, product.out)
        other = next((v.aval.dtype.name for v in values if v.aval.dtype.name not in _PROVED), None)
        if other is not None:
            return f"certify=True is proved for float32, bfloat16 and float16; this has {other}"
    if input_bits(match, platform) is None:
        return f"certify=True does not know what precision={_precision(match)} rounds to on {platform}"
    return kind_of(match).unproved(match, platform)


def input_bits(match: Match, platform: str) -> int | None:
    """Significant bits that the products to be bounded keep of f32 inputs on a platform; None when not known."""
    precision = _precision(match)
    stated = set(precision) if isinstance(precision, (tuple, list)) else {precision}
    if not stated <= {None, *Precision}:
        return None
    if platform == "cpu" or stated == {Precision.HIGHEST}:
        return ALL_BITS
    if all(v.aval.dtype.name == "bfloat16" for p in kind_of(match).bounded(match) for v in (p.x, p.weight)):
        return ALL_BITS  # exact in one pass of bf16, and in TF32
    # TPU: one pass of bf16, at HIGH three. GPU: TF32.
    return {"tpu": 16 if stated == {Precision.HIGH} else 8, "gpu": 11}.get(platform)


def platforms_proved(match: Match, bits: int) -> tuple[str, ...]:
    """Where a match is certified that was planned for products that keep ``bits`` of their inputs."""
    return tuple(
        platform
        for platform in ("cpu", "gpu", "tpu")
        if not_certifiable(match, platform) is None and (input_bits(match, platform) or 0) >= bits
    )


def _precision(match: Match) -> Any:
    stated = [product.node.params["precision"] for product in kind_of(match).bounded(match)]
    if len(stated) == 1:
        return stated[0]
    return tuple(p for each in stated for p in (each if isinstance(each, (tuple, list)) else (each,)))
