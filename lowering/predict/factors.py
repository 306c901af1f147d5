"""Best maps of low rank, in the plain norm and in that of the inputs; only ``[d, d]`` matrices are decomposed."""

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "SHRINKAGE",
    "factor_dtype",
    "leading_directions",
    "matmul",
    "principal_directions",
    "shrunk",
    "weighted_factors",
]

# Share of the mean variance that second moments are shrunk by; also what keeps an inverse root within reach of f32.
SHRINKAGE = 1e-3


def leading_directions(rank: int) -> int:
    """How many of the directions that are kept in 4 bits are kept in 8 instead: an eighth."""
    return rank // 8


def factor_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype a low-rank factor of a matrix of ``dtype`` is kept in: f32, or bf16 for 16-bit matrices."""
    return jnp.dtype(jnp.bfloat16) if jnp.dtype(dtype).itemsize == 2 else jnp.dtype(jnp.float32)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matrix product in full f32."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def principal_directions(gram: jax.Array, rank: int) -> jax.Array:
    """The ``rank`` eigenvectors of largest eigenvalue of a symmetric ``[d, d]``, as columns ``[d, rank]``."""
    return jnp.linalg.eigh((gram + gram.T) / 2.0)[1][:, gram.shape[0] - rank :]


def shrunk(moments: jax.Array) -> jax.Array:
    """Second moments of mean trace one, a little of the identity added; the identity for none."""
    d = moments.shape[0]
    mean = jnp.trace(moments) / d
    scaled = jnp.where(mean > 0.0, moments / jnp.where(mean > 0.0, mean, 1.0), jnp.eye(d))
    return (1.0 - SHRINKAGE) * scaled + SHRINKAGE * jnp.eye(d)


def weighted_factors(gram: jax.Array, covariance: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The best map of a rank in the norm of the inputs: what rows and what inputs are multiplied by.

    With ``gram = W' W``, minimises ``|(W - W E D') C^(1/2)|_F``. By Eckart and Young ``W E D' C^(1/2)`` is the
    truncated SVD of ``W C^(1/2)``: with its right singular vectors V, ``E = C^(1/2) V`` and ``D = C^(-1/2) V``.

    Args:
      gram: f32 ``[d, d]``.
      covariance: C, f32 ``[d, d]``, of any scale; it may be singular, and zero counts as the identity.
      rank: columns of the results.

    Returns:
      E and D, ``[d, rank]``.
    """
    root, inverse = _roots(covariance)
    basis = principal_directions(matmul(matmul(root, gram), root), rank)
    return matmul(root, basis), matmul(inverse, basis)


def _roots(covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The square root of a covariance, shrunk towards the identity, and its inverse."""
    d = covariance.shape[0]
    mean = jnp.trace(covariance) / d
    scaled = jnp.where(mean > 0.0, covariance / jnp.where(mean > 0.0, mean, 1.0), jnp.eye(d))
    values, vectors = jnp.linalg.eigh((scaled + scaled.T) / 2.0)
    root = jnp.sqrt(jnp.maximum(values, 0.0) * (1.0 - SHRINKAGE) + SHRINKAGE)
    return matmul(vectors * root, vectors.T), matmul(vectors / root, vectors.T)
