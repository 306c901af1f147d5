"""What random programs found: each cause once, as small as it gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width, kinds
from jax import lax

import hire_xform as hx

D, M = 6, 16


def weights():
    rng = np.random.default_rng(0)
    shapes = {"up": (D, M), "down": (M, D), "other": (D, M), "square": (D, D), "none": (0, D)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def block(w, x):
    return jax.nn.relu(x @ w["up"]) @ w["down"]


def test_a_custom_derivative_stays_when_its_call_has_weights_that_are_not_read():
    @jax.custom_vjp
    def square(w, x):
        return x @ w["square"]

    square.defvjp(lambda w, x: (square(w, x), w), lambda w, g: (jax.tree.map(jnp.zeros_like, w), 3 * g))
    w, x = weights(), jnp.ones((1, D))
    for fun in (lambda w, x: square(w, x).sum(), lambda w, x: block(w, square(w, x)).sum()):
        step = hx.sparsify(fun, config=full_width())
        packed = step.trace(w, x).pack(w)
        assert_same(jax.grad(step, 1)(packed, x), jax.grad(fun, 1)(w, x))


def test_a_custom_derivative_of_what_changes_nothing_stays():
    @jax.custom_vjp
    def clipped(x):
        return jax.jit(lambda x: x)(x)

    clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))

    @jax.custom_jvp
    def doubled(x):
        return x

    doubled.defjvp(lambda primals, tangents: (doubled(*primals), 2 * tangents[0]))
    w, x = weights(), jnp.ones((1, D))
    for through in (clipped, doubled):
        ways = (
            (lambda w, x, through=through: block(w, through(x)).sum(), 1),
            (lambda w, x, through=through: through(block(w, x)).sum(), 1),
            (lambda w, x, through=through: (through(jax.nn.relu(x @ w["up"])) @ w["down"]).sum(), 0),
        )
        for fun, sites in ways:
            step = hx.sparsify(fun, config=full_width())
            assert len(step.trace(w, x).plan.sites) == sites
            assert_same(jax.grad(step, 1)(w, x), jax.grad(fun, 1)(w, x))


def test_a_while_whose_condition_is_batched():
    def one(w, x):
        return lax.while_loop(lambda x: x[0] < 5, lambda x: (x + jnp.tanh(block(w, x[None])[0])).at[0].set(x[0] + 1), x)

    w, x = weights(), jnp.arange(3.0)[:, None] + jnp.ones((3, D))
    many = jax.vmap(one, (None, 0))
    step = hx.sparsify(many, config=full_width())
    assert kinds(step.trace(w, x).plan) == ["ffn"]
    assert_same(step(w, x), jax.jit(many)(w, x))


def test_a_block_into_which_nothing_goes_is_no_site():
    def fun(w, x):
        return jax.nn.relu(x[:, :0] @ w["none"]) @ w["square"]

    step = hx.sparsify(fun, config=full_width())
    assert not step.trace(weights(), jnp.ones((2, D))).plan.sites
    assert_same(step(weights(), jnp.ones((2, D))), fun(weights(), jnp.ones((2, D))))


def test_what_is_packed_suffices_when_a_leaf_is_held_beside_its_rows():
    def fun(w, x):
        def turn(x, _):
            (x @ w["other"]).sum()  # read by nobody, but an operand of the loop
            return x + jax.nn.relu(x @ w["stack"][1]) @ w["down"], None

        x, _ = lax.scan(turn, x, None, length=0)
        return jax.nn.relu(x @ w["stack"][1]) @ w["down"] + w["stack"].sum()

    w = {**weights(), "stack": jnp.stack([weights()["up"], weights()["other"]])}
    step = hx.sparsify(fun, config=full_width())
    traced = step.trace(w, jnp.ones((1, D)))
    assert kinds(traced.plan) == ["ffn"]
    assert_same(step(traced.pack(w), jnp.ones((1, D))), fun(w, jnp.ones((1, D))))


def changing(w, x, _):
    """Weights that a loop changes, and weights that change places in it."""

    def turn(state, _):
        square, first, second, x = state
        return (square / 2, second, first, x @ square + (x @ first).sum()), None

    return lax.scan(turn, (w["square"], w["up"], w["other"], x), None, length=2)[0][-1]


def in_condition(w, x, _):
    return lax.while_loop(lambda x: (jnp.sum(x @ w["square"]) < 1e3) & (x[0, 0] < 5), lambda x: x + 1, x)


# Weights that are computed inside by what hangs on the data: (function, products, word of the reason).
COMPUTED = {
    "scaled": (lambda w, x, i: x @ (w["up"] * i), 1, "mul"),
    "masked": (lambda w, x, i: x @ jnp.triu(w["up"]), 1, "select_n"),
    "chosen": (lambda w, x, i: x @ jnp.where(i > 0, w["up"], w["other"]), 1, "select_n"),
    "branch": (lambda w, x, i: x @ lax.cond(i > 0, lambda: w["up"], lambda: w["other"]), 1, "cond"),
    "changing": (changing, 2, "scan"),
    "condition": (in_condition, 1, "condition of a while"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_product_with_computed_weights_is_a_refusal(name):
    fun, count, word = COMPUTED[name]
    w, x = weights(), jnp.ones((2, D))
    step = hx.sparsify(fun, config=full_width())
    plan = step.trace(w, x, 2.0).plan
    assert not plan.sites
    assert len(plan.refusals) == count
    assert all(word in refusal.reason for refusal in plan.refusals)
    assert_same(step(w, x, 2.0), jax.jit(fun)(w, x, 2.0))


def test_a_block_that_ends_inside_a_custom_derivative_keeps_it():
    @jax.custom_vjp
    def ending(w, h):
        return jnp.tanh(h @ w["other"])

    def forward(w, h):
        return jax.vjp(ending.fun, w, h)

    def backward(pull, out_bar):
        return jax.tree.map(lambda g: 3 * g, pull(out_bar))

    ending.defvjp(forward, backward)

    def fun(w, x):
        return ending(w, jax.nn.relu(x @ w["square"]))

    w, x = weights(), jnp.linspace(-1, 1, 2 * D).reshape(2, D)
    step = hx.sparsify(fun, config=full_width())
    traced = step.trace(w, x)
    assert not [site for site in traced.plan.sites if site.kind == "ffn"], traced.explain()
    packed = traced.pack(w)
    slope = jax.grad(lambda x, f, w: f(w, x).sum())
    assert_same(slope(x, step, packed), slope(x, fun, w))
