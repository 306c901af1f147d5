"""Groups of units that fire together, from their co-firing: an order in which each group's units are neighbours."""

from __future__ import annotations

import numpy as np


def grouped_order(together: np.ndarray, group_size: int) -> np.ndarray:
    """An order of the units whose every ``group_size`` neighbours fire together as far as can be.

    Greedy: the unit that fires most, of those not yet in a group, begins one; then the unit is added whose co-firing
    with the group's, as the sum of cosines, is largest.

    Args:
      together: ``[m, m]``, or a sketch ``[m, r]``; see ``lowering/measure/cofiring.py``.
      group_size: units in a group, a divisor of m.

    Returns:
      int32 ``[m]``: for each place the unit.
    """
    units = together.shape[0]
    exact = together.shape[1] == units
    total = np.diag(together) if exact else np.square(together).sum(axis=1)
    scale = 1.0 / np.sqrt(np.maximum(total, 1e-30))

    def cosines(unit: int) -> np.ndarray:
        row = together[unit] if exact else together @ together[unit]
        return np.asarray(row * scale * scale[unit])

    free = np.ones(units, bool)
    order: list[int] = []
    for seed in np.argsort(-total, kind="stable"):
        if not free[seed]:
            continue
        unit, near = int(seed), np.zeros(units)
        for _ in range(group_size):
            free[unit] = False
            order.append(unit)
            near += cosines(unit)
            unit = int(np.argmax(np.where(free, near, -np.inf)))
    return np.asarray(order, np.int32)
