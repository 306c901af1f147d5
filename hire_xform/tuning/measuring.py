"""Measures a machine: dense products as XLA runs them here, and the steps of a site as they are lowered here.

Every program is timed with its weights out of caches: something larger is read before each call. Of a few rounds over
all programs the second fastest call of each counts, since what else runs on a machine only slows calls down; a program
whose two fastest calls differ is run again.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax

from hire_xform.comparing.timing import cache_bytes
from hire_xform.errors import HireWarning
from hire_xform.passes.ir.trace_context import as_usual
from hire_xform.passes.plan.machine import device_kind
from hire_xform.passes.plan.profile import FORMS, ROWS, SCORES, SPELLINGS, ByTokens, Profile, RowTimes
from hire_xform.tuning import programs
from hire_xform.tuning.keeping import cpu_name, key_of, usable_cores


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large what is measured is; smaller ones say less of memory, and more of what a call costs.

    Attributes:
      rows: of dense weights in f32.
      narrow_rows: the same of weights in fewer bits, of which some take long.
      scored: rows of a predictor.
      columns: of dense weights and of predictors.
      few_columns: of one with as many bytes, to tell what each row costs.
      row_matrix: rows of the matrix that rows are chosen from, of ``row_bytes`` each.
      row_bytes: bytes of a row.
      short_row_bytes: of another matrix with as many rows.
      chosen: how many rows are chosen, few and many.
      sites: rows of a small and of a large site.
      candidates: of these.
      tokens: of dense products, which are fast at one number and slow at the next.
      some_tokens: one, and several, of all else.
      swept: bytes that are read before each call, so that nothing else is left in a cache.
      rounds: over all programs, at most.
      seconds: after so many no further round begins.
    """

    rows: int = 16_384
    narrow_rows: int = 8192
    scored: int = 16_384
    columns: int = 1024
    few_columns: int = 128
    row_matrix: int = 16_384
    row_bytes: int = 4096
    short_row_bytes: int = 1024
    chosen: tuple[int, int] = (2048, 8192)
    sites: tuple[int, int] = (4096, 65_536)
    candidates: int = 64
    tokens: tuple[int, ...] = (1, 2, 8)
    some_tokens: tuple[int, int] = (1, 8)
    swept: int | None = None
    rounds: int = 7
    seconds: float = 4.5

    def dense(self, form: str) -> tuple[int, tuple[int, ...]]:
        """The rows of dense weights of some form, and of which tokens it is measured."""
        few = self.some_tokens if form.endswith("widened") else self.tokens
        return self.rows if form == "f32" else self.narrow_rows, few


# What is swept at least and at most where sizes say nothing: no less than twice the cache.
_SWEPT = 128 << 20, 512 << 20
# Programs that take longer are timed in two rounds only.
_LONG = 10e-3
# No site takes less besides reading, whatever small differences of times say: it is a dozen launches.
_LEAST_FIXED = 10e-6
# A time counts once a second one is within this; and so many programs may lack one.
_AGREE, _BUSY = 1.15, 0.1


@dataclass
class _Program:
    """A program to time: its function, its operands for each round, and the times of its calls."""

    fun: Callable[..., Any]
    operands: Sequence[tuple[Any, ...]]
    compiled: Any = None
    times: list[float] = field(default_factory=list)

    def compile(self) -> None:
        self.compiled = jax.jit(self.fun).lower(*self.operands[0]).compile()

    def run(self, number: int) -> None:
        given = self.operands[number % len(self.operands)]
        start = time.perf_counter()
        jax.block_until_ready(self.compiled(*given))
        self.times.append(time.perf_counter() - start)

    @property
    def seconds(self) -> float:
        """The second fastest: the fastest may be that of a cache that kept some of the weights."""
        return sorted(self.times)[:2][-1]

    @property
    def is_sure(self) -> bool:
        """Whether the fastest time is no accident: another one agrees with it."""
        first, second = sorted(self.times)[:2] if len(self.times) > 1 else (0.0, math.inf)
        return second <= _AGREE * first


