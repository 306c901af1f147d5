"""What a model's own choice of units takes from all units, made of the chosen ones and of precomputed moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from hire_xform.lowering.primitives.ranks import among_largest, kth_largest
from hire_xform.passes.match import sums
from hire_xform.passes.match.region import Region


class OfAll:
    """The model's own choice of units among all of them, as the dense block makes it."""

    def kth(self, values: Any, rank: int) -> Any:
        """The ``rank``-th largest."""
        return kth_largest(values, rank)

    def kept(self, values: Any, k: int) -> Any:
        """Which are among the ``k`` largest."""
        return among_largest(values, k)

    def total(self, region: Region, operand: int, values: Sequence[Any]) -> Any:
        """The sum, of the values themselves."""
        return jnp.sum(values[operand], axis=1, keepdims=True)


@dataclass(frozen=True)
class OfChosen(OfAll):
    """The model's own choice of units among the chosen ones; sums are those of all units, from their moments.

    Attributes:
      mean: mean over all units of the products (by expression) that are summed, ``[T, 1]``.
      variance: variance of the one that is.
    """

    mean: dict[int, Any]
    variance: Any

    def total(self, region: Region, operand: int, values: Sequence[Any]) -> Any:
        """The sum over all units."""
        value = one_column(values)
        return sums.total(
            region.exprs, region.varies, operand, value, self.mean.__getitem__, self.variance, region.units
        )


def one_column(values: Sequence[Any]) -> Callable[[int], Any]:
    """Of values that are the same for all units, scalars or ``[T, K]``, what one unit has: a scalar or ``[T, 1]``."""
    return lambda number: values[number][:, :1] if jnp.ndim(values[number]) == 2 else values[number]
