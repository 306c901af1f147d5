"""``hire_scores`` and ``hire_bounds``: products with every row, predicted from little, and what no product is above."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from hire_xform.lowering.primitives.kernels import bind_step, step_primitive
from hire_xform.lowering.primitives.stack_entry import whole
from hire_xform.lowering.xla.in_line import as_called

__all__ = ["bounded_scores", "bounds_p", "predicted_scores", "scores_p"]


class _Scores(Protocol):
    @property
    def in_place(self) -> frozenset[str]:
        """The arrays that it takes as entries of stacks."""

    def scores(self, x: jax.Array, packed: Mapping[str, jax.Array], n: int) -> jax.Array:
        """The predicted ``x @ rows.T``."""


class _Bounds(Protocol):
    @property
    def in_place(self) -> frozenset[str]:
        """As that of `_Scores`."""

    def bounds(self, x: jax.Array, proof: Mapping[str, jax.Array], input_bits: int) -> Sequence[jax.Array]:
        """The same with bounds."""


def _taken(packed: Mapping[str, Any], in_place: frozenset[str]) -> dict[str, Any]:
    """What is packed, with those entries of stacks taken out that a predictor does not take as they are."""
    return {name: array if name in in_place else whole(array) for name, array in packed.items()}


def predicted_scores(x: jax.Array, packed: Mapping[str, Any], spec: _Scores, n: int) -> jax.Array:
    """A predictor's scores.

    Args:
      x: ``[T, d]``.
      packed: the predictor's arrays, by name; some may be entries of stacks.
      spec: the predictor.
      n: rows of the matrix.

    Returns:
      f32 ``[T, n]``.

    Raises:
      ValueError: the predictor gives scores of another shape.
    """
    names, packed = tuple(packed), _taken(packed, spec.in_place)

    def portable(x: jax.Array, *arrays: Any) -> list[jax.Array]:
        with as_called():
            scores = spec.scores(x, dict(zip(names, arrays, strict=True)), n)
        if scores.shape != (x.shape[0], n):
            raise ValueError(f"predictor {spec!r}: its scores have shape {scores.shape}; expected {(x.shape[0], n)}")
        return [scores.astype(jnp.float32)]

    return bind_step(scores_p, portable, x, *packed.values(), names=names, spec=spec, n=n)[0]


def bounded_scores(
    x: jax.Array, proof: Mapping[str, Any], spec: _Bounds, input_bits: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A predictor's scores with bounds.

    Args:
      x: ``[T, d]``, f32 or 16 bits.
      proof: the arrays of its proof, by name; some may be entries of stacks.
      spec: the predictor.
      input_bits: significant bits that the dense product keeps of its f32 inputs.

    Returns:
      ``scores``, ``upper`` and ``exact_error`` of ``ScoresWithBounds``.
    """
    names, proof = tuple(proof), _taken(proof, spec.in_place)

    def portable(x: jax.Array, *arrays: Any) -> list[jax.Array]:
        with as_called():
            return list(spec.bounds(x, dict(zip(names, arrays, strict=True)), input_bits))

    made = bind_step(bounds_p, portable, x, *proof.values(), names=names, spec=spec, input_bits=input_bits)
    scores, upper, exact_error = made
    return scores, upper, exact_error


# A kernel: rule(x, *arrays, names, spec, n) -> what predicted_scores returns; `names` are those of the arrays.
scores_p = step_primitive("hire_scores")
# A kernel: rule(x, *arrays, names, spec, input_bits) -> what bounded_scores returns. Its bounds have to hold as well.
bounds_p = step_primitive("hire_bounds")
