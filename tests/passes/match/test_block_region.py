"""Regions of blocks: replayed on all units or on some, they make what the program contracts of these units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from laid_out import laid_out

from hire_xform.passes.ir.axes import Atom, to_canonical, whole
from hire_xform.passes.match import kinds
from hire_xform.passes.match.block_region import trace_region
from hire_xform.passes.match.ends import end_of, ends_before_products, outlives
from hire_xform.passes.match.ffn import ffn_ending_in
from hire_xform.passes.match.matches import FfnMatch
from hire_xform.passes.match.own_choice import OfAll
from hire_xform.passes.match.probe import Probe
from hire_xform.passes.match.region import Unfollowed, replay
from hire_xform.passes.match.vocab import Nearly
from hire_xform.passes.rewrite.canonical import canonical_activation

D, M, T = 4, 12, 3
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


W = {
    "up": normal(D, M),
    "gate": normal(D, M),
    "both": normal(D, 2 * M),
    "heads": normal(D, 3, 4),
    "bias": normal(M),
    "down": normal(M, D),
    "down_heads": normal(3, 4, D),
    "down_turned": normal(D, M),
}
X = normal(T, D)


def relu(v):
    return jnp.maximum(v, 0.0)


def over_threshold(v):
    return relu(v - (v.mean(-1, keepdims=True) + 0.5 * v.std(-1, keepdims=True)))


def largest(v):
    least = lax.top_k(v, 3)[0][..., -1:]
    return jnp.where(v >= least, v, 0.0)


# Programs, and the activation, as the region has it.
BLOCKS = {
    "relu": (lambda w, x: relu(x @ w["up"]) @ w["down"], "max"),
    "a call": (lambda w, x: jax.nn.gelu(x @ w["up"]) @ w["down"], None),
    "a bias and a scale": (lambda w, x: relu((x @ w["up"] + w["bias"]) * 0.5) @ w["down"], "add, mul, max"),
    "a gate": (lambda w, x: (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], "logistic, mul"),
    "one weight for both": (
        lambda w, x: (lambda h: relu(h[:, :M]) * h[:, M:])(x @ w["both"]) @ w["down"],
        "max, mul",
    ),
    "one weight for both in turns": (
        lambda w, x: (lambda h: relu(h[:, ::2]) * h[:, 1::2])(x @ w["both"]) @ w["down"],
        "max, mul",
    ),
    "weights on the left": (lambda w, x: w["down"].T @ relu(w["up"].T @ x.T), "max"),
    "units in two axes": (
        lambda w, x: jnp.einsum("thk,hkd->td", relu(jnp.einsum("td,dhk->thk", x, w["heads"])), w["down_heads"]),
        "max",
    ),
    "units in two axes, turned": (
        lambda w, x: jnp.swapaxes(relu(x @ w["up"]).reshape(T, 3, 4), 1, 2).reshape(T, M) @ w["down"],
        "max",
    ),
    "scaled by each token": (lambda w, x: (relu(x @ w["up"]) * x.sum(-1, keepdims=True)) @ w["down"], "max, mul"),
    "a mask of tokens and units": (
        lambda w, x: jnp.where(x[:, :1] * w["bias"] > 0, relu(x @ w["up"]), 0.0) @ w["down"],
        "max, select_n",
    ),
    "over mean and deviation": (lambda w, x: over_threshold(x @ w["up"]) @ w["down"], None),
    "the three largest": (lambda w, x: largest(x @ w["up"]) @ w["down"], None),
    "a third product beside": (lambda w, x: (relu(x @ w["up"] + x @ w["gate"])) @ w["down"], "add, max"),
}


def ending(fun, weights=W, x=X):
    """What the last weight product of a program ends."""
    found = laid_out(fun, weights, x)
    products = found.found[0]
    return found, ffn_ending_in(products[-1], {p.node: p for p in products}, set(), Probe())


def given(found, match, args):
    """The products and side inputs of a block, canonical."""
    leaves = dict(zip(found.graph.top.inputs, args, strict=True))
    hiddens, sides = [], []
    for up, matrix in zip(match.region.ups, match.matrices, strict=False):
        x = canonical_activation(up.product, found.value(up.product.x, args), up.layout, match.tokens)
        root = list(leaves.values())[matrix.rows.root.index]
        hiddens.append(x @ matrix.rows.apply(root).T)
    for side in match.region.sides:
        value = jnp.asarray(found.value(side.value, args))
        sides.append(value if value.ndim == 0 else to_canonical(value, side.layout, match.tokens, match.units))
    return hiddens, sides


@pytest.mark.parametrize("name", BLOCKS)
def test_a_region_makes_what_is_contracted(name):
    fun, activation = BLOCKS[name]
    found, match = ending(fun)
    assert isinstance(match, FfnMatch), match
    assert (match.tokens, match.units) == (T, M)
    assert activation is None or match.region.activation == activation
    args = [*jax.tree.leaves(W), X]
    hiddens, sides = given(found, match, args)
    want = to_canonical(jnp.asarray(found.value(match.hidden, args)), match.layout, T, M)
    got = replay(match.region, hiddens, sides, lambda v: v, jax.nn.relu, OfAll())
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    # The rows that contract the units, in the same order.
    down = match.matrices[-1]
    rows = down.rows.apply(args[down.rows.root.index])
    np.testing.assert_allclose(jnp.sort(jnp.ravel(want @ rows)), jnp.sort(jnp.ravel(fun(W, X))), rtol=1e-4, atol=1e-5)
    if match.region.own is not None:
        return
    chosen = jnp.asarray([7, 0, 11])
    few = [h[:, chosen] for h in hiddens]
    got = replay(match.region, few, sides, lambda v: v[:, chosen], jax.nn.relu, OfAll())
    np.testing.assert_allclose(got, want[:, chosen], rtol=1e-4, atol=1e-5)


def test_a_region_is_of_the_units_that_its_layout_names():
    found = laid_out(BLOCKS["relu"][0], W, X)
    up, down = found.found[0]
    by_node = {p.node: p for p in (up, down)}
    tokens, units = whole([Atom("t", 1, T)], T), whole([Atom("h", 1, M)], M)
    region = trace_region(down, (tokens, units), by_node, Probe())
    assert [one.product for one in region.ups] == [up]
    assert region.varies == [True, False, True]
    assert region.nodes == {up.node, down.x.node}
    assert region.inner == {up.out, down.x}
    assert trace_region(down, (tokens, units), {}, Probe()).reason.startswith(
        "what it contracts is made by what is not"
    )
    # As tokens the units are none.
    assert isinstance(trace_region(down, (units, tokens), by_node, Probe()), Unfollowed)


def test_which_zeros_a_region_leaves():
    assert ending(BLOCKS["relu"][0])[1].region.zeroing
    assert ending(BLOCKS["a mask of tokens and units"][0])[1].region.zeroing
    for name in ("a call", "a gate"):
        assert not ending(BLOCKS[name][0])[1].region.zeroing
    own = ending(BLOCKS["the three largest"][0])[1].region.own
    assert (own.name, own.share) == ("top 3", 3 / M)
    own = ending(BLOCKS["over mean and deviation"][0])[1].region.own
    assert own.name == "units above mean + 0.50 deviations"


def test_which_products_have_to_be_scored():
    assert ending(BLOCKS["a gate"][0])[1].region.scored == [True, True]
    gated = ending(lambda w, x: (over_threshold(x @ w["gate"]) * (x @ w["up"])) @ w["down"])[1].region
    assert sorted(gated.scored) == [False, True]
    assert gated.scored == gated.totalled


def test_regions_that_compute_the_same_have_one_signature():
    one, other = (ending(BLOCKS["a bias and a scale"][0])[1].region for _ in range(2))
    assert one.signature() == other.signature()
    third = ending(lambda w, x: relu((x @ w["up"] + w["bias"]) * 0.25) @ w["down"])[1].region
    assert one.signature() != third.signature()


# What is nearly a block, or none, and why.
NONE = {
    "a softmax": (lambda w, x: jax.nn.softmax(x @ w["up"]) @ w["down"], Nearly, "also read by reduce_max"),
    "returned": (lambda w, x: (lambda h: (h @ w["down"], h))(relu(x @ w["up"])), Nearly, "is also returned"),
    "read elsewhere": (
        lambda w, x: (lambda h: h @ w["down"] + jnp.sin(h).sum())(relu(x @ w["up"])),
        Nearly,
        "what it contracts is also read by sin",
    ),
    "two factors": (
        lambda w, x: (x @ w["narrow"]) @ w["wide"],
        Nearly,
        "one matrix in two factors",
    ),
    "nothing before it": (lambda w, x: x @ w["up"], Unfollowed, "made of what enters the program"),
    "a cumulative sum": (
        lambda w, x: jnp.cumsum(x @ w["up"], -1) @ w["down"],
        Unfollowed,
        "made by what is not followed back to a product",
    ),
    "a batch of experts": (
        lambda w, x: jnp.einsum("etm,emd->etd", relu(jnp.einsum("td,edm->etm", x, w["ups"])), w["downs"]),
        Nearly,
        "its weight has a batch dimension",
    ),
    "a part of the units": (
        lambda w, x: relu(x @ w["up"])[:, :6] @ w["half"],
        FfnMatch,
        "",
    ),
    "split unevenly": (
        lambda w, x: relu(x @ w["up"]).reshape(T * 2, 6) @ w["half"],
        Unfollowed,
        "the units that it contracts are not those of the product that makes them",
    ),
    "mixed with tokens": (
        lambda w, x: relu(x @ w["up"]).T.reshape(T, M) @ w["down"],
        Unfollowed,
        "a reshape mixes the hidden axis with others",
    ),
}
MORE = {
    **W,
    "narrow": normal(D, 2),
    "wide": normal(2, D),
    "ups": normal(2, D, M),
    "downs": normal(2, M, D),
    "half": normal(6, D),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_none_says_why(name):
    fun, kind, words = NONE[name]
    _, found = ending(fun, MORE)
    assert isinstance(found, kind), found
    if kind is not FfnMatch:
        assert words in found.reason


def test_a_product_of_another_block_is_left():
    found = laid_out(BLOCKS["relu"][0], W, X)
    up, down = found.found[0]
    by_node = {p.node: p for p in (up, down)}
    assert ffn_ending_in(down, by_node, {down}, Probe()).reason == "it belongs to another block"
    taken = ffn_ending_in(down, by_node, {up}, Probe())
    assert isinstance(taken, Nearly)
    assert f"{up.path}, already belongs to another block" in taken.reason


def test_the_quick_look_says_what_the_long_one_would():
    found = laid_out(lambda w, x: jnp.sin(x) @ w["up"], W, X)
    product = found.product
    assert "enters the program" in ends_before_products(product, {product.node: product}).reason
    blocks = laid_out(BLOCKS["relu"][0], W, X)
    up, down = blocks.found[0]
    assert ends_before_products(down, {p.node: p for p in (up, down)}) is None
    assert end_of([up.out], down, {up.node: up}).reason.startswith("the units that it contracts are not those")
    # The stream that a block adds to is read after it.
    beside = laid_out(lambda w, x: (lambda h: h + (h @ w["up"]) @ w["down"])(jnp.sin(x)), W, X)
    first, second = beside.found[0]
    assert outlives(first.x, second)
    assert not outlives(first.x, first)
    assert not outlives(first.out, second)


def test_kinds_are_found_by_name_and_given_back():
    class Toy(kinds.SiteKind):
        name = "vocab"

    before = kinds.kind_named("vocab")
    remove = kinds.register_site_kind(Toy())
    assert isinstance(kinds.kind_named("vocab"), Toy)
    assert kinds.kind_named("vocab") in list(kinds.kinds())
    remove()
    assert kinds.kind_named("vocab") is before
    assert kinds.kind_of(ending(BLOCKS["relu"][0])[1]) is kinds.kind_named("ffn")
    with pytest.raises(NotImplementedError, match="sites of kind 'vocab' are not calibrated"):
        Toy().criterion(None, None)
    assert Toy().unproved(None, "cpu") == "certify=True is not for sites of this kind"
