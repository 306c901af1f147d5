"""Steps that have kernels, one by one: against their portable forms, and as shares of the speed of copying."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu.run import Run
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import timed, traced
from hire_xform.lowering.predict.few_bits import fine_scores, pack_nibbles, quantized_scores
from hire_xform.lowering.primitives.combine_rows import combine_rows
from hire_xform.lowering.primitives.da_top_k import da_top_k
from hire_xform.lowering.primitives.kernels import portable_only
from hire_xform.lowering.primitives.open_rows import open_rows
from hire_xform.lowering.primitives.select_rows import select_rows_dot
from hire_xform.lowering.primitives.stored_rows import Operation, StoredRows

F32, BF16, INT8, INT32 = jnp.float32, jnp.bfloat16, jnp.int8, jnp.int32
# Sets of operands that calls have in turn, and matrices among them, at most; and calls that the profiler sees.
MOST_SETS, MATRICES, CALLS = 16, 3, 12
# The largest difference, of the largest entry. XLA's products of f32 are of fewer bits on a GPU; those of bf16 are
# rounded to it; what is chosen is the same.
PRODUCTS_OF = {BF16: 2e-2, F32: 5e-3}


@dataclass(frozen=True)
class Check:
    """A step: a function of its operands.

    Attributes:
      name, step: which.
      operands: their shapes.
      nbytes: bytes that it has to read.
      allowed: how much its results may differ.
      below: what the entries of its index are below.
      shift: what is added to vectors, which are not negative without.
    """

    name: str
    step: Callable[..., Any]
    operands: tuple[jax.ShapeDtypeStruct, ...]
    nbytes: int
    allowed: float = PRODUCTS_OF[F32]
    below: int = 0
    shift: float = 0.0


def checks(sizes: Sizes, tokens: int) -> Iterator[Check]:
    """All of them. What is of one vector of scores, however many tokens there are, comes with one token only."""
    n, d, k, t, shape = sizes.rows, sizes.columns, sizes.chosen, tokens, jax.ShapeDtypeStruct

    def of_scores(score: Any, bits: int) -> Callable[..., Any]:
        return lambda x, q, scale: score(x, q, scale, bits)

    for bits, dtype in ((8, INT8), (4, jnp.uint8)):
        operands = shape((t, d * 8 // bits), F32), shape((n, d), dtype), shape((n,), F32)
        yield Check(f"scores, {bits} bits", of_scores(quantized_scores, bits), operands, n * d)
        yield Check(f"fine scores, {bits} bits", of_scores(fine_scores, bits), operands, n * d)
    if tokens == 1:
        for of, most in sizes.choices:
            choose = functools.partial(da_top_k, k=most)
            yield Check(f"da_top_k, {most} of {of}", choose, (shape((of,), F32),), 4 * of, 0.0)
        scores = (shape((sizes.opened,), F32),)
        # One in eighty is open.
        yield Check(f"open_rows, {sizes.opened}", open_rows, scores, 4 * sizes.opened, 0.0, shift=-2.5)
    for dtype in (BF16, F32):
        rows, size = shape((n, d), dtype), k * d * jnp.dtype(dtype).itemsize
        for group in (1, 8):
            index, name = shape((k // group,), INT32), f"{jnp.dtype(dtype).name}, groups of {group}"
            select = functools.partial(select_rows_dot, group_size=group)
            combine = functools.partial(combine_rows, group_size=group)
            others = size, PRODUCTS_OF[dtype], n // group
            yield Check(f"products, {name}", select, (shape((t, d), dtype), rows, index), *others)
            yield Check(f"sums, {name}", combine, (shape((t, k), dtype), rows, index), *others)
    scaled = (Operation("mul", jnp.dtype(F32)),)
    stored = lambda v, s: StoredRows(v, (s,), scaled, (False,))  # noqa: E731
    select, combine = (lambda x, v, s, i, of=of: of(x, stored(v, s), i) for of in (select_rows_dot, combine_rows))
    given = shape((n, d), INT8), shape((n, 1), F32), shape((k,), INT32)
    yield Check("products, int8", select, (shape((t, d), F32), *given), k * d, below=n)
    yield Check("sums, int8", combine, (shape((t, k), F32), *given), k * d, below=n)


@functools.lru_cache(maxsize=256)
def drawn(struct: jax.ShapeDtypeStruct, seed: int, below: int, shift: float) -> jax.Array:
    """An array of a shape: an index is below a number; vectors and columns are not negative, but for a shift."""
    rng = np.random.default_rng(seed)
    if struct.dtype == INT32:
        return jnp.asarray(rng.permutation(below)[: struct.shape[0]], INT32)
    if struct.dtype == jnp.uint8:
        return pack_nibbles(jnp.asarray(rng.integers(-7, 8, (struct.shape[0], 2 * struct.shape[1]), np.int8)))
    if struct.dtype == INT8:
        return jnp.asarray(rng.integers(-127, 128, struct.shape, np.int8))
    values = rng.standard_normal(struct.shape, np.float32)
    is_vector = len(struct.shape) == 1 or struct.shape[1] == 1
    return jnp.asarray(np.abs(values) + np.float32(shift) if is_vector else values, struct.dtype)


def difference(a: Any, b: Any) -> float:
    """The largest difference, of the largest entry."""
    a, b = (np.asarray(each, np.float64) for each in (a, b))
    return float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-30))


def repeated(check: Check, times: int) -> Callable[..., Any]:
    """A step run over and over, on other rows each time where it has an index, so that no cache has them."""

    def run(x: jax.Array, *others: jax.Array) -> jax.Array:
        def body(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            own = [(one + i * 97) % check.below if one.dtype == INT32 else one for one in others]
            made = jax.tree.leaves(check.step(x, *own))
            # What comes out is in what goes in next, without changing it.
            return x + (1e-30 * sum(jnp.sum(each.astype(F32)) for each in made)).astype(x.dtype), None

        return lax.scan(body, x, jnp.arange(times, dtype=INT32))[0]

    return run


class CheckLine:
    """Two lines of the table: a step as programs for GPUs have it, and its portable form."""

    part = "check"

    def __init__(self, run: Run, check: Check, tokens: int):
        """Lowers and makes nothing yet."""
        self.run, self.check, self.tokens = run, check, tokens
        self.name = f"{check.name}, {tokens} tokens"

    def programs(self) -> dict[str, Any]:
        """Lowered: the step with its kernel, and without; and loops of both where the profiler sees no kernels."""
        found = self._lowered("kernel")
        if not self.run.compiling:
            # Around the lowering: that is where a kernel takes the place of the portable form.
            with portable_only():
                found |= self._lowered("portable")
        return found

    def _lowered(self, form: str) -> dict[str, Any]:
        check, operands = self.check, self.run.placed(self.check.operands)
        # A new function each time: JAX remembers what it has traced and lowered of one.
        functions = {form: lambda *operands: jax.tree.leaves(check.step(*operands))}
        if not self.run.compiling and not self.run.profiles:
            functions[f"{form} loop"] = repeated(check, self.run.sizes.steps)
        return {name: jax.jit(function).trace(*operands).lower() for name, function in functions.items()}

    def operands(self) -> list[list[jax.Array]]:
        """Sets of operands, so many that no cache has those of the next call; they share a few matrices."""
        count = max(1, min(MOST_SETS, -(-self.run.sizes.uncached // self.check.nbytes)))
        large = self.run.sizes.rows * self.run.sizes.columns // 2
        of = self.check.below, self.check.shift
        return [
            [drawn(one, i % MATRICES if one.size >= large else i, *of) for one in self.check.operands]
            for i in range(count)
        ]

    # Drawn while others are compiled.
    prepare = operands

    def measure(self, programs: dict[str, Callable[..., Any]]) -> None:
        """Results, then times of both."""
        run, check, sets = self.run, self.check, self.operands()
        got, want = (programs[form](*sets[0]) for form in ("kernel", "portable"))
        error = max(map(difference, got, want))
        right = error <= check.allowed
        if not right:
            run.wrong.append(f"{self.name}: differs by {error}")
        said = [f"differs by {error:.1e}" + ("" if right else " WRONG")]
        for form, name, notes in (("kernel", check.name, said), ("portable", f"{check.name}, portable", [])):
            if f"{form} loop" in programs:
                loop = programs[f"{form} loop"]
                seconds = timed(functools.partial(loop, *sets[0]), run.sizes.steps)
                run.tell(self.part, name, self.tokens, seconds, check.nbytes, notes)
                continue
            kernels = self._kernels(programs[form], sets)
            notes = [*notes, f"largest {kernels.largest[:60]} {kernels.largest_us:.1f} us"]
            run.tell(self.part, name, self.tokens, kernels.busy_us / 1e6, check.nbytes, notes, kernels)

    def _kernels(self, program: Callable[..., Any], sets: list[list[jax.Array]]) -> Any:
        calls = max(CALLS, len(sets))
        call = lambda: [program(*sets[i % len(sets)]) for i in range(calls)]  # noqa: E731
        jax.block_until_ready(call())
        kernels = traced(call, calls)
        if kernels is None:
            raise RuntimeError(f"{self.name}: the profiler saw no kernels; expected some in a GPU's streams")
        return kernels
