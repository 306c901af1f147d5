"""Calls that are emitted again: their shardings, and derivatives of their own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from laid_out import laid_out

from hire_xform.passes.ir.graph import Frame
from hire_xform.passes.rewrite.calls import constrained, with_own_derivative

X = jnp.arange(1.0, 4.0)


def frame_of(fun):
    (frame,) = [item for item in laid_out(lambda w, x: fun(x), (), X).graph.top.root.items if isinstance(item, Frame)]
    return frame


@jax.custom_jvp
def rounded(x):
    return jnp.round(x)


# Straight through, and three times.
rounded.defjvp(lambda primals, tangents: (rounded(*primals), 3 * tangents[0]))


def body(operands, seen):
    return [operands[0] * 10]


def test_the_value_is_the_bodys_and_the_derivative_the_rules():
    frame = frame_of(rounded)
    assert frame.kind == "custom"

    def run(x):
        (made,) = with_own_derivative(frame, body, [x], [x], [])
        return made

    np.testing.assert_array_equal(run(X), 10 * X)
    value, tangent = jax.jvp(run, (X,), (jnp.ones(3),))
    np.testing.assert_array_equal(value, rounded(X))
    np.testing.assert_array_equal(tangent, jnp.full(3, 3.0))


def test_where_an_operand_is_not_there_the_derivative_is_the_bodys():
    (made,) = with_own_derivative(frame_of(rounded), body, [None], [X], [])
    np.testing.assert_array_equal(made, 10 * X)


def test_a_call_without_shardings_is_left_as_it_is():
    frame = frame_of(jax.jit(lambda x: jnp.sin(x)))
    assert constrained(frame, body) is body


def test_shardings_of_a_call_are_constraints():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = NamedSharding(mesh, PartitionSpec("data"))
    frame = frame_of(jax.jit(lambda x: jnp.sin(x), in_shardings=placed, out_shardings=placed))
    run = constrained(frame, lambda operands, seen: ([operands[0] * 2], []))
    text = str(jax.make_jaxpr(lambda x: run([x], [])[0])(X))
    assert text.count("sharding_constraint") == 2
    results, told = run([X], [])
    np.testing.assert_array_equal(results[0], 2 * X)
    assert told == []
    results, _ = constrained(frame, lambda operands, seen: ([None], []))([None], [])
    assert results == [None]
