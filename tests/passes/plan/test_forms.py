"""Packed forms: what each is made of, how many bytes it says it has, and what it is equal to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_xform as hx
from hire_xform.passes.pack.packers import packer
from hire_xform.passes.plan.forms import (
    ROWS,
    Inputs,
    LargestNorm,
    Leaf,
    Moments,
    Norms,
    Order,
    PackedPredictor,
    Rows,
    UnitOrder,
)
from hire_xform.passes.plan.levels import Levels
from hire_xform.passes.plan.slots import ProductForms, SiteForms
from hire_xform.passes.weights.recipe import Stack

L, N, D = 2, 12, 8
ROW = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), jnp.float32)
LEAF = jnp.asarray(np.random.default_rng(1).normal(size=(L, N, D)), jnp.float32)
ORDER = np.stack([np.random.default_rng(layer).permutation(N) for layer in range(L)]).astype(np.int32)
COVARIANCE = np.stack([np.eye(D), np.diag(np.arange(1.0, D + 1))]).astype(np.float32)
PREDICTORS = [hx.Quantized(8), hx.Quantized(4), hx.LowRank(3, bits=8)]


def held(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("proves", [False, True])
@pytest.mark.parametrize("spec", PREDICTORS, ids=str)
def test_a_predictor_says_its_shapes_and_bytes(spec, proves):
    form = PackedPredictor(spec, proves)
    made = form.pack(ROW)
    told = form.shapes(N, D, ROW.dtype)
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {k: (v.shape, v.dtype) for k, v in told.items()}
    assert form.nbytes(N, D, ROW.dtype) == held(made)


@pytest.mark.parametrize("form", [Norms(), Moments(), Moments(bounded=True)], ids=str)
def test_what_is_read_at_every_call_is_counted(form):
    assert form.nbytes(N, D, ROW.dtype) == held(form.pack(ROW))


@pytest.mark.parametrize("form", [ROWS, LargestNorm(), Leaf()], ids=str)
def test_rows_and_single_numbers_are_not(form):
    assert form.nbytes(N, D, ROW.dtype) == 0


def packed(form):
    return packer((Stack(L),), form.bare)(LEAF, *(array for array, _ in form.given))


def same(made, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), made, expected)


@pytest.mark.parametrize("form", [Rows, LargestNorm, Norms, Moments], ids=lambda kind: kind.__name__)
def test_a_stack_is_packed_matrix_by_matrix_in_its_order(form):
    for order in (None, Order("o", ORDER)):
        made = packed(form(order=order))
        for layer in range(L):
            rows = LEAF[layer] if order is None else LEAF[layer][ORDER[layer]]
            same(jax.tree.map(lambda a, i=layer: a[i], made), form().pack(rows))


def test_a_predictor_is_of_the_rows_that_are_not_always_computed_and_of_their_own_inputs():
    form = PackedPredictor(hx.LowRank(2, bits=8), inputs=Inputs("c", COVARIANCE), static=4, order=Order("o", ORDER))
    made = packed(form)
    for layer in range(L):
        alone = PackedPredictor(hx.LowRank(2, bits=8), inputs=Inputs("c", COVARIANCE[layer]))
        one = alone.pack(LEAF[layer][ORDER[layer][4:]], COVARIANCE[layer])
        same(jax.tree.map(lambda a, i=layer: a[i].astype(jnp.float32), made), jax.tree.map(jnp.float32, one))


def test_one_packer_serves_all_inputs_and_orders():
    one = PackedPredictor(hx.Quantized(8), inputs=Inputs("a", COVARIANCE), order=Order("o", ORDER))
    other = PackedPredictor(hx.Quantized(8), inputs=Inputs("b", COVARIANCE), order=Order("p", ORDER[::-1]))
    assert one != other
    assert hash(one) != hash(other)
    assert packer((), one.bare) is packer((), other.bare)
    assert one == PackedPredictor(hx.Quantized(8), inputs=Inputs("a", None), order=Order("o"))


def test_what_is_of_no_rows():
    np.testing.assert_array_equal(packed(UnitOrder(Order("o", ORDER))), ORDER)
    np.testing.assert_array_equal(packed(Levels((4, 8), (1, 0), (2,))), [1, 0])
    assert packed(Leaf()).shape == LEAF.shape


def test_only_rows_as_they_lie_are_one_array_over_devices():
    assert ROWS.split
    others = [
        Rows(order=Order("o", ORDER)),
        Norms(),
        LargestNorm(),
        Moments(),
        Leaf(),
        PackedPredictor(hx.Quantized(8)),
    ]
    assert not any(form.split for form in others)


def test_slots_have_one_order():
    up = ProductForms("rows", predictor="predictor", largest="largest", norms="norms", moments="moments")
    site = SiteForms((up, ProductForms("rows2")), ProductForms("down", norms="n"), "order", "level", ("leaf",))
    expected = ["rows", "predictor", "largest", "norms", "moments", "rows2", "down", "n", "order", "level", "leaf"]
    assert jax.tree.leaves(site) == expected
    assert [one for product in site.products for one in product] == expected[:-3]
