"""How many rows to choose for a handful of tokens, and which.

Tokens of one step may each have their own rows, or share one set that holds what every one of them wants. Reading is
what costs, so the fewer rows read wins (:func:`selection_of`); which rows they are is decided from scores
(:func:`select`).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from hire_xform.lowering.primitives.da_top_k import best_rows, da_top_k

__all__ = ["Selection", "entries", "leaves_out", "rungs", "select", "selection_of"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The static shape of a choice of rows (or of groups of rows)."""

    # "shared": one set for all tokens, an index [size]. "per_token": a set for each, an index [T, size].
    mode: Literal["per_token", "shared"]
    # Entries of the index: compiled in, so a shared set is as large as the expected union, not the actual one.
    size: int
    # What each token asked for; a shared set of several tokens holds more.
    k: int

    def rows_read(self, tokens: int) -> int:
        """Rows (or groups) that one use of the index reads."""
        return self.size if self.mode == "shared" else tokens * self.size


def selection_of(tokens: int, n_groups: int, k: int) -> Selection:
    """Decides between a set for each token and one shared set, by rows read.

    ``tokens`` sets of ``k`` read ``tokens * k`` rows. Their union, if the tokens choose independently, has an expected
    ``n * (1 - (1 - k/n) ** tokens)``. Tokens of one step are positively correlated, so their union is usually smaller
    and a shared set of that size nearly always holds everything. It is taken where it reads at least 10 % less: below
    that, the plainer per-token sets guarantee each token its own choice. One token, or ``k == n``, is always shared.

    Args:
      tokens: ``T >= 1``.
      n_groups: rows, or groups of rows, to choose from.
      k: how many each token wants, ``1 <= k <= n_groups``.

    Returns:
      The selection's mode and compiled size.

    Raises:
      ValueError: a size is out of range.
    """
    if tokens < 1:
        raise ValueError(f"selection_of: tokens={tokens}; expected at least 1")
    if not 1 <= k <= n_groups:
        raise ValueError(f"selection_of: k={k}; expected 1 <= k <= {n_groups}")
    if tokens == 1 or k == n_groups:
        return Selection(mode="shared", size=k, k=k)
    union = min(n_groups, _union(tokens, n_groups, k))
    if union <= 0.9 * tokens * k:
        return Selection(mode="shared", size=union, k=k)
    return Selection(mode="per_token", size=k, k=k)


def _union(tokens: int, n_groups: int, k: int) -> int:
    return k if tokens == 1 else max(k, math.ceil(n_groups * (1.0 - (1.0 - k / n_groups) ** tokens)))


def rungs(tokens: int, n_groups: int, counts: Sequence[int]) -> tuple[Selection, ...]:
    """Selections of several sizes for one use, all in the mode of the largest.

    Args:
      tokens, n_groups: as for :func:`selection_of`.
      counts: how many each token wants, ascending.

    Returns:
      For each a selection, none smaller than the one before; the last is ``selection_of``'s own.

    Raises:
      ValueError: a size is out of range, or no larger than the one before.
    """
    if any(a >= b for a, b in itertools.pairwise(counts)):
        raise ValueError(f"rungs: counts={tuple(counts)}; expected ascending sizes")
    last = selection_of(tokens, n_groups, counts[-1])
    if last.mode == "per_token":
        return (*(Selection(mode="per_token", size=k, k=k) for k in counts[:-1]), last)
    sizes = [min(last.size, _union(tokens, n_groups, k)) for k in counts[:-1]]
    return (*(Selection(mode="shared", size=s, k=k) for s, k in zip(sizes, counts[:-1], strict=True)), last)


def select(scores: jax.Array, selection: Selection) -> jax.Array:
    """The rows (or groups) to compute exactly.

    A shared set of several tokens holds each token's own best ``k`` whenever their union is no larger than the set.
    Where it is larger, the tokens' better ranks go first; where it is smaller, the next best scores fill it, measured
    in each token's own spread. NaN scores rank above all others.

    Args:
      scores: f32 ``[T, n_groups]``.
      selection: from :func:`selection_of` for these sizes.

    Returns:
      int32 ``[size]`` for a shared selection, else ``[T, size]``, in any order. No entry appears twice.
    """
    if selection.mode == "per_token":
        return best_rows(scores, selection.size)
    return best_rows(scores[0] if scores.shape[0] == 1 else _merge(scores, selection.k), selection.size)


def entries(index: jax.Array, values: jax.Array) -> tuple[Any, ...]:
    """Where an index of :func:`select` points to in ``values [T, n]``, as ``values.at`` takes it."""
    return (slice(None), index) if index.ndim == 1 else (jnp.arange(values.shape[0])[:, None], index)


def leaves_out(scores: jax.Array, index: jax.Array) -> jax.Array:
    """Whether any token has a row (or group) of a score other than zero that is not among those chosen.

    Args:
      scores: f32 ``[T, n_groups]``, none below zero; a NaN is no zero.
      index: from :func:`select`.

    Returns:
      A bool scalar.
    """
    wanted = scores != 0.0
    if index.ndim == 2 or scores.shape[0] == 1:
        # Each token's own best: zeros come last.
        return jnp.any(jnp.sum(wanted, axis=-1) > index.shape[-1])
    union = jnp.any(wanted, axis=0)
    held = union.at[index].get(mode="promise_in_bounds", unique_indices=True)
    return jnp.sum(union) > jnp.sum(held)


def _merge(scores: jax.Array, k: int) -> jax.Array:
    """One f32 ``[n]`` ranking for all tokens: members of any token's top k in (1, 2] by rank, all others at most 0."""
    values, index = da_top_k(scores, k)
    # Others: how far below the k-th best, in units of the token's own spread, finite whatever the scores hold.
    last = jnp.min(jnp.where(jnp.isnan(values), jnp.inf, values), axis=1, keepdims=True)
    spread = jnp.mean(jnp.abs(values - last), axis=1, keepdims=True)
    margin = jnp.minimum((scores - last) / jnp.where(spread > 0.0, spread, 1.0), 0.0)
    merged = jnp.max(jnp.where(jnp.isnan(margin), 0.0, margin), axis=0)
    rank = 2.0 - jnp.arange(k, dtype=jnp.float32) / k
    return merged.at[index].max(jnp.broadcast_to(rank, index.shape), mode="promise_in_bounds")
