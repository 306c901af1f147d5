"""What kernels name of JAX holds on the installed one."""

import types

import jax
import jax.numpy as jnp

from hire_xform.lowering.kernels import versions


def test_a_shape_varies_along_no_axis():
    told = jax.ShapeDtypeStruct((2,), jnp.float32, **versions.along_no_axis())
    kind = getattr(told, "manual_axis_type", None)
    assert not (told.vma if kind is None else kind.varying)


def test_a_gpu_is_described():
    assert versions.described_gpu().device_kind == "NVIDIA H100"


def test_a_product_is_that_of_triton_or_else_of_pallas():
    assert versions.dot_of(types.SimpleNamespace(dot="own"), None) == "own"
    assert versions.dot_of(types.SimpleNamespace(), types.SimpleNamespace(dot="usual")) == "usual"
