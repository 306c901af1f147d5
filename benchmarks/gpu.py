"""Heads, blocks and a step of a billion parameters on a GPU: checks every kernel, then prints ms a token and GB/s.

    python benchmarks/gpu.py                       # on a GPU: ten minutes at most
    python benchmarks/gpu.py --compile             # anywhere: every program is compiled for an H100, and none is run
    python benchmarks/gpu.py --small --any-device  # anywhere: all of it, at sizes whose figures say nothing

Each form runs in a loop of steps inside one program, so that no call from Python is in the times; what one step makes
is the input of the next. Speeds are bytes that a step has to read over its time, and their share of the speed at which
the card copies. Certified forms read what they read: their bytes are those of the inputs that were run. All parts of
one number of tokens come before those of the next; what does not fit into the minutes is named and left out. What is
wrong makes the exit status 1; without a GPU it is 2.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import hire_xform as hx
from hire_xform.dump.targets import Target
from hire_xform.lowering.predict.few_bits import fine_scores, pack_nibbles, quantize, quantized_scores
from hire_xform.lowering.primitives.combine_rows import combine_rows
from hire_xform.lowering.primitives.kernels import portable_only
from hire_xform.lowering.primitives.select_rows import select_rows_dot
from hire_xform.lowering.primitives.stored_rows import Operation, StoredRows

PARTS = ("check", "head", "ffn", "step")
EIGHTH, EIGHT, FOUR = hx.LowRank(0.125, bits=8), hx.Quantized(8), hx.Quantized(4)
NOISE, BIAS, EPSILON = 0.05, -1.6, 1e-6
REPEATS, SEEN = 5, 8


@dataclass(frozen=True)
class Sizes:
    """What is run. The model of a step has them all; a head, and a stack of blocks, are parts of it."""

    d: int = 2048
    m: int = 8192
    vocab: int = 131072
    layers: int = 16
    blocks: int = 6
    heads: int = 16
    context: int = 64
    # Of the checks: rows, columns, and how many are chosen.
    rows: int = 16384
    columns: int = 4096
    chosen: int = 1024
    # Steps of a loop, and bytes that are copied.
    steps: int = 32
    copied: int = 2 << 30


SMALL = Sizes(256, 1024, 2048, 2, 2, 2, 8, 1024, 512, 64, 3, 1 << 20)


@dataclass
class Row:
    """A line of a table."""

    part: str
    name: str
    tokens: int
    milliseconds: float
    nbytes: float
    share: float
    note: str = ""


@dataclass
class Run:
    """What all parts know, and what they found."""

    sizes: Sizes
    tokens: tuple[int, ...]
    deadline: float
    compiling: Target | None
    copy_speed: float = float("nan")
    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def has_time(self, what: str, seconds: float = 20.0) -> bool:
        """Whether so many seconds are left; if not, what does without them is noted."""
        if time.monotonic() + seconds < self.deadline:
            return True
        self.left_out.append(what)
        return False

    def tell(self, part: str, name: str, tokens: int, seconds: float, nbytes: float, note: str = "") -> None:
        """Prints a line at once: what was measured stays, whatever comes after it."""
        speed = nbytes / seconds
        row = Row(part, name, tokens, 1e3 * seconds / tokens, nbytes, speed / self.copy_speed, note)
        self.rows.append(row)
        print(
            f"{part:6s} {name:44s} {tokens:2d} tokens {1e3 * seconds:9.4f} ms a step {row.milliseconds:9.4f} ms a "
            f"token {nbytes / 1e6:9.2f} MB {speed / 1e9:8.1f} GB/s {row.share:6.1%} of copying  {note}",
            flush=True,
        )


def timed(call: Callable[[], Any], times: int) -> float:
    """Seconds of one of the ``times`` steps of a call: the median of some calls, after one that is not counted."""
    jax.block_until_ready(call())
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append((time.perf_counter() - start) / times)
    return statistics.median(found)


# --- memory ---


def measure_copy(run: Run) -> None:
    """Bytes a second in and out of a copy that is larger than any cache."""
    loops = 8
    array = jnp.zeros(run.sizes.copied // 4, jnp.float32)
    copy = jax.jit(lambda a: lax.fori_loop(0, loops, lambda i, a: a + 1.0, a))
    run.copy_speed = 2 * array.nbytes / timed(lambda: copy(array), loops)
    print(f"copy speed: {run.copy_speed / 1e9:.0f} GB/s, in and out, of {array.nbytes / 1e9:.2f} GB", flush=True)


# --- kernels against their portable forms ---


def checks(sizes: Sizes, tokens: int) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...], int]]:
    """Steps of functions of their operands, the shapes of these, and the bytes of rows that each has to read."""
    n, d, k, t = sizes.rows, sizes.columns, sizes.chosen, tokens
    f32, bf16, int8, int32 = jnp.float32, jnp.bfloat16, jnp.int8, jnp.int32
    shape = jax.ShapeDtypeStruct

    def of_scores(score: Any, bits: int) -> Callable[..., Any]:
        return lambda x, q, scale: score(x, q, scale, bits)

    for bits, dtype in ((8, int8), (4, jnp.uint8)):
        operands = shape((t, d * 8 // bits), f32), shape((n, d), dtype), shape((n,), f32)
        yield f"scores, {bits} bits", of_scores(quantized_scores, bits), operands, n * d
        yield f"fine scores, {bits} bits", of_scores(fine_scores, bits), operands, n * d
    for dtype in (bf16, f32):
        rows, size = shape((n, d), dtype), k * d * jnp.dtype(dtype).itemsize
        for group in (1, 8):
            index, name = shape((k // group,), int32), f"{jnp.dtype(dtype).name}, groups of {group}"
            select = lambda x, w, i, group=group: select_rows_dot(x, w, i, group_size=group)  # noqa: E731
            combine = lambda h, w, i, group=group: combine_rows(h, w, i, group_size=group)  # noqa: E731
            yield f"products, {name}", select, (shape((t, d), dtype), rows, index), size
            yield f"sums, {name}", combine, (shape((t, k), dtype), rows, index), size
    scaled = (Operation("mul", jnp.dtype(f32)),)
    stored = lambda v, s: StoredRows(v, (s,), scaled, (False,))  # noqa: E731
    rows, scale, index = shape((n, d), int8), shape((n, 1), f32), shape((k,), int32)
    given = rows, scale, index
    yield "products, int8", lambda x, v, s, i: select_rows_dot(x, stored(v, s), i), (shape((t, d), f32), *given), k * d
    yield "sums, int8", lambda h, v, s, i: combine_rows(h, stored(v, s), i), (shape((t, k), f32), *given), k * d


def drawn(struct: jax.ShapeDtypeStruct, seed: int, below: int) -> jax.Array:
    """An array of a shape: an index is below a number."""
    rng = np.random.default_rng(seed)
    if struct.dtype == jnp.int32:
        return jnp.asarray(rng.permutation(below)[: struct.shape[0]], jnp.int32)
    if struct.dtype == jnp.uint8:
        return pack_nibbles(jnp.asarray(rng.integers(-7, 8, (struct.shape[0], 2 * struct.shape[1])), jnp.int8))
    if struct.dtype == jnp.int8:
        return jnp.asarray(rng.integers(-127, 128, struct.shape), jnp.int8)
    values = rng.standard_normal(struct.shape, np.float32)
    return jnp.asarray(np.abs(values) if len(struct.shape) == 1 or struct.shape[1] == 1 else values, struct.dtype)


def check(run: Run, tokens: int) -> None:
    """Every step as programs for GPUs have it, against its portable form: results, then times of both."""
    for name, step, operands, nbytes in checks(run.sizes, tokens):
        if run.compiling:
            compiled(run, f"{name}, {tokens} tokens", jax.jit(lambda *o, step=step: step(*o)), operands)
        elif run.has_time(f"check of {name}, {tokens} tokens", 10):
            arrays = [drawn(struct, i, run.sizes.rows) for i, struct in enumerate(operands)]
            if operands[-1].dtype == jnp.int32:
                arrays[-1] = arrays[-1] % (run.sizes.rows * operands[-1].shape[0] // run.sizes.chosen)
            got, seconds = made_and_timed(step, arrays, run.sizes.steps)
            with portable_only():
                want, plain = made_and_timed(step, arrays, run.sizes.steps)
            error = max(map(difference, got, want))
            # XLA's products of f32 are of fewer bits on a GPU, and those of bf16 are rounded to it.
            right = error <= (2e-2 if operands[0].dtype == jnp.bfloat16 else 5e-3)
            if not right:
                run.wrong.append(f"{name}, {tokens} tokens: differs by {error}")
            run.tell("check", name, tokens, seconds, nbytes, f"differs by {error:.1e}" + ("" if right else " WRONG"))
            run.tell("check", f"{name}, portable", tokens, plain, nbytes)


def made_and_timed(step: Callable[..., Any], arrays: Sequence[jax.Array], times: int) -> tuple[list[jax.Array], float]:
    """What a step makes, and the seconds that it takes."""
    made = jax.jit(lambda *operands: jax.tree.leaves(step(*operands)))(*arrays)
    loop = jax.jit(repeated(step, times))
    return made, timed(lambda: loop(*arrays), times)


def difference(a: Any, b: Any) -> float:
    """The largest difference, of the largest entry."""
    a, b = (np.asarray(each, np.float64) for each in (a, b))
    return float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-30))


def repeated(step: Callable[..., Any], times: int) -> Callable[..., Any]:
    """A step run over and over, on other rows each time where it has an index, so that no cache has them."""

    def run(x: jax.Array, *others: jax.Array) -> jax.Array:
        *rows, last = others

        def body(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            own = last
            if last.dtype == jnp.int32:
                most = rows[0].shape[0] * last.shape[0] // (x.shape[1] if x.shape[1] > last.shape[0] else 1)
                own = (last + i * 97) % max(1, min(most, int(rows[0].shape[0] // 8)))
            made = jax.tree.leaves(step(x, *rows, own))
            # What comes out is in what goes in next, without changing it.
            return x + (1e-30 * sum(jnp.sum(each.astype(jnp.float32)) for each in made)).astype(x.dtype), None

        return lax.scan(body, x, jnp.arange(times, dtype=jnp.int32))[0]

    return run


# --- the model ---


def shapes_of(sizes: Sizes, part: str) -> dict[str, tuple[int, int]]:
    """Matrices by name, a row for each output, but ``down`` a row for each unit."""
    d, m, found = sizes.d, sizes.m, {}
    for i in range({"head": 0, "ffn": sizes.blocks, "step": sizes.layers}[part]):
        if part == "step":
            found |= {f"{i}.{name}": (d, d) for name in "qkvo"}
        found |= {f"{i}.up": (m, d), f"{i}.down": (m, d)}
    return found if part == "ffn" else {**found, "head": (sizes.vocab, d)}


def make_weights(sizes: Sizes, part: str) -> dict[str, jax.Array]:
    """Of rank d / 8 and a little noise, so that small predictors are good ones: no time hangs on it, agreement does."""
    made = {}
    for number, (name, (rows, columns)) in enumerate(shapes_of(sizes, part).items()):
        keys = jax.random.split(jax.random.key(number), 3)
        matrix = jax.random.normal(keys[0], (rows, columns)) * (NOISE * columns**-0.5)
        if name.endswith(("up", "head")):
            rank = columns // 8
            left = jax.random.normal(keys[1], (rows, rank))
            matrix += left @ jax.random.normal(keys[2], (rank, columns)) * (rank * columns) ** -0.5
        else:
            matrix *= (rows / columns if name.endswith("down") else 1.0) ** -0.5 / NOISE
        made[name] = matrix.astype(jnp.bfloat16)
    return made


Product = Callable[[jax.Array, Any, str], jax.Array]


def rows_form(x: jax.Array, w: jax.Array, name: str) -> jax.Array:
    """A product with weights as :func:`shapes_of` has them."""
    return x @ w if name.endswith("down") else x @ w.T


def columns_form(x: jax.Array, w: jax.Array, name: str) -> jax.Array:
    """The same of weights with a column for each output; but the head has rows: it is looked up, too."""
    return x @ w.T if name == "head" else x @ w


def int8_form(x: jax.Array, w: Any, name: str) -> jax.Array:
    """Weights in int8 with a scale for each output, widened by the program, as users write it."""
    q, scale = w
    return (x @ q.astype(jnp.bfloat16).T) * scale.astype(jnp.bfloat16)


def norm(x: jax.Array) -> jax.Array:
    """Root mean square."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + EPSILON)).astype(x.dtype)


