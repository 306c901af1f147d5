"""What was measured of one predictor at one site: ``Curve``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Curve:
    """What was measured of a predictor at a site. Sums over tokens, by position in the predictor's order.

    Attributes:
      wanted: int64 ``[*stack, units / g]``, what stands there of what recall counts: arg maxes, or units not zero.
      wanted_energy: f64 ``[*stack, units / g]``; None for a vocabulary.
      kl: f64 ``[*stack, K]``, sum over tokens of the KL divergence of 1, 2, ... candidates, as ``vocab_ranks`` has it
        for the site's fill; None for a block.
      predictor_bytes: bytes that one token reads of the predictor and of what goes with it.
      static: for so many units that fire most, always computed and first in the order: ``wanted``, and the bytes of the
        predictor of the others.
    """

    wanted: np.ndarray
    wanted_energy: np.ndarray | None
    kl: np.ndarray | None
    predictor_bytes: int
    static: Mapping[int, tuple[np.ndarray, int]] = field(default_factory=dict)

    @cached_property
    def found(self) -> np.ndarray:
        """Share of what is wanted among the first k positions, ``[*stack, units / g]``; one where nothing is."""
        return share_by(self.wanted)

    @cached_property
    def found_energy(self) -> np.ndarray:
        """Share of the energy among the first k positions, likewise."""
        assert self.wanted_energy is not None
        return share_by(self.wanted_energy)


def share_by(counted: np.ndarray) -> np.ndarray:
    """Of what is counted by position ``[..., n]`` the share among the first 1, 2, ... positions; one where none is."""
    sums = np.cumsum(counted.astype(np.float64), axis=-1)
    total = sums[..., -1:]
    return np.where(total > 0, sums / np.where(total > 0, total, 1), 1.0)