@dataclass
class _Measured:
    """The programs of a profile by name, and their seconds above those of a call that does nothing."""

    made: dict[Any, _Program] = field(default_factory=dict)

    def add(self, name: Any, fun: Callable[..., Any], *operands: tuple[Any, ...]) -> None:
        self.made[name] = _Program(fun, operands)

    def __getitem__(self, name: Any) -> float:
        # No step is faster than what a clock can tell.
        return max(self.made[name].seconds - self.made["nothing"].seconds, 1e-9)


def measure(platform: str, sizes: Sizes | None = None) -> Profile:
    """Measures the first device of a platform here, in a few seconds.

    Args:
      platform: "cpu", "gpu" or "tpu".
      sizes: how large what is measured is.

    Raises:
      RuntimeError: there are no such devices.
    """
    # In a thread of its own there is no trace, and no setting of JAX, that the caller may be in.
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(_measure, platform, sizes or Sizes()).result()


def _measure(platform: str, sizes: Sizes) -> Profile:
    device = jax.devices(platform)[0]
    found = _Measured()
    try:
        with as_usual(), jax.default_device(device):
            for name, fun, operands in _all_programs(sizes):
                found.add(name, fun, *operands)
            _time(list(found.made.values()), sizes, device)
    finally:
        programs.forget()
    return _profile(platform, found, sizes)


def _all_programs(sizes: Sizes) -> Iterator[tuple[Any, Callable[..., Any], Sequence[tuple[Any, ...]]]]:
    yield "nothing", *programs.nothing()
    for form in FORMS:
        rows, measured = sizes.dense(form)
        for spelling in SPELLINGS:
            for tokens in measured:
                yield (form, spelling, tokens), *programs.dense(form, spelling, rows, sizes.columns, tokens)
    for kind in SCORES:
        for tokens in sizes.some_tokens:
            yield (kind, tokens), *programs.scores(kind, sizes.scored, sizes.columns, tokens)
    shorter = sizes.scored * sizes.columns // sizes.few_columns
    for tokens in sizes.some_tokens:
        yield ("short", tokens), *programs.scores("int8 fine", shorter, sizes.few_columns, tokens)
    few, many = sizes.chosen
    for step in ROWS:
        for count, tokens in ((few, 1), (many, 1), (few, sizes.some_tokens[1])):
            yield (step, count, tokens), *programs.rows(step, sizes.row_matrix, sizes.row_bytes, count, tokens)
        yield (step, "short"), *programs.rows(step, sizes.row_matrix, sizes.short_row_bytes, few, 1)
    for name, site in programs.SITES.items():
        for number, units in enumerate(sizes.sites):
            yield (name, number), *site(units, sizes.candidates)
    for count in (sizes.candidates, few):
        yield ("largest", count), *programs.largest(max(sizes.sites[0], 2 * few), count)


def _time(all_programs: list[_Program], sizes: Sizes, device: Any) -> None:
    """Compiles all, two at once, then runs them round after round."""

    def compiled(program: _Program) -> None:
        with as_usual(), jax.default_device(device):  # which each thread has of its own
            program.compile()

    with ThreadPoolExecutor(2) as two:
        list(two.map(compiled, all_programs))
    swept = sizes.swept
    if swept is None:
        swept = min(max(_SWEPT[0], 2 * (cache_bytes() or 0)), _SWEPT[1])
    sweep, (operands,) = programs.sweep(swept)
    sweep = jax.jit(sweep)
    for program in all_programs:
        program.run(0)
        program.times.clear()

    def run(some: list[_Program], number: int) -> None:
        for program in some:
            jax.block_until_ready(sweep(*operands))
            program.run(number)

    start = time.perf_counter()
    for number in range(sizes.rounds):
        if number >= 2 and time.perf_counter() - start > sizes.seconds:
            break
        run([p for p in all_programs if number < 2 or p.seconds < _LONG], number)
    start = time.perf_counter()
    while (unsure := [p for p in all_programs if not p.is_sure]) and time.perf_counter() - start < sizes.seconds:
        run(unsure, len(unsure[0].times))
    _warn_if_busy(len(unsure) / len(all_programs))


