"""Rows distributed cyclically over devices, and what was computed of them brought back to its place.

Ids of a vocabulary are mostly ordered by how frequent they are, so of contiguous blocks of rows the first has most of
the best candidates. In a cyclic distribution row ``i`` is row ``i // shards`` of device ``i % shards``. All functions
here are for the body of a ``shard_map``; each device sends every other one at most ``ceil(n / shards)`` of its ``n``
rows, so none ever holds more than its own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["cyclic_ids", "from_cyclic", "return_candidates", "to_cyclic"]


def cyclic_ids(places: jax.Array, names: Sequence[str], shards: int) -> jax.Array:
    """The ids of the rows that a device has at some places, int32, of ``places``'s shape."""
    return places * shards + lax.axis_index(tuple(names))


def to_cyclic(
    own: jax.Array, names: Sequence[str], shards: int, axis: int = 0, here: jax.Array | None = None
) -> jax.Array:
    """From a device's block of rows to its rows of the cyclic distribution.

    Args:
      own: the device's ``n`` rows along ``axis``: those from ``n`` times its number on.
      names: mesh axes that the rows are split over.
      shards: devices along them.
      axis: where the rows are.
      here: the device's number, int32 scalar; None asks for it, which tracing at compile time does not allow.

    Returns:
      An array of the same shape: the rows whose id, modulo ``shards``, is the device's number, in their order.
    """
    own = jnp.moveaxis(own, axis, 0)
    n, here = own.shape[0], lax.axis_index(tuple(names)) if here is None else here
    most = -(-n // shards)
    others = jnp.arange(shards, dtype=jnp.int32)
    first = (others - here * n) % shards  # of mine, the first that is theirs
    received = _exchange(own, first[:, None] + jnp.arange(most, dtype=jnp.int32) * shards, names)
    ids = jnp.arange(n, dtype=jnp.int32) * shards + here
    source = ids // n
    number = (ids - source * n - (here - source * n) % shards) // shards
    return jnp.moveaxis(received.at[source, number].get(mode="promise_in_bounds"), 0, axis)


def from_cyclic(own: jax.Array, names: Sequence[str], shards: int, axis: int = 0) -> jax.Array:
    """The inverse of :func:`to_cyclic`."""
    own = jnp.moveaxis(own, axis, 0)
    n, here = own.shape[0], lax.axis_index(tuple(names))
    most = -(-n // shards)
    others = jnp.arange(shards, dtype=jnp.int32)
    first = (others * n + (here - others * n) % shards - here) // shards  # of mine, the first that lay on them
    received = _exchange(own, first[:, None] + jnp.arange(most, dtype=jnp.int32), names)
    ids = jnp.arange(n, dtype=jnp.int32) + here * n
    source = ids % shards
    number = (ids - here * n - (source - here * n) % shards) // shards
    return jnp.moveaxis(received.at[source, number].get(mode="promise_in_bounds"), 0, axis)


def _exchange(own: jax.Array, places: jax.Array, names: Sequence[str]) -> jax.Array:
    """Sends device ``b`` the entries at ``places[b]``; those that are beyond the last are of no meaning."""
    sent = own.at[places].get(mode="clip")
    return lax.all_to_all(sent, tuple(names), 0, 0, tiled=True)


def return_candidates(
    exact: jax.Array, index: jax.Array, names: Sequence[str], shards: int, n: int, fill: float = -jnp.inf
) -> jax.Array:
    """The candidates of all devices as contiguous blocks of rows.

    Args:
      exact: ``[T, K]``, a device's candidates.
      index: ``[K]`` or ``[T, K]``, their places on it.
      names: mesh axes that the rows are split over.
      shards: devices along them.
      n: rows of a device.
      fill: what stands for all other rows.

    Returns:
      ``[T, n]``: of the device's block.
    """
    tokens = exact.shape[0]
    ids = cyclic_ids(index, names, shards)
    ids = lax.all_gather(ids, tuple(names), axis=ids.ndim - 1, tiled=True)
    values = lax.all_gather(exact, tuple(names), axis=1, tiled=True)
    places = ids - lax.axis_index(tuple(names)) * n
    places = jnp.where((places >= 0) & (places < n), places, n)  # those of other devices are dropped
    at = (slice(None), places) if places.ndim == 1 else (jnp.arange(tokens)[:, None], places)
    return jnp.full((tokens, n), fill, exact.dtype).at[at].set(values, mode="drop")
