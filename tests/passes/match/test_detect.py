"""What becomes of a product's output, which products make a match, and what is said of a match."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from laid_out import laid_out

from hire_xform.passes.match.derivatives import derivative_of
from hire_xform.passes.match.detect import detect
from hire_xform.passes.match.equations import equations_between
from hire_xform.passes.match.matches import FfnMatch, VocabMatch
from hire_xform.passes.match.output_axis import follow

HEAD, X = jnp.ones((4, 16)), jnp.ones((3, 4))

# What reads logits, the events of their axis in order, and whether it stays whole.
FATES = {
    "returned": (lambda y: y, ["returned"], True),
    "transposed": (lambda y: y.T, ["returned"], True),
    "exp": (lambda y: jnp.exp(y), ["returned"], True),
    "largest": (lambda y: y.max(-1), ["reduced"], True),
    "arg max": (lambda y: jnp.argmax(y, -1), ["reduced"], True),
    "largest of all tokens": (lambda y: y.max(0), ["returned"], True),
    "reversed": (lambda y: y[:, ::-1], ["moved", "returned"], True),
    "one entry": (lambda y: y[:, 3], ["gathered"], True),
    "stored": (lambda y: jnp.zeros((9, 16)).at[jnp.arange(3)].set(y), ["stored", "returned"], True),
    "contracted": (lambda y: y @ jnp.ones((16, 2)), ["contracted"], True),
    "cut in two axes": (lambda y: y.reshape(3, 4, 4), ["returned"], False),
}


@pytest.mark.parametrize("name", FATES)
def test_what_becomes_of_an_axis(name):
    read, events, intact = FATES[name]
    found = laid_out(lambda w, x: read(x @ w), HEAD, X)
    (product, *_) = found.found[0]
    fate = follow(product, narrow=False)
    kinds = [kind for kind, _ in fate.events]
    assert kinds == [kind for kind in events if kind in kinds]
    assert set(events) <= set(kinds)
    assert fate.intact is intact
    assert fate.axes[product.out] == frozenset({1})
    assert (fate.first("returned") is not None) is ("returned" in events)


def block(act):
    return lambda w, x: act(x @ w["up"]) @ w["down"]


UP, DOWN = jnp.ones((4, 32)), jnp.ones((32, 4))
BLOCK = {"up": UP, "down": DOWN}
GATED = {**BLOCK, "gate": UP}

# A program and its weights; the kinds of match in it, and words of the reason of each rejection.
PROGRAMS = {
    "block": (block(jax.nn.relu), BLOCK, [FfnMatch], []),
    "gated block": (lambda w, x: (jax.nn.relu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], GATED, [FfnMatch], []),
    "softmax between": (block(jax.nn.softmax), BLOCK, [], ["", ""]),
    "head": (lambda w, x: x @ w, HEAD, [VocabMatch], []),
    "arg max": (lambda w, x: jnp.argmax(x @ w, -1), HEAD, [VocabMatch], []),
    "narrow": (lambda w, x: x @ w, jnp.ones((4, 4)), [], ["too narrow for a vocabulary"]),
    "two weights": (lambda w, x: (w @ w.T).sum() + x, HEAD, [], ["both operands are weights"]),
    "two heads that meet": (
        lambda w, x: x @ w["up"] + x @ w["gate"],
        GATED,
        [VocabMatch],
        ["its output meets that of"],
    ),
}


def detected(fun, weights):
    found = laid_out(fun, weights, X)
    return detect(found.graph, found.provenance)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_product_is_in_one_match_or_one_rejection(name):
    fun, weights, kinds, reasons = PROGRAMS[name]
    found = detected(fun, weights)
    assert [type(match) for match in found.matches] == kinds
    assert len(found.rejections) == len(reasons)
    for rejection, words in zip(found.rejections, reasons, strict=True):
        assert rejection.reason
        assert words in rejection.reason
    matched = [product for match in found.matches for product in match.products]
    rejected = [r.product for r in found.rejections if r.product is not None]
    assert len({*matched, *rejected}) == len(matched) + len(rejected) == len(found.products)


def biased(w, x):
    return jax.nn.relu(x @ w["up"] + w["bias"]) @ w["down"]


def stepped(w, x):
    hidden = lax.scan(lambda c, _: (jnp.sin(c), None), x @ w["up"], None, length=2)[0]
    return jax.nn.relu(hidden) @ w["down"]


def test_the_equations_between_a_blocks_products_in_order():
    (match,) = detected(block(lambda h: jax.nn.relu(h * 2.0)), BLOCK).matches
    names = [str(node.primitive) for node in equations_between(match)]
    assert names[0] == "mul"
    assert names[-1] == "max"
    (match,) = detected(biased, {**BLOCK, "bias": jnp.ones(32)}).matches
    assert "add" in [str(node.primitive) for node in equations_between(match)]
    assert not detected(stepped, BLOCK).matches


@jax.custom_jvp
def custom(h):
    return jnp.maximum(h, 0.0)


custom.defjvp(lambda h, t: (custom(h[0]), t[0]))


def test_which_derivative_a_site_has():
    def told(fun):
        (match,) = detected(fun, BLOCK).matches
        return derivative_of(match)

    assert told(block(jax.nn.relu)) == ""
    assert told(block(lambda h: jnp.maximum(h, 0.0))) == ""
    assert told(block(custom)).startswith("that of the body of the custom_jvp")
    around = jax.custom_jvp(block(jax.nn.relu))
    around.defjvp(lambda primals, tangents: (around(*primals), primals[1]))
    assert "around it states" in told(around)
