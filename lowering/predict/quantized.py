"""``Quantized``: every entry of a matrix in few bits; HiRE-Q of arXiv 2402.09360.

Tokens are quantised as well: symmetric, in 8 bits, and where something is to be proved in two limbs of 8.

What is proved: for a row w kept as q (its quantised entries times its scale) and a token x kept as y, with score ``s =
q . y``,

    w . x - s = (w - q) . x + q . (x - y),   so   |w . x - s| <= |w - q| |x| + |q| |x - y|        (Cauchy-Schwarz)

The first norm is the row's *error*, the second its *size*; both are kept. ``y`` is x in two 8-bit limbs, ``t (a + b /
254)``, so that ``|x - y|`` is some ten-thousandths of ``|x|``. Rounding is that of ``lowering/prove/bounds.py``.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.predict.few_bits import entries, fine_scores, pack_nibbles, quantize, quantized_scores
from hire_xform.lowering.predict.predictors import Given, PackedArrays, Predictor
from hire_xform.lowering.prove.bounds import U, norm, slack, tiny
from hire_xform.lowering.xla.blocks import map_row_blocks, rows_together
from hire_xform.lowering.xla.in_line import in_line

__all__ = ["Quantized"]


@dataclass(frozen=True, kw_only=True)
class Quantized(Predictor):
    """Every entry in 8 or 4 bits, symmetric, with one f32 scale per row (HiRE-Q of arXiv 2402.09360 is 4 bits)."""

    # Bits of an entry: 8 or 4. Two 4-bit entries share a byte.
    bits: int = field(kw_only=False)

    proves = True
    in_place = frozenset({"q"})
    instead = "a predictor of low rank, which a calibration finds, may be faster"

    def __post_init__(self) -> None:
        """Refuses a value out of range."""
        if isinstance(self.bits, bool) or self.bits not in (4, 8):
            raise ValueError(f"Quantized: bits={self.bits!r} is not supported; expected 8 or 4")

    def shapes(self, n: int, d: int, dtype: jax.typing.DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """Entries, two to a byte in 4 bits, and a scale per row."""
        struct = jax.ShapeDtypeStruct
        q = struct((n, d), jnp.int8) if self.bits == 8 else struct((n, (d + 1) // 2), jnp.uint8)
        return {"q": q, "scale": struct((n,), jnp.float32)}

    def pack(self, rows: jax.Array, given: Given) -> PackedArrays:
        """The arrays of :meth:`shapes`."""
        return map_row_blocks(self._kept, rows_together(rows.shape[1]), rows)

    def _kept(self, rows: jax.Array) -> dict[str, jax.Array]:
        q, scale = quantize(rows, 127 if self.bits == 8 else 7)
        return {"q": q if self.bits == 8 else pack_nibbles(q), "scale": scale}

    @in_line()
    def scores(self, x: jax.Array, packed: PackedArrays, n: int) -> jax.Array:
        """Integer products of quantised tokens and quantised rows, then both scales."""
        return quantized_scores(x, packed["q"], packed["scale"], self.bits)

    def scores_of_many(self, x: jax.Array, packed: PackedArrays, n: int) -> jax.Array:
        """One product of integers, those of 4 bits unpacked all at once."""
        return quantized_scores(x, entries(packed["q"], self.bits, x.shape[1]), packed["scale"], 8)

    def proof_shapes(self, n: int, d: int, dtype: jax.typing.DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """What is packed, and of every row its error and its size."""
        bound = jax.ShapeDtypeStruct((n,), "float32")
        return {**self.shapes(n, d, dtype), "error": bound, "size": bound}

    def pack_proof(self, rows: jax.Array, given: Given) -> PackedArrays:
        """The arrays of :meth:`proof_shapes`."""
        return map_row_blocks(self._kept_with_bounds, rows_together(rows.shape[1]), rows)

    def _kept_with_bounds(self, rows: jax.Array) -> dict[str, jax.Array]:
        packed = self._kept(rows)
        kept = entries(packed["q"], self.bits, rows.shape[1]).astype(jnp.float32) * packed["scale"][:, None]
        exact = rows.astype(jnp.float32)
        # The difference is rounded once, by at most u of either term.
        error = norm(exact - kept) * (1.0 + 4.0 * U) + 2.0 * U * norm(exact)
        return {**packed, "error": error, "size": norm(kept)}

    @in_line()
    def bounds(self, x: jax.Array, proof: PackedArrays, input_bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Scores of tokens in two limbs, bounded as at the head of this file."""
        x = x.astype(jnp.float32)
        d = x.shape[1]
        scores, kept = fine_scores(x, proof["q"], proof["scale"], self.bits)
        x, kept = lax.stop_gradient((x, kept))
        size = norm(x)[:, None]
        # What was kept of x is computed with a rounding of at most 4 u of x.
        left = norm(x - kept)[:, None] + 8.0 * U * size
        error, row = proof["error"][None, :], proof["size"][None, :]
        rounding = slack(d, input_bits) * (error + row) * size + tiny(d)
        upper = lax.stop_gradient(scores) + (error * size + row * left) * (1.0 + 8.0 * U) + rounding
        # The sum above is rounded, too: by at most 4 u of its largest term.
        upper = upper + 4.0 * U * jnp.abs(upper)
        return scores, upper, 2.0 * rounding
