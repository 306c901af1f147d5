"""What a machine takes for the steps of a program, in seconds: what the planner predicts times with.

A profile is measured (``hire_xform/tuning``), or it is one of those that are built in (``machine.py``). Times are those
of weights that lie in memory and not in a cache, as of a model that is larger than caches are.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

# Of a step, by how many tokens it has, ascending: seconds.
ByTokens = tuple[tuple[int, float], ...]

# How a dense product stores its weights, and what it makes of them. "widened": the program makes f32 of them first.
FORMS = ("f32", "16 bits", "16 bits to f32", "16 bits widened", "8 bits widened")
# How it is spelled: ``x @ w`` of w as it is stored, ``[inputs, outputs]``; or, stored ``[outputs, inputs]``, with a
# transpose in the program, without (an einsum, say), and with the weight on the left.
SPELLINGS = ("x @ w", "x @ w.T", "x . rows", "w @ x")
# What the products of a predictor are of. "fine": each token is two limbs of 8 bits.
SCORES = ("int8", "int8 fine", "int4", "int4 fine", "f32", "16 bits")
# Exact products with chosen rows, and sums of them, of rows in f32 and in 16 bits.
ROWS = ("dot f32", "sum f32", "dot 16 bits", "sum 16 bits")

# How far off measured times are taken to be. Those that are built in are cautious already.
MARGIN = 0.1

Source = Literal["built in", "modelled", "measured"]


@dataclass(frozen=True, kw_only=True)
class RowTimes:
    """What chosen rows take, which lie anywhere.

    Attributes:
      points: bytes of all rows, and seconds, both ascending; one token and rows of a few kilobytes. Between two points,
        and beyond the last two, time is linear. Where rows are gathered into an array first, the pages of a large one
        are new at every call, and cost more than the reading.
      each: seconds of a row besides, however short it is.
      further: how much longer all takes, as a share, for each further token that shares the rows.
      single: how many times as long it takes where rows do not come in groups of an even number.
    """

    points: tuple[tuple[int, float], ...]
    each: float
    further: float
    single: float = 1.0

    def seconds(self, count: float, row_bytes: float, tokens: int = 1, gathered: bool = True, group: int = 1) -> float:
        """Of so many rows.

        Args:
          count: rows.
          row_bytes: bytes of one.
          tokens: that share them.
          gathered: False where the array that they are gathered into, if any, serves other sites as well.
          group: how many lie beside one another.
        """
        size = count * row_bytes
        (first, least), *_ = self.points
        time = least / first * size
        if gathered and size > first:
            pairs = list(itertools.pairwise(self.points)) or [((0, 0.0), self.points[0])]
            (low, start), (high, end) = next((pair for pair in pairs if size <= pair[1][0]), pairs[-1])
            time = start + (size - low) * (end - start) / (high - low)
        alone = self.single if group % 2 else 1.0
        return (time + count * self.each) * (1.0 + self.further * (tokens - 1)) * alone


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A machine.

    Attributes:
      name: for reports.
      platform: "cpu", "gpu" or "tpu".
      source: "measured" here or elsewhere, "modelled" from data sheets, or "built in": guessed cautiously.
      kernels: whether native kernels run the steps.
      dense: of ``FORMS`` and ``SPELLINGS``, seconds that a dense product takes for a byte of its weights as stored.
      scores: of ``SCORES``, seconds for a byte of a predictor.
      score_rows: seconds for each row that is scored besides, all tokens together.
      rows: of ``ROWS``, what chosen rows take.
      fixed: seconds of a site, besides all else: its many small steps.
      choosing: seconds for each row and token that is chosen from.
      bounding: seconds for each of those besides where it is bounded.
      picking: seconds for each that is chosen.
    """

    name: str
    platform: str
    source: Source
    kernels: bool
    dense: Mapping[str, Mapping[str, ByTokens]]
    scores: Mapping[str, ByTokens]
    score_rows: ByTokens
    rows: Mapping[str, RowTimes]
    fixed: float
    choosing: float
    bounding: float
    picking: float

    @property
    def memory(self) -> float:
        """Bytes a second that a dense product in f32 reads, one token: the median of its spellings."""
        return 1.0 / statistics.median(by_tokens[0][1] for by_tokens in self.dense["f32"].values())

    @property
    def margin(self) -> float:
        """By what share of its dense form's time a site has to be faster: what is measured is off by some."""
        return MARGIN if self.source == "measured" else 0.0

    def speed(self, scores: str) -> float:
        """Bytes a second of a predictor's products, of those that a dense product in f32 reads; one token."""
        return 1.0 / (self.memory * self.scores[scores][0][1])

    @property
    def in_words(self) -> str:
        """For reports: its name, and how it is known."""
        return f"{self.name}, {self.source}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Any) -> Profile:
        """From what :meth:`to_dict` gave.

        Raises:
          ValueError: it is of another form; the message names the field.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(plain, Mapping) or set(plain) != set(names):
            there = sorted(plain) if isinstance(plain, Mapping) else plain
            raise ValueError(f"a profile with fields {there}; expected {names}")
        try:
            profile = cls(
                **{
                    **plain,
                    "dense": {form: _tables(own, SPELLINGS) for form, own in _named(plain["dense"], FORMS)},
                    "scores": _tables(plain["scores"], SCORES),
                    "score_rows": _table(plain["score_rows"], zero=True),
                    "rows": {step: _row_times(own) for step, own in _named(plain["rows"], ROWS)},
                }
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"a profile whose tables are not of numbers ({error!r})") from error
        profile.check()
        return profile

    def check(self) -> None:
        """Refuses what is no profile.

        Raises:
          ValueError: names the field.
        """
        for name, choices in (("platform", ("cpu", "gpu", "tpu")), ("source", ("built in", "modelled", "measured"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"profile: {name}={getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if not isinstance(self.name, str) or not isinstance(self.kernels, bool):
            raise ValueError(
                f"profile: name={self.name!r}, kernels={self.kernels!r}; expected a text, and true or false"
            )
        for name in ("fixed", "choosing", "bounding", "picking"):
            _number(getattr(self, name), zero=True, name=name)


def seconds_text(seconds: float) -> str:
    """A time for people: ``1.23 ms``."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def at(by_tokens: ByTokens, tokens: int) -> float:
    """Seconds for so many tokens: linear between those that are known, and beyond the last two, if it rises there."""
    for (low, start), (high, end) in itertools.pairwise(by_tokens):
        if low <= tokens <= high:
            return start + (tokens - low) * (end - start) / (high - low)
    last, found = by_tokens[-1]
    if tokens <= last or len(by_tokens) < 2:
        return found if tokens >= last else by_tokens[0][1]
    before, start = by_tokens[-2]
    return found + max(0.0, found - start) * (tokens - last) / (last - before)


def _named(plain: Any, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    if not isinstance(plain, Mapping) or set(plain) != set(names):
        raise ValueError(f"profile: a table of {sorted(plain)}; expected {sorted(names)}")
    return [(name, plain[name]) for name in names]


def _tables(plain: Any, names: tuple[str, ...]) -> dict[str, ByTokens]:
    return {name: _table(own) for name, own in _named(plain, names)}


def _table(plain: Any, zero: bool = False) -> ByTokens:
    made = tuple((int(first), _number(second, zero)) for first, second in plain)
    if not made or any(a >= b for a, b in itertools.pairwise(first for first, _ in made)) or made[0][0] < 1:
        raise ValueError(f"profile: a table by {[first for first, _ in made]}; expected ascending numbers from 1 on")
    return made


def _row_times(plain: Any) -> RowTimes:
    return RowTimes(
        points=_table(plain["points"]),
        each=_number(plain["each"], zero=True),
        further=_number(plain["further"], zero=True),
        single=_number(plain.get("single", 1.0)),
    )


def _number(value: Any, zero: bool = False, name: str = "a time") -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"profile: {name}={value!r}; expected a {'' if zero else 'positive '}finite number of seconds")
    return float(value)
