"""A vocabulary projection whose arg max is proved, per input, to be the dense one's; else the dense product is run.

Candidates are the rows of largest *upper bound*. The best of them is the dense arg max when no other row's interval of
possible dense values reaches its own; where intervals meet only in a value that both round to, the lower index must be
the best's, as the dense arg max breaks ties. The proof is of the logits as the projection returns them, whatever the
order in which the dense product sums; see ``lowering/bounds.py``. Section 5 of the design; derived there and here.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hire_xform.lowering.goals import Goal, proved
from hire_xform.lowering.predictors import PredictorSpec
from hire_xform.lowering.proofs import Proof, scores_with_bounds
from hire_xform.lowering.rows import select_rows_dot
from hire_xform.lowering.selection import choose, select

__all__ = ["certified_logits"]


def certified_logits(
    x: jax.Array,
    rows: jax.Array,
    proof: Proof,
    spec: PredictorSpec,
    dense: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    candidates: int,
    goal: Goal = True,
    vocab: int | None = None,
    first_row: jax.Array | int = 0,
    fill: Literal["predicted", "-inf"] = "predicted",
    out_dtype: jax.typing.DTypeLike,
    input_bits: int = 24,
) -> tuple[jax.Array, jax.Array]:
    """``x @ rows.T`` with exact logits for the candidates, and the arg max (or another goal) of the dense product.

    Under ``vmap`` over ``x`` the tokens of all examples are taken together: one dense product if any of them fails.

    Args:
      x: ``[T, d]``, f32 or 16 bits.
      rows: ``[V, d]`` of the same kind, or a taller matrix that holds these rows from ``first_row`` on.
      proof: what is kept of the ``V`` rows, with bounds.
      spec: the predictor's spec.
      dense: the dense product of ``[T, d]`` and ``[V, d]``, of ``out_dtype``, ``[T, V]``.
      candidates: rows each token may have computed exactly.
      goal: what is to be proved; True is the arg max.
      vocab: ``V``; None takes all of ``rows``.
      first_row: where the rows begin.
      fill: what stands for the other logits.
      out_dtype: dtype of the logits.
      input_bits: significant bits that the dense product keeps of f32 inputs.

    Returns:
      Logits ``[T, V]`` of ``out_dtype``, and a bool scalar: whether the dense product was run.
    """
    vocab = rows.shape[0] if vocab is None else vocab
    out = jnp.dtype(out_dtype)
    # Arrays are operands of `run`, never closed over: transformations have to see them.
    arrays = (rows, proof, jnp.asarray(first_row, jnp.int32))

    def own_rows(rows: jax.Array, first_row: jax.Array) -> jax.Array:
        return rows if rows.shape[0] == vocab else lax.dynamic_slice_in_dim(rows, first_row, vocab)

    @jax.custom_batching.custom_vmap
    def run(x: jax.Array, arrays: tuple) -> tuple[jax.Array, jax.Array]:
        rows, proof, first_row = arrays
        start = 0 if rows.shape[0] == vocab else first_row
        logits, sure = _attempt(x, rows, proof, spec, goal, candidates, vocab, start, fill, out, input_bits)
        fallback = jnp.logical_not(jnp.all(sure))
        return lax.cond(fallback, lambda: dense(x, own_rows(rows, first_row)), lambda: logits), fallback

    @run.def_vmap
    def _batched(size: int, in_batched: list, x: jax.Array, arrays: tuple) -> tuple:
        if any(jax.tree.leaves(in_batched[1])):
            x_of, arrays_of = (jax.tree.map(_spread(size), a, b) for a, b in zip((x, arrays), in_batched, strict=True))
            return lax.map(lambda pair: run(*pair), (x_of, arrays_of)), (True, True)
        logits, fallback = run(x.reshape(-1, x.shape[-1]), arrays)
        return (logits.reshape(size, -1, vocab), jnp.broadcast_to(fallback, (size,))), (True, True)

    @jax.custom_jvp
    def differentiable(x: jax.Array, arrays: tuple) -> tuple[jax.Array, jax.Array]:
        return run(x, arrays)

    @differentiable.defjvp
    def _jvp(primals: tuple, tangents: tuple) -> tuple:
        """The dense product's, of every logit that is not minus infinity; it reads every row."""
        (x, arrays), (dx, darrays) = primals, tangents
        logits, fallback = differentiable(x, arrays)
        change = dense(dx, own_rows(arrays[0], arrays[2])) + dense(x, own_rows(darrays[0], arrays[2]))
        change = jnp.where(logits == -jnp.inf, jnp.zeros((), change.dtype), change)
        return (logits, fallback), (change, np.zeros(fallback.shape, jax.dtypes.float0))

    return differentiable(x, arrays)


def _spread(size: int) -> Callable[[jax.Array, bool], jax.Array]:
    """Gives what is not batched a leading axis of ``size``."""
    return lambda array, batched: array if batched else jnp.broadcast_to(array, (size, *jnp.shape(array)))


def _attempt(
    x: jax.Array,
    rows: jax.Array,
    proof: Proof,
    spec: PredictorSpec,
    goal: Goal,
    candidates: int,
    vocab: int,
    first_row: jax.Array | int,
    fill: str,
    out_dtype: jnp.dtype,
    input_bits: int,
) -> tuple[jax.Array, jax.Array]:
    """Logits, and for each token whether the goal is proved."""
    tokens = x.shape[0]
    selection = choose(tokens, vocab, candidates)
    with jax.named_scope("predict"):
        found = scores_with_bounds(x, proof, spec, input_bits=input_bits)
    with jax.named_scope("select"):
        index = select(found.upper, selection)
    with jax.named_scope("compute"):
        exact = select_rows_dot(
            x, rows, index + first_row, preferred_element_type=jnp.promote_types(out_dtype, jnp.float32)
        )
        at = (slice(None), index) if index.ndim == 1 else (jnp.arange(tokens)[:, None], index)
        rest = found.scores if fill == "predicted" else jnp.full(found.scores.shape, -jnp.inf, exact.dtype)
        logits = rest.astype(exact.dtype).at[at].set(exact, unique_indices=True, mode="promise_in_bounds")
        logits = logits.astype(out_dtype)
    with jax.named_scope("prove"):
        outside = found.upper.at[at].set(-jnp.inf, unique_indices=True, mode="promise_in_bounds")
        error = jnp.take_along_axis(found.exact_error, jnp.broadcast_to(index, exact.shape), axis=1)
        sure = proved(goal, lax.stop_gradient(exact), error, outside, index, out_dtype)
    return logits, sure
