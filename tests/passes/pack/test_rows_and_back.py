"""Rows are packed as recipes say, announced before they are there, and give the leaf back where nothing is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives as prims
from laid_out import laid_out

from hire_xform.passes.pack.make import pack_array, pack_shapes, packing_bytes, unpack_rows
from hire_xform.passes.plan.decisions import PackKey
from hire_xform.passes.plan.forms import ROWS, Norms
from hire_xform.passes.rewrite.cyclic_lookups import CyclicLookup
from hire_xform.passes.weights.lookups import Lookup
from hire_xform.passes.weights.recipe import Convert, Cyclic, Recipe, Reshape, Root, Stack, Transpose

LEAF = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6)), jnp.float32)
STEPS = {
    "as it is": (Stack(2),),
    "transposed": (Stack(2), Transpose((1, 0))),
    "an axis in front": (Transpose((2, 0, 1)), Stack(6), Transpose((1, 0))),
    "merged": (Reshape((8, 6)),),
    "split": (Stack(2), Reshape((12, 2))),
    "cyclic": (Stack(2), Cyclic(2)),
    "transposed and cyclic": (Stack(2), Transpose((1, 0)), Cyclic(3)),
}


def key_of(name, form=ROWS):
    return PackKey(Recipe(Root.of(0, 0), STEPS[name]), form)


@pytest.mark.parametrize("name", STEPS)
def test_rows_there_and_back(name):
    key = key_of(name)
    rows = pack_array(key, LEAF)
    np.testing.assert_array_equal(rows, key.recipe.apply(LEAF))
    assert jax.tree.map(lambda s: (s.shape, s.dtype), pack_shapes(key, LEAF)) == (rows.shape, rows.dtype)
    np.testing.assert_array_equal(unpack_rows(key, LEAF.shape, rows, None), LEAF)


@pytest.mark.parametrize("name", STEPS)
def test_norms_are_those_of_the_rows_made_of_the_leaf_or_of_rows_that_are_there(name):
    key = key_of(name, Norms())
    rows = pack_array(key_of(name), LEAF)
    norms = pack_array(key, LEAF)
    np.testing.assert_allclose(norms, jnp.linalg.norm(rows, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(pack_array(key, LEAF, rows=rows), norms)


def test_what_is_rounded_can_not_be_undone():
    key = PackKey(Recipe(Root.of(0, 0), (Convert(jnp.bfloat16),)), ROWS)
    with pytest.raises(AssertionError, match="can't be undone"):
        unpack_rows(key, LEAF.shape, LEAF, None)


def test_a_key_anywhere_and_the_bytes_that_packing_reads():
    key = key_of("merged")
    assert key.anywhere == PackKey(Recipe(Root("", 0), key.recipe.steps), ROWS)
    assert packing_bytes([key, key_of("split", Norms())], lambda root: LEAF) == 2 * LEAF.nbytes


LOOKUPS = {
    "indexed": lambda w, i: w[i],
    "clipped": lambda w, i: w.at[i].get(mode="clip"),
    "filled": lambda w, i: w.at[i].get(mode="fill", fill_value=7.0),
    "one": lambda w, i: jax.lax.dynamic_slice(w, (i[0], 0), (1, 6)),
}


@pytest.mark.parametrize("ids", [[0, 5], [7, 2], [9, -9]], ids=str)
@pytest.mark.parametrize("name", LOOKUPS)
def test_rows_looked_up_in_cyclic_distribution_are_those_of_the_weight(name, ids):
    w, i = LEAF.reshape(8, 6), jnp.asarray(ids)
    fun = LOOKUPS[name]
    node = laid_out(fun, w, i).node(prims.gather_p, prims.dynamic_slice_p)
    if name in ("indexed", "one"):  # what negative indices mean in Python is computed before
        i = jnp.where(i < 0, i + 8, i)
    operands = [i[:, None]] if node.primitive is prims.gather_p else [i[0], jnp.int32(0)]
    got = CyclicLookup(Lookup(node, None), None, 2).found(Cyclic(2).apply(w), operands)
    np.testing.assert_array_equal(got, fun(w, jnp.asarray(ids)))
