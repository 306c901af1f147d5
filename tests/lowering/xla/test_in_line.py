"""Subgraphs are traced without calls of jitted functions; loops stay loops, and what users wrote is as it would be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import primitives_of
from jax import lax
from jax.extend.core import primitives as prims

from hire_xform.lowering.primitives.scores import predicted_scores
from hire_xform.lowering.xla.blocks import map_row_blocks
from hire_xform.lowering.xla.in_line import as_called, in_line, loop

X = jnp.arange(6.0)
LOOPS = {
    "scan": lambda body: loop(lax.scan, lambda c, x: (body(c) + x, x), 0.0, X)[1],
    "map": lambda body: loop(lax.map, body, X),
    "while": lambda body: loop(functools.partial(lax.while_loop, lambda c: c < 3.0), lambda c: body(c) + 9.0, X[0]),
}


def clipped(x):
    return jnp.clip(jnp.where(x > 1.0, x, 2.0 * x), 0.0, 4.0)


def traced(fun, *args):
    return primitives_of(jax.make_jaxpr(fun)(*args))


def test_equations_are_the_same_without_calls():
    called, flat = traced(clipped, X), traced(in_line()(clipped), X)
    assert prims.jit_p in called
    # A number needs no equation that converts it for a call.
    assert set(flat) <= set(called) - {prims.jit_p}
    np.testing.assert_array_equal(in_line()(clipped)(X), clipped(X))


@pytest.mark.parametrize("name", LOOPS)
def test_loops_stay_loops_of_the_same_kind_of_body(name):
    kind = prims.while_p if name == "while" else prims.scan_p
    for around, calls in ((in_line, False), (as_called, True)):
        found = traced(around()(lambda: LOOPS[name](clipped)))
        assert kind in found
        assert (prims.jit_p in found) == calls


def test_blocks_of_rows_are_looped_over():
    rows = jnp.ones((64, 4))
    found = traced(in_line()(lambda rows: map_row_blocks(clipped, 8, rows)), rows)
    assert prims.scan_p in found
    assert prims.jit_p not in found


class Turning:
    """A predictor with a loop of its own."""

    in_place = frozenset()

    def scores(self, x, packed, n):
        return lax.scan(lambda total, row: (total, clipped(x @ row)), 0.0, packed["rows"])[1].T


def test_a_users_predictor_is_traced_as_it_is_written():
    rows = jnp.ones((64, 4))
    found = traced(in_line()(lambda x: predicted_scores(x, {"rows": rows}, Turning(), 64)), jnp.ones((1, 4)))
    assert {prims.scan_p, prims.jit_p} <= set(found)
