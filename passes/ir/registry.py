"""What is registered from outside, and taken away again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def enter(table: dict[Any, Any], key: Any, value: Any) -> Callable[[], None]:
    """Puts a value into a registry, in the place of what was there.

    Returns:
      What takes it away again, and puts back what was there. It does nothing where another has taken its place.
    """
    before = {key: table[key]} if key in table else {}
    table[key] = value

    def remove() -> None:
        if table.get(key) is value:
            del table[key]
            table.update(before)

    return remove
