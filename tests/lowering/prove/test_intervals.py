"""Intervals: whatever operands lie between, and however a result is rounded, it lies between what comes out."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hire_xform.lowering.prove import intervals
from hire_xform.lowering.prove.intervals import Interval, interval, point

pytestmark = pytest.mark.any_jax("cases vary numbers of arithmetic that is our own", every=3)

N = 64
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}
INSIDE = (0.0, 1.0, 0.5, 0.1)


def spread(seed, low=-4.0, high=4.0):
    """Intervals of very different widths, some of them points, some zero, some across zero."""
    rng = np.random.default_rng(seed)
    middle = rng.uniform(low, high, N)
    width = np.abs(high - low) * 10.0 ** rng.uniform(-7, 0, N) * rng.integers(0, 2, N)
    ends = np.clip([middle - width, middle + width], low, high).astype(np.float32)
    ends[:, :3] = max(low, 0.0)
    return Interval(jnp.asarray(ends[0]), jnp.asarray(ends[1]))


def inside(a, share):
    """A value of each interval."""
    low, high = np.asarray(a.low, np.float64), np.asarray(a.high, np.float64)
    return np.clip(low + (high - low) * share, low, high).astype(np.float32)


def held(found, values, dtype):
    """That values, before or after they are rounded, lie between, wherever anything is known."""
    low, high = np.asarray(found.low, np.float64), np.asarray(found.high, np.float64)
    known = ~np.isnan(low) & ~np.isnan(high)
    for made in (values, np.asarray(jnp.asarray(values, dtype), np.float64)):
        assert (low[known] <= made[known]).all()
        assert (made[known] <= high[known]).all()
    return known


# What is exact of f64 numbers, and of two intervals.
BINARY = {
    "sum": (np.add, intervals.added, (-4, 4)),
    "difference": (np.subtract, lambda a, b, t: intervals.added(a, intervals.negative(b), t), (-4, 4)),
    "product": (np.multiply, intervals.multiplied, (-4, 4)),
    "quotient": (np.divide, intervals.quotient, (0.25, 4)),
    "quotient by what is negative": (
        lambda x, y: x / -y,
        lambda a, b, t: intervals.quotient(a, intervals.negative(b), t),
        (0.25, 4),
    ),
    "larger": (np.maximum, lambda a, b, t: intervals.larger(a, b), (-4, 4)),
    "smaller": (np.minimum, lambda a, b, t: intervals.smaller(a, b), (-4, 4)),
}
UNARY = {
    "square": (np.square, lambda a, t: intervals.power(a, 2, t), (-4, 4)),
    "cube": (lambda x: x**3, lambda a, t: intervals.power(a, 3, t), (-4, 4)),
    "root": (np.sqrt, intervals.root, (0, 4)),
    "inverse root": (lambda x: 1 / np.sqrt(x), lambda a, t: intervals.root(a, t, inverse=True), (0.25, 4)),
    "absolute": (np.abs, lambda a, t: intervals.absolute(a), (-4, 4)),
    "negative": (np.negative, lambda a, t: intervals.negative(a), (-4, 4)),
    "narrowed": (lambda x: x, intervals.narrowed, (-4, 4)),
    "tanh": (np.tanh, lambda a, t: intervals.sloped(jnp.tanh, a, t, odd=True), (-4, 4)),
    "logistic": (lambda x: 1 / (1 + np.exp(-x)), lambda a, t: intervals.sloped(lax.logistic, a, t), (-4, 4)),
    "what falls": (
        lambda x: 1 - np.tanh(x),
        lambda a, t: intervals.sloped(lambda x: 1 - jnp.tanh(x), a, t, falls=True),
        (-4, 4),
    ),
}
ROUNDS_NOTHING = {"larger", "smaller", "absolute", "negative"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*BINARY, *UNARY])
def test_a_result_lies_between_the_ends(name, dtype):
    exact, rule, limits = {**BINARY, **UNARY}[name]
    dtype = DTYPES[dtype]
    operands = [spread(seed, *limits) for seed in (1, 2)[: 2 if name in BINARY else 1]]
    if name in ROUNDS_NOTHING:
        operands = [o.map(lambda end: end.astype(dtype).astype(jnp.float32)) for o in operands]
    found = rule(*operands, dtype)
    for own in np.ndindex(*[len(INSIDE)] * len(operands)):
        values = [inside(o, INSIDE[i]) for o, i in zip(operands, own, strict=True)]
        if name in ROUNDS_NOTHING:
            values = [np.asarray(jnp.asarray(v, dtype), np.float32) for v in values]
        with np.errstate(divide="ignore"):
            made = exact(*(v.astype(np.float64) for v in values))
        assert held(found, made, dtype).all()
    # A point comes out hardly wider than it, or the lesser operand of a sum, is rounded.
    points = [inside(o, 0.5) for o in operands]
    found = rule(*map(point, points), dtype)
    unit = 2.0**-20 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    lost = 8 * float(jnp.finfo(dtype).tiny) + (2.0**-13 if name in ("tanh", "logistic", "what falls") else 0.0)
    width, size = (np.asarray(v) for v in (found.high - found.low, found.magnitude))
    lesser = np.minimum(*map(np.abs, points)) if name in ("sum", "difference") else 0.0
    assert (width <= 4 * unit * (size + lesser) + lost).all()


def two(low, high):
    return Interval(jnp.float32(low), jnp.float32(high))


def ends(found):
    return [float(e) for e in found]


def test_zero_stays_zero_and_what_is_not_negative_stays_so():
    zero, some, least = two(0, 0), two(-1, 2), two(0, 3)
    assert ends(intervals.added(zero, zero, jnp.float32)) == [0, 0]
    assert ends(intervals.multiplied(zero, some, jnp.bfloat16)) == [0, 0]
    assert ends(intervals.quotient(zero, two(1, 2), jnp.float32)) == [0, 0]
    assert ends(intervals.narrowed(zero, jnp.float16)) == [0, 0]
    assert ends(intervals.power(zero, 3, jnp.float32)) == [0, 0]
    assert ends(intervals.root(zero, jnp.float32)) == [0, 0]
    assert ends(intervals.sloped(jnp.tanh, zero, jnp.float32, odd=True)) == [0, 0]
    assert ends(intervals.sloped(jnp.tanh, zero, jnp.float32))[0] < 0
    for made in (
        intervals.added(least, least, jnp.float32),
        intervals.multiplied(least, least, jnp.float32),
        intervals.power(some, 2, jnp.float32),
        intervals.root(least, jnp.float32),
        intervals.narrowed(least, jnp.bfloat16),
        intervals.absolute(some),
    ):
        assert float(made.low) == 0
    assert float(intervals.added(least, two(-1, 0), jnp.float32).low) < -1
    assert ends(intervals.absolute(two(-3, -2))) == [2, 3]


# What a compiler makes of one equation in several: each of them rounds.
IN_PARTS = {
    "cube": (lambda x: x * x * x, lambda a, t: intervals.power(a, 3, t)),
    "fourth power": (lambda x: (x * x) * (x * x), lambda a, t: intervals.power(a, 4, t)),
    "fourth power, one after the other": (lambda x: x * x * x * x, lambda a, t: intervals.power(a, 4, t)),
    "quotient by a constant": (
        lambda x: x * (1 / jnp.asarray(0.7, x.dtype)),
        lambda a, t: intervals.quotient(a, point(jnp.asarray(0.7, t)), t),
    ),
    "inverse root": (lambda x: 1 / jnp.sqrt(x), lambda a, t: intervals.root(a, t, inverse=True)),
    "logistic": (lambda x: 1 / (1 + jnp.exp(-x)), lambda a, t: intervals.sloped(lax.logistic, a, t)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", IN_PARTS)
def test_an_operation_in_parts_is_rounded_as_often(name, dtype):
    parts, rule = IN_PARTS[name]
    x = jnp.linspace(0.5, 3, 2001).astype(DTYPES[dtype])
    found, made = rule(point(x), DTYPES[dtype]), parts(x).astype(jnp.float32)
    assert bool(jnp.all((found.low <= made) & (made <= found.high)))


UNKNOWN = {
    "a quotient by what may be zero": lambda: intervals.quotient(two(1, 2), two(-1, 1), jnp.float32),
    "a quotient by what may just be zero": lambda: intervals.quotient(two(1, 2), two(0, 1), jnp.float32),
    "a quotient by what has no inverse": lambda: intervals.quotient(two(1, 2), two(1, 3e4), jnp.float16),
    "a root of what may be negative": lambda: intervals.root(two(-1e-9, 1), jnp.float32),
    "an inverse root of what may be zero": lambda: intervals.root(two(0, 1), jnp.float32, inverse=True),
    "what overflows": lambda: intervals.multiplied(two(1, 1e30), two(1, 1e30), jnp.float32),
    "what may overflow in 16 bits": lambda: intervals.narrowed(two(1, 60000), jnp.float16),
    "nothing": lambda: intervals.added(two(np.nan, np.nan), two(0, 1), jnp.float32),
    "zero times nothing": lambda: intervals.multiplied(two(np.nan, np.nan), two(0, 0), jnp.float32),
    "zero times infinity": lambda: intervals.multiplied(two(0, 0), two(0, np.inf), jnp.float32),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_of_what_is_not_known_nothing_is_said(name):
    found = UNKNOWN[name]()
    assert any(np.isnan(ends(found)))
    assert not bool(intervals.greater(two(5, 6), found).low)
    assert bool(intervals.greater(two(5, 6), found).high)
    assert not bool(found.decided)
    assert np.isnan(float(found.magnitude))


# Of two intervals whether one is above the other: certain, possible.
COMPARED = {
    ((3, 4), (1, 2)): (True, True),
    ((1, 2), (3, 4)): (False, False),
    ((1, 3), (2, 4)): (False, True),
    ((2, 3), (1, 2)): (False, True),
    ((1, 2), (2, 3)): (False, False),
}
OR_EQUAL = {**COMPARED, ((2, 3), (1, 2)): (True, True), ((1, 2), (2, 3)): (False, True)}


@pytest.mark.parametrize("or_equal", [False, True])
def test_comparisons(or_equal):
    for (a, b), want in (OR_EQUAL if or_equal else COMPARED).items():
        assert tuple(map(bool, intervals.greater(two(*a), two(*b), or_equal))) == want, (a, b)
    assert tuple(map(bool, intervals.equal(two(1, 2), two(3, 4)))) == (False, False)
    assert tuple(map(bool, intervals.equal(two(1, 3), two(3, 4)))) == (False, True)
    assert tuple(map(bool, intervals.equal(two(3, 3), two(3, 3)))) == (True, True)
    assert tuple(map(bool, intervals.equal(two(np.nan, np.nan), two(3, 3)))) == (False, True)


def test_truth_values():
    true, false, open_ = (
        Interval(jnp.asarray(a), jnp.asarray(b)) for a, b in ((True, True), (False, False), (False, True))
    )
    kinds = {"t": true, "f": false, "o": open_}

    def name(found):
        return {(True, True): "t", (False, False): "f", (False, True): "o"}[tuple(map(bool, found))]

    assert [name(intervals.negated(v)) for v in kinds.values()] == ["f", "t", "o"]
    pairs = [(a, b) for a in "tfo" for b in "tfo"]
    assert "".join(name(intervals.both(kinds[a], kinds[b])) for a, b in pairs) == "tfofffofo"
    assert "".join(name(intervals.either(kinds[a], kinds[b])) for a, b in pairs) == "ttttfotoo"
    assert [bool(v.decided) for v in kinds.values()] == [True, True, False]
    no, yes = two(1, 2), two(5, 6)
    assert ends(intervals.chosen_of(true, no, yes)) == [5, 6]
    assert ends(intervals.chosen_of(false, no, yes)) == [1, 2]
    assert ends(intervals.chosen_of(open_, no, yes)) == [1, 6]
    assert name(intervals.chosen_of(open_, false, true)) == "o"
    assert name(intervals.chosen_of(open_, true, true)) == "t"


def test_operators_are_those_of_f32():
    a, b = two(1, 2), two(3, 4)
    assert ends(a + 1) == ends(1 + a) == ends(intervals.added(a, point(1.0), jnp.float32))
    assert ends(a - b) == ends(intervals.added(a, intervals.negative(b), jnp.float32))
    assert ends(2 * a) == ends(a * 2) == ends(intervals.multiplied(a, point(2.0), jnp.float32))
    assert ends(1.0 / b) == ends(intervals.quotient(point(1.0), b, jnp.float32))
    assert interval(a) is a
    assert point(jnp.asarray(True)).low.dtype == jnp.bool_
    assert point(jnp.asarray(1, jnp.bfloat16)).low.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
def test_an_upper_bound_stays_one_after_rounding_and_none_above_zero_where_it_is_not(dtype):
    upper = jnp.asarray([-3.0, -1e-6, 0.0, 1e-6, 1.0 + 2.0**-10, 777.7], jnp.float32)
    found = np.asarray(intervals.rounded_up(upper, dtype))
    after = np.ceil(upper) if dtype == jnp.int32 else np.asarray(upper.astype(dtype), np.float32)
    assert (found >= np.asarray(upper)).all()
    assert (found >= after).all()
    assert ((found > 0) == (np.asarray(upper) > 0)).all()
    if dtype == jnp.float16:
        assert np.isnan(float(intervals.rounded_up(jnp.float32(6e4), dtype)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_constants_that_a_compiler_adds_up_first_are_rounded_together(dtype):
    rng = np.random.default_rng(5)
    small = np.float32(2.0**11 if dtype is jnp.float16 else 2.0**20)
    c, d = (np.asarray(jnp.asarray(rng.normal(size=2_000) * size, dtype), np.float32) for size in (small, small / 3))
    # What nearly cancels the first, so that both sums are far smaller than the constants.
    x = np.asarray(jnp.asarray(-c - d + rng.normal(size=2_000), jnp.float32))
    first = intervals.added(point(x), point(c), dtype)
    found = intervals.added(first, point(d), dtype)
    together = np.asarray(jnp.asarray(c.astype(np.float64) + d, dtype), np.float64)
    assert held(found, x.astype(np.float64) + together, dtype).all()
