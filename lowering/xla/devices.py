"""The devices that have parts of a site's rows, as each of them sees the others in the body of a ``shard_map``."""

from dataclasses import dataclass

import jax
from jax import lax

__all__ = ["ONE", "Devices"]


@dataclass(frozen=True)
class Devices:
    """Those along some mesh axes, or one; for one all that is asked for here is the value itself.

    What is decided from what these give is decided alike on all of them.

    Attributes:
      names: the mesh axes that rows are split over; none for one device.
      count: devices along them.
    """

    names: tuple[str, ...] = ()
    count: int = 1

    def largest(self, values: jax.Array) -> jax.Array:
        """The largest of all devices' values, entry by entry."""
        return lax.pmax(values, self.names) if self.names else values

    def total(self, values: jax.Array) -> jax.Array:
        """The sum of all devices' values, entry by entry."""
        return lax.psum(values, self.names) if self.names else values

    def gathered(self, values: jax.Array, axis: int) -> jax.Array:
        """All devices' values, one device's behind the other's along an axis."""
        return lax.all_gather(values, self.names, axis=axis, tiled=True) if self.names else values

    def number(self) -> jax.Array | int:
        """Which of them this one is, an int32 scalar, or zero where there is one."""
        return lax.axis_index(self.names) if self.names else 0

    def ids(self, places: jax.Array, n: int, cyclic: bool) -> jax.Array:
        """The ids of the rows at some places of a device that has ``n`` of them.

        Args:
          places: int32.
          n: rows of each device.
          cyclic: whether row ``i`` is row ``i // count`` of device ``i % count``; else each has a block of them.

        Returns:
          An array of the shape of ``places``.
        """
        return places * self.count + self.number() if cyclic else places + self.number() * n


ONE = Devices()
