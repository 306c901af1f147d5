"""Rows distributed cyclically over devices, and what was computed of them brought back to its place.

Ids of a vocabulary are mostly ordered by how frequent they are, so of contiguous blocks of rows the first has most of
the best candidates. In a cyclic distribution row ``i`` is row ``i // shards`` of device ``i % shards``. All functions
here are for the body of a ``shard_map``; each device sends every other one at most ``ceil(n / shards)`` of its ``n``
rows, so none ever holds more than its own.
"""

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.lowering.engine.selection import entries
from hire_xform.lowering.xla.devices import Devices

__all__ = ["from_cyclic", "return_candidates", "to_cyclic"]


def to_cyclic(own: jax.Array, devices: Devices, axis: int = 0, here: jax.Array | None = None) -> jax.Array:
    """From a device's block of rows to its rows of the cyclic distribution.

    Args:
      own: the device's ``n`` rows along ``axis``: those from ``n`` times its number on.
      devices: those that the rows are split over.
      axis: where the rows are.
      here: the device's number, int32 scalar; None asks for it, which tracing at compile time does not allow.

    Returns:
      An array of the same shape: the rows whose id, modulo their count, is the device's number, in their order.
    """
    own = jnp.moveaxis(own, axis, 0)
    n, shards, at = own.shape[0], devices.count, devices.number() if here is None else here
    most = -(-n // shards)
    others = jnp.arange(shards, dtype=jnp.int32)
    first = (others - at * n) % shards  # of mine, the first that is theirs
    received = _exchange(own, first[:, None] + jnp.arange(most, dtype=jnp.int32) * shards, devices)
    ids = jnp.arange(n, dtype=jnp.int32) * shards + at
    source = ids // n
    number = (ids - source * n - (at - source * n) % shards) // shards
    return jnp.moveaxis(received.at[source, number].get(mode="promise_in_bounds"), 0, axis)


def from_cyclic(own: jax.Array, devices: Devices, axis: int = 0) -> jax.Array:
    """The inverse of :func:`to_cyclic`."""
    own = jnp.moveaxis(own, axis, 0)
    n, here, shards = own.shape[0], devices.number(), devices.count
    most = -(-n // shards)
    others = jnp.arange(shards, dtype=jnp.int32)
    first = (others * n + (here - others * n) % shards - here) // shards  # of mine, the first that lay on them
    received = _exchange(own, first[:, None] + jnp.arange(most, dtype=jnp.int32), devices)
    ids = jnp.arange(n, dtype=jnp.int32) + here * n
    source = ids % shards
    number = (ids - here * n - (source - here * n) % shards) // shards
    return jnp.moveaxis(received.at[source, number].get(mode="promise_in_bounds"), 0, axis)


def _exchange(own: jax.Array, places: jax.Array, devices: Devices) -> jax.Array:
    """Sends device ``b`` the entries at ``places[b]``; those that are beyond the last are of no meaning."""
    sent = own.at[places].get(mode="clip")
    return lax.all_to_all(sent, devices.names, 0, 0, tiled=True)


def return_candidates(
    exact: jax.Array, index: jax.Array, devices: Devices, n: int, fill: float = -jnp.inf
) -> jax.Array:
    """The candidates of all devices as contiguous blocks of rows.

    Args:
      exact: ``[T, K]``, a device's candidates.
      index: ``[K]`` or ``[T, K]``, their places on it.
      devices: those that the rows are split over.
      n: rows of a device.
      fill: what stands for all other rows.

    Returns:
      ``[T, n]``: of the device's block.
    """
    ids = devices.gathered(devices.ids(index, n, cyclic=True), index.ndim - 1)
    values = devices.gathered(exact, 1)
    places = ids - devices.number() * n
    places = jnp.where((places >= 0) & (places < n), places, n)  # those of other devices are dropped
    full = jnp.full((exact.shape[0], n), fill, exact.dtype)
    return full.at[entries(places, full)].set(values, mode="drop")
