"""What a model's own choice of units takes from all units, made of the chosen ones and of precomputed moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hire_xform.lowering import among_largest, kth_largest
from hire_xform.passes import sums
from hire_xform.passes.region import Region


@dataclass(frozen=True)
class OfChosen:
    """The model's own choice of units among the chosen ones; sums are those of all units, from their moments.

    Attributes:
      mean: mean over all units of the products (by expression) that are summed, ``[T, 1]``.
      variance: variance of the one that is.
    """

    mean: dict[int, Any]
    variance: Any

    def kth(self, values: Any, rank: int) -> Any:
        """The ``rank``-th largest of the chosen."""
        return kth_largest(values, rank)

    def kept(self, values: Any, k: int) -> Any:
        """Which of the chosen are among their ``k`` largest."""
        return among_largest(values, k)

    def total(self, region: Region, operand: int, values: Sequence[Any]) -> Any:
        """The sum over all units."""
        return sums.total(
            region.exprs, region.varies, operand, values, self.mean.__getitem__, self.variance, region.units
        )
