"""What is made of numbers in intervals lies in the intervals that are made of these."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hire_xform.lowering.prove import reductions
from hire_xform.lowering.prove.intervals import Interval, point
from hire_xform.lowering.prove.reductions import Order

pytestmark = pytest.mark.any_jax("cases vary numbers of arithmetic that is our own", every=3)

N = 13
RNG = np.random.default_rng(0)


def box(seed, ties=False):
    """Intervals ``[4, N]``, some without width, and points in them: ends, and between."""
    rng = np.random.default_rng(seed)
    middle = rng.integers(-3, 4, size=(4, N)) if ties else rng.normal(size=(4, N))
    wide = rng.uniform(size=(4, N)) * rng.integers(0, 2, size=(4, N)) * 0.8
    low, high = (jnp.asarray(middle + sign * wide, jnp.float32) for sign in (-1, 1))
    shares = [rng.choice([0.0, 0.5, 1.0], size=(4, N)) for _ in range(24)]
    points = [jnp.clip(low + jnp.asarray(share, jnp.float32) * (high - low), low, high) for share in shares]
    return Interval(low, high), points


def holds(made, value):
    inside = (made.low.astype(jnp.float32) <= value) & (value <= made.high.astype(jnp.float32))
    unknown = jnp.isnan(made.low.astype(jnp.float32)) | jnp.isnan(made.high.astype(jnp.float32))
    return bool(jnp.all(inside | unknown))


def ranked(values):
    return jnp.argsort(-values, axis=-1, stable=True)


ORDER = lambda a: Order(a, 0, 1, N)  # noqa: E731
PAYLOAD = jnp.asarray(RNG.normal(size=(4, N)), jnp.float32)
KNOWN = Interval(PAYLOAD, PAYLOAD)
PLACES = jnp.asarray(RNG.integers(0, N, size=(4, 3)), jnp.int32)
AT = Interval(PLACES.astype(jnp.float32), PLACES.astype(jnp.float32))
take = lambda values, at: jnp.take_along_axis(values, at, axis=-1)  # noqa: E731

# What is made of intervals, and of points.
MADE = {
    "sum": (lambda a: reductions.summed(a, (1,), jnp.float32), lambda x: x.sum(-1)),
    "running sums": (lambda a: reductions.running(a, 1, False, jnp.float32), lambda x: jnp.cumsum(x, -1)),
    "largest": (lambda a: reductions.largest(a, (1,)), lambda x: x.max(-1)),
    "sorted": (lambda a: reductions.sorted_entries(a, 1), lambda x: jnp.sort(x, -1)),
    "5 largest": (lambda a: reductions.sorted_entries(a, 1, 5), lambda x: lax.top_k(x, 5)[0]),
    "exponential": (lambda a: reductions.exponential(a, jnp.float32), jnp.exp),
    "logarithm": (lambda a: reductions.logarithm(reductions.exponential(a, jnp.float32), jnp.float32), lambda x: x),
    "arg max": (lambda a: reductions.located(a, 1), lambda x: jnp.argmax(x, -1)),
    "places": (lambda a: reductions.positions(ORDER(a)), lambda x: jnp.argsort(ranked(x), -1)),
    "entries at places": (lambda a: ORDER(a).at(AT), lambda x: take(ranked(x), PLACES)),
    "others in the order": (lambda a: reductions.in_order(KNOWN, ORDER(a)), lambda x: take(PAYLOAD, ranked(x))),
    "put back": (
        lambda a: reductions.hull(KNOWN, reductions.positions(ORDER(a))),
        lambda x: take(PAYLOAD, jnp.argsort(ranked(x), -1)),
    ),
    "in descending order, turned": (
        lambda a: reductions.positions(ORDER(a).cut(N - 1, -1, N)),
        lambda x: jnp.argsort(ranked(x)[:, ::-1], -1),
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_it_holds_what_is_made_of_every_point(name):
    of_intervals, of_points = MADE[name]
    for seed in range(6):
        intervals, points = box(seed, ties=seed % 2 == 1)
        made = of_intervals(intervals)
        assert all(holds(made, of_points(point)) for point in points)


@pytest.mark.parametrize("name", ["places", "entries at places", "others in the order", "put back", "arg max"])
def test_without_width_and_ties_it_is_decided(name):
    values = jnp.asarray(RNG.normal(size=(4, N)), jnp.float32)
    made = MADE[name][0](Interval(values, values))
    np.testing.assert_array_equal(made.low, made.high)
    np.testing.assert_array_equal(made.low, MADE[name][1](values))


@pytest.mark.parametrize("name", ["sum", "largest", "sorted", "5 largest", "entries at places"])
def test_what_is_unknown_spreads(name):
    values = jnp.asarray(RNG.normal(size=(4, N)), jnp.float32).at[2, 5].set(jnp.nan)
    made = MADE[name][0](Interval(values, values))
    assert bool(jnp.isnan(made.low[2]).all())
    assert not bool(jnp.isnan(made.low[jnp.array([0, 1, 3])]).any())


def test_of_too_many_terms_of_16_bits_nothing_is_known():
    ones = jnp.ones((1, 300))
    assert bool(jnp.isnan(reductions.summed(Interval(ones, ones), (1,), jnp.bfloat16).low).all())
    assert reductions.summed(Interval(ones, ones), (1,), jnp.float32).low > 299.0


def test_whole_numbers_that_f32_does_not_hold_are_not_known():
    big = jnp.float32(2.0**24)
    assert bool(jnp.isnan(reductions.whole(Interval(big, big)).low))


# --- how far sums may be off ---


def in_some_order(terms, rng):
    """A sum in f32 along a tree of its own: any two parts that are left are added next."""
    parts = list(np.float32(terms))
    while len(parts) > 1:
        a, b = sorted(rng.choice(len(parts), size=2, replace=False), reverse=True)
        parts.append(np.float32(parts.pop(a) + parts.pop(b)))
    return parts[0]


@pytest.mark.parametrize("spread", [0.0, 2.0, 8.0, 24.0])
def test_sums_in_any_order_are_inside_and_small_terms_lose_less(spread):
    """One after the other in both directions, in pairs, and along trees at random."""
    rng = np.random.default_rng(int(spread))
    for _ in range(8):
        terms = np.float32(np.exp(-spread * rng.exponential(size=400)))
        found = reductions.summed(point(jnp.asarray(terms)), (0,), jnp.float32)
        exact = np.sum(np.float64(terms))
        made = [in_some_order(terms, rng), np.sum(terms)]
        for order in (np.sort(terms), -np.sort(-terms)):
            made.append(functools.reduce(lambda a, b: np.float32(a + b), order))
        assert all(found.low <= value <= found.high for value in made)
        # Twice, for the program's sum and for this one.
        width, most = (found.high - found.low) / exact, 4.0 * 400 * 2.0**-24
        assert width < 1.1 * most
        assert spread < 8.0 or width < 0.9 * most


def test_each_addition_that_rounds_as_far_as_it_may():
    """A large term first, then terms of half its last place, each of which is lost or counted twice."""
    for small in (2.0**-24, 2.0**-24 * (1.0 + 2.0**-20), 2.0**-23 * 0.75):
        terms = np.float32([1.0, *[small] * 1000])
        found = reductions.running(point(jnp.asarray(terms)), 0, False, jnp.float32)
        sums = np.add.accumulate(terms, dtype=np.float32)
        assert np.all((found.low <= sums) & (sums <= found.high))
        assert np.all(found.low <= np.add.accumulate(np.float64(terms)))
