"""``Projected``: rows on the principal directions of their inputs."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hire_xform.lowering.predict.factored import Factored
from hire_xform.lowering.predict.factors import matmul, principal_directions, shrunk

__all__ = ["Projected"]


@dataclass(frozen=True, kw_only=True)
class Projected(Factored):
    """The rows on the principal directions of the inputs, as a calibration saw them; needs one.

    Where trained models' inputs live near a subspace of few dimensions, little is lost by it. ``LowRank``, fitted to
    the same inputs, looks at the rows as well, and is to be preferred: docs/calibration.md has what was measured.
    """

    # None keeps the projected rows in the matrix's own dtype (f32, or bf16); 8 keeps them, and the directions, as
    # `Quantized(8)` does; 4 keeps seven eighths of the rows' coordinates in 4 bits, as of `LowRank`.
    bits: int | None = None

    needs_inputs = "principal directions"

    def maps(self, gram: jax.Array, inputs: jax.Array | None, rank: int) -> tuple[jax.Array, jax.Array]:
        """The principal directions, for both."""
        assert inputs is not None
        return (principal_directions(inputs, rank),) * 2

    def coordinates(self, gram: jax.Array, inputs: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The principal directions, scaled so that inputs and rows spread alike."""
        assert inputs is not None
        inputs = shrunk(inputs)
        basis = principal_directions(inputs, gram.shape[0])[:, ::-1]
        of_inputs = jnp.sum(basis * matmul(inputs, basis), axis=0)
        of_rows = jnp.sum(basis * matmul(gram, basis), axis=0)
        return basis * jnp.sqrt(jnp.sqrt(of_rows / of_inputs)), jnp.sqrt(of_inputs * of_rows)
