"""What an eager call of a primitive runs: the primitive, compiled by itself."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive

__all__ = ["compiled_alone"]


def compiled_alone(primitive: Primitive, *static: str) -> Callable[..., Any]:
    """An implementation for ``primitive.def_impl``; ``static`` names its parameters."""
    compiled = jax.jit(primitive.bind, static_argnames=static)

    def implementation(*operands: Any, **params: Any) -> Any:
        # Under jax.disable_jit the call would come back here.
        with jax.disable_jit(False):
            return compiled(*operands, **params)

    return implementation
