"""What kernels in Pallas make, in a type that holds inside a ``shard_map`` as well."""

from __future__ import annotations

from collections.abc import Sequence

import jax

__all__ = ["result"]

# Along no mesh axis; JAX 0.9 has no such type, but sets of axes. (What knows of versions is above this package.)
_KIND = getattr(jax.sharding, "ManualAxisType", None)
_ALONG_NONE = {"vma": frozenset()} if _KIND is None else {"manual_axis_type": _KIND()}


def result(shape: Sequence[int], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a result, for ``pallas_call``.

    Inside a ``shard_map`` it asks along which axes that varies. A kernel is traced on operands of which nothing is said
    (``lower_kernel``), so along none.
    """
    return jax.ShapeDtypeStruct(tuple(shape), dtype, **_ALONG_NONE)
