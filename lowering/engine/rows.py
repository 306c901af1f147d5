"""Exact products that read only the chosen rows of a matrix: the primitives, where the engine looks for them."""

from hire_xform.lowering.primitives.combine_rows import combine_rows
from hire_xform.lowering.primitives.select_rows import select_rows_dot

__all__ = ["combine_rows", "select_rows_dot"]
