"""What the TPU's compiler makes of the kernels and of a decode step of 1.2 billion parameters, without a TPU.

    python benchmarks/tpu.py                  # v5e; needs the extra tpu-aot, a minute or two
    python benchmarks/tpu.py --chip v6e
    python benchmarks/tpu.py --docs docs/tpu.md

Nothing is run and nothing is timed. Bytes are read off compiled programs (`hire_xform/dump/hlo.py`), copies of kernels
off the instructions of the chip, which libtpu writes down. Times are modelled, with every assumption said.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from tpu_model import BF16, F32, INT8, INT32, LAYERS, UINT8, VOCAB, D, M, decode_step, on_four, operands

import hire_xform as hx
from hire_xform.dump.hlo import Counts, counts
from hire_xform.dump.targets import Target
from hire_xform.lowering.kernels.tpu import rows, scores, shapes, top_k
from hire_xform.lowering.primitives.chosen_block import chosen_block

# Of a chip: bytes a second that its memory is said to read, and what XLA gives a kernel of its VMEM unless asked.
CHIPS = {"v5e": (819e9, 16 * 2**20), "v6e": (1640e9, 32 * 2**20), "v5p": (2765e9, 16 * 2**20)}


@dataclass(frozen=True)
class Kernel:
    """A kernel at one size.

    Attributes:
      name: in words.
      fun, operands: what is compiled, and the shapes and dtypes that it takes.
      least: bytes that have to be moved, whatever moves them.
      copies: how often it copies the rows that it reads, and what one such copy has of bytes.
    """

    name: str
    fun: Callable[..., Any]
    operands: tuple[tuple[tuple[int, ...], Any], ...]
    least: int
    copies: tuple[int, int]


def kernels() -> Iterator[Kernel]:
    """Those of a step, and some more sizes."""
    # Whole blocks, so that instructions have a copy's size as a number.
    vocab = 2**17
    for n, bits, width, what in (
        (vocab, 8, D // 4, "head, d/4 in 8 bits"),
        (vocab, 8, D // 8, "head, d/8 in 8 bits"),
        (vocab, 4, D, "head, int4"),
        (M, 8, D // 4, "block, d/4 in 8 bits"),
        (M, 8, D // 8, "block, d/8 in 8 bits"),
        (D // 4, 8, D, "tokens to d/4"),
    ):
        stored = width * bits // 8
        together = shapes.scored_together(n, stored)
        yield Kernel(
            f"scores of {n}, {what}",
            partial(scores.fine_scores, bits=bits),
            (((1, width), F32), ((n, stored), INT8 if bits == 8 else UINT8), ((n,), F32)),
            n * stored + 4 * n + 4 * n + 2 * width,
            (-(-n // together), together * stored),
        )
    for n, r, what in ((vocab, D // 4, "head, d/4"), (M, D // 4, "block, d/4"), (M, D // 8, "block, d/8")):
        together, factors = shapes.scored_together(n, r), [((r, D), INT8), ((r,), F32), ((n, r), INT8), ((n,), F32)]
        yield Kernel(
            f"scores in two of {n}, {what} in 8 bits",
            scores.scores_in_two,
            (((1, D), F32), *factors),
            r * D + 4 * r + n * r + 4 * n + 4 * D + 4 * n,
            (-(-n // together), together * r),
        )
    for n, k in ((VOCAB, 256), (M // 8, 64), (M // 8, 128)):
        yield Kernel(
            f"top {k} of {n}", partial(top_k.top_k, k=k, shards=1), (((1, n), F32),), 4 * n + 8 * k, (1, 4 * n)
        )
    for n, count, group, dtype in (
        (M, M // 128, 8, BF16),
        (M, M // 64, 8, BF16),
        (M, M // 256, 16, BF16),
        (M, M // 128, 8, INT8),
        (VOCAB, 256, 1, BF16),
        (VOCAB, 256, 1, F32),
    ):
        size = jnp.dtype(dtype).itemsize
        moved = shapes.bytes_of_slabs(count, group, D, dtype)
        least = count * group * D * size + 4 * count
        what = f"{count} {'rows' if group == 1 else f'groups of {group} rows'} of {n} x {D}, {jnp.dtype(dtype).name}"
        matrix, index = ((n, D), dtype), ((count,), INT32)
        given, scale = (BF16, [((1, D), F32)]) if dtype == INT8 else (dtype, [])
        yield Kernel(
            f"products, {what}",
            partial(products_with, group=group),
            (((1, D), given), matrix, index, *scale),
            least + size * D + 4 * count * group,
            (count, moved // count),
        )
        if group > 1:
            yield Kernel(
                f"sums, {what}",
                partial(sums_of, group=group),
                (((1, count * group), given), matrix, index, *scale),
                least + size * count * group + 4 * D,
                (count, moved // count),
            )
            if group == 8 and dtype == BF16:
                yield Kernel(
                    f"products, activation, sums, {what}",
                    partial(gated, group=group),
                    (((1, D), dtype), *[matrix] * 3, index),
                    3 * count * group * D * size + 4 * count + (size + 4) * D,
                    (3 * count, moved // count),
                )


def products_with(x: jax.Array, matrix: jax.Array, index: jax.Array, *scale: jax.Array, group: int) -> jax.Array:
    """Products with chosen rows, maybe times a scale of each column."""
    return rows.select_rows_dot(x, matrix, index, group, False, *scale)


def sums_of(h: jax.Array, matrix: jax.Array, index: jax.Array, *scale: jax.Array, group: int) -> jax.Array:
    """Sums of them."""
    return rows.combine_rows(h, matrix, index, group, *scale)


def gated(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, index: jax.Array, group: int) -> jax.Array:
    """The chosen units of a block of the model."""

    def activation(hiddens: list[jax.Array]) -> jax.Array:
        return jax.nn.relu(hiddens[0]) * hiddens[1]

    settings: dict[str, Any] = {"group_size": group, "dtypes": [x.dtype] * 2, "out_dtype": F32}
    return chosen_block([x, x], [gate, up], down, index, [0, 0, 0], activation, **settings)


_COPY = re.compile(r"= dma\.(?:hbm_to_vmem|general) .*?/\*size_in_granules=\*/%?(\w+)")
_CONSTANT = re.compile(r"%(s\w+) = smov (\d+)")
# What libtpu counts copies in.
_GRANULE = 32


def print_kernels(chip: str, folder: Path) -> None:
    """A table of kernels; ``folder`` is where libtpu writes down what it compiles."""
    print("| kernel | MB to move | MB moved | ratio | copies of rows, by its instructions | VMEM, KB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kernel in kernels():
        target = Target("tpu", chip)
        operands = target.placed([jax.ShapeDtypeStruct(*operand) for operand in kernel.operands])
        before = set(folder.iterdir())
        program = jax.jit(kernel.fun).trace(*operands).lower().compile()
        assert_compiled_for_a_tpu(program)
        text = program.as_text()
        moved = counted_bytes(text)
        held = max(int(size) for size in re.findall(r'"memory_space":"1","offset":"0","size":"(\d+)"', text))
        assert held < CHIPS[chip][1]
        bundles = [p for p in set(folder.iterdir()) - before if re.search(r"hire_\w+.*\d-final_bundles", p.name)]
        assert len(bundles) == 1, bundles
        instructions = bundles[0].read_text()
        print(
            f"| {kernel.name} | {kernel.least / 1e6:.3f} | {moved / 1e6:.3f} | {moved / kernel.least:.2f} "
            f"| {copied(instructions, kernel)} | {held / 1024:.0f} |"
        )


def copied(instructions: str, kernel: Kernel) -> str:
    """What the copies of rows are by a kernel's instructions, and whether that is what they are said to be."""
    times, size = kernel.copies
    told, sizes = f"{times} x {size / 1024:.4g} KB", set(_COPY.findall(instructions))
    if not sizes:
        return "in VMEM already"
    constants = dict(_CONSTANT.findall(instructions))
    found = {int(n) * _GRANULE for name in sizes if (n := constants.get(name, name)).isdigit()}
    if size in found:
        return told
    # A size that is reckoned there, as where the last block is not whole.
    return f"{told}, by its shapes" if any(not n.isdigit() and n not in constants for n in sizes) else f"none of {size}"


