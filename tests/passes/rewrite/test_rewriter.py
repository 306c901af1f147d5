"""A program evaluated again with something else in the place of each weight product, through every kind of nesting."""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import primitives_of
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.extend.core import primitives as prims
from laid_out import laid_out

from hire_xform.passes.ir import compat
from hire_xform.passes.pack.make import pack_array
from hire_xform.passes.plan.decisions import Need, PackKey
from hire_xform.passes.plan.forms import ROWS
from hire_xform.passes.rewrite import runs
from hire_xform.passes.rewrite.action import Action
from hire_xform.passes.rewrite.canonical import dense_product, flat_activation, result_shape
from hire_xform.passes.rewrite.control import EMIT
from hire_xform.passes.rewrite.rewriter import Rewriter
from hire_xform.passes.weights.products import Product, normal_form

D, L = 4, 3
RNG = np.random.default_rng(0)
W = {
    "stack": jnp.asarray(RNG.normal(size=(L, D, D)) / 2, jnp.float32),
    "one": jnp.asarray(RNG.normal(size=(D, D)) / 2, jnp.float32),
}
X = jnp.asarray(RNG.normal(size=(2, D)), jnp.float32)


@dataclass(frozen=True, eq=False)
class Doubled(Action):
    """Twice the product, from packed rows."""

    product: Product

    @cached_property
    def rows(self):
        return Need(PackKey(normal_form(self.product.rows_free()), ROWS), self.product.origin.refs)

    @property
    def needs(self):
        return (self.rows,)

    @property
    def node(self):
        return self.product.node

    @property
    def key(self):
        return "doubled"

    @property
    def operands(self):
        return (self.product.x,)

    def emit(self, context):
        flat = flat_activation(self.product, context.read(self.product.x))
        rows = context.view(self.rows).whole()
        return [result_shape(self.product, 2 * dense_product(self.product, flat, rows))]


def dot(x, w):
    return x @ w


def twice(x, w):
    return 2 * (x @ w)


def layer(dot, x, w):
    return jnp.tanh(dot(x, w))


def with_derivative(dot):
    fun = jax.custom_jvp(lambda x, w: layer(dot, x, w))
    fun.defjvp(lambda primals, tangents: (fun(*primals), tangents[0]))
    return fun


def while_far(dot, w, x):
    def body(state):
        x, i, w = state
        return layer(dot, x, w), i + 1, w

    return lax.while_loop(lambda s: (s[1] < 5) & (jnp.abs(s[0]).sum() > 1e-3), body, (x, 0, w["one"]))[:2]


PROGRAMS = {
    "flat": lambda dot, w, x: layer(dot, x, w["one"]) + x,
    "a call": lambda dot, w, x: jax.jit(lambda x, w: layer(dot, x, w))(x, w["one"]),
    "calls in a call": lambda dot, w, x: jax.jit(
        lambda x, w: jax.jit(lambda x, w: layer(dot, x, w))(layer(dot, x, w), w)
    )(x, w["one"]),
    "remat": lambda dot, w, x: jax.checkpoint(lambda x, w: layer(dot, x, w))(x, w["one"]),
    "a derivative of its own": lambda dot, w, x: with_derivative(dot)(x, w["one"]),
    "scan": lambda dot, w, x: lax.scan(lambda x, w: (layer(dot, x, w), x.sum()), x, w["stack"]),
    "scan backwards": lambda dot, w, x: lax.scan(
        lambda x, w: (layer(dot, x, w), x[0]), x, w["stack"], reverse=True, unroll=2
    ),
    "scan with what does not change": lambda dot, w, x: lax.scan(
        lambda c, _: ((layer(dot, c[0], c[1]), c[1]), None), (x, w["one"]), None, length=3
    )[0][0],
    "scan of tokens": lambda dot, w, x: lax.scan(lambda c, x: (c, layer(dot, x[None], w["one"])[0]), 0.0, x),
    "by index": lambda dot, w, x: lax.fori_loop(0, L, lambda i, x: layer(dot, x, w["stack"][i]), x),
    "while": while_far,
    "branches": lambda dot, w, x: lax.cond(
        x[0, 0] > 0, lambda x: layer(dot, x, w["one"]), lambda x: layer(dot, x, w["stack"][1]), x
    ),
    "one branch of three": lambda dot, w, x: lax.switch(
        1, [lambda x: x, lambda x: layer(dot, x, w["one"]), lambda x: -x], x
    ),
    "a scan in a branch in a call": lambda dot, w, x: jax.jit(
        lambda w, x: lax.cond(
            x.sum() < 99, lambda x: lax.scan(lambda x, w: (layer(dot, x, w), None), x, w)[0], lambda x: x, x
        )
    )(w["stack"], x),
    "scans in a scan": lambda dot, w, x: lax.scan(
        lambda x, _: lax.scan(lambda x, w: (layer(dot, x, w), None), x, w["stack"]), x, None, length=2
    )[0],
    "dropped results": lambda dot, w, x: lax.scan(
        lambda c, w: ((layer(dot, c[0], w), dot(c[1], w)), None), (x, x), w["stack"]
    )[0][0],
}


