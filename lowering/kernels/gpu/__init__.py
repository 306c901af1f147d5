"""Kernels for NVIDIA's GPUs, in Pallas by way of Triton: rows in few bits, choosing, and chosen rows.

:func:`install` puts them in the place of the portable forms for programs that are lowered for CUDA. They are compiled
ahead of time and run in Pallas's interpreter in the tests, and were measured on an H200 (docs/gpu.md). They serve where
XLA's own code writes down what it reads, reads more than it has to, or takes many kernels of a microsecond, which on so
fast a memory cost as much as reading. Pallas is imported when a program is lowered that has one of them. JAX 0.12 says
that Pallas will do without Triton one day: then there is the portable form, and ``hx.backends()`` says so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import jax

from hire_xform.lowering.kernels.gpu import shapes
from hire_xform.lowering.kernels.rules import Rules
from hire_xform.lowering.kernels.switch import switched_off
from hire_xform.lowering.primitives.kernels import ENTRIES, no_built_in, register_built_in

__all__ = ["install"]

# Why the others are left to XLA.
_PORTABLE = {
    "hire_arg_max": "XLA's own is one pass",
    "hire_products": "XLA's own product of all rows reads them once",
    "hire_scores": "made of the steps of its predictor",
    "hire_bounds": "made of the steps of its predictor",
    "hire_scores_in_two": "made of its two products",
    "hire_chosen_block": "made of the steps of its block",
}


@functools.cache
def install() -> str | None:
    """Registers the kernels; why not, where there are none. Calling it again changes nothing."""
    missing = "HIRE_KERNELS is off" if switched_off() else _why_missing()
    if missing:
        no_built_in("cuda", f"no kernels, since {missing}")
        return missing
    rules = Rules(_module)
    several, few = f"2 to {shapes.MOST_TOKENS} tokens", f"up to {shapes.MOST_TOKENS} tokens"
    scores, choices = "rows in 8 and 4 bits", f"up to {shapes.MOST_SCORES} scores, or groups of them"
    taken = {scores: frozenset({ENTRIES}), choices: frozenset({"ordered"})}
    for name, rule, serves, what in (
        ("da_top_k", rules.da_top_k, shapes.top_k_served, choices),
        ("hire_open_rows", rules.open_rows, shapes.open_rows_served, "f32"),
        ("hire_quantized_scores", rules.quantized_scores, shapes.scores_served, scores),
        ("hire_fine_scores", rules.fine_scores, shapes.fine_scores_served, scores),
        ("hire_select_rows_dot", rules.select_rows_dot, shapes.products_served, several),
        ("hire_combine_rows", rules.combine_rows, shapes.sums_served, few),
        ("hire_select_stored_rows_dot", rules.select_stored_rows_dot, shapes.stored_products_served, several),
        ("hire_combine_stored_rows", rules.combine_stored_rows, shapes.stored_sums_served, few),
    ):
        named = f"Pallas, through Triton, of {what}"
        register_built_in(name, "cuda", rule, serves, named, takes=taken.get(what, frozenset()))
    for name, reason in _PORTABLE.items():
        no_built_in("cuda", reason, name)
    return None


def _why_missing() -> str | None:
    # Looked for, not imported: that takes longer than all of this library.
    try:
        found = importlib.util.find_spec("jax.experimental.pallas.triton")
    except ModuleNotFoundError:
        found = None
    return None if found else f"JAX {jax.__version__} comes without Pallas for Triton"


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
