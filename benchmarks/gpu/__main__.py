"""Heads, blocks and a step of a model on a GPU: checks every kernel, then prints ms a token and GB/s.

    python -m benchmarks.gpu                       # on a GPU: ten minutes at most
    python -m benchmarks.gpu --compile             # anywhere: every program is compiled for an H100, and none is run
    python -m benchmarks.gpu --small --any-device  # anywhere: all of it, at sizes whose figures say nothing

All programs are lowered and compiled first, by many threads, and weights are made and packed meanwhile. Then each is
timed, while nothing compiles: all parts of one number of tokens before those of the next. What is not compiled within
six tenths of the minutes, or not timed within all of them, is named and left out.

Each form runs in a loop of steps inside one program, so that no call from Python is in the times; what one step makes
is the input of the next. Single kernels ("check") are timed by the profiler, over calls with several sets of operands
in turn, which no cache holds; without a profiler, in loops. Speeds are bytes that a step has to read over its time, and
their share of the speed at which the card copies. Certified forms read what they read: their bytes are those of the
inputs that were run. "busy" is the time of all kernels of a step: the rest of it no kernel runs. What is wrong makes
the exit status 1; without a GPU it is 2.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import hire_xform as hx
from benchmarks.gpu.lines import lines, names
from benchmarks.gpu.pool import Pool
from benchmarks.gpu.run import PARTS, Run
from benchmarks.gpu.sizes import SIZES
from benchmarks.gpu.timing import profiles, timed
from hire_xform.dump.targets import Target

# Of the minutes, in which programs are compiled.
COMPILING = 0.6


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}, in the order of timing")
    parser.add_argument("--tokens", default="1,8,2,4", help="tokens a step, in the order that they are run (1,8,2,4)")
    parser.add_argument(
        "--forms", nargs="+", default=[""], metavar="WORD", help="those with one of these in their name"
    )
    parser.add_argument("--sizes", choices=SIZES, default="1b", help="how large the model is (1b)")
    parser.add_argument("--small", action="store_const", const="small", dest="sizes", help="sizes that take no time")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which nothing more is begun (8.5)")
    parser.add_argument("--threads", type=int, help="that compile (as many as there are cores)")
    parser.add_argument("--any-device", action="store_true", help="run on what is here, GPU or not")
    parser.add_argument("--compile", nargs="?", const="cuda:h100", metavar="CHIP", help="compile only (cuda:h100)")
    parser.add_argument("--json", metavar="FILE", help="also write what was found there")
    found = parser.parse_args(argv)
    found.parts = tuple(found.parts.split(","))
    if not found.parts or set(found.parts) - set(PARTS):
        parser.error(f"--parts {','.join(found.parts)}; expected some of {','.join(PARTS)}")
    if not all(part.isdigit() and 1 <= int(part) <= 64 for part in found.tokens.split(",")):
        parser.error(f"--tokens {found.tokens}; expected numbers from 1 to 64, as 1,8")
    found.tokens = tuple(map(int, found.tokens.split(",")))
    known = names(SIZES[found.sizes], found.tokens, found.parts)
    for word in found.forms:
        if not any(word in name for name in known):
            some = ", ".join(map(repr, dict.fromkeys(known[::-1][:4])))
            parser.error(f"--forms {word}; expected part of the name of a form or check, such as {some}")
    if found.threads is not None and found.threads < 1:
        parser.error(f"--threads {found.threads}; expected 1 or more")
    try:
        found.compile = Target.parse(found.compile) if found.compile else None
    except ValueError as error:
        parser.error(str(error))
    return found


def copying(run: Run) -> Any:
    """A program that copies more than any cache holds, eight times."""
    array = jax.ShapeDtypeStruct((run.sizes.copied // 4,), jnp.float32)
    return jax.jit(lambda a: lax.fori_loop(0, 8, lambda i, a: a + 1.0, a)).trace(array).lower()


def measure_copy(run: Run, program: Any) -> None:
    """Bytes a second, in and out."""
    array = jnp.zeros(run.sizes.copied // 4, jnp.float32)
    run.copy_speed = 2 * array.nbytes / timed(lambda: program(array), 8)
    print(f"copy speed: {run.copy_speed / 1e9:.0f} GB/s, in and out, of {array.nbytes / 1e9:.2f} GB", flush=True)


def compiled(run: Run, name: str, program: Any) -> Any:
    """Compiles it; where that is all, says what came out."""
    start = time.monotonic()
    made = program.compile()
    if run.compiling:
        kernels, held = made.as_text().count("__gpu$xla.gpu.triton"), made.memory_analysis().temp_size_in_bytes
        seconds = time.monotonic() - start
        print(f"{name:70s} {seconds:6.1f} s, {kernels:3d} kernels, temporaries {held / 1e6:.1f} MB", flush=True)
    return made


def lower_all(
    run: Run, todo: Iterable[Any], pool: Pool, maker: Pool, until: float
) -> list[tuple[Any, dict[str, Future]]]:
    """Lowers the programs of lines, and has them compiled, and their weights made: the first numbers of tokens first.

    Returns:
      The lines that have programs, and these.
    """
    found, begun = [], {}
    for line in todo:
        if not run.has_time(line.name, until):
            continue
        try:
            programs = line.programs()
        except Exception as error:
            run.fails(line.name, error)
            continue
        if not programs:
            continue
        rank = run.tokens.index(line.tokens)
        if not run.compiling:
            maker.add(rank, 0, line.prepare)
        for program in programs.values():
            # A program that several lines have is compiled once; they keep it, so that no other gets its identity.
            if id(program) not in begun:
                call = functools.partial(compiled, run, line.name, program)
                begun[id(program)] = pool.add(rank, len(program.as_text()), call)
        found.append((line, {name: begun[id(program)] for name, program in programs.items()}, programs))
    return [(line, futures) for line, futures, _ in found]


def measure(run: Run, line: Any, futures: dict[str, Future]) -> None:
    """Times a line, if its programs are there and the time is not up."""
    if any(future.cancelled() or not future.done() for future in futures.values()):
        run.left_out.append(f"{line.name}: not compiled in time")
        return
    failed = next((error for future in futures.values() if (error := future.exception())), None)
    if failed:
        run.fails(line.name, failed)
    elif not run.compiling and run.has_time(line.name):
        try:
            line.measure({name: future.result() for name, future in futures.items()})
        except Exception as error:
            run.fails(line.name, error)


def work(run: Run, options: argparse.Namespace) -> None:
    """Compiles, and then times."""
    start = time.monotonic()
    until = start + COMPILING * (run.deadline - start)
    # Weights are made one after the other, and would keep threads waiting that can compile.
    pool, maker = Pool(options.threads, until), Pool(1, until)
    copy = None if run.compiling else pool.add(-1, 0, copying(run).compile)
    ready = lower_all(run, lines(run, options.parts), pool, maker, until)
    lowered = time.monotonic() - start
    ended = [one.close(run.deadline) for one in (pool, maker)]
    print(
        f"{len(ready)} lines were lowered in {lowered:.1f} s, and compiled within {time.monotonic() - start:.1f} s, by "
        f"{len(pool.threads)} threads",
        flush=True,
    )
    if all(ended) and copy and not copy.cancelled():
        measure_copy(run, copy.result())
    for line, futures in ready:
        if all(ended):
            measure(run, line, futures)
        else:
            run.left_out.append(f"{line.name}: something else was compiled until the time was up")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; returns the exit status."""
    options = parse(argv)
    # What runs nothing costs no time on a GPU.
    deadline = float("inf") if options.compile else time.monotonic() + 60 * options.minutes
    device = jax.devices()[0]
    if device.platform != "gpu" and not (options.any_device or options.compile):
        print(
            f"benchmarks.gpu: JAX {jax.__version__} has no GPU here, but {device.device_kind}; expected an NVIDIA "
            "GPU and jax[cuda12] or jax[cuda13], or --compile, or --small --any-device",
            file=sys.stderr,
        )
        return 2
    sees = not options.compile and profiles()
    run = Run(SIZES[options.sizes], options.tokens, deadline, options.compile, tuple(options.forms), sees)
    where = "compiled only, for " + options.compile.device().device_kind if options.compile else device.device_kind
    print(f"{where}; JAX {jax.__version__}; {run.sizes}")
    for step, platforms in hx.backends().items():
        print(f"  {step:28s} {platforms['cuda']}")
    work(run, options)
    run.summary()
    if options.json:
        run.write(options.json, device=where, jax=jax.__version__)
    return 1 if run.wrong else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: a thread that is still in XLA's compiler would be torn out of it while the process ends.
    os._exit(status)
