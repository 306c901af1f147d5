"""JAX's usual promotion of dtypes and ranks, in which this library's subgraphs are written."""

import contextlib
from collections.abc import Iterator

import jax

__all__ = ["usual_promotion"]


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """Operations on arrays promote as JAX's defaults have it; a context and a decorator.

    ``jax_numpy_dtype_promotion`` and ``jax_numpy_rank_promotion`` are for the user's program. What is run or traced
    while that program is rewritten stands in this context; rules of derivatives and batching, which JAX calls later,
    are decorated.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
