"""How far the results of two calls of one function are from each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hire_xform.call.stages import Traced
from hire_xform.passes.match.matches import VocabMatch

# How near to 1 the entries of a row sum up that are taken for probabilities, not for logits.
_ONE = 1e-2


@dataclass(frozen=True)
class Agreement:
    """How far a leaf of the sparse result is from that of the dense one, on the arguments that were given.

    Attributes:
      path: the leaf, such as ``result[0]``.
      shape: its shape.
      dtype: its dtype.
      equal: share of entries that are equal.
      largest: of floats, the largest absolute difference of entries that are finite in both.
      relative: that, of the root mean square of the dense leaf's finite entries; None where that is 0.
      unlike: of floats, share of entries that are finite in one of both only, or not finite in different ways. From a
        quarter of the dtype's largest number on they count as infinite: masks have such numbers.
      argmax: of logits that a rewritten vocabulary projection returns, or any where other products are read compressed,
        the share of tokens with the same arg max.
      kl: of those, the mean KL divergence of the sparse softmax from the dense one, nats a token.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    equal: float
    largest: float | None = None
    relative: float | None = None
    unlike: float | None = None
    argmax: float | None = None
    kl: float | None = None

    def __str__(self) -> str:
        """One line."""
        told = [f"{self.equal:.4%} of entries equal"]
        if self.largest is not None:
            of_rms = "" if self.relative is None else f" ({self.relative:.2g} of the dense root mean square)"
            told = [f"largest difference {self.largest:.3g}{of_rms}"]
        if self.unlike:
            told.append(f"{self.unlike:.4%} of entries are finite in one of both only")
        if self.argmax is not None:
            told.append(f"arg max equal for {self.argmax:.4%} of tokens")
            told.append(f"KL divergence {self.kl:.3g} nats a token")
        return f"{self.path}  {self.dtype}{list(self.shape)}: {'; '.join(told)}"


def agreements(dense: Any, sparse: Any, axes: dict[int, int]) -> tuple[Agreement, ...]:
    """One for each leaf.

    Args:
      dense, sparse: two results of one function.
      axes: of the leaves that are logits, by number, the axis of the vocabulary.
    """
    leaves = zip(jax.tree_util.tree_leaves_with_path(dense), jax.tree.leaves(sparse), strict=True)
    return tuple(
        _agreement(f"result{jax.tree_util.keystr(path)}", one, other, axes.get(number))
        for number, ((path, one), other) in enumerate(leaves)
    )


def logits_axes(traced: Traced) -> dict[int, int]:
    """Which leaves of the result are logits, or rise with them, by number; and the vocabulary's axis.

    Those of a site; and where products are read compressed those of any projection that something says is one.
    """
    found: dict[int, int] = {}
    decided = [decision.match for decision in traced.plan.decisions]
    # Other products that are read compressed move logits, too, however these are computed.
    compressed = any(not site.computed for site in traced.plan.sites)
    for match in traced.matches:
        if not isinstance(match, VocabMatch) or not (match in decided or (compressed and match.evidence)):
            continue
        for reader in match.readers:
            if reader.kind == "returned" and reader.slope > 0 and len(reader.dims) == 1:
                (axis,) = reader.dims
                found |= {number: axis for number, value in enumerate(traced.results) if value is reader.value}
    return found


def _agreement(path: str, dense: Any, sparse: Any, axis: int | None) -> Agreement:
    shape, dtype = tuple(dense.shape), str(dense.dtype)
    if jnp.issubdtype(dense.dtype, jax.dtypes.prng_key):
        dense, sparse = jax.random.key_data(dense), jax.random.key_data(sparse)
    if not dense.size:
        return Agreement(path, shape, dtype, 1.0)
    if not jnp.issubdtype(dense.dtype, jnp.inexact):
        return Agreement(path, shape, dtype, float(_equal(dense, sparse)))
    equal, largest, rms, unlike = (float(x) for x in _distance(dense, sparse))
    relative = largest / rms if rms > 0 else None
    argmax = kl = None
    if axis is not None and jnp.issubdtype(dense.dtype, jnp.floating):
        argmax, kl = (float(x) for x in _as_logits(dense, sparse, axis))
    return Agreement(path, shape, dtype, equal, largest, relative, unlike, argmax, kl)


@jax.jit
def _equal(dense: Any, sparse: Any) -> Any:
    return jnp.mean(dense == sparse)


@jax.jit
def _distance(dense: Any, sparse: Any) -> tuple[Any, Any, Any, Any]:
    """Share of equal entries, largest difference, root mean square of the dense ones, share of unlike ones."""
    most = float(jnp.finfo(dense.dtype).max) / 4
    same = (dense == sparse) | (jnp.isnan(dense) & jnp.isnan(sparse))
    a, b = (_wide(x) for x in (dense, sparse))
    is_a, is_b = (jnp.abs(x) < most for x in (a, b))
    largest = jnp.max(jnp.where(is_a & is_b, jnp.abs(a - b), 0))
    sizes = jnp.where(is_a, jnp.abs(a), 0)
    scale = jnp.maximum(jnp.max(sizes), jnp.finfo(sizes.dtype).tiny)
    rms = scale * jnp.sqrt(jnp.sum(jnp.square(sizes / scale)) / jnp.maximum(jnp.sum(is_a), 1))
    return jnp.mean(same), largest, rms, jnp.mean(~(is_a & is_b | same))


@partial(jax.jit, static_argnums=2)
def _as_logits(dense: Any, sparse: Any, axis: int) -> tuple[Any, Any]:
    """Share of tokens of the same arg max, and the mean KL divergence; of probabilities as they are."""
    a, b = (jnp.moveaxis(_wide(x), axis, -1) for x in (dense, sparse))
    argmax = jnp.mean(jnp.argmax(a, -1) == jnp.argmax(b, -1))
    drawn = jnp.all(a >= 0) & jnp.all(jnp.abs(jnp.sum(a, -1) - 1) < _ONE)
    log_a, log_b = (jnp.where(drawn, jnp.log(x), jax.nn.log_softmax(x)) for x in (a, b))
    weight = jnp.exp(log_a)
    each = jnp.sum(jnp.where(weight > 0, weight * (log_a - log_b), 0), -1)
    return argmax, jnp.mean(jnp.maximum(each, 0))


def _wide(x: Any) -> Any:
    # Of four bytes at least; those of fewer do not all promote by themselves.
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
