"""What is read of logits that lie between bounds: proved where every case has the same outcome, and only there."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.prove.goals import TopSet
from hire_xform.lowering.prove.intervals import Interval, interval
from hire_xform.lowering.prove.readings import (
    Reading,
    between_proved,
    between_proved_across,
    goal_of,
    openness,
    within_proved,
)
from hire_xform.lowering.xla.devices import Devices

pytestmark = pytest.mark.any_jax("cases vary numbers of arithmetic that is our own", every=3)


def as_they_are(logits, sides):
    return logits


def logits(*pairs):
    low, high = zip(*pairs, strict=True)
    return Interval(jnp.asarray([low], jnp.float32), jnp.asarray([high], jnp.float32))


ARG_MAX, SET, ORDERED = (
    Reading(goal, ordered, as_they_are) for goal, ordered in ((True, False), (TopSet(2), False), (TopSet(2), True))
)
INF = np.inf
CASES = {
    "one is above all": (ARG_MAX, [(1, 2), (3, 4), (0, 1)], [1]),
    "two overlap": (ARG_MAX, [(1, 3.5), (3, 4), (0, 1)], None),
    "they meet, and the lower index wins": (ARG_MAX, [(3, 4), (1, 3), (0, 1)], [0]),
    "they meet, and the other has the lower index": (ARG_MAX, [(1, 3), (3, 4), (0, 1)], None),
    "all others are left out": (ARG_MAX, [(-INF, -INF), (3, 4), (-INF, -INF)], [1]),
    "nothing is known of one": (ARG_MAX, [(np.nan, np.nan), (3, 4)], None),
    "the best is not finite": (ARG_MAX, [(INF, INF), (3, 4)], None),
    "all are left out": (ARG_MAX, [(-INF, -INF), (-INF, -INF)], None),
    "a set": (SET, [(5, 7), (6, 8), (0, 4)], [0, 1]),
    "a set with one that may be in it": (SET, [(5, 7), (6, 8), (0, 6)], None),
    "a set of all": (SET, [(0, 7), (1, 8)], [0, 1]),
    "an order": (ORDERED, [(7, 8), (5, 6), (0, 4)], [0, 1]),
    "a set whose order is open": (ORDERED, [(5, 7), (6, 8), (0, 4)], None),
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    reading, pairs, want = CASES[name]
    sure, best = between_proved(reading, logits(*pairs), ())
    assert bool(sure[0]) is (want is not None)
    if want is not None:
        assert sorted(np.asarray(best[0]).tolist()) == want


@pytest.mark.parametrize("reading", [ARG_MAX, SET, ORDERED], ids=["arg max", "set", "order"])
def test_what_is_proved_holds_at_every_corner(reading):
    rng, proved = np.random.default_rng(0), 0
    for _ in range(40):
        low = rng.integers(0, 6, 4).astype(float)
        high = low + rng.integers(0, 2, 4)
        sure, best = between_proved(reading, logits(*zip(low, high, strict=True)), ())
        outcomes = set()
        for corner in itertools.product(*zip(low, high, strict=True)):
            order = np.argsort(-np.asarray(corner), kind="stable")
            taken = order[: 1 if reading is ARG_MAX else 2].tolist()
            outcomes.add(tuple(taken if reading.ordered else sorted(taken)))
        if bool(sure[0]):
            proved += 1
            got = np.asarray(best[0]).tolist()
            assert outcomes == {tuple(got if reading.ordered else sorted(got))}
    assert proved > 3


def test_an_arg_max_across_devices_is_proved_where_one_entry_alone_can_be_it():
    """Of four entries on two devices: as on one, but that ties are never decided."""
    rng, proved = np.random.default_rng(1), 0
    devices = Devices(("devices",), 2)

    def across(low, high):
        return between_proved_across(ARG_MAX, Interval(low, high), (), devices)

    run = jax.jit(jax.vmap(across, axis_name="devices"))
    for number in range(60):
        low = rng.integers(0, 6, 4).astype(np.float32)
        high = low + rng.integers(0, 2, 4).astype(np.float32)
        if number % 10 == 0:
            high[number % 4] = low[number % 4] = np.nan
        given = (jnp.asarray(end.reshape(2, 1, 2)) for end in (low, high))
        first, second = np.asarray(run(*given))[:, 0]
        assert first == second  # every device must branch alike
        floor = np.nanmax(low)
        assert first == (np.isfinite(high).all() and (high >= floor).sum() == 1)
        proved += bool(first)
    assert proved > 5


WITHIN = Reading(True, False, as_they_are, within=0.5)
NUMBERS = {
    "as close": ((1.0, 1.5), (1.2, 1.2), True),
    "known here, at an end": ((1.0, 1.5), (1.0, 1.0), True),
    "too wide": ((0.0, 1.5), (0.5, 0.5), False),
    "rounded here": ((1.0, 1.4), (1.0, 1.4), True),
    "rounded here too much": ((1.0, 1.6), (1.0, 1.6), False),
    "not known": ((np.nan, np.nan), (1.0, 1.0), False),
    "not known here": ((1.0, 1.1), (np.nan, np.nan), False),
    "infinite": ((-INF, -INF), (-INF, -INF), False),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_proved_where_no_two_cases_are_further_apart(name):
    either, here, want = NUMBERS[name]
    sure = within_proved(WITHIN, logits(either), logits(here), ())
    assert bool(sure[0]) is want


def test_the_largest_must_be_ahead_by_the_margin():
    for ahead, want in ((0.5, False), (1.5, True)):
        reading = Reading(True, False, as_they_are, margin=lambda read: jnp.ones((1, 1)))
        assert bool(between_proved(reading, logits((3, 3), (3 - ahead, 3 - ahead)), ())[0][0]) is want


def test_a_reading_takes_its_own_side_inputs():
    reading = Reading(True, False, lambda logits, sides: logits + sides[0], sides=(1, 2))
    bias = [jnp.zeros(2), jnp.asarray([0.0, 9.0]), jnp.zeros(2)]
    sure, best = between_proved(reading, logits((3, 4), (0, 1)), bias)
    assert bool(sure[0])
    assert int(best[0, 0]) == 1


def test_open_entries_are_those_that_can_be_among_the_largest():
    read = logits((3, 4), (1, 3.5), (0, 2), (-INF, -INF), (np.nan, 5))
    (found,) = openness([ARG_MAX], read, ())
    assert (np.asarray(found[0]) > 0).tolist() == [True, True, False, False, True]
    assert float(found[0, 3]) == -INF
    (found,) = openness([SET], read, ())
    assert (np.asarray(found[0]) > 0).tolist() == [True, True, True, False, True]
    assert openness([Reading()], read, ()) == []
    assert interval(read) is read


def test_goals():
    assert goal_of(1) is True
    assert goal_of(5) == TopSet(5)
