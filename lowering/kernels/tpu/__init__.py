"""Kernels for TPUs, in Pallas: rows are read once, from where they lie, and scores stay in VMEM until rows are chosen.

:func:`install` puts them in the place of the portable forms for programs that are lowered for TPUs. They serve up to 16
tokens and sizes that fill a TPU's registers; all else has the portable form. Pallas is imported when a program is
lowered that has one of them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import jax

from hire_xform.lowering.kernels.rules import Rules
from hire_xform.lowering.kernels.switch import switched_off
from hire_xform.lowering.kernels.tpu import shapes
from hire_xform.lowering.predict.few_bits import fine_scores_p, quantized_scores_p, scores_in_two_p
from hire_xform.lowering.primitives.chosen_block import chosen_block_p
from hire_xform.lowering.primitives.combine_rows import combine_rows_p, combine_stored_rows_p
from hire_xform.lowering.primitives.da_top_k import da_top_k_p
from hire_xform.lowering.primitives.kernels import ENTRIES, is_overridden, no_built_in, register_built_in
from hire_xform.lowering.primitives.open_rows import open_rows_p
from hire_xform.lowering.primitives.select_rows import select_rows_dot_p, select_stored_rows_dot_p

__all__ = ["install"]


@functools.cache
def install() -> str | None:
    """Registers the kernels; why not, where there are none. Calling it again changes nothing."""
    missing = "HIRE_KERNELS is off" if switched_off() else _why_missing()
    if missing:
        no_built_in("tpu", f"no kernels, since {missing}")
        return missing
    rules = Rules(_module)
    entries, nothing = frozenset({ENTRIES}), frozenset[str]()
    for step, rule, serves, takes in (
        (quantized_scores_p, rules.quantized_scores, shapes.scores_served, entries),
        (fine_scores_p, rules.fine_scores, shapes.scores_served, entries),
        (chosen_block_p, rules.chosen_block, _block_served, nothing),
        (scores_in_two_p, rules.scores_in_two, _scores_in_two_served, entries),
        (da_top_k_p, rules.da_top_k, shapes.top_k_served, nothing),
        (select_rows_dot_p, rules.select_rows_dot, shapes.rows_served, nothing),
        (combine_rows_p, rules.combine_rows, shapes.rows_served, nothing),
        (select_stored_rows_dot_p, rules.select_stored_rows_dot, shapes.stored_rows_served, nothing),
        (combine_stored_rows_p, rules.combine_stored_rows, shapes.stored_rows_served, nothing),
        (open_rows_p, rules.open_rows, shapes.open_rows_served, nothing),
    ):
        # What Pallas makes for a TPU needs nothing of the process that made it.
        register_built_in(step.name, "tpu", rule, serves, "Pallas", exported=True, takes=takes)
    return None


def _block_served(*operands: Any, **settings: Any) -> bool:
    parts = (select_rows_dot_p, combine_rows_p)
    return not any(is_overridden(p.name, "tpu") for p in parts) and shapes.block_served(*operands, **settings)


def _scores_in_two_served(*operands: Any) -> bool:
    return not is_overridden(fine_scores_p.name, "tpu") and shapes.scores_in_two_served(*operands)


def _why_missing() -> str | None:
    # Looked for, not imported: that takes longer than all of this library.
    found = importlib.util.find_spec("jax.experimental.pallas")
    return None if found else f"JAX {jax.__version__} comes without Pallas"


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
