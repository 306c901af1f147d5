"""What samplers see of sparse logits: the distribution they draw from, compared with the dense one's."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import named

import hire_xform as hx

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from tiny_lm import model as lm

pytestmark = pytest.mark.any_jax("cases vary temperatures and fills of the same logits", every=3)

EXAMPLES = Path(__file__).parents[2] / "examples" / "tiny_lm"
POSITIONS = 192


@pytest.fixture(scope="module")
def head():
    """The bundled model's output projection, and inputs of it from held-out text."""
    params = lm.load(EXAMPLES / "weights.safetensors")
    tokens = jnp.asarray(np.load(EXAMPLES / "heldout.npy")[:POSITIONS].astype(np.int32))[None]
    # What the projection reads is what its transpose leaves unchanged: solved for, so that no model code is repeated.
    logits = np.asarray(jax.jit(lm.forward)(params, tokens)[0], np.float64)
    embedding = np.asarray(params["embedding"], np.float64)
    x = np.linalg.lstsq(embedding, logits.T, rcond=None)[0].T
    return jnp.asarray(embedding, jnp.float32), jnp.asarray(x, jnp.float32)


def project(rows, x):
    return x @ rows.T


def both(head, **vocab):
    """Dense and sparse logits of every position, one token a call, f64."""
    rows, x = head
    step = hx.sparsify(project, config=hx.Config(rules=named(hx.Vocab(**vocab))))
    packed = step.trace(rows, x[:1]).pack(rows)
    sparse = jax.jit(lambda packed, x: jax.lax.map(lambda one: step(packed, one[None])[0], x))(packed, x)
    return np.asarray(project(rows, x), np.float64), np.asarray(sparse, np.float64)


def softmax(logits, temperature=1.0):
    scaled = logits / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def top_k(probabilities, k):
    cut = np.sort(probabilities, -1)[:, -k][:, None]
    kept = np.where(probabilities >= cut, probabilities, 0)
    return kept / kept.sum(-1, keepdims=True)


def nucleus(probabilities, p):
    order = np.argsort(-probabilities, -1, kind="stable")
    ranked = np.take_along_axis(probabilities, order, -1)
    keep = np.cumsum(ranked, -1) - ranked < p
    kept = np.zeros_like(probabilities)
    np.put_along_axis(kept, order, np.where(keep, ranked, 0), -1)
    return kept / kept.sum(-1, keepdims=True)


def variation(one, other):
    """Total variation distance of each position."""
    return np.abs(one - other).sum(-1) / 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_predicted_logits_keep_the_distribution(head, temperature):
    dense, sparse = both(head, candidates=256)
    distance = variation(softmax(dense, temperature), softmax(sparse, temperature))
    assert distance.max() < 0.03
    assert distance.mean() < 0.006


def test_minus_infinity_loses_just_the_mass_outside_the_candidates(head):
    """A renormalised part of a distribution is as far from the whole as the mass left out: an identity."""
    dense, sparse = both(head, candidates=64, fill="-inf")
    inside = np.isfinite(sparse)
    assert (inside.sum(-1) == 64).all()
    outside = np.where(inside, 0, softmax(dense)).sum(-1)
    np.testing.assert_allclose(variation(softmax(dense), softmax(sparse)), outside, atol=1e-5)
    assert outside.max() > 0.01  # there is something to lose


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_minus_infinity_at_a_temperature_loses_the_mass_outside_at_that_temperature(head, temperature):
    dense, sparse = both(head, candidates=64, fill="-inf")
    inside = np.isfinite(sparse)
    outside = np.where(inside, 0, softmax(dense, temperature)).sum(-1)
    distance = variation(softmax(dense, temperature), softmax(sparse, temperature))
    np.testing.assert_allclose(distance, outside, atol=1e-5)


@pytest.mark.parametrize("fill", ["predicted", "-inf"])
def test_top_k_sampling_is_dense_where_the_candidates_hold_the_k_best(head, fill):
    dense, sparse = both(head, candidates=256, fill=fill)
    distance = variation(top_k(softmax(dense), 20), top_k(softmax(sparse), 20))
    held = (np.sort(np.argsort(-dense, -1)[:, :20], -1) == np.sort(np.argsort(-sparse, -1)[:, :20], -1)).all(-1)
    assert held.mean() > 0.99
    assert distance[held].max() < 1e-5


@pytest.mark.parametrize("fill", ["predicted", "-inf"])
def test_nucleus_sampling(head, fill):
    dense, sparse = both(head, candidates=512, fill=fill)
    outside = np.where(np.isfinite(both(head, candidates=512, fill="-inf")[1]), 0, softmax(dense)).sum(-1)
    distance = variation(nucleus(softmax(dense), 0.9), nucleus(softmax(sparse), 0.9))
    # With predicted logits nothing is missing. Without the mass outside a nucleus ends elsewhere: by as much mass, and
    # now and then by the one token at its edge, whatever that weighs.
    near = distance <= (2 * outside if fill == "-inf" else 0) + 0.03
    assert near.mean() > 0.97
    edge = np.where(nucleus(softmax(dense), 0.9) > 0, softmax(dense), 1).min(-1)
    assert (distance <= 2 * outside + 0.03 + edge / 0.9).all()
    settled = outside < 0.02
    assert settled.mean() > 0.3
    assert np.median(distance[settled]) < 1e-4


def test_log_probabilities_of_candidates_and_of_others(head):
    dense, sparse = both(head, candidates=256)
    inside = np.isfinite(both(head, candidates=256, fill="-inf")[1])
    gap = np.abs(np.log(softmax(dense)) - np.log(softmax(sparse)))
    assert gap[inside].max() < 0.05  # exact logits; the normaliser is close
    assert gap[inside].mean() < 0.005
    assert gap[~inside].mean() < 0.05


def test_log_probabilities_with_minus_infinity_are_those_given_that_it_is_a_candidate(head):
    """Too large by the logarithm of the candidates' mass, the same for all of them; those of others are -inf."""
    dense, sparse = both(head, candidates=64, fill="-inf")
    inside = np.isfinite(sparse)
    held = np.where(inside, softmax(dense), 0).sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        said, true = np.log(softmax(sparse)), np.log(softmax(dense))
    assert np.isneginf(said[~inside]).all()
    np.testing.assert_allclose(said[inside], (true - np.log(held))[inside], atol=1e-4)


@pytest.mark.slow
def test_tokens_drawn_from_sparse_logits_are_distributed_as_the_dense_ones(head):
    """Counts of many draws, by jax.random.categorical, against the dense probabilities."""
    dense, sparse = both(head, candidates=256)
    draws, position = 20_000, 7
    drawn = jax.random.categorical(jax.random.key(0), jnp.asarray(sparse[position], jnp.float32), shape=(draws,))
    counts = np.bincount(np.asarray(drawn), minlength=dense.shape[1]) / draws
    want = softmax(dense)[position]
    # The expected distance of a sample's frequencies from what they are drawn from, and the library's own beside it.
    noise = np.sqrt(want * (1 - want) / draws).sum() / 2
    assert variation(counts[None], want[None])[0] < noise + 0.02
