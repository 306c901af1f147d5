"""Where a binary search may end: the place that each program finds whose numbers lie in the intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.prove.intervals import Interval, point
from hire_xform.lowering.prove.searches import are_below, are_below_a_share, place_found

RNG = np.random.default_rng(0)
N = 23


def within(low, high):
    """Some number between two ends, often one of them."""
    at = RNG.choice([0.0, 1.0, RNG.uniform()], size=np.shape(low))
    return np.float32(low + at * (np.float64(high) - low)).clip(low, high)


@pytest.mark.parametrize("right", [False, True])
def test_every_place_that_is_found_lies_between(right):
    """Entries need not rise: a search of such ones ends somewhere, too."""
    decided = 0
    search = jax.jit(lambda a, v: jnp.searchsorted(a, v, side="right" if right else "left"))
    for width in (0.0, 0.0, 0.01, 0.1, 0.5):
        low = np.sort(RNG.integers(0, 8, size=N) / 4.0).astype(np.float32)
        high = low + np.float32(width) * RNG.integers(0, 2, size=N).astype(np.float32)
        for sought in (*low[:4], np.float32(0.3)):
            v = Interval(jnp.asarray([sought]), jnp.asarray([sought + np.float32(width)]))
            first, last = place_found(are_below(Interval(jnp.asarray(low), jnp.asarray(high)), v, right))
            decided += int(first == last)
            for _ in range(6):
                assert first <= search(within(low, high), within(v.low, v.high)[0]) <= last
    assert decided >= 10


def test_nothing_is_known_of_what_is_no_number():
    entries = jnp.asarray([0.1, jnp.nan, 0.3])
    first, last = place_found(are_below(point(entries), point(jnp.asarray([0.2])), False))
    assert (first, last) == (1, 2)
    first, last = place_found(are_below(point(entries), point(jnp.asarray([jnp.nan])), False))
    assert (first, last) == (0, 3)


@jax.jit
def drawn(terms, share):
    p = terms / jnp.sum(terms) / 3.0
    sums = jnp.cumsum(p)
    return jnp.searchsorted(sums, sums[-1] * share)


def place_of_a_share(low, high, share):
    terms = Interval(jnp.asarray(low), jnp.asarray(high))
    total = Interval(jnp.sum(terms.low)[None] * 0.999, jnp.sum(terms.high)[None] * 1.001)
    return place_found(are_below_a_share(terms, point(jnp.asarray([share])), (total, point(jnp.asarray(3.0)))))


@pytest.mark.parametrize("width", [0.0, 1e-3, 0.1])
def test_every_place_of_a_share_that_is_found_lies_between(width):
    decided = 0
    for _ in range(24):
        low = (RNG.exponential(size=N) ** 3).astype(np.float32)
        high = low * np.float32(1.0 + width * RNG.integers(0, 2, size=N))
        share = np.float32(RNG.uniform())
        first, last = place_of_a_share(low, high, share)
        decided += int(first == last)
        for _ in range(6):
            assert first <= drawn(within(low, high), share) <= last
    assert decided >= (12 if width < 0.1 else 4)


def test_a_divisor_that_is_hardly_known_does_not_matter():
    """Of intervals of their own the quotients would be known to a factor of two."""
    terms = point(jnp.asarray([1.0, 2.0, 1.0]))
    wide = Interval(jnp.asarray([2.0]), jnp.asarray([4.0]))
    first, last = place_found(are_below_a_share(terms, point(jnp.asarray([0.5])), (wide,)))
    assert first == last == 1


@pytest.mark.parametrize("share", [0.25, 0.75, 1.0])
def test_a_share_at_an_edge_is_not_decided(share):
    """The sums of four equal terms at their very edges: rounding says which place is found."""
    first, last = place_of_a_share(np.ones(4, np.float32), np.ones(4, np.float32), np.float32(share))
    assert first < last


@pytest.mark.parametrize("spoiled", ["negative", "infinite", "huge", "share", "divisor", "divisor of nothing"])
def test_what_breaks_the_rule_is_not_decided(spoiled):
    terms, share, divisor = np.ones(4, np.float32), 0.6, 4.0
    terms[2] = {"negative": -1e-9, "infinite": np.inf, "huge": 1e30}.get(spoiled, 1.0)
    share = 1.5 if spoiled == "share" else share
    divisor = {"divisor": -4.0, "divisor of nothing": 0.0}.get(spoiled, divisor)
    found = are_below_a_share(point(jnp.asarray(terms)), point(jnp.asarray([share])), (point(jnp.asarray(divisor)),))
    assert [float(end) for end in place_found(found)] == [0.0, 4.0]


def test_a_row_of_several_numbers_and_several_rows():
    terms = point(jnp.asarray([[[1.0, 1.0, 2.0]], [[2.0, 1.0, 1.0]]]))
    share = point(jnp.asarray([[[0.1], [0.4]], [[0.4], [0.9]]]))
    first, last = place_found(are_below_a_share(terms, share, ()))
    np.testing.assert_array_equal(first, [[0, 1], [0, 2]])
    np.testing.assert_array_equal(last, first)
