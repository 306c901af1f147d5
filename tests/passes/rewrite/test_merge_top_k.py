"""An arg max and a top-k of logits that several devices have parts of, merged from each one's own best."""

import re
from types import SimpleNamespace

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives as prims
from jax.sharding import NamedSharding, PartitionSpec
from laid_out import laid_out

from hire_xform.passes.match.detect import detect
from hire_xform.passes.plan.placement import Placement
from hire_xform.passes.plan.row_order import readers
from hire_xform.passes.rewrite.merge_top_k import Merged, all_readers, merge, merged

V, T = 16, 3
W, X = jnp.ones((4, V)), jnp.ones((T, 4))
P = PartitionSpec


def head(read):
    found = laid_out(lambda w, x: read(x @ w), W, X)
    (match,) = detect(found.graph, found.provenance).matches
    return found, match


def sharded(match, cyclic=""):
    placement = Placement(SimpleNamespace(shape={"model": 4}, axis_types=()), ("model",), ())
    reads = SimpleNamespace(chains=())
    return SimpleNamespace(match=match, placement=placement, cyclic=cyclic, settings=None, reads=reads)


# What reads logits: what minds no order of theirs, or why something does; and how many top-ks are merged in any case.
READERS = {
    "arg max": (lambda y: jnp.argmax(y, -1), 1, 0),
    "top-k": (lambda y: lax.top_k(y, 2), 1, 1),
    "both of something pointwise": (lambda y: (jnp.argmax(y * 2, -1), lax.top_k(jnp.tanh(y), 2)), 2, 1),
    "padded": (lambda y: jnp.argmax(y[:, :13], -1), 1, 0),
    "top-k of what is cut": (lambda y: lax.top_k(y[:, :13], 2), 1, 1),
    "returned": (lambda y: y, "its logits are returned", 0),
    "returned besides": (lambda y: (y, lax.top_k(y, 2)), "its logits are returned", 1),
    "a sum that minds nothing": (lambda y: (y.sum(-1), jnp.argmax(y, -1)), 1, 0),
    "a bias": (
        lambda y: jnp.argmax(y + jnp.arange(V, dtype=jnp.float32), -1),
        "joins its logits with what differs along the vocabulary",
        0,
    ),
    "a number for each token": (lambda y: jnp.argmax(y + jnp.ones((T, 1)) * 3, -1), 1, 0),
    "one entry": (lambda y: (y[:, 3], jnp.argmax(y, -1)), "reads its logits by their place", 0),
    "cut and returned": (lambda y: (jnp.argmax(y, -1), y[:, :13]), "cuts its logits, and not only an arg max", 0),
    "turned around": (lambda y: jnp.argmax(y.T, 0), "reads its logits by their place", 0),
    "in a loop": (
        lambda y: lax.scan(lambda c, _: (c, jnp.argmax(y * c, -1)), 1.0, None, length=2)[1],
        "by their place",
        0,
    ),
    "a rule of its own": (
        lambda y: _argmax_with_rule(y),
        "derivative rule of its own",
        0,
    ),
}


@jax.custom_jvp
def _argmax_with_rule(y):
    return jnp.argmax(y * 2.0, -1)


_argmax_with_rule.defjvp(lambda primals, tangents: (_argmax_with_rule(*primals), None))


@pytest.mark.parametrize("name", READERS)
def test_what_reads_logits_whatever_their_order(name):
    read, want, top_ks = READERS[name]
    _, match = head(read)
    found = readers(match)
    if isinstance(want, str):
        assert re.search(want, found)
    else:
        assert [node.primitive in (prims.argmax_p, prims.top_k_p) for node in found] == [True] * want
        assert len(merged([sharded(match, "kept")])) == want
    # Of contiguous rows a compiler finds an arg max by itself, a top-k not.
    assert len(merged([sharded(match)])) == top_ks


def test_what_is_merged_of_logits_that_are_cut():
    _, match = head(lambda y: lax.top_k(y[:, :13] * 2.0, 2))
    assert not merged([sharded(match)])
    _, match = head(lambda y: lax.top_k((y * 2.0)[:, :13], 2))
    (one,) = merged([sharded(match)])
    assert (one.vocab, one.k, one.cyclic) == (13, 2, False)
    assert one.operand.shape == (T, V)
    assert one.operand.node.primitive is prims.mul_p
    assert one.node in all_readers(match.product.out)
    assert not merged([SimpleNamespace(match=match, placement=None, cyclic="", settings=None)])


@pytest.fixture(scope="module")
def found():
    return devices.outcomes(__name__)


def all_cases(cyclic):
    """Random logits, of which many are equal, NaNs and infinities among them."""
    rng = np.random.default_rng(0)
    mesh = devices.mesh_of(4, 2)
    for dtype, vocab, k, tokens in (
        (jnp.float32, 32, None, 4),
        (jnp.float32, 32, 5, 4),
        (jnp.bfloat16, 32, 9, 3),
        (jnp.float32, 29, None, 4),
        (jnp.float32, 29, 10, 4),
        (jnp.int32, 29, 3, 2),
    ):
        values = rng.integers(-2, 3, size=(tokens, 32)).astype(np.float32)
        if dtype != jnp.int32:
            values[1, 7], values[1, 30], values[0, :] = np.nan, np.nan, -np.inf
        logits = jnp.asarray(values, dtype)
        operand = logits[:, :vocab]
        want = [lax.argmax(operand, 1, jnp.int32)] if k is None else lax.top_k(operand, k)
        node = SimpleNamespace(outputs=[SimpleNamespace(shape=w.shape, aval=jax.typeof(w)) for w in want])
        treatment = Merged(node, None, vocab, k, Placement(mesh, ("model",), ("data",)), cyclic)
        if cyclic:
            logits = logits.reshape(tokens, 8, 4).swapaxes(1, 2).reshape(tokens, 32)
        logits = jax.device_put(logits, NamedSharding(mesh, P(None, "model")))
        got = jax.jit(lambda y, treatment=treatment: merge(treatment, y))(logits)
        for one, other in zip(got, want, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32), str((vocab, k)))


def check_contiguous_rows():
    all_cases(cyclic=False)


def check_cyclic_rows():
    all_cases(cyclic=True)


@pytest.mark.parametrize("name", devices.checks(__name__))
def test_over_devices(found, name):
    assert found[name] == "", found[name]
