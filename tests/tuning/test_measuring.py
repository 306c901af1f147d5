"""What is measured of a machine: every table of a profile, in numbers that can be."""

import math
import warnings

import jax
import jax.numpy as jnp
import pytest

import hire_xform as hx
from hire_xform.passes.plan.profile import FORMS, ROWS, SCORES, SPELLINGS, Profile
from hire_xform.tuning import measuring
from hire_xform.tuning.measuring import Sizes, measure
from hire_xform.tuning.programs import dense
from hire_xform.tuning.report import table

TINY = Sizes(
    rows=64,
    narrow_rows=64,
    scored=64,
    columns=64,
    few_columns=16,
    row_matrix=64,
    row_bytes=128,
    short_row_bytes=64,
    chosen=(16, 32),
    sites=(64, 128),
    candidates=8,
    tokens=(1, 2),
    some_tokens=(1, 2),
    swept=4096,
    rounds=1,
    seconds=0.0,
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the machine was busy")
def test_measuring_fills_every_table():
    found = []

    def inside(x):
        # Whatever trace it is called in: a first plan may be made in one.
        found.append(measure("cpu", TINY))
        return x

    jax.jit(inside)(1.0)
    (profile,) = found
    assert (profile.platform, profile.source) == ("cpu", "measured")
    assert set(profile.dense) == set(FORMS)
    assert set(profile.scores) == set(SCORES)
    assert set(profile.rows) == set(ROWS)
    for by_tokens in [*profile.scores.values(), *(b for own in profile.dense.values() for b in own.values())]:
        assert [count for count, _ in by_tokens] == [1, 2]
        assert all(0 < seconds < math.inf for _, seconds in by_tokens)
    assert all(set(own) == set(SPELLINGS) for own in profile.dense.values())
    assert len({own[0] for own in profile.dense["f32"].values()}) == 1
    for times in profile.rows.values():
        (few, low), (many, high) = times.points
        assert (few, many) == (16 * 128, 32 * 128)
        assert 0 < low <= high < math.inf
    for value in (profile.fixed, profile.choosing, profile.bounding, profile.picking):
        assert 0 <= value < math.inf
    # It is what a file can hold.
    assert Profile.from_dict(profile.to_dict()) == profile
    assert len(table(profile).splitlines()) > len(FORMS) * len(SPELLINGS)


def test_a_time_counts_once_another_agrees():
    program = measuring._Program(None, [])
    for times, sure in (([1.0], False), ([3.0, 1.0], False), ([3.0, 1.0, 1.1], True), ([1.0, 1.1, 0.5], False)):
        program.times = times
        assert program.is_sure == sure
        assert program.seconds == sorted(times)[:2][-1]


def test_a_busy_machine_is_told_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measuring._warn_if_busy(0.05)
    with pytest.warns(hx.HireWarning, match=r"busy while it was measured: 30% of the programs .* when it is idle"):
        measuring._warn_if_busy(0.3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_dense_products_are_what_they_are_called(form, spelling):
    fun, ((x, w),) = dense(form, spelling, 6, 4, 2)
    assert w.shape == ((4, 6) if spelling == "x @ w" else (6, 4))
    out = jax.eval_shape(fun, x, w)
    assert out.shape == ((6, 2) if spelling == "w @ x" else (2, 6))
    assert out.dtype == (jnp.bfloat16 if form == "16 bits" else jnp.float32)
    assert w.dtype.itemsize * 8 == int(form.removeprefix("f").split()[0])
