"""What ``LowRank`` and ``Projected`` share: rows and tokens on few directions, in floating point or in few bits."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from hire_xform.lowering.predict.coordinates import WHOLE, coordinate_scores, coordinate_shapes, pack_coordinates
from hire_xform.lowering.predict.factors import factor_dtype, leading_directions, matmul
from hire_xform.lowering.predict.few_bits import (
    as_kept,
    as_rows,
    fine_scores,
    pack_nibbles,
    quantize,
    quantize_clipped,
    scores_in_two,
)
from hire_xform.lowering.predict.predictors import Given, PackedArrays, Predictor
from hire_xform.lowering.primitives.products import all_products
from hire_xform.lowering.xla.blocks import fold_row_blocks, map_row_blocks, rows_together
from hire_xform.lowering.xla.in_line import in_line

__all__ = ["Factored"]


@dataclass(frozen=True, kw_only=True)
class Factored(Predictor):
    """A matrix as rows and tokens on few directions; which ones, a subclass says.

    Activations are quantised where the predictor is: in two limbs of 8 bits per token.
    """

    # Directions kept: an int >= 1, or a float in (0, 1] for that fraction of the columns (rounded up).
    rank: int | float = field(kw_only=False)
    bits: int | None = None

    takes_inputs = True
    proves = True
    fine = True
    whole = WHOLE
    in_place = frozenset({"a", "q", "lead_q", "basis_q", "q0", "q1", "q2"})

    def __post_init__(self) -> None:
        """Refuses a value out of range."""
        owner, rank, bits = type(self).__name__, self.rank, self.bits
        if isinstance(rank, bool) or not isinstance(rank, (int, float)):
            raise ValueError(f"{owner}: rank={rank!r} is not a number; expected an int >= 1 or a float in (0, 1]")
        if isinstance(rank, int) and rank < 1:
            raise ValueError(f"{owner}: rank={rank!r} is too small; expected an int >= 1 or a float in (0, 1]")
        if isinstance(rank, float) and not 0.0 < rank <= 1.0:
            raise ValueError(
                f"{owner}: rank={rank!r} is not a fraction of the columns; expected an int >= 1 or a float in (0, 1]"
            )
        if isinstance(bits, bool) or bits not in (None, 8, 4):
            raise ValueError(f"{owner}: bits={bits!r} is not supported; expected None, 8 or 4")

    def rank_for(self, n: int, d: int) -> int:
        """The number of directions kept of an ``[n, d]`` matrix."""
        rank = math.ceil(self.rank * d - 1e-9) if isinstance(self.rank, float) else self.rank
        return max(1, min(rank, d))

    def maps(self, gram: jax.Array, inputs: jax.Array | None, rank: int) -> tuple[jax.Array, jax.Array]:
        """What rows and what tokens are multiplied by, ``[d, rank]`` each, the leading direction last.

        Those of a smaller rank are the last columns of those of a larger one.

        Args:
          gram: f32 ``[d, d]``, of the rows: ``W' W``.
          inputs: as in ``Given``.
          rank: how many.
        """
        raise NotImplementedError

    def coordinates(self, gram: jax.Array, inputs: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """All directions that a proof sees tokens on, ``[d, d]``, the leading one first, and their spreads ``[d]``.

        See ``coordinates.py``.

        Args:
          gram: f32 ``[d, d]``, second moments of the rows, shrunk.
          inputs: as in ``Given``.
        """
        raise NotImplementedError

    def shapes(self, n: int, d: int, dtype: jax.typing.DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """Both factors; in few bits with their scales, the leading directions apart where others have 4."""
        struct, r = jax.ShapeDtypeStruct, self.rank_for(n, d)
        if self.bits is None:
            return {"a": struct((n, r), factor_dtype(dtype)), "basis": struct((d, r), jnp.float32)}
        made = {
            "q": struct((n, r), jnp.int8),
            "scale": struct((n,), jnp.float32),
            "basis_q": struct((r, d), jnp.int8),
            "basis_scale": struct((r,), jnp.float32),
        }
        lead = self._leading(r)
        if self.bits == 4:
            made["q"] = struct((n, (r - lead + 1) // 2), jnp.uint8)
        if lead:
            made |= {"lead_q": struct((n, lead), jnp.int8), "lead_scale": struct((n,), jnp.float32)}
        return made

    def _leading(self, rank: int) -> int:
        return leading_directions(rank) if self.bits == 4 else 0

    def pack(self, rows: jax.Array, given: Given) -> PackedArrays:
        """The arrays of :meth:`shapes`."""
        n, d = rows.shape

        def gram_of(block: jax.Array) -> jax.Array:
            finite = jnp.all(jnp.isfinite(block), axis=1, keepdims=True)
            block = jnp.where(finite, block, 0).astype(jnp.float32)
            return matmul(block.T, block)

        gram = given.once("gram", lambda: fold_row_blocks(gram_of, rows_together(d), rows))
        rank = self.rank_for(n, d)
        # Those of a smaller rank are the leading ones of all. The leading direction first.
        maps = given.once((type(self), "maps"), lambda: self.maps(gram, given.inputs, d))
        of_rows, of_inputs = (f[:, ::-1][:, :rank] for f in maps)
        if self.bits is not None:
            # Directions of equal size lose least to one scale per row, so each direction's size moves into the inputs'.
            squares = jnp.sum(of_rows * matmul(gram, of_rows), axis=0)
            size = jnp.sqrt(jnp.maximum(squares / n, 0.0))
            size = jnp.where(size > 1e-6 * jnp.max(size), size, 1.0)
        else:
            size = jnp.ones(of_rows.shape[1], jnp.float32)
        lead = self._leading(rank)

        def factor(block: jax.Array) -> dict[str, jax.Array]:
            finite = jnp.all(jnp.isfinite(block), axis=1, keepdims=True)
            block = jnp.where(finite, block, 0).astype(jnp.float32)
            a = jnp.where(finite, matmul(block, of_rows / size), jnp.nan)
            if self.bits is None:
                return {"a": a.astype(factor_dtype(rows.dtype))}
            made: dict[str, jax.Array] = {}
            if lead:
                made["lead_q"], made["lead_scale"] = quantize(a[:, :lead], 127)
            if self.bits == 8:
                made["q"], made["scale"] = quantize(a, 127)
            else:
                q, made["scale"] = quantize_clipped(a[:, lead:], 7)
                made["q"] = pack_nibbles(q)
            return made

        parts = map_row_blocks(factor, rows_together(d), rows)
        if self.bits is None:
            return {**parts, "basis": of_inputs}
        basis_q, basis_scale = quantize((of_inputs * size).T, 127)
        return {**parts, "basis_q": basis_q, "basis_scale": basis_scale}

    @in_line()
    def scores(self, x: jax.Array, packed: PackedArrays, n: int) -> jax.Array:
        """Products of the factors, with that of the tokens between them."""
        if self.bits is None:
            z = jnp.matmul(x.astype(jnp.float32), packed["basis"], preferred_element_type=jnp.float32)
            return all_products(z.astype(packed["a"].dtype), packed["a"])
        # Both maps enlarge some directions a hundredfold, and with them what one limb would lose.
        basis = packed["basis_q"], packed["basis_scale"]
        if self.bits == 8:
            return scores_in_two(x.astype(jnp.float32), *basis, packed["q"], packed["scale"])
        z, _ = fine_scores(x.astype(jnp.float32), *basis, 8)
        lead = self._leading(z.shape[1])
        scores, _ = fine_scores(z[:, lead:], packed["q"], packed["scale"], self.bits)
        if lead:
            scores = scores + fine_scores(z[:, :lead], packed["lead_q"], packed["lead_scale"], 8)[0]
        return scores

    def _proof_rank(self, d: int) -> int:
        """Coordinates kept of ``d``: as many of chosen rows as of all."""
        return Factored.rank_for(self, 1, d)

    def scores_of_many(self, x: jax.Array, packed: PackedArrays, n: int) -> jax.Array:
        """One product in f32 of what is kept of tokens and of rows, the leading directions beside the others."""
        if self.bits is None:
            return self.scores(x, packed, n)
        z, _ = fine_scores(x.astype(jnp.float32), packed["basis_q"], packed["basis_scale"], 8)
        lead = self._leading(z.shape[1])
        tokens = [as_kept(z[:, lead:])]
        rows = [as_rows(packed["q"], packed["scale"], self.bits, z.shape[1] - lead)]
        if lead:
            tokens.append(as_kept(z[:, :lead]))
            rows.append(as_rows(packed["lead_q"], packed["lead_scale"], 8, lead))
        return matmul(jnp.concatenate(tokens, axis=1), jnp.concatenate(rows, axis=1).T)

    def proof_shapes(self, n: int, d: int, dtype: jax.typing.DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """As ``coordinates.py`` keeps rows."""
        return coordinate_shapes(n, d, self._proof_rank(d), self.bits, dtype)

    def pack_proof(self, rows: jax.Array, given: Given) -> PackedArrays:
        """The arrays of :meth:`proof_shapes`."""
        rank = self._proof_rank(rows.shape[1])
        return pack_coordinates(rows, rank, self.bits, lambda gram: self.coordinates(gram, given.inputs))

    @in_line()
    def bounds(self, x: jax.Array, proof: PackedArrays, input_bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As ``coordinates.py`` proves them."""
        rank = self._proof_rank(x.shape[1])
        return coordinate_scores(x, dict(proof), rank, self.bits, input_bits=input_bits)