def counted_bytes(text: str) -> int:
    """Bytes that the one kernel of a program says it moves: its estimate."""
    (told,) = re.findall(r'"bytes_accessed":"?(\d+)', text)
    return int(told)


def assert_compiled_for_a_tpu(program: Any) -> None:
    """Without a topology in its operands a program is quietly compiled for this machine."""
    kinds = {device.platform for s in jax.tree.leaves(program.input_shardings) for device in s.device_set}
    assert kinds == {"tpu"}, kinds


def compiled(
    chip: str, active: float | None, rank: float, stacked: bool, four: bool = False, int8: bool = False
) -> tuple[Counts, Any]:
    """What a step does, dense or with so many units and predictors of such a rank."""
    shapes, step = operands(stacked, int8), jax.jit(decode_step, donate_argnums=1)
    placed = on_four(chip, shapes) if four else Target("tpu", chip).placed(shapes)
    if active is None:
        program = step.trace(*placed).lower().compile()
    else:
        predictor = hx.LowRank(rank, bits=8)
        config = hx.Config(
            ffn=hx.Ffn(active=active, group_size=8, predictor=predictor),
            vocab=hx.Vocab(candidates=256, predictor=predictor, fill="-inf"),
            rules=(hx.Rule("*", force=True),),
        )
        traced = hx.sparsify(step, config=config).trace(*placed)
        assert len(traced.plan.sites) == 1 + (1 if stacked else LAYERS), traced.explain()
        program = traced.lower().compile()
    assert_compiled_for_a_tpu(program)
    return counts(program.as_text()), program


