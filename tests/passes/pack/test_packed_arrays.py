"""``Packed`` and its layout: what is held, by number and by key, as a pytree and as a static value."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.passes.pack.packed import Packed, PackedToken, PackLayout
from hire_xform.passes.plan.decisions import PackKey
from hire_xform.passes.plan.forms import ROWS, Norms
from hire_xform.passes.weights.recipe import Recipe, Root, Transpose

KEYS = tuple(PackKey(Recipe(Root.of(0, 1), (Transpose((1, 0)),)), form).anywhere for form in (ROWS, Norms()))
LAYOUT = PackLayout(
    treedef=jax.tree.structure({"a": 0, "b": 0}),
    avals=(jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((2, 4), jnp.float32)),
    static=((2, 1.5),),
    kept=(0,),
    keys=KEYS,
    restored=((1, 0),),
)
PACKED = Packed([jnp.arange(3.0)], [jnp.ones((4, 2)), {"norms": jnp.ones(4, jnp.bfloat16)}], LAYOUT)
CHANGES = {
    "treedef": jax.tree.structure([0, 0]),
    "avals": LAYOUT.avals[:1],
    "static": ((2, -1.5),),
    "kept": (0, 1),
    "keys": KEYS[:1],
    "restored": (),
    "placed": ("x",),
    "token_axes": ("data",),
}


def test_leaves_and_forms_are_found():
    np.testing.assert_array_equal(PACKED.leaf(0), jnp.arange(3.0))
    assert PACKED.leaf(1) is None
    assert PACKED.form(KEYS[0]).shape == (4, 2)
    elsewhere = replace(KEYS[1], recipe=replace(KEYS[1].recipe, root=Root.of(7, 1)))
    assert set(PACKED.form(elsewhere)) == {"norms"}
    other = replace(KEYS[1], recipe=replace(KEYS[1].recipe, root=Root.of(0, 2)))
    assert PACKED.form(other) is None
    assert [LAYOUT.number_of(key) for key in (*KEYS, other)] == [0, 1, None]


def test_its_bytes_and_its_text():
    assert PACKED.nbytes == 3 * 4 + 8 * 4 + 4 * 2
    assert repr(PACKED) == "Packed(1 plain leaves, 2 packed forms, 0.0 MB)"


def test_it_is_a_pytree():
    assert PACKED.leaves is PACKED.leaves
    assert [leaf.shape for leaf in PACKED.leaves] == [(3,), (4, 2), (4,)]
    twice = jax.tree.map(lambda leaf: leaf * 2, PACKED)
    assert isinstance(twice, Packed)
    assert twice.layout is LAYOUT
    np.testing.assert_array_equal(twice.form(KEYS[0]), 2 * jnp.ones((4, 2)))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(PACKED)]
    assert paths == ["['kept'][0]", "['forms'][0]", "['forms'][1]['norms']"]


@pytest.mark.parametrize("name", CHANGES)
def test_layouts_that_differ_in_anything_are_not_equal(name):
    changed = replace(LAYOUT, **{name: CHANGES[name]})
    assert changed != LAYOUT
    assert PackedToken(changed) != PackedToken(LAYOUT)


def test_layouts_that_say_the_same_are_equal():
    again = replace(LAYOUT)
    assert again == LAYOUT
    assert hash(again) == hash(LAYOUT)
    assert PackedToken(again) == PackedToken(LAYOUT)
    assert hash(PackedToken(again)) == hash(LAYOUT)
    assert LAYOUT != "a layout"
