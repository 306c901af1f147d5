"""Whether functions of ``jax.numpy`` are traced where they are called, or as the jitted functions that they are.

JAX jits nearly all of them, and traces each on its own for every new combination of shapes and dtypes: half of the time
to trace a subgraph, in which most combinations come once. What is computed is the same.

Loops of ``jax.lax`` are unrolled in such a context: they are called through :func:`loop`. What users have written, a
predictor say, is called as it would be anywhere.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

__all__ = ["as_called", "in_line", "loop"]


@contextlib.contextmanager
def in_line() -> Iterator[None]:
    """Jitted functions are traced where they are called; a context and a decorator."""
    with jax.disable_jit():
        yield


@contextlib.contextmanager
def as_called() -> Iterator[None]:
    """Jitted functions are what they are, and loops loops; a context and a decorator."""
    with jax.disable_jit(False):
        yield


def loop(run: Callable[..., Any], body: Callable[..., Any], *operands: Any, **options: Any) -> Any:
    """``run(body, *operands, **options)``, a loop of ``jax.lax`` that stays one; its body is traced as around it."""
    if not jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return run(body, *operands, **options)
    with as_called():
        return run(in_line()(body), *operands, **options)
