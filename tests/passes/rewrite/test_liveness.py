"""What a program still needs, without rewritten sites: of straight code, loops, branches and effects."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.core import primitives as prims
from laid_out import laid_out

from hire_xform.passes.ir import compat
from hire_xform.passes.rewrite.liveness import Liveness, state_read

W, X = jnp.ones((4, 4)), jnp.ones(4)


def dead_and_live(w, x):
    jnp.cos(x)
    return jnp.sin(x)


def printed(w, x):
    jax.debug.callback(lambda y: None, jnp.cos(x))
    return jnp.sin(x)


def scanned(w, x):
    def body(c, m):
        jnp.cos(c)
        return jnp.sin(c), None

    return lax.scan(body, x, w)[0]


# A program, and the primitives that stay.
PROGRAMS = {
    "straight": (dead_and_live, {prims.sin_p}),
    "an effect and what it reads": (printed, {prims.sin_p, prims.cos_p}),
    "in a loop": (scanned, {prims.sin_p}),
    "a result of two": (lambda w, x: lax.top_k(x, 2)[0], {prims.top_k_p}),
    "a branch": (lambda w, x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), {prims.sin_p, prims.cos_p}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_equations_that_stay(name):
    fun, staying = PROGRAMS[name]
    found = laid_out(fun, W, X)
    live = Liveness(found.graph, {})
    watched = {prims.sin_p, prims.cos_p, prims.top_k_p}
    assert {node.primitive for node in live.nodes} & watched == staying
    assert not live.changed


def test_a_loop_that_is_not_changed_keeps_all_its_operands():
    found = laid_out(scanned, W, X)
    assert set(found.graph.top.inputs) <= Liveness(found.graph, {}).values


def test_the_state_that_a_while_tests():
    found = laid_out(lambda w, x: lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] @ w, c[1] + 1), (x, 0))[0], W, X)
    assert state_read(compat.while_parts(found.node(prims.while_p).eqn)) == {1}
