"""An identity that is lowered only for the platforms that a proof holds for.

Products of f32 are rounded to fewer bits on some platforms than on others, and a program may be lowered for any of them
long after it was planned for one: by ``jax.export``, by ``lower(lowering_platforms=...)``, or by arrays that moved.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from hire_xform.lowering.xla.eager import compiled_alone

__all__ = ["lowered_for", "proved_for", "proved_for_p"]

# The names that JAX lowers for, and what plans call them.
_PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


def proved_for(value: jax.Array, platforms: Sequence[str], path: str) -> jax.Array:
    """``value``, of which something is proved on some platforms.

    Args:
      value: any array.
      platforms: among "cpu", "gpu" and "tpu".
      path: what it is the value of, for the message.

    Returns:
      The value. Lowering it for another platform raises ``ValueError``.
    """
    return proved_for_p.bind(value, platforms=tuple(platforms), path=path)


def lowered_for(platforms: Sequence[str]) -> tuple[str, ...]:
    """What is among "cpu", "gpu" and "tpu" as JAX names what it lowers for."""
    return tuple(name for name, planned in _PLATFORMS.items() if planned in platforms)


def _lower(asked: str, ctx: Any, value: Any, *, platforms: tuple[str, ...], path: str) -> list[Any]:
    if _PLATFORMS[asked] not in platforms:
        raise ValueError(
            f"{path} is certified for {' and '.join(platforms)}, and is now lowered for {asked}, which rounds "
            "differently; expected a step traced for arguments that are placed on devices of that platform, or, for "
            "one program that serves several, products in bfloat16 or at precision=HIGHEST, or certify=False"
        )
    return [value]


def _abstract(value: ShapedArray, *, platforms: tuple[str, ...], path: str) -> ShapedArray:
    return value


def _batch(args: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    return proved_for_p.bind(args[0], **params), dims[0]


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    return proved_for_p.bind(primals[0], **params), tangents[0]


proved_for_p = Primitive("hire_proved_for")
proved_for_p.def_impl(compiled_alone(proved_for_p, "platforms", "path"))
proved_for_p.def_abstract_eval(_abstract)
batching.primitive_batchers[proved_for_p] = _batch
ad.primitive_jvps[proved_for_p] = _jvp
for _name in _PLATFORMS:
    mlir.register_lowering(proved_for_p, functools.partial(_lower, _name), platform=_name)
