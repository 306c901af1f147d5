"""``HIRE_DUMP=folder``: what each stage made of a traced program, as text files, and how long it took.

Each program has a folder of its own, ``0000-decode_step`` and so on, which is new, so that no file is ever replaced.
Files say nothing that changes from run to run, so that two of them can be compared; times stand in their own.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from hire_xform.dump.dump import dump
from hire_xform.dump.text import plural, short_reason, short_source
from hire_xform.explain import explain, size
from hire_xform.passes.ir.debugging import type_text
from hire_xform.passes.ir.graph import Graph, Operand, Scope, Value
from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.match.matches import Detection
from hire_xform.passes.pack.packed import Packed
from hire_xform.passes.weights.provenance import Root

if TYPE_CHECKING:
    from hire_xform.call.stages import Traced

VARIABLE = "HIRE_DUMP"


def dump_stages(traced: Traced) -> Path:
    """Writes the files of a traced program to a new folder in the one that ``HIRE_DUMP`` names.

    Returns:
      The new folder.

    Raises:
      ValueError: the folder can't be made or written to; the message names the variable.
    """
    name = getattr(traced.signature.fun, "__name__", "function")
    given = os.environ[VARIABLE]
    try:
        folder = _new_folder(Path(given), re.sub(r"\W+", "_", name).strip("_") or "function")
        for number, (stage, text) in enumerate(_stages(traced, name), 1):
            _write(folder / f"{number}-{stage}.txt", text)
        _write(folder / "times.txt", [f"{s:8s} {1e3 * took:10.2f} ms" for s, took in traced.seconds.items()])
    except OSError as error:
        raise ValueError(
            f"{VARIABLE}={given!r}: {error.strerror or error}; expected a folder that is there or can be made, and "
            "that files can be written to"
        ) from error
    return folder


def _new_folder(parent: Path, name: str) -> Path:
    """A folder that was not there before, with the next number of those there are: other processes take others."""
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [int(found[0]) for path in parent.iterdir() if (found := re.match(r"\d{4,}(?=-)", path.name))]
    number = max(numbers, default=-1) + 1
    while True:
        folder = parent / f"{number:04d}-{name}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _write(path: Path, lines: Sequence[str]) -> None:
    # "x": a file that is there is not replaced.
    with open(path, "x", encoding="utf-8", newline="\n") as file:
        file.write("\n".join(line.rstrip() for line in lines) + "\n")


def _stages(traced: Traced, name: str) -> Iterator[tuple[str, list[str]]]:
    yield "graph", _graph(traced._graph)
    yield "weights", _weights(traced)
    yield "matches", _matches(traced._detection)
    yield "plan", [short_reason(line) for line in explain(traced.plan).splitlines()]
    if traced.runs_dense:
        return  # its sites are measured, for a calibration
    with traced.timed("packed"):
        packed = _packed(traced)
    yield "packed", packed
    with traced.timed("program"):
        _ = traced.sparse_jaxpr
    yield "program", dump(traced, name=name, show="sparse").splitlines()


def _graph(graph: Graph) -> list[str]:
    """Each scope with its equations, calls laid out, and what they read and make."""
    lines = [f"graph: {plural(len(graph.scopes), 'scope')}, {plural(len(graph.program_order()), 'equation')}"]
    for scope in graph.scopes:
        lines += ["", *_scope(scope)]
    return lines


def _scope(scope: Scope) -> list[str]:
    names: dict[Value, str] = {}

    def name(operand: Operand) -> str:
        if not isinstance(operand, Value):
            return str(operand.val)
        if operand.const is not None:
            return f"constant:{type_text(operand.aval)}"
        return names.setdefault(operand, f"v{len(names)}")

    times = "once" if scope.iterations == 1 else f"{scope.iterations:,} times"
    lines = [f"scope {scope.root.path or '/'} ({scope.kind}, {times})"]
    for value in scope.inputs:
        how = "a slice of an operand" if value.scanned else "a part of an operand" if value.split else "an operand"
        outer = f"  # {how} of {scope.node.path}" if scope.node is not None and value.outer is not None else ""
        lines.append(f"  in {name(value)}:{type_text(value.aval)}{outer}")
    for node in scope.nodes:
        read = ", ".join(name(o) for o in node.inputs)
        made = ", ".join(f"{name(o)}:{type_text(o.aval)}" for o in node.outputs)
        lines.append(f"  {made} = {node.path}({read})  # {short_source(node.source)}")
    return [*lines, f"  return {', '.join(map(name, scope.outputs))}"]


def _weights(traced: Traced) -> list[str]:
    """The leaves that are weights, the products they are in and how these read them, and lookups."""
    found = traced._detection
    roots = [root for root in traced.call.roots if root is not None]
    lines = [f"weights: {plural(len(roots), 'array')}"]
    lines += [f"  {traced.name(root)}:{type_text(traced.aval(root))}" for root in roots]
    lines += ["", plural(len(found.products), "product")]
    for product in found.products:
        recipe = product.origin.recipe
        what = f"{plural(product.tokens, 'token')}, {product.contracted:,} -> {product.width:,}"
        lines.append(f"  {product.path}  {traced.name(recipe.root)}  {what}, {size(product.nbytes)}")
        lines += [f"      {step!r}" for step in recipe.steps]
    lines += ["", plural(len(found.lookups), "lookup")]
    return lines + [f"  {one.node.path}  {traced.name(one.origin.recipe.root)}" for one in found.lookups]


def _matches(found: Detection) -> list[str]:
    """Each match with its region, and each rejection with its reason."""
    lines = [f"matches: {len(found.matches)}, rejections: {len(found.rejections)}"]
    for match in found.matches:
        lines += ["", *map(short_reason, kind_of(match).listing(match))]
    if found.rejections:
        lines += [""]
    return lines + [f"rejected {r.node.path}: {short_reason(r.reason)}" for r in found.rejections]


def _packed(traced: Traced) -> list[str]:
    """What ``Packed`` weights hold in the place of each weights argument."""
    call, lines = traced.packed_call(), []
    for key in traced.signature.weights:
        packed = traced.argument(call, key)
        if not isinstance(packed, Packed):
            continue
        kept, forms = packed.layout.kept, packed.layout.keys
        lines.append(f"argument {key}: {plural(len(kept), 'plain array')}, {plural(len(forms), 'packed form')}")
        for index in kept:
            lines.append(f"  plain  {traced.name(Root.of(key, index))}:{type_text(packed.layout.avals[index])}")
        for form in forms:
            arrays = jax.tree.leaves(packed.form(form))
            held = size(sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays))
            name = traced.name(Root.of(key, form.recipe.root.index))
            lines.append(f"  {form.form} of {name}: {', '.join(map(type_text, arrays))}  {held}")
    return lines or ["nothing is packed"]
