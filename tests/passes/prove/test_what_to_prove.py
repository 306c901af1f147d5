"""What is to be proved of what reads logits, and why something can't be."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from laid_out import laid_out

from hire_xform.lowering.prove.intervals import Interval
from hire_xform.passes.match.detect import detect
from hire_xform.passes.plan.settings import Vocab
from hire_xform.passes.prove.chains import Chain, keeps_values, margin_of
from hire_xform.passes.prove.what_to_prove import NOTHING_READ, Reads, reads_of

V = 32
W, X = jnp.ones((4, V)), jnp.ones((2, 4))
BIAS = jnp.arange(V, dtype=jnp.float32)
PROVED, APPROXIMATE = Vocab(certify=True), Vocab(certify=False, candidates=4)
DROPPED = Vocab(certify=True, fill="-inf", candidates=4)


def read(fun, settings=PROVED, split=False):
    found = laid_out(lambda w, x: fun(x @ w), W, X)
    (match,) = detect(found.graph, found.provenance).matches
    return reads_of(match, settings, split)


# What a program reads; what is proved of it, and what is not.
READ = {
    "arg max": (lambda y: jnp.argmax(y, -1), ["the arg max (argmax"], []),
    "three largest": (lambda y: lax.top_k(y, 3), ["the 3 largest (top_k"], []),
    "both": (lambda y: (jnp.argmax(y, -1), lax.top_k(y, 3)), ["the arg max", "the 3 largest"], []),
    "with a bias": (lambda y: jnp.argmax(y + BIAS, -1), ["the arg max"], []),
    "returned": (lambda y: y, ["the arg max of what is returned"], []),
    "a softmax": (
        lambda y: jax.nn.softmax(y, -1),
        ["the arg max of what is returned"],
        ["the probabilities of the softmax"],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_proved(name):
    fun, proved, unproved = READ[name]
    found = read(fun)
    assert isinstance(found, Reads), found
    for got, want in ((found.proved, proved), (found.unproved, unproved)):
        assert len(got) == len(want), got
        assert all(any(text.startswith(w) for text in got) for w in want), got
    assert all(isinstance(chain, Chain) for chain in found.chains)


def test_the_most_that_is_read_and_what_is_read_besides():
    assert NOTHING_READ.most == 1
    assert NOTHING_READ.sides == []
    found = read(lambda y: (jnp.argmax(y + BIAS, -1), lax.top_k(y, 5)))
    assert found.most == 5
    ((chain, side),) = found.sides
    assert side.shape in ((V,), (1, V), (2, V))
    assert not chain.plain
    assert not chain.uniform


# What is refused, with which settings, over several devices or not, and why.
REFUSED = {
    "what is not followed": (
        lambda y: jnp.argmax(jnp.sin(y), -1),
        PROVED,
        False,
        "it can't be proved what argmax",
    ),
    "a bias over devices": (
        lambda y: jnp.argmax(y + BIAS, -1),
        PROVED,
        True,
        "is not its logits alone, which is proved on one device only",
    ),
    "a factor, and minus infinity": (
        lambda y: jnp.argmax(y * (1.0 + BIAS), -1),
        DROPPED,
        False,
        'fill="-inf" would change what argmax',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    fun, settings, split, words = REFUSED[name]
    found = read(fun, settings, split)
    assert isinstance(found, str), found.proved
    assert words in found


def test_the_same_for_all_is_proved_over_devices():
    assert isinstance(read(lambda y: jnp.argmax(y * 0.5, -1), split=True), Reads)
    assert isinstance(read(lambda y: jnp.argmax(y, -1), split=True), Reads)


def test_where_nothing_is_proved_candidates_are_chosen_by_what_is_read():
    found = read(lambda y: jnp.argmax(y + BIAS, -1), APPROXIMATE)
    assert len(found.chains) == 1
    assert not found.proved
    assert not read(lambda y: jnp.argmax(y + BIAS, -1), APPROXIMATE, split=True).chains
    # Of what is the same for all entries they are the largest logits.
    assert not read(lambda y: jnp.argmax(y * 0.5, -1), APPROXIMATE).chains


def test_equations_that_keep_values():
    def narrowed(w, x):
        return jnp.exp((x.astype(jnp.bfloat16) @ w).astype(jnp.float32).T)

    nodes = laid_out(narrowed, W.astype(jnp.bfloat16), X).graph.program_order()
    kept = [(str(node.primitive), keeps_values(node)) for node in nodes]
    converted = [keeps for name, keeps in kept if name == "convert_element_type"]
    assert converted == [False, True]
    assert ("transpose", True) in kept
    assert ("exp", False) in kept


def test_a_margin_grows_with_the_logits():
    small, large = (float(margin_of(Interval(-v * jnp.ones((1, V)), v * jnp.ones((1, V))))[0, 0]) for v in (1.0, 1e3))
    assert 0 < small < 1e-4
    assert large > 100 * small
    masked = Interval(jnp.full((1, V), -jnp.inf), jnp.ones((1, V)))
    assert jnp.isfinite(margin_of(masked)).all()
