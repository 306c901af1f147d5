"""Programs whose loops, branches and calls are nested as deeply as JAX lowers them."""

import sys
import threading
from importlib import metadata

import jax
import jax.numpy as jnp
import pytest
from checks import FORCE, assert_same, kinds
from jax import lax

import hire_xform as hx
from hire_xform.passes.ir.recursion import room_for

D, M = 16, 64
# XLA of jaxlib 0.9 lowers as deep programs, and ends the process when it compiles one of 45 levels, whoever made it.
COMPILED = 40 if metadata.version("jaxlib").startswith("0.9.") else 100
CONFIG = hx.Config(vocab=None, ffn=hx.Ffn(active=1.0, certify=False), rules=FORCE)


def block(w, x):
    return jax.nn.relu(x @ w["up"]) @ w["down"]


def in_cond(fun):
    return lambda w, x: lax.cond(x[0, 0] > -1e9, fun, lambda w, x: x, w, x)


def in_while(fun):
    return lambda w, x: lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, fun(w, c[1])), (0, x))[1]


def in_jit(fun):
    return jax.jit(lambda w, x: fun(w, x))


def nested(around, depth):
    fun = block
    for _ in range(depth):
        fun = around(fun)
    return fun


def arrays():
    return {"up": jnp.ones((D, M)) * 0.1, "down": jnp.ones((M, D)) * 0.1}, jnp.ones((1, D))


@pytest.mark.parametrize(("around", "most"), [(in_cond, 80), (in_while, 100), (in_jit, 100)])
def test_what_jax_lowers_is_lowered(around, most):
    w, x = arrays()
    limit = sys.getrecursionlimit()
    for depth in range(most, 50, -10):
        fun = nested(around, depth)
        try:
            jax.jit(fun).lower(w, x)
        except RecursionError:
            continue
        break
    else:
        pytest.fail("JAX lowers none of them: the test tries nothing")
    step = hx.sparsify(fun, config=CONFIG)
    traced = step.trace(w, x)
    assert kinds(traced.plan) == ["ffn"]
    assert traced.lower() is not None
    if depth > COMPILED:
        step = hx.sparsify(nested(around, COMPILED), config=CONFIG)
    assert_same(step(w, x), block(w, x))
    assert sys.getrecursionlimit() == limit


def test_the_limit_is_put_back_by_the_last_of_those_who_raised_it():
    before = sys.getrecursionlimit()
    with room_for(100):
        outer = sys.getrecursionlimit()
        assert outer > before + 100 * 20
        with room_for(200):
            assert sys.getrecursionlimit() > outer
        assert sys.getrecursionlimit() == outer
        with pytest.raises(KeyError), room_for(300):
            raise KeyError
        assert sys.getrecursionlimit() == outer
    assert sys.getrecursionlimit() == before
    with room_for(0):
        assert sys.getrecursionlimit() == before
    with room_for(10**9):
        assert sys.getrecursionlimit() <= max(before, 20_000)


def test_threads_raise_the_limit_at_once():
    before, seen, errors = sys.getrecursionlimit(), [], []
    meet = threading.Barrier(4)

    def down(n):
        return 0 if n == 0 else 1 + down(n - 1)

    def work(levels):
        try:
            for _ in range(20):
                meet.wait()
                with room_for(levels):
                    seen.append(down(levels * 20))
        except Exception as error:
            errors.append(error)
            meet.abort()

    threads = [threading.Thread(target=work, args=(levels,)) for levels in (0, 60, 90, 120)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(seen) == 80
    assert max(seen) == 2400 > before
    assert sys.getrecursionlimit() == before


def test_a_limit_that_somebody_else_sets_meanwhile_stays():
    before = sys.getrecursionlimit()
    try:
        with room_for(100):
            sys.setrecursionlimit(before + 5000)
        assert sys.getrecursionlimit() == before + 5000
    finally:
        sys.setrecursionlimit(before)
    with room_for(100):
        assert sys.getrecursionlimit() > before
    assert sys.getrecursionlimit() == before
