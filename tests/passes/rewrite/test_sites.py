"""What is emitted in the place of a site: its subgraph, its dense product of packed rows, its own equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planned import W, X, block, planned, views

from hire_xform.passes.rewrite.action import Context
from hire_xform.passes.rewrite.actions import DenseRows
from hire_xform.passes.rewrite.environment import PackedView
from hire_xform.passes.rewrite.own_equations import own_block, own_product
from hire_xform.passes.rewrite.site import RewrittenSite, site_key


def test_sites_that_are_rewritten_alike_have_one_key_and_one_function():
    found, plan = planned()
    one, other, head = plan.decisions
    assert site_key(one) == site_key(other) != site_key(head)
    assert hash(site_key(one)) == hash(site_key(other))
    functions, args = {}, [*jax.tree.leaves(W), X]
    for decision in plan.decisions:
        action = RewrittenSite(decision)
        assert action.node is decision.node
        given = {v: found.value(v, args) for v in action.operands}
        known = views(decision, args)
        (value,) = action.emit(Context(given, known.__getitem__, functions))
        assert value.shape == decision.node.outputs[0].shape
    assert len(functions) == 2


def test_a_dense_product_of_packed_rows():
    found, plan = planned()
    args = [*jax.tree.leaves(W), X]
    decision = plan.decisions[-1]
    action = DenseRows(decision.match.last, decision.forms.head.rows, False)
    given = {v: found.value(v, args) for v in action.operands}
    (value,) = action.emit(Context(given, views(decision, args).__getitem__, {}))
    np.testing.assert_allclose(value, found.value(decision.node.outputs[0], args), rtol=1e-5)
    assert action.key == DenseRows(decision.match.last, decision.forms.head.rows, False).key
    assert action.key != DenseRows(decision.match.last, decision.forms.head.rows, True).key


@pytest.mark.parametrize("examples", [1, 3])
def test_a_sites_own_equations_again(examples):
    """Of one example the same bits; several that were put together are batched, which may add up in another order."""
    _, plan = planned()
    args = [*jax.tree.leaves(W), X]
    decision = plan.decisions[0]
    match, x = decision.match, jnp.concatenate([X * (1 + i) for i in range(examples)])
    leaves = [PackedView(args[p.origin.recipe.root.index], recipe=p.origin.recipe) for p in match.products]
    got = own_block(match, [x for _ in match.region.ups], [], leaves)
    want = jnp.concatenate([block(W, X * (1 + i)) for i in range(examples)])
    limit = 0 if examples == 1 else 1e-5
    np.testing.assert_allclose(got, want, rtol=limit, atol=limit)
    (up, _), (leaf, _) = match.products, leaves
    np.testing.assert_array_equal(
        own_product(up, x, leaf), jnp.concatenate([(X * (1 + i)) @ W["up"] for i in range(examples)])
    )
