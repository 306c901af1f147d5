"""A primitive that the library has never seen, taught from outside: what it stands in the middle of is followed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same, full_width, kinds, narrow
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

import hire_xform as hx
from hire_xform.passes.ir.axis_rules import POINTWISE, Kind, Rule, register_axis_rule, registered
from hire_xform.passes.ir.links import Link

D, M, V, T = 12, 40, 96, 3


def new_primitive(name, fun, shape):
    """A primitive of one operand, that runs as a function does."""
    primitive = Primitive(name)
    primitive.def_impl(lambda x, **params: jax.jit(lambda x: primitive.bind(x, **params))(x))
    primitive.def_abstract_eval(lambda x, **_: ShapedArray(shape(x.shape), x.dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(fun, multiple_results=False))
    return primitive


bend_p = new_primitive("bend", lambda x, *, by: x - by * jnp.sin(x), lambda shape: shape)
turn_p = new_primitive("turn", lambda x: jnp.moveaxis(x, -1, 0), lambda shape: (shape[-1], *shape[:-1]))


@pytest.fixture
def teach():
    """``teach(primitive, rule)`` registers a rule, for this test."""
    removed = []
    yield lambda *given: removed.append(register_axis_rule(*given))
    for remove in removed:
        remove()


def weights():
    rng = np.random.default_rng(0)
    shapes = {"up": (D, M), "down": (M, D), "head": (D, V)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def inputs():
    return jnp.asarray(np.random.default_rng(1).normal(size=(T, D)), jnp.float32)


def block(p, x):
    return jax.nn.relu(bend_p.bind(x @ p["up"], by=0.5)) @ p["down"]


def token(p, x):
    return jnp.argmax(turn_p.bind(x @ p["head"]), axis=0)


def test_a_block_around_a_pointwise_primitive_is_found_once_it_is_taught(teach):
    p, x = weights(), inputs()
    assert not hx.sparsify(block, config=full_width()).trace(p, x).plan.sites
    teach(bend_p, POINTWISE)
    step = hx.sparsify(block, config=full_width())
    plan = step.trace(p, x).plan
    assert kinds(plan) == ["ffn"]
    assert plan.sites[0].activation == "bend, max"
    assert_same(step(p, x), jax.jit(block)(p, x))


def test_it_is_bound_as_it_is_on_chosen_units(teach):
    teach(bend_p, POINTWISE)
    p, x = weights(), inputs()
    # A quarter of the units is open for any of these tokens, and fewer than all are computed.
    p["up"] = p["up"].at[:, M // 4 :].set(-10.0 * jnp.abs(p["up"][:, M // 4 :]))
    x = jnp.abs(x)
    step = hx.sparsify(block, config=narrow(active=0.5))
    predicted, chosen = _bends(step.trace(p, x).sparse_jaxpr)
    assert predicted.params == chosen.params == {"by": 0.5}
    assert predicted.invars[0].aval.shape[-1] == M > chosen.invars[0].aval.shape[-1]
    assert_same(step(p, x), jax.jit(block)(p, x))


def _bends(jaxpr):
    found = []
    for eqn in jaxpr.eqns:
        found += [eqn] if eqn.primitive is bend_p else []
        for value in eqn.params.values():
            found += _bends(getattr(value, "jaxpr", value)) if hasattr(value, "eqns") else []
    return found


def test_logits_are_followed_through_a_primitive_that_moves_axes(teach):
    p, x = weights(), inputs()
    config = hx.Config(vocab=hx.Vocab(candidates=V), rules=FORCE)
    assert not hx.sparsify(token, config=config).trace(p, x).plan.sites
    teach(turn_p, Rule(lambda eqn: [Link((0,), (1,)), Link((1,), (0,))], Kind.MOVES))
    step = hx.sparsify(token, config=config)
    assert kinds(step.trace(p, x).plan) == ["vocab"]
    np.testing.assert_array_equal(step(p, x), jax.jit(token)(p, x))


def test_a_block_is_found_behind_a_primitive_that_moves_axes(teach):
    def turned(p, x):
        return jnp.moveaxis(jax.nn.relu(turn_p.bind(x @ p["up"])), 0, -1) @ p["down"]

    p, x = weights(), inputs()
    teach(turn_p, Rule(lambda eqn: [Link((0,), (1,)), Link((1,), (0,))], Kind.MOVES))
    step = hx.sparsify(turned, config=full_width())
    assert kinds(step.trace(p, x).plan) == ["ffn"]
    assert_same(step(p, x), jax.jit(turned)(p, x))


def test_what_is_registered_is_taken_away_again():
    before = registered()
    first = register_axis_rule(bend_p, POINTWISE)
    second = register_axis_rule(bend_p, Rule(lambda eqn: []))
    first()  # another rule has taken its place
    assert registered()[bend_p] is not POINTWISE
    second()
    assert registered()[bend_p] is POINTWISE
    first()
    assert registered() == before
