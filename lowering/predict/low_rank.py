"""``LowRank``: the best approximation of a rank; HiRE-LR of arXiv 2402.09360."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hire_xform.lowering.predict.factored import Factored
from hire_xform.lowering.predict.factors import SHRINKAGE, matmul, principal_directions, weighted_factors

__all__ = ["LowRank"]


@dataclass(frozen=True, kw_only=True)
class LowRank(Factored):
    """The best rank-r approximation, kept as two factors (HiRE-LR of arXiv 2402.09360).

    With a calibration, the best for the inputs the model really sees: with their covariance C it minimises ``|(W - A B)
    C^(1/2)|_F``, the error of the scores over those inputs, instead of ``|W - A B|_F``. A B is the truncated SVD of ``W
    C^(1/2)``, times ``C^(-1/2)`` (Eckart and Young in the norm of C). C is shrunk towards a multiple of the identity
    first, so that directions the inputs were never seen in count a little.
    """

    # None keeps the tall factor in the matrix's own dtype (f32, or bf16); 8 quantises both factors as
    # `Quantized(8)` does. 4 keeps of the tall one an eighth of the directions, the leading ones, in 8 bits and the
    # others in 4: of trained matrices the leading ones make most of every product.
    bits: int | None = None

    def rank_for(self, n: int, d: int) -> int:
        """The number of directions kept of an ``[n, d]`` matrix, never more than its full rank."""
        return min(super().rank_for(n, d), n)

    def maps(self, gram: jax.Array, inputs: jax.Array | None, rank: int) -> tuple[jax.Array, jax.Array]:
        """The factors of least error, over the inputs where they are known."""
        if inputs is None:
            return (principal_directions(gram, rank),) * 2
        return weighted_factors(gram, inputs, rank)

    def coordinates(self, gram: jax.Array, inputs: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Those in which inputs and rows spread alike."""
        d = gram.shape[0]
        of_rows, of_inputs = (f[:, ::-1] for f in weighted_factors(gram, jnp.eye(d) if inputs is None else inputs, d))
        spread = jnp.sqrt(jnp.maximum(jnp.sum(of_rows * matmul(gram, of_rows), axis=0), SHRINKAGE**2))
        return of_inputs * jnp.sqrt(spread), spread
