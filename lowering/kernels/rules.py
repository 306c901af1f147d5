"""Kernels as steps call them, made of functions on arrays that each platform has of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from hire_xform.lowering.primitives.stack_entry import StackEntry

__all__ = ["Rules"]


@dataclass(frozen=True)
class Rules:
    """What ``register_built_in`` is given, by the names of the steps.

    Attributes:
      load: the module that has a platform's ``scores``, ``rows``, ``top_k`` or ``open_rows``; it may import it, when a
        program is lowered.
    """

    load: Callable[[str], Any]

    def quantized_scores(self, x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array, *, bits: int) -> jax.Array:
        """Of ``hire_quantized_scores``."""
        made: jax.Array = self.load("scores").quantized_scores(x, q, scale, bits)
        return made

    def fine_scores(
        self, x: jax.Array, q: jax.Array | StackEntry, scale: jax.Array, *, bits: int
    ) -> tuple[jax.Array, jax.Array]:
        """Of ``hire_fine_scores``."""
        scores, kept = self.load("scores").fine_scores(x, q, scale, bits)
        return scores, kept

    def scores_in_two(self, *operands: Any) -> jax.Array:
        """Of ``hire_scores_in_two``."""
        made: jax.Array = self.load("scores").scores_in_two(*operands)
        return made

    def select_rows_dot(
        self, x: jax.Array, rows: jax.Array, index: jax.Array, *, group_size: int, out_dtype: Any, magnitudes: bool
    ) -> jax.Array:
        """Of ``hire_select_rows_dot``."""
        made: jax.Array = self.load("rows").select_rows_dot(x, rows, index, group_size, magnitudes)
        return made.astype(out_dtype)

    def combine_rows(
        self, h: jax.Array, rows: jax.Array, index: jax.Array, *, group_size: int, out_dtype: Any
    ) -> jax.Array:
        """Of ``hire_combine_rows``."""
        made: jax.Array = self.load("rows").combine_rows(h, rows, index, group_size)
        return made.astype(out_dtype)

    def select_stored_rows_dot(
        self, x: jax.Array, index: jax.Array, values: jax.Array, scale: jax.Array, **settings: Any
    ) -> jax.Array:
        """Of ``hire_select_stored_rows_dot``, where rows are integers times one scale."""
        group, magnitudes = settings["group_size"], settings["magnitudes"]
        made: jax.Array = self.load("rows").select_rows_dot(x, values, index, group, magnitudes, scale)
        return made.astype(settings["out_dtype"])

    def combine_stored_rows(
        self, h: jax.Array, index: jax.Array, values: jax.Array, scale: jax.Array, **settings: Any
    ) -> jax.Array:
        """Of ``hire_combine_stored_rows``, where rows are integers times one scale."""
        made: jax.Array = self.load("rows").combine_rows(h, values, index, settings["group_size"], scale)
        return made.astype(settings["out_dtype"])

    def chosen_block(self, *operands: jax.Array, form: Any, group_size: int) -> jax.Array:
        """Of ``hire_chosen_block``."""
        made: jax.Array = self.load("block").chosen_block(*operands, form=form, group=group_size)
        return made.astype(form.jaxpr.outvars[0].aval.dtype)

    def da_top_k(self, scores: jax.Array, *, k: int, shards: int, **order: bool) -> tuple[jax.Array, jax.Array]:
        """Of ``da_top_k``; ``ordered`` where a kernel takes that."""
        values, index = self.load("top_k").top_k(scores, k, shards, **order)
        return values, index

    def open_rows(self, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of ``hire_open_rows``."""
        index, count = self.load("open_rows").open_rows(values)
        return index, count
