"""How far what floating point makes of a product can be from the exact one, and what is proved of a score.

With u = 2^-24 and d columns:

- A product of two f32 vectors summed in f32 in any order is within ``d u / (1 - d u) |w| |x|`` of the exact one
  (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). 16-bit inputs are exact in f32; a 16-bit
  *result* is rounded once, which keeps order and is applied to both ends of an interval.
- Of scores made of integer products of a row q and a token in two 8-bit limbs, those products are exact. What is made
  of them rounds each limb's sum, the two scales and the addition: within ``8 u (1 + sqrt(d) / 64) |q| |x|``.
- Norms are scaled by their largest entry before squaring, so that nothing overflows or vanishes, and are rounded up by
  ``1 + (d + 16) u``.
- Whatever is flushed to zero is less than 2^-126 each time, times at most ``2^15 d`` where an integer product follows.

``slack`` and ``tiny`` add these up with room to spare. They hold for dense products accumulated in f32 or better. What
is assumed of each platform says ``arithmetic.py``: where inputs of f32 are rounded to fewer bits first (``input_bits``)
a term for them is added, and where sums may be cut off instead of rounded, three units stand for one.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.prove.arithmetic import ALL_BITS, WHOLE_BITS, sum_units

__all__ = ["ScoresWithBounds", "U", "flushed", "norm", "product_error", "slack", "tiny"]

# Half of f32's last place.
U = 2.0**-24


def slack(d: int, input_bits: int = WHOLE_BITS) -> float:
    """The relative rounding of a product of ``d`` terms and of a score, to be multiplied by both norms.

    Args:
      d: how many terms.
      input_bits: what the product keeps of its inputs, and its sums; by default what our own products in f32 keep,
        which are asked for at the highest precision, on every platform.
    """
    return 1.02 * (sum_units(input_bits) * d + 2.0 * d**0.5 + 48.0) * U + _of_inputs(input_bits)


def _of_inputs(input_bits: int) -> float:
    return 2.1 * 2.0**-input_bits if input_bits < WHOLE_BITS else 0.0


def product_error(terms: jax.Array, d: int, input_bits: int = ALL_BITS, product: jax.Array | None = None) -> jax.Array:
    """How far two products of the same ``d`` terms can be from each other, whatever the order of their sums.

    Either is within ``d u / (1 - d u)`` of the exact one, times the sum of the terms' magnitudes; that is less than the
    product of the norms, and known where the row is read. It holds for one that is subtracted from what was computed.

    Where the sum is known too, less is: each of at most d additions rounds by u of a partial sum, and in whatever order
    one lies between all that is negative and all that is positive. The larger of these is half of the sum of the
    magnitudes and the sum's own, and no product is larger than it. Products are rounded by u of themselves.

    Args:
      terms: that sum, computed in f32.
      d: how many terms.
      input_bits: significant bits that the dense product keeps of its f32 inputs; see ``arithmetic.py``.
      product: the sum itself, computed in f32 in any order; None where it is not known.
    """
    largest = terms if product is None else 0.5 * (terms + jnp.abs(product))
    sums = 1.02 * U * (sum_units(input_bits) * d * largest + 16.0 * terms)
    return 2.0 * (sums + _of_inputs(input_bits) * terms + tiny(d))


def tiny(d: int) -> float:
    """What may be lost to zero in a product of ``d`` terms and in a score, of inputs below ``2^18``."""
    return d * 2.0**-108


def flushed(x: jax.Array) -> jax.Array:
    """What two products of the same row may differ by where its denormal entries are lost in one, ``[T, 1]``."""
    peak = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return 2.0 * x.shape[-1] * 2.0**-126 * peak


def norm(values: jax.Array) -> jax.Array:
    """An upper bound of the Euclidean norm along the last axis, f32; NaN or infinite where an entry is."""
    values = values.astype(jnp.float32)
    d = values.shape[-1]
    peak = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    divisor = jnp.where(peak > 0.0, peak, 1.0)
    squares = jnp.sum(jnp.square(values / divisor), axis=-1)
    return peak[..., 0] * jnp.sqrt(squares) * (1.0 + (d + 16.0) * U) + 2.0**-118


@dataclass(frozen=True)
class ScoresWithBounds:
    """Scores and what is proved of them.

    Attributes:
      scores: f32 ``[T, n]``.
      upper: f32 ``[T, n]``: no dense product, in f32 and any order of summation, is above it. NaN where nothing is
        known.
      exact_error: f32 ``[T, n]``: a product of the same row and token, in f32 and any order, is within this of any
        other.
    """

    scores: jax.Array
    upper: jax.Array
    exact_error: jax.Array

    @property
    def lower(self) -> jax.Array:
        """f32 ``[T, n]``: no dense product is below it; all bounds are the same on both sides of a score."""
        scores = lax.stop_gradient(self.scores)
        return scores - (self.upper - scores) * (1.0 + 8.0 * U) - 8.0 * U * jnp.abs(scores)
