"""A product that asks for a precision is computed with it: it matters on GPU and TPU, which round f32 by default."""

import jax
import jax.numpy as jnp
import pytest
from checks import named
from jax.extend.core import primitives as prims
from jax.lax import Precision

import hire_xform as hx


def products(jaxpr):
    """Every dot_general in a program: whether it is of integers, and the precision it asks for."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive is prims.dot_general_p:
            found.append((jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.integer), eqn.params["precision"]))
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    found += products(sub)
    return found


def step_with(*precisions):
    def step(w, x):
        up, head = precisions
        return jnp.dot(jax.nn.relu(jnp.dot(x, w["up"], precision=up)) @ w["down"], w["head"], precision=head)

    return step


def shapes():
    sizes = {"up": (16, 64), "down": (64, 16), "head": (16, 128)}
    w = {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}
    return w, jax.ShapeDtypeStruct((1, 16), jnp.float32)


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("precision", [None, Precision.HIGH, Precision.HIGHEST])
def test_chosen_rows_are_multiplied_as_precisely_as_the_model_asks(precision, certify):
    config = (hx.lossless if certify else hx.approximate)(rules=named(hx.Vocab(certify=certify)))
    traced = hx.sparsify(step_with(precision, precision), config=config).trace(*shapes())
    assert len(traced.plan.sites) == 2
    found = products(traced.sparse_jaxpr.jaxpr)
    floats = [asked for integers, asked in found if not integers]
    want = None if precision is None else (precision, precision)
    assert floats.count(want) >= 3
    assert set(floats) <= {want, None, (Precision.HIGHEST,) * 2}
    # Products of integers are exact as they are.
    assert {asked for integers, asked in found if integers} <= {None, (Precision.DEFAULT,) * 2}


def test_heads_that_ask_for_other_precisions_share_no_function():
    def step(w, x):
        return jnp.dot(x, w["one"]), jnp.dot(x, w["two"], precision=Precision.HIGHEST)

    w = {name: jax.ShapeDtypeStruct((16, 128), jnp.float32) for name in ("one", "two")}
    traced = hx.sparsify(step, config=hx.approximate(rules=named(hx.Vocab(certify=False)))).trace(w, shapes()[1])
    floats = [asked for integers, asked in products(traced.sparse_jaxpr.jaxpr) if not integers]
    assert set(floats) == {None, (Precision.HIGHEST,) * 2}
