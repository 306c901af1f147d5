"""Which products into hidden units are low-rank updates of others."""

import jax
import jax.numpy as jnp
import pytest
from laid_out import laid_out

from hire_xform.passes.match.detect import detect
from hire_xform.passes.match.updates import low_rank_updates

D, M, R = 16, 48, 4
W = {"w": jnp.ones((D, M)), "a": jnp.ones((D, R)), "b": jnp.ones((R, M)), "wide": jnp.ones((D, 8))}
W |= {"c": jnp.ones((8, M)), "down": jnp.ones((M, D))}
X = jnp.ones((1, D))

UPDATES = {
    "plain": (lambda w, x: x @ w["w"] + (x @ w["a"]) @ w["b"], ["dot_general[2]"]),
    "scaled and cast": (
        lambda w, x: x @ w["w"] + 2 * ((0.5 * (x @ w["a"])).astype(jnp.float32) @ w["b"]),
        ["dot_general[2]"],
    ),
    "of no low rank": (lambda w, x: x @ w["w"] + (x @ w["wide"]) @ w["c"], []),
    "of data": (lambda w, x: x @ w["w"] + x[:, :R] @ w["b"], []),
    "of nothing else": (lambda w, x: (x @ w["a"]) @ w["b"], []),
}


@pytest.mark.parametrize("name", UPDATES)
def test_second_factors_of_a_low_rank_are_updates(name):
    fun, want = UPDATES[name]
    found = laid_out(lambda w, x: jax.nn.relu(fun(w, x)) @ w["down"], W, X)
    detection = detect(found.graph, found.provenance)
    (match,) = detection.matches
    assert [product.path for product in match.region.updates] == want
    # They are no products of the block: found once, none is left.
    assert low_rank_updates(match.region, {p.node: p for p in detection.products}) == ()