# What something takes besides reading, in microseconds: assumed.
A_KERNEL, A_STEP = 1.0, 0.5


def modelled(own: Counts, rate: float) -> tuple[float, float]:
    """Microseconds of reading and writing alone, and with what every kernel and every other step takes besides."""
    alone, kernels = own.moved / rate * 1e6, sum(own.kernels.values())
    return alone, alone + A_KERNEL * kernels + A_STEP * (own.steps - kernels)


def print_steps(chip: str) -> None:
    """A table of the whole step, dense and sparse, with layers one after the other and in a loop."""
    rate, _ = CHIPS[chip]
    for what, stacked, four, int8 in (
        ("Layers one after the other", False, False, False),
        ("Layers in a loop over stacked weights", True, False, False),
        ("The same of weights in int8", True, False, True),
        ("In bf16 on four chips, figures of each of them", True, True, False),
    ):
        print(f"\n{what}:\n")
        print(
            "| step | MB moved | kernels | other steps | bytes, dense/this | us of bytes | us with steps | dense/this |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        dense, program = compiled(chip, None, 0.0, stacked, four, int8)
        forms, sent = [(f"dense, {'int8' if int8 else 'bf16'}", dense)], [collectives(program)]
        for rank in (0.25, 0.125):
            for active in (0.125, 0.0625):
                name = f"d/{round(1 / rank)} in 8 bits, {100 * active:.4g} % of units"
                own, program = compiled(chip, active, rank, stacked, four, int8)
                forms.append((name, own))
                sent.append(collectives(program))
        for name, own in forms:
            (_, before), (alone, whole) = modelled(dense, rate), modelled(own, rate)
            kernels = sum(own.kernels.values())
            print(
                f"| {name} | {own.moved / 1e6:.0f} | {kernels} | {own.steps - kernels} | {dense.moved / own.moved:.2f} "
                f"| {alone:.0f} | {whole:.0f} | {before / whole:.2f} |"
            )
        if four:
            assert all(each == sent[0] for each in sent)
            print(f"\nAll of them have the same collectives, which are not in these times: {', '.join(sent[0])}.")


def collectives(program: Any) -> list[str]:
    """Those that stand in a program, each with the type of what it makes."""
    found = re.findall(
        r"= \(?(\w+\[[\d,]*\])\S* (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", program.as_text()
    )
    return sorted(f"{kind} of {of}" for of, kind in found)


def written(chip: str) -> str:
    """What both tables print, the first in a process that has libtpu write down instructions."""
    parts = []
    for which in ("kernels", "steps"):
        with tempfile.TemporaryDirectory() as folder:
            told = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true" if which == "kernels" else ""
            command = [sys.executable, __file__, "--chip", chip, "--only", which, "--dumped", folder]
            done = subprocess.run(
                command, env={**os.environ, "LIBTPU_INIT_ARGS": told}, stdout=subprocess.PIPE, text=True
            )
            if done.returncode:
                raise SystemExit(done.returncode)
            parts.append(done.stdout)
    return "\n".join(parts)


def replaced(page: str, chip: str, text: str) -> str:
    """A page with what stands between two marks replaced."""
    start, end = f"<!-- {chip}: benchmarks/tpu.py -->\n", f"<!-- {chip}: end -->"
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"the page has no place for {chip}; expected the lines {start.strip()!r} and {end!r}")
    return f"{before}{start}\n{text}\n{end}{after}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--docs", type=Path, help="write into this page what is printed")
    parser.add_argument("--only", choices=("kernels", "steps"), help=argparse.SUPPRESS)
    parser.add_argument("--dumped", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only == "kernels":
        print_kernels(given.chip, given.dumped)
    elif given.only == "steps":
        print_steps(given.chip)
    else:
        text = written(given.chip)
        print(text)
        if given.docs:
            given.docs.write_text(replaced(given.docs.read_text(), given.chip, text))


if __name__ == "__main__":
    main()
