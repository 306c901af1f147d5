"""What reads logits while the vocabulary is their last axis: by place, or whatever the order of its entries."""

import jax.numpy as jnp
import pytest
from jax import lax
from laid_out import laid_out

from hire_xform.passes.match.whole_axis import cuts_end, is_uniform, joined_by, reads_of, selects, takes_largest

V = 8
W, X, BIAS = jnp.ones((4, V)), jnp.ones((2, 4)), jnp.arange(V, dtype=jnp.float32)


def read(fun, *more):
    found = laid_out(lambda w, x, *more: fun(x @ w, *more), W, X, *more)
    return found, found.product.out


# An equation that reads logits: what of its results are such values again; None where it takes them by place.
READS = {
    "pointwise": (lambda y: jnp.tanh(y), 1),
    "converted": (lambda y: y.astype(jnp.bfloat16), 1),
    "reduced": (lambda y: y.sum(-1), 0),
    "arg max": (lambda y: jnp.argmax(y, -1), None),
    "of all tokens": (lambda y: y.max(0), 1),
    "more axes": (lambda y: y[None], 1),
    "turned": (lambda y: y.T, None),
    "split": (lambda y: y.reshape(2, 2, 4), None),
    "cut": (lambda y: y[:, 1:], None),
    "reversed": (lambda y: y[:, ::-1], None),
    "contracted": (lambda y: y @ jnp.ones((V, 2)), None),
}


@pytest.mark.parametrize("name", READS)
def test_what_stays_of_the_axis(name):
    fun, want = READS[name]
    _, logits = read(fun)
    (value, reads), *_ = list(reads_of(logits))
    assert value is logits
    (results,) = reads.values()
    assert (None if results is None else len(results)) == want


def test_reads_go_on_behind_what_keeps_the_axis():
    _, logits = read(lambda y: (jnp.argmax(jnp.tanh(y) * 2, -1), y.sum(-1)))
    found = list(reads_of(logits))
    assert len(found) == 3
    assert sum(len(reads) for _, reads in found) == 4


def test_values_that_are_the_same_along_an_axis():
    token = jnp.ones((2, 1))
    for fun, want in (
        (lambda y, t: y + 1.0, True),
        (lambda y, t: y + t, True),
        (lambda y, t: y + jnp.broadcast_to(t * 2, (2, V)), True),
        (lambda y, t: y + BIAS, False),
        (lambda y, t: y + jnp.tanh(BIAS + t), False),
        (lambda y, t: y + jnp.cumsum(jnp.broadcast_to(t, (2, V)), -1), False),
    ):
        found, logits = read(fun, token)
        node = logits.consumers[0]
        joined = joined_by(node, node.outputs[0])
        assert (logits, 1) in joined
        assert all(is_uniform(o, axis) for o, axis in joined if o is not logits) is want
    assert not is_uniform(logits, 1)
    assert found.product.out is logits


def test_cuts_and_choices():
    def node_of(fun):
        _, logits = read(fun)
        return logits.consumers[0], logits

    assert cuts_end(node_of(lambda y: y[:, :5])[0])
    for fun in (lambda y: y[:, 1:], lambda y: y[:, ::2], lambda y: y[:1], lambda y: y[:1, :5], lambda y: jnp.tanh(y)):
        assert not cuts_end(node_of(fun)[0])
    for fun, chooses, largest in (
        (lambda y: jnp.argmax(y, -1), True, True),
        (lambda y: jnp.argmax(y, 0), False, False),
        (lambda y: lax.top_k(y, 2), True, False),
        (lambda y: lax.top_k(y, 2, axis=0), False, False),
        (lambda y: jnp.argmin(y, -1), False, False),
    ):
        node, logits = node_of(fun)
        assert selects(node, logits) is chooses
        assert takes_largest(node) is largest
