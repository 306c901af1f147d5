"""What kernels in Pallas make, in a type that holds inside a ``shard_map`` as well."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from hire_xform.lowering.kernels.versions import along_no_axis

__all__ = ["result"]

_ALONG_NONE = along_no_axis()


def result(shape: Sequence[int], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a result, for ``pallas_call``.

    Inside a ``shard_map`` it asks along which axes that varies. A kernel is traced on operands of which nothing is said
    (``lower_kernel``), so along none.
    """
    return jax.ShapeDtypeStruct(tuple(shape), dtype, **_ALONG_NONE)
