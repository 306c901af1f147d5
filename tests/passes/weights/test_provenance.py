"""Which values are weights, one rule each: the recipe makes of the leaf what the program does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives as prims
from laid_out import laid_out

from hire_xform.passes.weights.origins import IndexSlice, ScanSlice
from hire_xform.passes.weights.recipe import Convert, Reshape, Slice, Stack, Transpose

W = jnp.arange(24.0).reshape(2, 3, 4)

# What the program does with a leaf, and the steps of the recipe.
RULES = {
    "reshape": (lambda w: w.reshape(6, 4), [Reshape]),
    "squeeze": (lambda w: jnp.squeeze(w[:1], 0), [Slice, Reshape]),
    "expand": (lambda w: w[:, None], [Reshape]),
    "transpose": (lambda w: w.transpose(2, 0, 1), [Transpose]),
    "slice": (lambda w: lax.slice(w, (0, 1, 0), (2, 3, 4), (1, 1, 3)), [Slice]),
    "split": (lambda w: jnp.split(w, [1, 3], axis=2)[1], [Slice]),
    "convert": (lambda w: w.astype(jnp.bfloat16), [Convert]),
    "copy": (lambda w: jnp.copy(w), []),
    "name": (lambda w: checkpoint_name(w, "kernel"), []),
    "stop gradient": (lax.stop_gradient, []),
    "barrier": (lambda w: lax.optimization_barrier(w), []),
    "jit": (lambda w: jax.jit(lambda v: v.reshape(6, 4))(w), [Reshape]),
    "remat": (lambda w: jax.checkpoint(lambda v: v.transpose(1, 0, 2))(w), [Transpose]),
}


@pytest.mark.parametrize("name", RULES)
def test_a_step_of_layout_or_dtype_keeps_a_weight(name):
    fun, steps = RULES[name]
    origin = laid_out(fun, W).origin
    assert [type(step) for step in origin.recipe.steps] == steps
    assert not origin.refs
    np.testing.assert_array_equal(origin.recipe.apply(W), fun(W))


# What no recipe is of: made of weights alone it is derived, with data it is data.
DERIVED = {
    "sum": lambda w, x: w + w,
    "scaled": lambda w, x: w * 2.0,
    "scaled by data": lambda w, x: w * x[0],
    "reduced": lambda w, x: w.sum(0),
    "stretched": lambda w, x: jnp.broadcast_to(w[:, :, None], (2, 3, 5, 4)),
    "picked by data": lambda w, x: w[:, x.astype(int)],
}
DATA = {
    "with data": lambda w, x: w + x,
    "product": lambda w, x: x @ w[0].T,
    "data alone": lambda w, x: x * 2.0,
}


@pytest.mark.parametrize("name", [*DERIVED, *DATA])
def test_what_is_computed_is_no_weight_and_says_how_it_was_made(name):
    found = laid_out({**DERIVED, **DATA}[name], W, jnp.ones(4))
    assert found.origin is None
    how = found.provenance.derived(found.output)
    assert (how is not None) == (name in DERIVED)
    if how is not None:
        assert "test_provenance.py" in how


def test_a_scan_takes_one_matrix_of_a_stack():
    found = laid_out(lambda w, x: lax.scan(lambda c, m: (c @ m.T, None), x, w)[0], jnp.ones((5, 4, 4)), jnp.ones(4))
    origin = found.provenance.origin(found.node(prims.dot_general_p).inputs[1])
    assert origin.recipe.steps[0] == Stack(5)
    (ref,) = origin.refs
    assert isinstance(ref, ScanSlice)
    assert ref.scope is found.graph.scopes[1]


def test_an_index_takes_one_matrix_of_a_stack():
    found = laid_out(lambda w, i, x: x @ lax.dynamic_index_in_dim(w, i, 0, keepdims=False), W, 1, jnp.ones(3))
    origin = found.product.origin
    (ref,) = origin.refs
    assert isinstance(ref, IndexSlice)
    np.testing.assert_array_equal(origin.recipe.one(W, [1]), W[1])


def test_a_carry_that_stays_a_weight_is_one_and_one_that_turns_into_data_is_not():
    def loop(step):
        return laid_out(lambda w, x: lax.fori_loop(0, 3, step, (w, x)), W[0], jnp.ones(4))

    kept = loop(lambda i, c: (c[0] * 0.5, c[1]))
    assert kept.provenance.derived(kept.output) is not None
    mixed = loop(lambda i, c: (c[0] + c[1], c[1]))
    assert mixed.provenance.derived(mixed.output) is None


def test_bytes_read_count_each_part_once_and_loops_as_often_as_they_run():
    found = laid_out(
        lambda w, x: lax.scan(lambda c, m: (c @ m + c @ m, None), x, w)[0], jnp.ones((5, 4, 4)), jnp.ones(4)
    )
    read = found.provenance.read_by(node.inputs[1] for node in found.nodes(prims.dot_general_p))
    assert list(read.values()) == [5 * 16 * 4]
