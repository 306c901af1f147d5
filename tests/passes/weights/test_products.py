"""Weight products in every order of their axes, and what only looks like one, with its reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.lax import Precision
from laid_out import laid_out

from hire_xform.passes.weights.cut_weights import is_cut, parts_of_rows
from hire_xform.passes.weights.lookups import find_lookups
from hire_xform.passes.weights.origins import ScanSlice, ShardSlice
from hire_xform.passes.weights.products import normal_form, precision_asked, rounding_free, widened_at_once
from hire_xform.passes.weights.recipe import Convert, Recipe, Reshape, Root, Slice, Stack, Transpose

RNG = np.random.default_rng(0)


def array(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


# einsum of the activation and the weight; shapes; tokens, contracted, width.
SPELLINGS = {
    "td,dm->tm": ((3, 4), (4, 5), (3, 4, 5)),
    "td,md->tm": ((3, 4), (5, 4), (3, 4, 5)),
    "td,dm->mt": ((3, 4), (4, 5), (3, 4, 5)),
    "btd,dhk->bthk": ((2, 3, 4), (4, 5, 2), (6, 4, 10)),
    "thk,hkd->td": ((3, 5, 2), (5, 2, 4), (3, 10, 4)),
    "tkh,hdk->dt": ((3, 2, 5), (5, 4, 2), (3, 10, 4)),
    "d,dm->m": ((4,), (4, 5), (1, 4, 5)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rows_of_any_spelling_give_the_product(spelling):
    x_shape, w_shape, sizes = SPELLINGS[spelling]
    x, w = array(*x_shape), array(*w_shape)
    product = laid_out(lambda w, x: jnp.einsum(spelling, x, w), w, x).product
    assert (product.tokens, product.contracted, product.width) == sizes
    assert product.nbytes == w.nbytes
    assert not product.w_batch
    flat = jnp.transpose(x, (*product.x_free, *product.x_contract)).reshape(product.tokens, product.contracted)
    node = product.node
    want = lax.dot_general(*((w, x) if product.weight_left else (x, w)), node.params["dimension_numbers"])
    want = jnp.transpose(want, (*product.out_x_dims, *product.out_w_dims)).reshape(product.tokens, product.width)
    np.testing.assert_allclose(flat @ product.rows_free().apply(w).T, want, rtol=1e-5)
    np.testing.assert_allclose(flat @ product.rows_contracted().apply(w), want, rtol=1e-5)


def test_a_weight_with_a_batch_dimension_is_said_to_have_one():
    assert laid_out(lambda w, x: jnp.einsum("etd,edm->etm", x, w), array(2, 4, 5), array(2, 3, 4)).product.w_batch == (
        0,
    )


# What is no product with a weight, and the words that say why; None where it is not about weights at all.
LOOSE = {
    "of two weights": (lambda w, x: w @ w.T, "both operands are weights"),
    "computed": (lambda w, x: (w * 2.0) @ x, "computed inside the program, by mul"),
    "not used": (lambda w, x: (w @ x, x)[1], "its output is not used"),
    "summed": (lambda w, x: (w * x).sum(1), "a product spelled as a sum of products"),
    "convolved": (lambda w, x: lax.conv(x[None, None], w[:, None, :3], (1,), "VALID"), "a convolution"),
    "tested": (
        lambda w, x: lax.while_loop(lambda c: (w @ c).sum() > 0, lambda c: c - 1, x),
        "the condition of a while is not entered",
    ),
    "data": (lambda w, x: jnp.outer(x, x) @ x, None),
}


@pytest.mark.parametrize("name", LOOSE)
def test_what_only_looks_like_a_product_says_why_it_is_none(name):
    fun, words = LOOSE[name]
    products, loose = laid_out(fun, array(4, 4), array(4)).found
    assert not [p for p in products if p.origin.recipe.root.kind != "const"]
    assert len(loose) == (words is not None)
    for one in loose:
        assert words in one.reason
        assert sum(one.read.values()) == {"not used": 0, "of two weights": 128, "convolved": 48}.get(name, 64)


def test_a_closed_over_array_is_the_weight_beside_an_argument():
    const = array(4, 5)
    product = laid_out(lambda x: x @ const, array(3, 4)).product
    assert product.origin.recipe.root.kind == "const"


# Steps, and the same in normal form.
NORMAL = {
    "two transposes": ((Transpose((1, 2, 0)), Transpose((2, 0, 1))), ()),
    "fused": ((Transpose((1, 0, 2)), Transpose((0, 2, 1))), (Transpose((1, 2, 0)),)),
    "reshapes": ((Reshape((6,)), Reshape((2, 3))), (Reshape((2, 3)),)),
    "apart": ((Reshape((6, 2)), Transpose((1, 0)), Reshape((12,))),) * 2,
}


@pytest.mark.parametrize("name", NORMAL)
def test_equal_steps_have_one_normal_form(name):
    before, after = (Recipe(Root.of(0, 0), steps) for steps in NORMAL[name])
    assert normal_form(before) == after


def test_what_is_cut_or_converted_does_not_give_the_leaf_back():
    root = Recipe(Root.of(0, 0))
    assert rounding_free(root.then(Transpose((1, 0)), Reshape((6,))))
    assert not rounding_free(root.then(Slice((0,), (2,), (1,))))
    assert not rounding_free(root.then(Convert(jnp.bfloat16)))


# A bfloat16 product, what reads it, and whether XLA leaves its rounding out.
WIDENED = {
    "widened": (lambda y: y.astype(jnp.float32), True),
    "twice": (lambda y: y.astype(jnp.float32) + jnp.exp(y.astype(jnp.float32)), True),
    "read as it is too": (lambda y: (y.astype(jnp.float32), jnp.exp(y)), False),
    "returned": (lambda y: y, False),
    "returned too": (lambda y: (y.astype(jnp.float32), y), False),
    "narrowed": (lambda y: y.astype(jnp.float16), False),
}


@pytest.mark.parametrize("name", WIDENED)
def test_a_result_that_all_readers_widen_is_not_rounded(name):
    read, unrounded = WIDENED[name]
    w, x = array(4, 5, dtype=jnp.bfloat16), array(3, 4, dtype=jnp.bfloat16)
    product = laid_out(lambda w, x: read(x @ w), w, x).product
    assert product.unrounded is unrounded
    assert widened_at_once(product) == (jnp.float32 if unrounded else jnp.bfloat16)
    assert not laid_out(lambda w, x: read(x @ w), w, x[None]).product.unrounded  # of three axes it is rounded


def test_the_highest_precision_that_is_named_is_asked_for():
    def of(*precisions):
        def fun(w, x):
            return [jnp.dot(x, w, precision=p) for p in precisions]

        return precision_asked(laid_out(fun, array(4, 5), array(3, 4)).found[0])

    assert of(None) is None
    assert of(None, Precision.HIGH) == "high"
    assert of(Precision.HIGH, Precision.HIGHEST) == "highest"


# What takes rows of a weight, and whether it takes whole ones by id.
LOOKUPS = {
    "indexed": (lambda w, i: w[i], 1),
    "one": (lambda w, i: lax.dynamic_index_in_dim(w, i[0], 0), 1),
    "taken": (lambda w, i: jnp.take(w, i, axis=0), 1),
    "columns": (lambda w, i: w[:, i], 0),
    "part of a row": (lambda w, i: lax.dynamic_slice(w, (i[0], 0), (1, 2)), 0),
    "of data": (lambda w, i: (w + i[0])[i], 0),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_take_whole_rows_of_a_weight(name):
    fun, count = LOOKUPS[name]
    found = laid_out(fun, array(6, 4), jnp.arange(2))
    assert len(find_lookups(found.graph, found.provenance)) == count


# Steps that make a matrix of one device's part; the part's shape; the dimension cut in two; devices along the rows.
CUT = {
    "rows": ((), (4, 3), 0, 2),
    "columns": ((), (4, 3), 1, 1),
    "columns transposed": ((Transpose((1, 0)),), (4, 3), 1, 2),
    "rows transposed": ((Transpose((1, 0)),), (4, 3), 0, 1),
    "a leading axis merged": ((Reshape((12, 5)),), (4, 3, 5), 0, 2),
    "an inner axis merged": ((Reshape((12, 5)),), (4, 3, 5), 1, 2),
    "a trailing axis kept": ((Reshape((12, 5)),), (4, 3, 5), 2, 1),
}


@pytest.mark.parametrize("name", CUT)
def test_over_how_many_devices_rows_are_cut(name):
    steps, shape, dim, parts = CUT[name]
    scope = object()
    ref = ShardSlice(scope=scope, dim=dim, parts=2, shape=shape, axes=("model",))
    recipe = Recipe(Root.of(0, 0), (Stack(2), *steps))
    assert is_cut((ref,))
    assert parts_of_rows(recipe, (ref,)) == parts
    assert not is_cut((ScanSlice(scope),))
    assert parts_of_rows(recipe, (ScanSlice(scope),)) == 1


def test_what_jit_computes_is_laid_out_like_what_it_does_not():
    w, x = array(4, 5), array(3, 4)
    plain, jitted = (laid_out(f, w, x).product for f in (lambda w, x: x @ w, jax.jit(lambda w, x: x @ w)))
    assert plain.rows_free() == jitted.rows_free()
