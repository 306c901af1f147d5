"""What stands around a call, and must not change what is packed or tried: settings, and outer traces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from hire_xform.lowering.xla.promotion import usual_promotion
from hire_xform.passes.ir import compat


@contextlib.contextmanager
def as_usual() -> Iterator[None]:
    """What is traced, compiled and run here is what it would be under the usual settings.

    ``jax_debug_nans`` and ``jax_debug_infs`` are off: they are for what the user's program computes, and rows that are
    not finite are marked by a NaN when they are packed, as regions are tried where they may give one. So is
    ``jax_disable_jit``, which would pack by one operation after the other, and a transfer guard: numbers that a region
    is tried on come from the host.
    """
    debugging = jax.debug_nans(False), jax.debug_infs(False), jax.disable_jit(False), jax.transfer_guard("allow")
    with contextlib.ExitStack() as stack:
        for context in (usual_promotion(), *debugging):
            stack.enter_context(context)
        yield


@contextlib.contextmanager
def concretely() -> Iterator[None]:
    """Operations on arrays that are there give arrays, under an outer trace too; and all else is as usual."""
    with as_usual(), compat.outside_of_traces():
        yield
