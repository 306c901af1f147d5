"""A line of the table for each form of the model or of a part of it: its programs, its weights, how it is timed."""

from __future__ import annotations

import functools
import itertools
import statistics
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hire_xform as hx
from benchmarks.gpu.checks import CheckLine, checks, difference
from benchmarks.gpu.forms import PLAIN, Plain, configs
from benchmarks.gpu.model import inputs, looped, make_weights, one_step, rows_form, shapes_of
from benchmarks.gpu.run import Run
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import timed, traced
from hire_xform.call.counting import count_rungs

# Inputs that results are compared on.
SEEN = 8


def lines(run: Run, parts: tuple[str, ...]) -> Iterator[Any]:
    """All lines, in the order that they are timed in: all parts of one number of tokens before those of the next."""
    of_model = {name: Part(run, name) for name in parts if name != "check"}
    for tokens, part in itertools.product(run.tokens, parts):
        if part == "check":
            made: Iterator[Any] = (CheckLine(run, check, tokens) for check in checks(run.sizes, tokens))
            yield from (line for line in made if run.takes(line.check.name))
            continue
        one = of_model[part]
        yield from (PlainLine(one, plain, tokens) for plain in PLAIN if run.takes(plain.name))
        yield from (OwnLine(one, form, tokens) for form in one.configs if run.takes(form))


def names(sizes: Sizes, tokens: tuple[int, ...], parts: tuple[str, ...]) -> list[str]:
    """Of all forms and checks, without parts and numbers of tokens."""
    found = [check.name for t in tokens for check in checks(sizes, t)] if "check" in parts else []
    for part in parts:
        if part != "check":
            found += [*(plain.name for plain in PLAIN), *configs(part, max(tokens))]
    return found


def lowered(function: Callable[..., Any], *operands: Any) -> Any:
    """A program of it."""
    return jax.jit(function).trace(*operands).lower()


class Part:
    """A part of the model: what is traced of it, its weights, and what is packed of them for all numbers of tokens."""

    def __init__(self, run: Run, name: str):
        """Makes nothing yet."""
        self.run, self.name = run, name
        self.structs = run.placed(shapes_of(run.sizes, name))
        self.configs = configs(name, max(run.tokens))
        self.single = one_step(run.sizes, name, rows_form)
        self.loop = looped(self.single, run.sizes.steps)
        # Weights are made, and packed, one after the other: temporaries of one are gone before those of the next.
        self._lock = threading.RLock()
        self._weights: dict[str, Any] = {}
        self._traces: dict[str, dict[int, tuple[Any, Any]]] = {}

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return sum(one.size * one.dtype.itemsize for one in self.structs.values())

    def x(self, tokens: int) -> Any:
        """The shape of an input."""
        return self.run.placed(jax.ShapeDtypeStruct((tokens, self.run.sizes.d), jnp.bfloat16))

    def traces(self, form: str) -> dict[int, tuple[Any, Any]]:
        """Loop and single step in a form of ours, for each number of tokens."""
        if form not in self._traces:
            loop, single = (hx.sparsify(f, config=self.configs[form]) for f in (self.loop, self.single))
            self._traces[form] = {
                t: (loop.trace(self.structs, self.x(t)), single.trace(self.structs, self.x(t))) for t in self.run.tokens
            }
        return self._traces[form]

    def pack(self, form: str, weights: Any) -> Any:
        """Weights as a form of ours has them for all numbers of tokens, in the loop and by themselves."""
        return hx.pack(weights, [one for both in self.traces(form).values() for one in both])

    @functools.lru_cache(maxsize=64)  # noqa: B019  (both live as long as the process)
    def dense(self, tokens: int) -> Any:
        """The single step that results are compared with, for all forms."""
        return lowered(self.single, self.structs, self.x(tokens))

    def weights(self, form: str) -> Any:
        """On the device, as a form has them; made once."""
        with self._lock:
            if form not in self._weights:
                plain = {one.name: one.layout for one in PLAIN}
                if not form:
                    made = make_weights(self.run.sizes, self.name)
                elif form in plain:
                    made = plain[form](self.weights(""))
                else:
                    made = self.pack(form, self.weights(""))
                self._weights[form] = jax.block_until_ready(made)
            return self._weights[form]


