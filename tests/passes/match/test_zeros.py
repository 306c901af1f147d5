"""The gate of a block: at most zero, it leaves a zero; and its upper bound, whatever is rounded on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_block_region import W, X, ending, given, normal, relu

from hire_xform.passes.ir.axes import to_canonical
from hire_xform.passes.match.zeros import gate_of, upper_of

MORE = {**W, "scale": normal(W["up"].shape[1])}


def up(w, x):
    return x @ w["up"]


def gate(w, x):
    return x @ w["gate"]


# A block's activation, and which of its products the gate rises with; None where it has none.
GATES = {
    "relu": (lambda w, x: relu(up(w, x)), 0),
    "zero first": (lambda w, x: jnp.maximum(0.0, up(w, x)), 0),
    "a call": (lambda w, x: jax.nn.relu(up(w, x)), 0),
    "squared": (lambda w, x: jnp.square(relu(up(w, x))), 0),
    "cubed": (lambda w, x: relu(up(w, x)) ** 3, 0),
    "up to six": (lambda w, x: jnp.minimum(relu(up(w, x)), 6.0), 0),
    "clipped": (lambda w, x: jnp.clip(up(w, x), 0.0, 1.0), 0),
    "negated": (lambda w, x: -relu(up(w, x)), 0),
    "divided": (lambda w, x: relu(up(w, x)) / 2.0, 0),
    "a bias": (lambda w, x: relu(up(w, x) + w["bias"]), 0),
    "a bias first, less a number": (lambda w, x: relu(w["bias"] + up(w, x) - 0.5), 0),
    "the gate second": (lambda w, x: up(w, x) * relu(gate(w, x)), 1),
    "the gate first": (lambda w, x: relu(gate(w, x)) * up(w, x), 0),
    "of what falls": (lambda w, x: relu(-up(w, x)), None),
    "less the product": (lambda w, x: relu(w["bias"] - up(w, x)), None),
    "of a product of two": (lambda w, x: relu(up(w, x) * gate(w, x)), None),
    "of a sum of two": (lambda w, x: relu(up(w, x) + gate(w, x)), None),
    "above one": (lambda w, x: jnp.maximum(up(w, x), 1.0), None),
    "at least a little": (lambda w, x: jnp.minimum(relu(up(w, x)), -1.0), None),
    "clipped below zero": (lambda w, x: jnp.clip(up(w, x), -1.0, 1.0), None),
    "times what may be infinite": (lambda w, x: relu(up(w, x)) * jnp.exp(gate(w, x)), None),
    "shifted": (lambda w, x: relu(up(w, x)) + 1.0, None),
    "divided by a product": (lambda w, x: relu(up(w, x)) / gate(w, x), None),
    "smooth": (lambda w, x: jax.nn.silu(up(w, x)), None),
}


def block(activation):
    return lambda w, x: activation(w, x) @ w["down"]


@pytest.mark.parametrize("name", GATES)
def test_which_product_a_gate_rises_with(name):
    activation, want = GATES[name]
    _, match = ending(block(activation), MORE)
    found = gate_of(match.region)
    assert (None if found is None else found.up) == want


@pytest.mark.parametrize("name", [name for name, (_, want) in GATES.items() if want is not None])
def test_where_a_gates_bound_is_at_most_zero_the_activation_is_zero(name):
    found, match = ending(block(GATES[name][0]), MORE)
    args = [*jax.tree.leaves(MORE), X]
    hiddens, sides = given(found, match, args)
    own = gate_of(match.region)
    upper = upper_of(match.region, own.expr, hiddens[own.up], sides)
    activation = to_canonical(jnp.asarray(found.value(match.hidden, args)), match.layout, match.tokens, match.units)
    closed = np.broadcast_to(upper <= 0, activation.shape)
    assert 0 < closed.sum() < closed.size
    assert (np.asarray(activation)[closed] == 0).all()
    assert (np.asarray(activation)[~closed] != 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_a_bound_stays_one_in_16_bits(dtype):
    """Whether each step is rounded or not."""
    weights = {k: v.astype(dtype) for k, v in MORE.items()}

    def steps(u, bias, rounds):
        made = rounds(rounds(bias + u) - 0.3)
        return made

    found, match = ending(
        lambda w, x: relu((w["bias"] + x @ w["up"]) - jnp.asarray(0.3, dtype)) @ w["down"], weights, X.astype(dtype)
    )
    args = [*jax.tree.leaves(weights), X.astype(dtype)]
    hiddens, sides = given(found, match, args)
    own = gate_of(match.region)
    products = jnp.asarray(hiddens[own.up], jnp.float32)
    bound = np.asarray(upper_of(match.region, own.expr, products, sides), np.float64)
    bias = np.asarray(weights["bias"], np.float64)
    for rounds in (lambda v: v, lambda v: np.asarray(jnp.asarray(v, dtype), np.float64)):
        made = rounds(rounds(bias + np.asarray(products, np.float64)) - float(jnp.asarray(0.3, dtype)))
        assert (bound >= made).all()
