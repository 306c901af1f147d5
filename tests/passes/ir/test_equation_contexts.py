"""What is bound in an equation's place carries its name stack, and the context that it was traced in."""

import jax
import jax.numpy as jnp

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.equation_contexts import EquationContexts, equation_context

WEIGHT = jnp.ones((3, 3))


def named(x):
    with jax.named_scope("outside"):
        y = x + 1
    return jax.lax.split(y, (1, 2))


def names(jaxpr):
    return [str(eqn.source_info.name_stack) for eqn in jaxpr.eqns]


def test_one_equation_bound_again_keeps_its_name():
    added = jax.make_jaxpr(named)(WEIGHT).eqns[0]

    def again(x):
        with equation_context(added):
            y = compat.bind(added, [x, 1.0])[0]
        return y * 2

    assert float(again(2.0)) == 6.0
    assert names(jax.make_jaxpr(again)(WEIGHT)) == ["outside", ""]


def test_each_of_a_run_of_equations_has_its_own():
    added, parts = jax.make_jaxpr(named)(WEIGHT).eqns

    def again(x):
        with jax.named_scope("around"), EquationContexts() as contexts:
            contexts.enter(added)
            y = compat.bind(added, [x, 1.0])[0]
            contexts.enter(parts)
            found = compat.bind(parts, [y])
        return [p * 2 for p in found]

    assert [p.shape for p in again(WEIGHT)] == [(1, 3), (2, 3)]
    assert names(jax.make_jaxpr(again)(WEIGHT)) == ["around/outside", "around", "", ""]


def test_an_error_leaves_nothing_entered():
    added = jax.make_jaxpr(named)(WEIGHT).eqns[0]

    def again(x):
        try:
            with equation_context(added):
                raise ValueError
        except ValueError:
            return x + 1

    assert names(jax.make_jaxpr(again)(WEIGHT)) == [""]