class Line:
    """What lines of the model have in common."""

    def __init__(self, part: Part, form: str, tokens: int):
        """Lowers and makes nothing yet."""
        self.run, self.of, self.form, self.tokens = part.run, part, form, tokens
        self.part = part.name
        self.name = f"{self.part}, {form}, {tokens} tokens"

    def prepare(self) -> None:
        """Makes the weights."""
        self.of.weights(self.form)

    def time(self, loop: Callable[..., Any], nbytes: float, notes: list[str]) -> None:
        """Times a loop, and counts its kernels."""
        run, w = self.run, self.of.weights(self.form)
        x = inputs(run.sizes, self.tokens, 1)[0]
        seconds = timed(lambda: loop(w, x), run.sizes.steps)
        kernels = traced(lambda: loop(w, x), run.sizes.steps) if run.profiles else None
        run.tell(self.part, self.form, self.tokens, seconds, nbytes, notes, kernels)


class PlainLine(Line):
    """Dense, or int8 as users write it."""

    def __init__(self, part: Part, plain: Plain, tokens: int):
        """As a line."""
        super().__init__(part, plain.name, tokens)
        self.plain = plain

    def programs(self) -> dict[str, Any]:
        """The loop."""
        run, of = self.run, self.of
        shapes = run.placed(jax.eval_shape(self.plain.layout, of.structs))
        loop = looped(one_step(run.sizes, of.name, self.plain.product), run.sizes.steps)
        return {"loop": lowered(loop, shapes, of.x(self.tokens))}

    def measure(self, programs: dict[str, Callable[..., Any]]) -> None:
        """The loop is timed."""
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.of.weights(self.form)))
        self.time(programs["loop"], nbytes, [])


class OwnLine(Line):
    """Ours: the loop is timed; results and bytes are those of single steps on some inputs."""

    def programs(self) -> dict[str, Any]:
        """The loop, and single steps that count what they read, and dense; none where nothing is rewritten."""
        of, (loop, single) = self.of, self.of.traces(self.form)[self.tokens]
        if not single.plan.sites:
            reasons = single.plan.refusals
            reason = reasons[-1].reason if reasons else "nothing was found"
            self.run.left_out.append(f"{self.name}: left dense, {reason}")
            return {}
        packed = self.run.placed(jax.eval_shape(functools.partial(of.pack, self.form), of.structs))
        given = packed, of.x(self.tokens)
        # A step that is packed for a GPU that is only described can't be called: what a call runs is lowered.
        found = {"loop": lowered(loop.run, *given)}
        if not self.run.compiling:
            found |= {"counted": lowered(counted(single.run), *given), "dense": of.dense(self.tokens)}
        return found

    def measure(self, programs: dict[str, Callable[..., Any]]) -> None:
        """What it says, what it reads, and its time."""
        run, plan = self.run, self.of.traces(self.form)[self.tokens][1].plan
        base, weights, ran = self.of.weights(""), self.of.weights(self.form), Counted()
        seen = inputs(run.sizes, self.tokens, SEEN)
        for x in seen:
            (got, _), counts = programs["counted"](weights, x)
            want = programs["dense"](base, x)[0]
            ran.add(plan, counts)
            same = difference(got, want) if self.part == "ffn" else float(np.mean(np.asarray(got) == np.asarray(want)))
            ran.same.append(same)
        differs, agree = f"differs by {max(ran.same):.1e}", f"{statistics.mean(ran.same):.1%} of tokens agree"
        notes = [differs if self.part == "ffn" else agree]
        if "certified" in self.form:
            notes.append(f"{1 - ran.dense / max(1, ran.runs):.1%} proved")
            if min(ran.same) < 1:
                run.wrong.append(f"{self.name}: {', '.join(notes)}")
        self.time(programs["loop"], self.of.nbytes - plan.dense_bytes + ran.read / len(seen), notes)


def counted(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same, which also returns how often each site took each of its sizes."""

    def counting(w: Any, x: jax.Array) -> Any:
        program, shape = jax.make_jaxpr(run, return_shape=True)(w, x)
        results, counts = count_rungs(program, jax.tree.leaves((w, x)))
        return jax.tree.unflatten(jax.tree.structure(shape), results), counts

    return counting


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
