"""What a softmax leaves out of its logits: common to all entries, and of a size that is known."""

import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.core import primitives as prims
from laid_out import laid_out

from hire_xform.passes.match.output_axis import follow
from hire_xform.passes.prove.logits import Logits
from hire_xform.passes.prove.soft_maximum import is_left_out

W, X = jnp.ones((4, 32)), jnp.ones((3, 4))


def largest(y):
    return y.max(-1, keepdims=True)


def log_sum(y, shift):
    return shift + jnp.log(jnp.exp(y - shift).sum(-1, keepdims=True))


def many_sums(y):
    common = largest(y)
    for _ in range(4):
        common = common + largest(y)
    return common


# What is subtracted from the logits, and whether it may be for a softmax's size.
SUBTRACTED = {
    "largest": (largest, True),
    "stopped": (lambda y: lax.stop_gradient(largest(y)), True),
    "log of the sum of exponentials": (lambda y: log_sum(y, largest(y)), True),
    "smallest": (lambda y: y.min(-1, keepdims=True), False),
    "mean": (lambda y: y.mean(-1, keepdims=True), False),
    "sum": (lambda y: y.sum(-1, keepdims=True), False),
    "twice the largest, by a product": (lambda y: largest(y) * 2.0, False),
    "largest of another size": (lambda y: largest(y * 3.0), False),
    "too many sums": (many_sums, False),
    "a number": (lambda y: jnp.float32(2.0), False),
    "of each entry its own": (lambda y: jnp.exp(y), False),
}


def checked(read, divides=False):
    found = laid_out(lambda w, x: read(x @ w), W, X)
    product = found.product
    logits = Logits(product, follow(product, narrow=False))
    node = found.nodes(prims.div_p if divides else prims.sub_p)[-1]
    return logits, is_left_out(logits, node.inputs[1], node.inputs[0], divides)


@pytest.mark.parametrize("name", SUBTRACTED)
def test_what_is_subtracted(name):
    common, known = SUBTRACTED[name]
    assert checked(lambda y: y - common(y))[1] is known


DIVIDED = {
    "softmax": (lambda y: (e := jnp.exp(y - largest(y))) / e.sum(-1, keepdims=True), True),
    "by the largest": (lambda y: jnp.exp(y) / largest(y), False),
    "by a sum of what may be negative": (lambda y: y / y.sum(-1, keepdims=True), False),
}


@pytest.mark.parametrize("name", DIVIDED)
def test_what_is_divided_by(name):
    fun, known = DIVIDED[name]
    assert checked(fun, divides=True)[1] is known


def test_sixteen_bits_are_not_known():
    assert not checked(lambda y: (z := y.astype(jnp.bfloat16)) - largest(z))[1]


def test_what_is_computed_from_the_logits_is_reached_and_nothing_else():
    found = laid_out(lambda w, x: jnp.exp(x @ w).sum(-1) + x.sum(-1), W, X)
    product = found.product
    logits = Logits(product, follow(product, narrow=False))
    of_logits, of_x = found.nodes(prims.reduce_sum_p)
    assert logits.reach(of_logits.outputs[0])
    assert not logits.reach(of_x.outputs[0])
    assert logits.make_for_each_token(of_logits.outputs[0])
    assert not logits.make_for_each_token(product.out)
    assert logits.width(product.out) == 32
    assert not logits.are_merged_in(product.out)
