"""What kernels name of JAX that differs between versions. (For all else it is ``compat`` of ``passes/ir``, above.)"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractDevice

__all__ = ["along_no_axis", "described_gpu", "dot_of"]


def along_no_axis() -> dict[str, Any]:
    """How a ``ShapeDtypeStruct`` is told that it varies along no mesh axis: by a type, in 0.9 by a set of axes."""
    kind = getattr(jax.sharding, "ManualAxisType", None)
    return {"vma": frozenset()} if kind is None else {"manual_axis_type": kind()}


def described_gpu() -> AbstractDevice:
    """A GPU that is not here; its description has a platform from 0.10.1 on."""
    told: dict[str, Any] = {"device_kind": "NVIDIA H100", "num_cores": None, "platform": "gpu"}
    return AbstractDevice(**{name: told[name] for name in AbstractDevice.__dataclass_fields__})


def dot_of(triton: Any, pallas: Any) -> Any:
    """A product in a kernel through Triton: that of Pallas itself before 0.10.2."""
    return getattr(triton, "dot", None) or pallas.dot