def one_step(sizes: Sizes, part: str, product: Product) -> Callable[..., Any]:
    """A step of the model: weights and tokens ``[T, d]`` to what is looked at, and the tokens of the next step."""

    def attention(w: Any, x: jax.Array, i: int, cache: jax.Array) -> jax.Array:
        tokens, heads, width = x.shape[0], sizes.heads, sizes.d // sizes.heads
        q, k, v = (product(x, w[f"{i}.{name}"], f"{i}.{name}").reshape(tokens, heads, width) for name in "qkv")
        keys = jnp.concatenate([jnp.broadcast_to(cache, (tokens, *cache.shape)), k[:, None]], 1)
        values = jnp.concatenate([jnp.broadcast_to(cache, (tokens, *cache.shape)), v[:, None]], 1)
        weights = jax.nn.softmax(jnp.einsum("thw,tchw->thc", q, keys).astype(jnp.float32) * width**-0.5, -1)
        mixed = jnp.einsum("thc,tchw->thw", weights.astype(x.dtype), values)
        return product(mixed.reshape(tokens, sizes.d), w[f"{i}.o"], f"{i}.o")

    def step(w: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        cache = jnp.full((sizes.context, sizes.heads, sizes.d // sizes.heads), 0.1, x.dtype)
        for i in range({"head": 0, "ffn": sizes.blocks, "step": sizes.layers}[part]):
            if part == "step":
                x = x + attention(w, norm(x), i, cache)
            hidden = jax.nn.relu(product(norm(x), w[f"{i}.up"], f"{i}.up") + jnp.asarray(BIAS, x.dtype))
            x = x + product(hidden, w[f"{i}.down"], f"{i}.down")
        if part == "ffn":
            return x, norm(x)
        ids = jnp.argmax(product(norm(x), w["head"], "head"), -1)
        table = w["head"][0] if isinstance(w["head"], tuple) else w["head"]
        return ids, norm(table[ids].astype(jnp.float32)).astype(x.dtype)

    return step


def looped(step: Callable[..., Any], times: int) -> Callable[..., Any]:
    """So many steps, one after the other, in one program."""

    def loop(w: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, _: (step(w, x)[1], None), x, None, length=times)[0]

    return loop


def columns_of(w: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The other layout."""
    return {k: v if k.endswith("down") or k == "head" else v.T for k, v in w.items()}


def int8_of(w: dict[str, jax.Array]) -> dict[str, Any]:
    """In int8."""
    turned = {k: v.T if k.endswith("down") else v for k, v in w.items()}
    return {k: quantize(v, 127) for k, v in turned.items()}


def configs(part: str, tokens: int) -> dict[str, hx.Config]:
    """Settings of ours by name. Forced, so that a line says what it says."""
    rules, most = (hx.Rule("*", force=True),), max(8, tokens)

    def approximate(predictor: Any, active: float) -> hx.Config:
        head = hx.Vocab(predictor=predictor, certify=False, max_tokens=most)
        block = hx.Ffn(predictor=predictor, active=active, certify=False, max_tokens=most)
        return hx.Config(vocab=head, ffn=block, rules=rules)

    if part == "head":
        certified = {"int8": EIGHT, "low rank d/8, then int8": hx.Staged((EIGHTH, EIGHT))}
        heads = {
            f"ours, certified, {name}": hx.Config(
                vocab=hx.Vocab(predictor=predictor, certify=True, max_tokens=most), ffn=None, rules=rules
            )
            for name, predictor in certified.items()
        }
        approximated = {"low rank d/8 in 8 bits": EIGHTH, "4 bits": FOUR}
        return heads | {f"ours, {name}": approximate(predictor, 0.25) for name, predictor in approximated.items()}
    return {
        "ours, low rank d/8, 6.25 % of units": approximate(EIGHTH, 0.0625),
        "ours, low rank d/8, 12.5 % of units": approximate(EIGHTH, 0.125),
        "ours, int8, 25 % of units": approximate(EIGHT, 0.25),
    }


class Part:
    """A part of the model: its weights, and what is packed of them for all numbers of tokens."""

    def __init__(self, run: Run, name: str):
        """Makes nothing yet."""
        self.run, self.name = run, name
        self.structs = {k: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for k, shape in shapes_of(run.sizes, name).items()}
        self.configs = configs(name, max(run.tokens))
        self.single = one_step(run.sizes, name, rows_form)
        self.loop = looped(self.single, run.sizes.steps)
        self._packed: dict[str, Any] = {}

    @functools.cached_property
    def base(self) -> dict[str, jax.Array]:
        """The weights."""
        return make_weights(self.run.sizes, self.name)

    def inputs(self, tokens: int) -> list[jax.Array]:
        """Some, for so many tokens."""
        shape = tokens, self.run.sizes.d
        return [norm(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)) for i in range(SEEN)]

    def packed(self, form: str) -> Any:
        """The weights as a form of ours has them."""
        if form not in self._packed:
            steps = [hx.sparsify(f, config=self.configs[form]) for f in (self.loop, self.single)]
            traces = [step.trace(self.base, self.inputs(t)[0]) for t in self.run.tokens for step in steps]
            self._packed[form] = hx.pack(self.base, traces)
        return self._packed[form]

    def measure(self, tokens: int) -> None:
        """Dense in two layouts, int8, and ours."""
        run, x = self.run, self.inputs(tokens)[0]
        for name, product, layout in (
            ("dense bf16, rows", rows_form, lambda w: w),
            ("dense bf16, columns", columns_form, columns_of),
            ("XLA int8", int8_form, int8_of),
        ):
            loop = jax.jit(looped(one_step(run.sizes, self.name, product), run.sizes.steps))
            if run.compiling:
                shapes = jax.eval_shape(layout, self.structs)
                compiled(run, f"{self.name}, {name}, {tokens} tokens", loop, (shapes, x))
            elif run.has_time(f"{self.name}, {name}, {tokens} tokens"):
                w = layout(self.base)
                seconds = timed(lambda loop=loop, w=w: loop(w, x), run.sizes.steps)
                run.tell(self.name, name, tokens, seconds, sum(leaf.nbytes for leaf in jax.tree.leaves(w)))
        for name, config in self.configs.items():
            if run.compiling:
                args = run.compiling.placed((self.structs, x))
                step = hx.sparsify(self.loop, config=config)
                compiled(run, f"{self.name}, {name}, {tokens} tokens", step, args, placed=True)
            elif run.has_time(f"{self.name}, {name}, {tokens} tokens", 40):
                self.ours(name, tokens)

    def ours(self, name: str, tokens: int) -> None:
        """A line of ours: the loop is timed; results and bytes are those of single steps on some inputs."""
        run, config, inputs = self.run, self.configs[name], self.inputs(tokens)
        loop, single = (hx.sparsify(f, config=config) for f in (self.loop, self.single))
        plan = single.trace(self.base, inputs[0]).plan
        if not plan.sites:
            run.left_out.append(f"{self.name}, {name}: left dense, {hx_reason(plan)}")
            return
        weights, dense, ran = self.packed(name), jax.jit(self.single), Counted()
        for x in inputs:
            (got, _), counts = single.with_rungs(weights, x)
            want = dense(self.base, x)[0]
            ran.add(plan, counts)
            ran.same.append(
                difference(got, want) if self.name == "ffn" else float(np.mean(np.asarray(got) == np.asarray(want)))
            )
        note = (
            f"differs by {max(ran.same):.1e}"
            if self.name == "ffn"
            else f"{statistics.mean(ran.same):.1%} of tokens agree"
        )
        if "certified" in name:
            note += f", {1 - ran.dense / max(1, ran.runs):.1%} proved"
            if min(ran.same) < 1:
                run.wrong.append(f"{self.name}, {name}, {tokens} tokens: {note}")
        others = sum(leaf.nbytes for leaf in jax.tree.leaves(self.base)) - plan.dense_bytes
        seconds = timed(lambda: loop(weights, inputs[0]), run.sizes.steps)
        run.tell(self.name, name, tokens, seconds, others + ran.read / len(inputs), note)


@dataclass
class Counted:
    """Of some calls: bytes that their sites read, how often certified ones ran and fell back, and how results agree."""

    read: float = 0.0
    runs: int = 0
    dense: int = 0
    same: list[float] = field(default_factory=list)

    def add(self, plan: hx.Plan, counts: Any) -> None:
        """One call more, by what each site counted."""
        for site in plan.sites:
            own = counts.get(site.path)
            if own is None or not site.rungs:
                self.read += site.sparse_bytes
                continue
            self.read += sum(int(n) * rung.bytes for n, rung in zip(own, site.rungs, strict=True))
            self.runs, self.dense = self.runs + int(sum(own)), self.dense + int(own[-1])


def hx_reason(plan: hx.Plan) -> str:
    """Why nothing is rewritten."""
    return plan.refusals[-1].reason if plan.refusals else "nothing was found"


def compiled(run: Run, name: str, function: Any, operands: Any, placed: bool = False) -> None:
    """Compiles for a GPU that is described, and runs nothing."""
    assert run.compiling is not None
    start = time.monotonic()
    try:
        operands = operands if placed else run.compiling.placed(operands)
        program = function.trace(*operands).lower().compile()
    except Exception as error:
        run.wrong.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
        print(f"{name:70s} FAILED", flush=True)
        return
    held = program.memory_analysis()
    calls = program.as_text().count("__gpu$xla.gpu.triton")
    print(
        f"{name:70s} {time.monotonic() - start:6.1f} s, {calls:3d} kernels, temporaries "
        f"{held.temp_size_in_bytes / 1e6:.1f} MB",
        flush=True,
    )


# --- the command line ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--tokens", default="1,8,2,4", help="tokens a step, in the order that they are run (1,8,2,4)")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which nothing more is begun (8.5)")
    parser.add_argument("--small", action="store_true", help="sizes that take no time")
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
    try:
        found.compile = Target.parse(found.compile) if found.compile else None
    except ValueError as error:
        parser.error(str(error))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; returns the exit status."""
    options = parse(argv)
    device = jax.devices()[0]
    if device.platform != "gpu" and not (options.any_device or options.compile):
        print(
            f"benchmarks/gpu.py: JAX {jax.__version__} has no GPU here, but {device.device_kind}; expected an NVIDIA "
            "GPU and jax[cuda12] or jax[cuda13], or --compile, or --small --any-device",
            file=sys.stderr,
        )
        return 2
    sizes = SMALL if options.small else Sizes()
    run = Run(sizes, options.tokens, time.monotonic() + 60 * options.minutes, options.compile)
    where = "compiled only, for " + options.compile.device().device_kind if options.compile else device.device_kind
    print(f"{where}; JAX {jax.__version__}; {sizes}")
    for step, platforms in hx.backends().items():
        print(f"  {step:28s} {platforms['cuda']}")
    if not options.compile:
        measure_copy(run)
    parts = {name: Part(run, name) for name in options.parts if name != "check"}
    for tokens, part in itertools.product(options.tokens, options.parts):
        try:
            check(run, tokens) if part == "check" else parts[part].measure(tokens)
        except Exception as error:
            # The parts after it are as good without it, and the time on a GPU is short.
            run.wrong.append(f"{part}, {tokens} tokens: {type(error).__name__}: {str(error)[:2000]}")
            print(f"{part} FAILED: {type(error).__name__}: {str(error)[:2000]}", flush=True)
    summary(run)
    if options.json:
        found = {"device": where, "jax": jax.__version__, "copy": run.copy_speed, "wrong": run.wrong}
        found |= {"left_out": run.left_out, "rows": [vars(row) for row in run.rows]}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    return 1 if run.wrong else 0


def summary(run: Run) -> None:
    """Of each part and number of tokens ours and int8 beside the best dense form; then what is wrong or left out."""
    for part in PARTS[1:]:
        for tokens in run.tokens:
            rows = [row for row in run.rows if (row.part, row.tokens) == (part, tokens)]
            best = min((row.milliseconds for row in rows if row.name.startswith("dense")), default=None)
            if best is not None:
                ratios = [f"{row.name} {best / row.milliseconds:.2f}x" for row in rows if "dense" not in row.name]
                print(f"{part}, {tokens} tokens, of the best dense form: {'; '.join(ratios)}")
    for what, found in (("left out", run.left_out), ("WRONG", run.wrong)):
        for one in found:
            print(f"{what}: {one}")


if __name__ == "__main__":
    sys.exit(main())
