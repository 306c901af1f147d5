"""An output axis followed forwards, where equations keep several axes apart."""

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.passes.ir.graph import walk
from hire_xform.passes.match.output_axis import follow
from hire_xform.passes.weights.products import find_products
from hire_xform.passes.weights.provenance import Provenance
from hire_xform.passes.weights.recipe import Root

D, V, T = 4, 16, 3
IDS = jnp.zeros((T, 2), jnp.int32)


def fate_of(fun, *weight_shape):
    """What becomes of the output axis of the one product of a function of weights and inputs; and its result."""
    graph = walk(jax.make_jaxpr(fun)(jnp.ones(weight_shape), jnp.ones((T, D))))
    ((product,), _) = find_products(graph, Provenance(graph, [Root("arg0", 0), None]))
    return follow(product, narrow=False), graph.top.outputs[0]


def test_entries_picked_for_each_token_lie_beside_the_tokens():
    fate, picked = fate_of(lambda w, x: jnp.take_along_axis(x @ w, IDS, 1), D, V)
    assert fate.axes[picked] == {1}
    assert picked in fate.drawn


def test_tokens_picked_for_each_entry_leave_the_axis_where_it_is():
    ids = jnp.zeros((2, V), jnp.int32)
    fate, picked = fate_of(lambda w, x: jnp.take_along_axis(x @ w, ids, 0), D, V)
    assert fate.axes[picked] == {1}
    assert picked not in fate.drawn


def test_the_largest_of_each_codebook_are_not_those_of_all():
    for taken in (lambda u: lax.top_k(u, 2)[0], lambda u: jnp.argmax(u, -1)):
        fate, _ = fate_of(lambda w, x, taken=taken: taken(jnp.einsum("td,dkv->tkv", x, w)), D, 2, V)
        assert not fate.intact
