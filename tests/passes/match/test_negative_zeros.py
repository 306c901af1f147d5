"""Zeros that are replaced before an arg max: told by their equations, and nothing else is taken for them."""

import jax
import jax.numpy as jnp
import pytest

from hire_xform.passes.ir.graph import walk
from hire_xform.passes.match.negative_zeros import source_of_replaced_zeros

TINY = float(jnp.finfo(jnp.float32).tiny)

REPLACED = {
    "keras": lambda x: jnp.where((x == 0.0) & jnp.signbit(x), -TINY, x),
    "other order": lambda x: jnp.where((1 / x < 0) & (x == 0.0), TINY, x),
}
OTHERS = {
    "larger": lambda x: jnp.where((x == 0.0) & jnp.signbit(x), -1e-3, x),
    "not zero": lambda x: jnp.where((x == 1.0) & jnp.signbit(x), -TINY, x),
    "of another": lambda x: jnp.where((x[::-1] == 0.0) & jnp.signbit(x), -TINY, x),
    "either": lambda x: jnp.where((x == 0.0) | jnp.signbit(x), -TINY, x),
    "kept where it is zero": lambda x: jnp.where((x == 0.0) & jnp.signbit(x), x, -TINY),
}


def source_in(fun):
    graph = walk(jax.make_jaxpr(fun)(jnp.ones(5)))
    last = graph.top.outputs[0]
    return source_of_replaced_zeros(last.node), graph.top.inputs[0]


@pytest.mark.parametrize("name", REPLACED)
def test_entries_come_from_what_is_kept(name):
    found, given = source_in(REPLACED[name])
    assert found is given


@pytest.mark.parametrize("name", OTHERS)
def test_what_replaces_more_than_zeros_is_none(name):
    assert source_in(OTHERS[name])[0] is None