def rewritten(fun, w=W, x=X, only=None):
    found = laid_out(fun, w, x)
    products = [p for i, p in enumerate(found.found[0]) if only is None or i in only]
    leaves = jax.tree.leaves(w)

    def packed(need):
        return pack_array(need.key, leaves[need.key.recipe.root.index])

    return found, Rewriter(found.graph, {p.node: Doubled(p) for p in products}), [*leaves, x], packed


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_stands_in_a_products_place_is_what_is_computed(name, monkeypatch):
    program = PROGRAMS[name]
    _, rewriter, operands, packed = rewritten(lambda w, x: program(dot, w, x))
    needed = rewriter.needed_inputs()
    # A rule of its own for the derivative may read the weights. Leaves are in the order of their names.
    assert needed == [name == "a derivative of its own", False, True]
    given = [o if read else None for o, read in zip(operands, needed, strict=True)]
    want = jax.tree.leaves(program(twice, W, X))
    got = jax.jit(lambda *given: rewriter.evaluate(given, packed))(*given)
    always(monkeypatch)
    in_runs = jax.jit(lambda *given: rewriter.evaluate(given, packed, in_runs=True))(*given)
    for one, same, other in zip(got, in_runs, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(same, other, rtol=1e-5, atol=1e-6)


def test_without_an_action_a_program_is_bound_as_it_is():
    program = PROGRAMS["a scan in a branch in a call"]
    found, rewriter, operands, packed = rewritten(lambda w, x: program(dot, w, x), only=())
    assert rewriter.needed_inputs() == [False, True, True]
    same = jax.make_jaxpr(lambda *given: rewriter.evaluate(given, packed))(*operands)
    assert primitives_of(same) == primitives_of(jax.make_jaxpr(lambda *leaves: program(dot, W, leaves[-1]))(*operands))
    assert not found.found[1]


KEPT = jnp.arange(float(D))


def stretch(w, x):
    """A product with equations on either side of it, some of them in a call, and a result made of both sides."""
    before = jnp.sin(x) + KEPT
    after = jax.nn.silu(dot(before, w["one"])) * before
    return after, before.sum()


def in_runs(fun, x=X):
    """The graph of a function, its rewritten program with what stays in runs, and its results."""
    found, rewriter, (*leaves, _), packed = rewritten(fun)
    made = jax.make_jaxpr(lambda *given: rewriter.evaluate(given, packed, in_runs=True))(*leaves, x)
    return found, made, jaxpr_as_fun(made)(*leaves, x)


def always(monkeypatch):
    """Runs are made of a single equation, too."""
    monkeypatch.setattr(runs, "FEWEST", 1)
    monkeypatch.setattr(runs, "FEWEST_ALONE", 1)


def called(made, name):
    """What is called by a name."""
    return [compat.call_jaxpr(eqn) for eqn in jits(made) if eqn.params["name"] == name]


def equations_but_products(jaxpr):
    return [eqn for eqn in compat.close(jaxpr)[0].eqns if eqn.primitive is not prims.dot_general_p]


def test_what_stays_is_there_as_it_was_traced(monkeypatch):
    always(monkeypatch)
    found, made, (got, total) = in_runs(stretch)
    (whole,) = called(made, "rewritten")
    assert not called(whole, "unchanged")
    # Lines, scopes and contexts are those of the equations, and so are types.
    kept = [(eqn.primitive, eqn.source_info, eqn.outvars) for eqn in equations_but_products(found.graph.jaxpr)]
    now = [(eqn.primitive, eqn.source_info, eqn.outvars) for eqn in equations_but_products(whole)]
    assert [one for one in now if one in kept] == kept
    want, summed = stretch({"one": 2 * W["one"]}, X)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(total, summed, rtol=1e-5)


def test_a_few_equations_are_no_run():
    _, made, _ = in_runs(stretch)
    assert not called(made, "rewritten")
    assert not called(made, "unchanged")


def test_what_is_of_another_type_than_was_traced_is_bound_again(monkeypatch):
    always(monkeypatch)
    weak = lax.broadcast(0.5, X.shape)
    assert weak.weak_type
    _, made, (got, _) = in_runs(stretch, weak)
    # The sine of a weak type is of a weak type.
    (whole,) = called(made, "rewritten")
    sine = compat.close(whole)[0].eqns[0]
    assert (sine.primitive, sine.outvars[0].aval.weak_type) == (prims.sin_p, True)
    np.testing.assert_allclose(got, stretch({"one": 2 * W["one"]}, weak)[0], rtol=1e-5)


def layers(w, x, between):
    for i in range(5):
        x = between(jnp.sin(dot(x, w["one"])), i)
    return x


ALIKE = {
    "layers of a loop": (lambda x, i: jnp.tanh(x) + 1.0, 1),
    "of two kinds in turn": (lambda x, i: jnp.tanh(x) + 1.0 if i % 2 else jnp.cos(x) + 1.0, 2),
    "an effect between": (lambda x, i: jax.debug.callback(lambda _: None, x) or jnp.tanh(x) + 1.0, 1),
    "other numbers": (lambda x, i: jnp.tanh(x) + float(i), 0),
    "other parameters": (lambda x, i: jnp.roll(x, i, axis=1), 0),
    "other functions": (lambda x, i: [jnp.tanh, jnp.sin, jnp.cos, jnp.exp, jnp.abs][i](x), 0),
    "other operands": (lambda x, i: [x - 1.0, 1.0 - x, x * x, x * 2.0, x / 2.0][i], 0),
    "other arrays": (lambda x, i: x * np.arange(D) * i, 0),
    "other scopes": (lambda x, i: jax.named_scope(f"layer{i}")(jnp.tanh)(x), 0),
}


@pytest.mark.parametrize("name", ALIKE)
def test_stretches_that_are_alike_call_one_function(name, monkeypatch):
    between, kinds = ALIKE[name]
    plain = in_runs(lambda w, x: layers(w, x, between))[2][0]
    always(monkeypatch)
    monkeypatch.setattr(runs, "FEWEST", 2)
    _, made, (got,) = in_runs(lambda w, x: layers(w, x, between))
    (whole,) = called(made, "rewritten") or [made]
    assert len({id(call) for call in called(whole, "unchanged")}) == kinds
    np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got, layers({"one": 2 * W["one"]}, X, between), rtol=1e-4, atol=1e-5)


