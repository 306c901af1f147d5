"""``pack``: one ``Packed`` for several programs of the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hire_xform.call.collector import collector_paused
from hire_xform.call.packing import make_packed, placed_text
from hire_xform.call.stages import Traced
from hire_xform.passes.ir.static_values import value_key
from hire_xform.passes.pack.packed import PackLayout
from hire_xform.passes.rewrite.holding import decide_holding
from hire_xform.passes.weights.recipe import Root


def pack(weights: Any, traced: Traced | Sequence[Traced], *, progress: bool | None = None) -> Any:
    """Compresses weights once for all programs that read them: prefill and decode, blocks and head in a jit each::

        blocks, head = hx.sparsify(run_blocks), hx.sparsify(run_head)
        packed = hx.pack(params, [blocks.trace(params, cache, token), head.trace(params, x)])
        x, cache = blocks(packed, cache, token)
        logits = head(packed, x)

    Each matrix is held once: where one program computes rows of it and another reads it whole, the other reads these
    rows. What two programs have in other layouts or with other predictors is held for each. The weights may be passed
    at another position, or by another name, in each program.

    Args:
      weights: the weights argument; of programs that have several the tuple of them, in the order of
        ``weights_argnums`` and then ``weights_argnames``, as many and in the same order in each program.
      traced: what ``step.trace(...)`` gave of each program.
      progress: show a progress bar; None shows one on a terminal when there is much to pack.

    Returns:
      A ``Packed``, which stands where the weights stood in any of the programs; a tuple of them for several arguments.

    Raises:
      TypeError, ValueError: an argument is not usable, the programs are of other weights than each other, or these are
        not the weights that were traced; the message names the first difference.
    """
    programs = _checked(traced)
    keys = programs[0].signature.weights
    if len(keys) == 1:
        weights = (weights,)
    elif not isinstance(weights, tuple) or len(weights) != len(keys):
        got = f"a tuple of {len(weights)}" if isinstance(weights, tuple) else f"a {type(weights).__name__}"
        raise TypeError(
            f"pack: weights is {got}; expected the tuple of the {len(keys)} arguments in {programs[0].signature.stated}"
        )
    expected = programs[0].layouts({})
    for number, program in enumerate(programs[1:], 1):
        for slot, (layout, first) in enumerate(zip(program.layouts({}), expected, strict=True)):
            _check_same(f"traced[{number}]", program, slot, layout, first)
    with collector_paused():
        holdings = decide_holding([program.reader for program in programs])
    made = zip(keys, weights, programs[0].layouts(holdings), strict=True)
    packed = tuple(make_packed(key, weight, layout, progress) for key, weight, layout in made)
    return packed[0] if len(packed) == 1 else packed


def _checked(traced: Any) -> list[Traced]:
    programs = [traced] if isinstance(traced, Traced) else traced
    if not isinstance(programs, (list, tuple)) or not programs:
        raise TypeError(f"pack: traced={traced!r}; expected a list of what step.trace(...) gave of each program")
    for number, program in enumerate(programs):
        if not isinstance(program, Traced):
            raise TypeError(
                f"pack: traced[{number}] is a {type(program).__name__}; expected what step.trace(...) gave, a Traced"
            )
        here, first = program.signature, programs[0].signature
        if len(here.weights) != len(first.weights) or not here.weights:
            raise ValueError(
                f"pack: traced[{number}] has its weights in {here.stated}, traced[0] in {first.stated}; expected as "
                "many weights arguments in each, one at least"
            )
    return list(programs)


def _check_same(name: str, program: Traced, slot: int, layout: PackLayout, first: PackLayout) -> None:
    """Raises ValueError when a program was traced with other weights than the first."""
    if layout.treedef != first.treedef:
        raise ValueError(
            f"pack: {name} was traced with weights of another structure than traced[0]; got {layout.treedef}, expected "
            f"{first.treedef}"
        )
    static, others = dict(layout.static), dict(first.static)
    for position in sorted({*static, *others}):
        got, want = (value_key(of[position]) if position in of else None for of in (static, others))
        if got != want:
            raise ValueError(
                f"pack: {name} was traced with {static.get(position, 'an array')!r} in its weights where traced[0] has "
                f"{others.get(position, 'an array')!r}; expected the same weights"
            )
    key = program.signature.weights[slot]
    for i, (aval, want) in enumerate(zip(layout.avals, first.avals, strict=True)):
        if (aval.shape, aval.dtype) != (want.shape, want.dtype):
            raise ValueError(
                f"pack: {name} was traced with {program.name(Root.of(key, i))} as {aval.dtype}{list(aval.shape)}, "
                f"traced[0] with {want.dtype}{list(want.shape)}; expected the same weights"
            )
    for i, (placed, there) in enumerate(zip(layout.placed, first.placed, strict=True)):
        if placed != there:
            raise ValueError(
                f"pack: {name} was traced with {program.name(Root.of(key, i))} placed as {placed_text(placed)}, "
                f"traced[0] with it placed as {placed_text(there)}; expected the same weights"
            )
    if layout.token_axes != first.token_axes:
        raise ValueError(
            f"pack: {name} was traced with data sharded over {layout.token_axes or 'no axis'}, traced[0] with data "
            f"sharded over {first.token_axes or 'no axis'}; expected the same, or a Packed for each"
        )
