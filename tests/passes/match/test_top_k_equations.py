"""Which equation is a top-k, what takes its smallest value, and what puts values where they came from."""

import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.core import primitives as prims
from laid_out import laid_out

from hire_xform.passes.match.top_k import placed, smallest_of, sorted_rank, top_k_of

X, K = jnp.arange(24.0).reshape(3, 8), 2
TOP = (prims.top_k_p, prims.approx_top_k_p)

# A program, and (k, axis) of its top-k; None where it is not one of whole rows.
TOP_KS = {
    "exact": (lambda x: lax.top_k(x, K), (2, 1)),
    "approximate": (lambda x: lax.approx_max_k(x, K), (2, 1)),
    "along the first axis": (lambda x: lax.approx_max_k(x, K, reduction_dimension=0), (2, 0)),
    "the smallest": (lambda x: lax.approx_min_k(x, K), None),
    "not put together": (lambda x: lax.approx_max_k(x, K, aggregate_to_topk=False), None),
    "of a part": (lambda x: lax.approx_max_k(x, K, reduction_input_size_override=64), None),
}


@pytest.mark.parametrize("name", TOP_KS)
def test_a_top_k_has_its_k_and_axis(name):
    fun, wanted = TOP_KS[name]
    node = laid_out(fun, X).node(*TOP)
    top = top_k_of(node)
    assert (None if top is None else (top.k, top.axis)) == wanted
    if top is not None:
        assert top.operand is node.inputs[0]


def test_other_equations_are_no_top_k():
    assert top_k_of(laid_out(jnp.sort, X).node(prims.sort_p)) is None


def test_ranks_in_a_sort_count_from_the_largest():
    node = laid_out(jnp.sort, X).node(prims.sort_p)
    assert [sorted_rank(node, position) for position in (0, 6, 7)] == [8, 2, 1]
    assert sorted_rank(laid_out(lambda x: jnp.sort(x, axis=0), X).node(prims.sort_p), 2) == 1
    both = laid_out(lambda x: lax.sort((x, -x), num_keys=1), X).node(prims.sort_p)
    assert sorted_rank(both, 0) is None


SMALLEST = {
    "of the values": (lambda x: lax.top_k(x, K)[0].min(-1), True),
    "kept as an axis": (lambda x: lax.top_k(x, K)[0].min(-1, keepdims=True), True),
    "of the indices": (lambda x: lax.top_k(x, K)[1].min(-1), False),
    "over tokens": (lambda x: lax.top_k(x, K)[0].min(0), False),
    "over all": (lambda x: lax.top_k(x, K)[0].min(), False),
    "of something else": (lambda x: jnp.exp(x).min(-1), False),
}


@pytest.mark.parametrize("name", SMALLEST)
def test_the_threshold_is_the_smallest_of_the_values(name):
    fun, found = SMALLEST[name]
    assert (smallest_of(laid_out(fun, X).node(prims.reduce_min_p)) is not None) is found


def scattered(write, values=lambda v: v, zeros=0.0):
    def fun(x):
        v, i = lax.top_k(x, K)
        rows = jnp.arange(len(x))[:, None]
        return getattr(jnp.full_like(x, zeros).at[rows, i], write)(values(v))

    return fun


def one_hot(x, sum_over=1):
    _, i = lax.top_k(x, K)
    return (i[..., None] == jnp.arange(x.shape[-1])).astype(x.dtype).sum(sum_over)


# What writes to where the largest stood; "values", the number that is written, or None for no such placement.
PLACED = {
    "values set": (scattered("set"), "values"),
    "values added": (scattered("add"), "values"),
    "ones": (scattered("set", lambda v: 1.0), 1.0),
    "onto ones": (scattered("set", zeros=1.0), None),
    "one-hot": (one_hot, 1.0),
    "one-hot summed over units": (lambda x: one_hot(x, 2), None),
}


@pytest.mark.parametrize("name", PLACED)
def test_values_are_placed_by_their_indices(name):
    fun, wanted = PLACED[name]
    found = laid_out(fun, X)
    writes = found.nodes(prims.scatter_p, prims.scatter_add_p, prims.reduce_sum_p)
    (got,) = [placed(node) for node in writes[-1:]]
    if wanted is None:
        assert got is None
        return
    assert got.top.k == K
    assert found.node(*TOP) in got.nodes
    assert (got.update is not None) is (wanted == "values")
    if wanted != "values":
        assert got.number == wanted