def test_one_product_of_two_is_replaced():
    def program(w, x, second=dot):
        return second(layer(dot, x, w["one"]), w["one"])

    _, rewriter, operands, packed = rewritten(program, only=(1,))
    # The other still reads its weight.
    assert rewriter.needed_inputs() == [True, False, True]
    (got,) = rewriter.evaluate(operands, packed)
    np.testing.assert_allclose(got, program(W, X, twice), rtol=1e-5)


def jits(jaxpr):
    return [eqn for eqn in compat.close(jaxpr)[0].eqns if eqn.primitive in compat.CALL_PRIMITIVES]


def test_calls_that_are_rewritten_alike_are_one_function():
    once = jax.jit(lambda x, w: layer(dot, x, w))

    def program(w, x):
        x = once(once(x, w["stack"][0]), w["stack"][1])
        return once(x, w["one"]), once(x, x.T @ x)

    _, rewriter, operands, packed = rewritten(program)
    made = jits(jax.make_jaxpr(lambda *given: rewriter.evaluate(given, packed))(*operands))
    first, second, alone, data = (compat.call_jaxpr(eqn) for eqn in made if eqn.params["name"] == "<lambda>")
    assert first is second
    # A stack's rows come by another index; the last has no weight and is as it was.
    assert alone is not first
    assert prims.dot_general_p in primitives_of(data)
    assert len(primitives_of(data)) < len(primitives_of(first))


def test_every_higher_order_equation_has_a_way_to_be_emitted_again():
    assert set(EMIT) == {prims.scan_p, prims.while_p, prims.cond_p, compat.SHARD_MAP}
