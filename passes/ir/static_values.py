"""When two static values are the same: of one type, equal, and floats to the bit."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np


def value_key(value: Any) -> Any:
    """Stands for a static value where values are compared: hashable where the value is, equal where a trace is alike.

    By ``==`` 1 is 1.0 and True, 0.0 is -0.0, of which the reciprocals differ, and NaN is not even itself.
    """
    kind = type(value)
    if kind is float:
        return kind, struct.pack("=d", value)
    if kind is complex:
        return kind, struct.pack("=dd", value.real, value.imag)
    if isinstance(value, np.inexact):
        return kind, value.tobytes()
    if isinstance(value, tuple) and kind.__eq__ is tuple.__eq__:
        return kind, tuple(map(value_key, value))
    return kind, value