def _warn_if_busy(unsure: float) -> None:
    """Warns where a share of the programs were never as fast twice as they were once."""
    if unsure > _BUSY:
        warnings.warn(
            f"the machine was busy while it was measured: {unsure:.0%} of the programs had no two times that agree; "
            "run `hire-xform tune` again when it is idle",
            HireWarning,
            stacklevel=2,
        )


def _profile(platform: str, found: _Measured, sizes: Sizes) -> Profile:
    small, large = sizes.sites

    def by_tokens(size: float, tokens: Sequence[int], *name: Any) -> ByTokens:
        return tuple((count, found[(*name, count)] / size) for count in tokens)

    dense = {}
    for form in FORMS:
        rows, measured = sizes.dense(form)
        size = rows * sizes.columns * programs.itemsize(form)
        dense[form] = {how: by_tokens(size, measured, form, how) for how in SPELLINGS}
    # In f32 one token is multiplied at the speed of memory, or nearly, however it is spelled. What is slower was
    # chance, by which dense products are not to be taken for slow.
    (one, fastest), *_ = min(dense["f32"].values(), key=lambda times: times[0][1])
    dense["f32"] = {how: ((one, fastest), *times[1:]) for how, times in dense["f32"].items()}
    scores = {
        kind: by_tokens(programs.score_bytes(kind, sizes.scored, sizes.columns), sizes.some_tokens, kind)
        for kind in SCORES
    }
    short = sizes.scored * sizes.columns // sizes.few_columns
    score_rows = tuple(
        (count, max(0.0, found["short", count] - per_byte * short * sizes.few_columns) / short)
        for count, per_byte in scores["int8 fine"]
    )
    # Between the small site and the large one: what each row costs. What is left of the small one is the site's own.
    each = {name: max(0.0, (found[name, 1] - found[name, 0]) / (large - small)) for name in programs.SITES}
    own = {name: max(0.0, found[name, 0] - found["scored", 0]) for name in ("head", "block")}
    choosing = max(0.0, max(each["head"], each["block"]) - each["scored"])
    picked = sizes.chosen[0] - sizes.candidates
    return Profile(
        name=_name(platform),
        platform=platform,
        source="measured",
        kernels=bool(key_of(platform)["kernels"]),
        dense=dense,
        scores=scores,
        score_rows=score_rows,
        rows={step: _row_times(found, step, sizes) for step in ROWS},
        fixed=max(_LEAST_FIXED, *own.values()),
        choosing=choosing,
        bounding=max(0.0, each["certified head"] - each["scored"] - choosing),
        picking=max(0.0, found["largest", sizes.chosen[0]] - found["largest", sizes.candidates]) / picked,
    )


def _row_times(found: _Measured, step: str, sizes: Sizes) -> RowTimes:
    few, many = sizes.chosen
    tokens = sizes.some_tokens[1]
    low = found[step, few, 1]
    high = max(found[step, many, 1], low)
    each = found[step, "short"] / few - low / few * sizes.short_row_bytes / sizes.row_bytes
    return RowTimes(
        points=((few * sizes.row_bytes, low), (many * sizes.row_bytes, high)),
        each=max(0.0, each),
        further=max(0.0, found[step, few, tokens] / low - 1.0) / (tokens - 1),
    )


def _name(platform: str) -> str:
    if platform != "cpu":
        return device_kind(platform)
    key = key_of(platform)
    kernels = next(iter(key["kernels"].values()), "no native kernels")
    return f"{cpu_name()}, {usable_cores()} cores, {kernels}"
