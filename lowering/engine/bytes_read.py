"""Weight bytes that one call of a head or a block reads."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hire_xform.lowering.engine.selection import selection_of
from hire_xform.lowering.predict.predictors import Predictor, predictor_bytes

__all__ = ["ffn_bytes", "vocab_bytes"]


def vocab_bytes(
    tokens: int, vocab: int, d: int, dtype: jax.typing.DTypeLike, spec: Predictor, *, candidates: int
) -> int:
    """Weight bytes one call of ``vocab_logits`` reads: the predictor and the candidates' rows."""
    chosen = selection_of(tokens, vocab, candidates).rows_read(tokens)
    return predictor_bytes(vocab, d, spec, dtype) + chosen * d * jnp.dtype(dtype).itemsize


def ffn_bytes(
    tokens: int,
    m: int,
    ups: Sequence[tuple[int, jax.typing.DTypeLike, Predictor | None]],
    d_out: int,
    down_dtype: jax.typing.DTypeLike,
    *,
    active: int,
    group_size: int = 1,
    norms: bool = True,
    static: int = 0,
) -> int:
    """Weight bytes one call of ``ffn`` reads: predictors, chosen up and down rows, and the down norms.

    Args:
      tokens: ``T``.
      m: hidden units.
      ups: ``(d, dtype, spec)`` of each product into them; the spec is None where nothing is predicted.
      d_out: columns of the down matrix.
      down_dtype: its dtype.
      active: groups each token may have computed.
      group_size: units in a group.
      norms: whether the down norms are read.
      static: as of ``ffn``.

    Returns:
      Bytes.
    """
    m -= static
    units = selection_of(tokens, m // group_size, active).rows_read(tokens) * group_size + static
    total = (4 * m if norms else 0) + units * d_out * jnp.dtype(down_dtype).itemsize
    for d, dtype, spec in ups:
        row = d * jnp.dtype(dtype).itemsize
        total += (0 if spec is None else predictor_bytes(m, d, spec, dtype)) + units * row
    return total
