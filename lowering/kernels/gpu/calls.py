"""What all kernels for GPUs share: how they are called, and how they load what their blocks reach beyond."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import AbstractMesh, use_abstract_mesh

from hire_xform.lowering.kernels.results import result
from hire_xform.lowering.kernels.versions import described_gpu, dot_of

__all__ = ["as_float", "call", "dot", "padded", "row_of"]

dot = dot_of(triton, pl)

# Newer JAX asks which GPU a kernel is lowered for, and that one be here or described. What is lowered is the same for
# all that are served: XLA compiles it for the one that it runs on.
_ANY = AbstractMesh((), (), abstract_device=described_gpu())


def call(
    kernel: Callable[..., None],
    name: str,
    out: Any,
    grid: tuple[int, ...],
    *operands: jax.Array,
    warps: int,
    interpret: bool,
) -> Any:
    """A kernel on operands that it reads from memory itself.

    Args:
      kernel: a function of references to the operands and to the results.
      name: for profiles, and for reports of what was compiled.
      out: what it makes, a shape with its dtype or a sequence of them.
      grid: how many programs run.
      *operands: arrays.
      warps: of each program.
      interpret: run it here, step by step.
    """
    with use_abstract_mesh(_ANY):
        return pl.pallas_call(
            kernel,
            out_shape=jax.tree.map(lambda each: result(each.shape, each.dtype), out),
            grid=grid,
            compiler_params=None if interpret else triton.CompilerParams(num_warps=warps, num_stages=2),
            interpret=interpret,
            name=name,
        )(*operands)


def padded(count: int) -> int:
    """The power of two that ``count`` fits in: what a block's sides are."""
    return 1 << max(0, count - 1).bit_length()


def row_of(index_ref: Any, first: Any, slot: Any, group: int, inside: Any) -> Any:
    """Which rows stand at some slots of the chosen ones.

    Args:
      index_ref: the chosen groups, int32, of all tokens after each other.
      first: where those of a token begin.
      slot: which rows of the chosen ones, from 0 on.
      group: rows of a group.
      inside: which slots there are; others have a row of group 0.
    """
    at = triton.load(index_ref.at[first + slot // group], mask=inside, other=0)
    return at * group + slot % group if group > 1 else at


def as_float(values: jax.Array) -> jax.Array:
    """Entries as f32, which holds all of them exactly."""
    return values.astype(jnp.float32)
