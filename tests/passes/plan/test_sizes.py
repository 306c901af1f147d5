"""Sizes, ladders of them and levels of layers: the best there are, against all there could be."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from laid_out import laid_out

import hire_xform as hx
from hire_xform.passes.match.detect import detect
from hire_xform.passes.plan import ladder, levels
from hire_xform.passes.plan.ladder import ladder_of
from hire_xform.passes.plan.levels import levels_of, told
from hire_xform.passes.plan.measurement import Chosen
from hire_xform.passes.plan.settings import Ffn
from hire_xform.passes.plan.sizes import UNCHOSEN, Reading, sizes_of

# --- levels ---


def best_levels(sizes, most):
    """The smallest sum where each layer has one of at most so many sizes that is as large as its own."""
    known = sorted(set(sizes))
    return min(
        sum(min(c for c in counts if c >= s) for s in sizes)
        for r in range(1, most + 1)
        for counts in itertools.combinations(known, min(r, len(known)))
        if max(counts) == max(known)
    )


@pytest.mark.parametrize("most", [1, 2, 3])
def test_levels_are_the_best_there_are(most):
    rng = np.random.default_rng(most)
    for _ in range(25):
        sizes = rng.integers(1, 30, size=(2, 4))
        found = levels_of(sizes, most)
        own = np.asarray(found.counts)[found.array]
        assert len(found.counts) <= most
        assert list(found.counts) == sorted(found.counts)
        assert (own >= sizes).all()
        assert own.sum() == best_levels(sizes.ravel().tolist(), most)


def test_levels_say_which_size_each_layer_has():
    found = levels_of(np.asarray([[3, 9], [9, 3]]))
    assert (found.counts, found.numbers, found.shape) == ((3, 9), (0, 1, 1, 0), (2, 2))
    np.testing.assert_array_equal(found.array, [[0, 1], [1, 0]])
    assert found.ladders == ((3,), (9,))
    assert levels.Levels((3, 9), (0,), (1,), ((1, 2), (4,))).ladders == ((1, 2, 3), (4, 9))
    assert len(levels_of(np.arange(1, 20)).counts) == levels.MOST
    assert told([1000, 2]) == "1,000, 2"
    assert told(range(10)).endswith("7 and 2 more")


# --- ladders ---


def expected_bytes(counts, needs, read, dense, tried, tokens):
    """What an execution reads: its neediest token takes the smallest size that holds what it needs, or else dense."""
    layers = needs.reshape(-1, needs.shape[-1]).astype(float)
    total = 0.0
    for layer in layers:
        below = [0.0, *(((layer[:c].sum() / layer.sum()) ** tokens) for c in counts), 1.0]
        costs = [*map(read, counts), dense + read(counts[-1]) * tried]
        total += sum((b - a) * c for a, b, c in zip(below, below[1:], costs, strict=False))
    return total / len(layers)


@pytest.mark.parametrize(
    ("tried", "tokens", "least", "last"),
    [
        (True, 1, 1, None),
        (False, 1, 1, None),
        (True, 3, 1, None),
        (True, 1, 5, None),
        (True, 1, 1, 6),
        (False, 2, 1, 4),
    ],
)
def test_a_ladder_has_the_fewest_expected_bytes(tried, tokens, least, last):
    rng = np.random.default_rng(0)
    for _ in range(12):
        needs = rng.integers(0, 6, size=(2, 8)) * rng.integers(0, 2, size=(2, 8))
        needs[:, 2] += 1
        dense, slope = float(rng.integers(8, 40)), float(rng.uniform(0.5, 3))

        def read(count, slope=slope):
            return 1.0 + slope * count

        found = ladder_of(needs, read, dense, tried=tried, tokens=tokens, least=least, last=last)
        assert found.read == pytest.approx(expected_bytes(found.counts, needs, read, dense, tried, tokens))
        assert sum(found.shares) == pytest.approx(1)
        assert list(found.counts) == sorted(set(found.counts))
        assert found.counts[-1] >= least
        assert last is None or found.counts[-1] == last
        seen = set((np.flatnonzero(needs.sum(0)) + 1).tolist())
        ends = [last] if last else sorted(c for c in seen | {least} if c >= least)
        ladders = [
            (*below, end)
            for end in ends
            for r in range(ladder.MOST)
            for below in itertools.combinations(sorted(c for c in seen if c < end), r)
        ]
        best = min(expected_bytes(c, needs, read, dense, tried, tokens) for c in ladders)
        # One size more is not taken for less than its worth.
        assert best <= found.read + 1e-9
        assert found.read * (1 - ladder.WORTH) ** (ladder.MOST - 1) <= best + 1e-9


def test_one_size_more_is_taken_for_its_worth_only():
    needs = np.asarray([0, 99, 1, 0, 0, 0, 0, 100])
    assert ladder_of(needs, lambda c: float(c), 100.0, tried=True).counts == (2, 8)
    assert ladder_of(needs, lambda c: float(c), 100.0, tried=True, fixed=1e5).counts == (8,)


def test_the_largest_size_is_at_least_what_is_asked_for():
    needs = np.asarray([0, 9, 0, 0, 0, 0])
    assert ladder_of(needs, lambda c: float(c), 1e9, tried=True).counts == (2,)
    assert ladder_of(needs, lambda c: 10.0 * c, 0.0, tried=False, least=5).counts[-1] == 5


# --- the sizes of a site ---

D, M, L = 8, 64, 4


def block(w, x):
    return jnp.maximum(x @ w["up"], 0) @ w["down"]


def head(w, x):
    return jnp.argmax(x @ w["up"], -1)


def reading(certify=False, tokens=1, static=0, fun=block):
    found = laid_out(fun, {"down": jnp.ones((M, D)), "up": jnp.ones((D, M))}, jnp.ones((tokens, D)))
    (match,) = detect(found.graph, found.provenance).matches
    settings = Ffn(active=0.5, certify=certify, predictor=hx.Quantized(8))
    if fun is head:
        settings = hx.Vocab(candidates=8, certify=certify, predictor=hx.Quantized(8))
    return Reading(match, settings, tokens, M - static, 1, 1, static)


def test_a_reading_counts_bytes():
    read = reading()
    row = 2 * D * 4
    assert read.dense == 2 * M * D * 4
    assert read.exact(10) == 10 * row
    predicted, exact = read.bytes(16)
    assert exact == 16 * row
    assert M * D < predicted < M * (D + 16)
    assert read.rows(16) == 16
    assert reading(static=8).rows(16) == 24
    assert reading(tokens=3).rows(4) >= 4
    assert read.rows_of((4, 16)) == [4, 16]


def test_one_size_without_a_calibration():
    read = reading()
    found = sizes_of(read, UNCHOSEN, 16)
    assert (found.predicted, found.exact) == read.bytes(16)
    assert not found.smaller
    assert not found.rungs
    assert found.levels is None
    assert found.taken(True) == [(1.0, found.exact, False)]


@pytest.mark.parametrize("fun", [block, head], ids=["block", "head"])
def test_a_certified_site_has_its_size_and_the_dense_form(fun):
    read = reading(certify=True, fun=fun)
    # A head reads its candidates before it knows whether they prove anything.
    assert read.tried is (fun is head)
    found = sizes_of(read, UNCHOSEN, 16)
    own, dense = found.rungs
    assert (own.computed, own.share) == (16, None)
    assert dense.computed == M
    assert dense.bytes == found.predicted + read.dense + (read.exact(16) if read.tried else 0)
    assert found.taken(read.tried) == [(1.0, found.exact, False)]


def needing(*pairs):
    needs = np.zeros(M, int)
    for count, often in pairs:
        needs[count - 1] = often
    return needs


@pytest.mark.parametrize("fun", [block, head], ids=["block", "head"])
def test_a_calibrated_certified_site_has_a_ladder(fun):
    read = reading(certify=True, fun=fun)
    chosen = Chosen(None, 40, "", needs=needing((4, 70), (40, 20), (60, 10)))
    found = sizes_of(read, chosen, 40)
    assert found.smaller == (4,)
    small, large, dense = found.rungs
    assert [r.computed for r in found.rungs] == [4, 40, M]
    assert [r.share for r in found.rungs] == pytest.approx([0.7, 0.2, 0.1])
    assert small.bytes - found.predicted == read.exact(4)
    whole = read.dense + (read.exact(40) if read.tried else 0)
    assert found.exact == pytest.approx(0.7 * read.exact(4) + 0.2 * read.exact(40) + 0.1 * whole, abs=1)
    assert large.bytes < dense.bytes
    taken = found.taken(read.tried)
    assert [share for share, _, _ in taken] == pytest.approx([0.7, 0.2, 0.1])
    assert [runs_dense for _, _, runs_dense in taken] == [False, False, True]
    assert taken[-1][1] == (read.exact(40) if read.tried else 0)


def test_layers_have_sizes_of_their_own_where_that_is_worth_it():
    read = reading()
    found = sizes_of(read, Chosen(None, 40, "", sizes=np.asarray([4, 40, 4, 4])), 40)
    assert found.levels.counts == (4, 40)
    assert found.levels.numbers == (0, 1, 0, 0)
    assert found.exact == (3 * read.exact(4) + read.exact(40)) / L
    assert "each layer has its own in a branch (4, 40, 4, 4), which saves" in found.how
    alike = sizes_of(read, Chosen(None, 40, "", sizes=np.asarray([40, 40, 39, 40])), 40)
    assert alike.levels is None
    assert alike.exact == read.exact(40)
    assert "the layers share it, as sizes of their own (40, 40, 39, 40) save" in alike.how
    assert sizes_of(read, Chosen(None, 40, "", sizes=np.asarray([40, 40])), 40).how == ""


def test_layers_of_a_certified_site_have_ladders_of_their_own():
    read = reading(certify=True)
    needs = np.stack([needing((2, 50), (8, 25), (16, 25)), needing((30, 50), (40, 25), (50, 25))])
    found = sizes_of(read, Chosen(None, 50, "", sizes=np.asarray([16, 50]), needs=needs), 50)
    assert found.levels.counts == (16, 50)
    assert found.levels.ladders == ((2, 8, 16), (30, 40, 50))
    assert [r.share for r in found.rungs] == pytest.approx([0.25, 0.125, 0.125, 0.25, 0.125, 0.125, 0])
    assert [r.computed for r in found.rungs] == [2, 8, 16, 30, 40, 50, M]
