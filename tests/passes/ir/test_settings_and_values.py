"""Static values as they are compared, settings around what is tried, and room for nested calls."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from hire_xform.passes.ir.each_device import is_explicit, under_automatic_axes
from hire_xform.passes.ir.recursion import room_for
from hire_xform.passes.ir.static_values import value_key
from hire_xform.passes.ir.trace_context import as_usual, concretely

ALIKE = [(1, 1), (math.nan, math.nan), ((1, 2.0), (1, 2.0)), (np.float32(math.nan), np.float32(math.nan)), ("a", "a")]
OTHER = [(1, 1.0), (1, True), (0.0, -0.0), (0j, complex(0, -0.0)), ((1,), (1.0,)), (np.float32(1), np.float64(1))]


@pytest.mark.parametrize(("one", "other"), ALIKE + OTHER, ids=repr)
def test_values_are_the_same_to_the_bit_and_of_one_type(one, other):
    assert (value_key(one) == value_key(other)) is any(one is a and other is b for a, b in ALIKE)


@pytest.mark.parametrize("setting", [jax.debug_nans(True), jax.disable_jit(True), jax.transfer_guard("disallow")])
def test_settings_around_do_not_matter(setting):
    with setting, as_usual():
        assert bool(jnp.isnan(jax.jit(lambda x: x / 0)(np.float32(0))))
        assert isinstance(jax.make_jaxpr(jax.jit(jnp.sin))(1.0).eqns[0].params["name"], str)


def test_operations_under_a_trace_give_arrays():
    made = []

    def traced(x):
        with concretely():
            made.append(jnp.ones(3) + 1)
        return x

    jax.make_jaxpr(traced)(1.0)
    assert made[0].tolist() == [2, 2, 2]


def test_the_limit_of_nested_calls_is_raised_and_put_back():
    before = sys.getrecursionlimit()
    with room_for(50):
        inner = sys.getrecursionlimit()
        with room_for(1):
            assert sys.getrecursionlimit() == inner
    assert inner > before
    assert sys.getrecursionlimit() == before


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_inside_no_axis_is_explicit(kind):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(kind,))
    assert is_explicit(mesh) is (kind == AxisType.Explicit)
    kinds = []

    def run(x):
        kinds.append(jax.typeof(x).sharding.mesh.axis_types)
        return x + 1

    x = jax.device_put(jnp.ones(4), jax.NamedSharding(mesh, jax.P("d")))
    result = jax.jit(under_automatic_axes(run, mesh, jax.P("d")))(x)
    assert result.tolist() == [2] * 4
    assert all(AxisType.Explicit not in each for each in kinds)
