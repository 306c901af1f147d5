"""From logits to what an arg max takes: equations replayed on intervals hold what the program computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from laid_out import laid_out

from hire_xform.lowering.prove.intervals import Interval
from hire_xform.passes.ir.graph import Value
from hire_xform.passes.match.output_axis import follow
from hire_xform.passes.match.readers import readers_of
from hire_xform.passes.prove.chain_tracing import Filtered, chain_of

RNG = np.random.default_rng(0)
W, X = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((4, 16), (3, 4)))
BIAS = jnp.asarray(RNG.normal(size=16), jnp.float32)


def chains(read):
    """The program, and what each reader that takes one entry or a few takes of the logits."""
    found = laid_out(lambda w, x: read(x @ w), W, X)
    fate = follow(found.product, narrow=False)
    readers = [r for r in readers_of(found.product, fate) if r.kind not in ("returned", "softmax")]
    return found, [chain_of(found.product, fate, reader) for reader in readers]


def chain(between):
    """The program and the chain of the one arg max behind what stands between."""
    found, (one,) = chains(lambda y: jnp.argmax(between(y), -1))
    return found, one


# What stands between, and whether it is plain and uniform. A softmax is left out: what is compared is its logits.
BETWEEN = {
    "nothing": (lambda y: y, True, True),
    "widened": (lambda y: y.astype(jnp.float32), True, True),
    "moved": (lambda y: y.reshape(3, 4, 4).reshape(3, 16), True, True),
    "scaled": (lambda y: y / 0.7, False, True),
    "soft cap": (lambda y: 5.0 * jnp.tanh(y / 5.0), False, True),
    "clipped": (lambda y: jnp.clip(y, -1.0, 1.0), False, True),
    "bias": (lambda y: y + np.asarray(BIAS), False, False),
    "mask": (lambda y: jnp.where(np.arange(16) % 3 == 0, -jnp.inf, y), False, False),
    "narrowed": (lambda y: y.astype(jnp.bfloat16).astype(jnp.float32), False, True),
    "negated twice": (lambda y: jnp.negative(jnp.negative(y)), False, True),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_intervals_hold_what_the_program_computes(name):
    between, plain, uniform = BETWEEN[name]
    program, found = chain(between)
    assert (found.plain, found.uniform, found.softmax, found.cut) == (plain, uniform, False, False)
    logits = X @ W
    sides = [program.value(side, (W, X)) for side in found.sides if isinstance(side, Value)]
    for slack in (0.0, 0.1):
        got = found.between(Interval(logits - slack, logits + slack), sides)
        want = between(logits)
        assert bool((got.low <= want).all())
        assert bool((want <= got.high).all())
        if not slack and name in ("nothing", "moved", "mask"):
            np.testing.assert_array_equal(got.low, got.high)
    np.testing.assert_array_equal(found.moved(jnp.arange(48).reshape(3, 16)), np.arange(48).reshape(3, 16))


def test_a_softmax_is_left_out_and_said_to_be():
    for soft in (jax.nn.softmax, jax.nn.log_softmax):
        _, found = chain(soft)
        assert found.softmax
        assert not found.plain


def test_a_part_of_the_logits_is_said_to_be_cut():
    assert chain(lambda y: y[:, :12])[1].cut


# What can't be followed.
NOT_FOLLOWED = {
    "ranks": lambda y: jnp.argsort(y, -1).astype(jnp.float32),
    "running sums": lambda y: jnp.cumsum(y, -1),
    "of other tokens": lambda y: y + y[::-1],
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_what_is_not_followed_is_a_reason(name):
    assert all(isinstance(one, str) for one in chains(lambda y: jnp.argmax(NOT_FOLLOWED[name](y), -1))[1])


def test_a_filter_by_the_kth_largest_is_told_apart():
    def filtered(y):
        return jnp.where(y < lax.top_k(y, 4)[0][:, -1:], -jnp.inf, y)

    assert any(isinstance(one, Filtered) for one in chains(lambda y: jnp.argmax(filtered(y) + BIAS, -1))[1])


def test_chains_of_one_function_have_one_signature():
    scaled, again, other = (chain(lambda y, by=by: y / by)[1] for by in (0.7, 0.7, 0.8))
    assert scaled.signature() == again.signature() != other.signature()
    assert hash(scaled.signature()) == hash(again.signature())
