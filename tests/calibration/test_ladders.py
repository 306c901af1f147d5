"""Certified sites with several compiled sizes, chosen by a calibration: what is taken, what is read, what is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same, named
from jax import lax
from jax.extend.core import primitives as prims
from test_lossless import BLOCKS, D, tokens, weights

import hire_xform as hx
from hire_xform.lowering.prove.proofs import pack_proof, scores_with_bounds
from hire_xform.passes.ir import compat
from hire_xform.passes.plan.ladder import ladder_of

INT8 = hx.Quantized(8)
LOSSLESS = hx.lossless(rules=named(hx.Vocab(certify=True)))
BLOCK = BLOCKS["relu"]


def calibrated(fun, p, *batches, config=LOSSLESS):
    cal = hx.calibrate(fun, [(p, x) for x in batches], config=config, predictors=[INT8])
    return cal, hx.sparsify(fun, config=config, calibration=cal)


@jax.jit
def opened(p, x):
    """Units of `BLOCK` that are not proved zero, of each token."""
    rows = p["gate"].T
    upper = scores_with_bounds(x, pack_proof(rows, INT8), INT8).upper
    return jnp.sum(upper + p["bias"] > 0, axis=1)


def replayed(step, p, xs, dense):
    """Each token alone: the counts of the one site's rungs, each result checked."""
    packed = step.trace(p, xs[:1]).pack(p)
    total = 0
    for t in range(len(xs)):
        result, counts = step.with_rungs(packed, xs[t : t + 1])
        assert_same(result, dense(p, xs[t : t + 1]))
        total = total + np.asarray(*counts.values())
    return total


def test_a_block_takes_the_smallest_size_that_holds_its_open_units():
    p, xs = weights(bias=-0.6), tokens(48)
    _, step = calibrated(BLOCK, p, xs)
    traced = step.trace(p, xs[:1])
    *rungs, dense = traced.plan.sites[0].rungs
    needs = np.asarray(opened(p, xs))
    assert 2 <= len(rungs) <= 3
    # Sizes are needs that were seen, so that there are tokens at every edge, and others above it.
    assert {r.computed for r in rungs} <= set(needs)
    assert rungs[-1].computed == needs.max() == traced.plan.sites[0].computed
    packed = traced.pack(p)
    for t in range(0, 48, 3):
        result, counts = step.with_rungs(packed, xs[t : t + 1])
        (taken,) = counts.values()
        assert int(np.argmax(taken)) == sum(needs[t] > r.computed for r in rungs)
        assert int(taken.sum()) == 1
        assert_same(result, jax.jit(BLOCK)(p, xs[t : t + 1]))
    more = {**p, "bias": p["bias"] + 2.0}
    result, counts = step.with_rungs(more, xs[:1])
    assert [int(n) for n in next(iter(counts.values()))] == [0] * len(rungs) + [1]
    assert dense.computed == p["bias"].size
    assert_same(result, jax.jit(BLOCK)(more, xs[:1]), 1e-6)


def test_a_plan_says_what_is_read_as_it_is_read():
    p, xs = weights(bias=-0.6), tokens(32)
    cal, step = calibrated(BLOCK, p, xs)
    site = step.trace(p, xs[:1]).plan.sites[0]
    taken = replayed(step, p, xs, jax.jit(BLOCK))
    np.testing.assert_allclose(taken / 32, [r.share for r in site.rungs], atol=1e-9)
    read = sum(int(n) * r.bytes for n, r in zip(taken, site.rungs, strict=True)) / 32
    assert read <= site.sparse_bytes <= read + 1
    one_size = site.rungs[-2].bytes
    assert site.sparse_bytes < 0.97 * one_size
    rows = (site.rungs[1].bytes - site.rungs[0].bytes) / (site.rungs[1].computed - site.rungs[0].computed)
    assert rows == 2 * D * 4
    assert site.rungs[-1].bytes == site.rungs[0].bytes - site.rungs[0].computed * rows + site.dense_bytes
    told = step.trace(p, xs[:1]).explain()
    assert f"{site.rungs[0].computed} ({site.rungs[0].share:.2%})" in told
    assert "expected" in told
    assert cal.sites[site.path].sizes == site.computed


def test_without_a_calibration_there_is_one_size():
    p, x = weights(), tokens()
    config = hx.Config(vocab=None, ffn=hx.Ffn(active=0.5, certify=True), rules=FORCE)
    site = hx.sparsify(BLOCK, config=config).trace(p, x).plan.sites[0]
    assert [(r.computed, r.share) for r in site.rungs] == [(48, None), (96, None)]
    assert site.sparse_bytes == site.rungs[0].bytes
    plain = hx.Config(vocab=None, ffn=hx.Ffn(active=0.5), rules=FORCE)
    assert hx.sparsify(BLOCK, config=plain).trace(p, x).plan.sites[0].rungs == ()


def test_a_size_that_is_given_is_the_last_one():
    p, xs = weights(bias=-0.6), tokens(48)
    config = hx.Config(vocab=None, ffn=hx.Ffn(active=0.75, certify=True), rules=FORCE)
    _, step = calibrated(BLOCK, p, xs, config=config)
    rungs = step.trace(p, xs[:1]).plan.sites[0].rungs
    assert [r.computed for r in rungs[-2:]] == [72, 96]
    assert 1 <= len(rungs) - 2 <= 2
    # As many logits as are asked for are exact: a head has that one size.
    head = lambda p, x: x @ p["gate"]  # noqa: E731
    _, step = calibrated(head, p, xs, config=hx.Config(rules=named(hx.Vocab(candidates=12, certify=True))))
    site = step.trace(p, xs[:1]).plan.sites[0]
    assert [r.computed for r in site.rungs] == [12, 96]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_a_head_takes_several_sizes(dtype):
    """Rows that matter very differently; NaN runs dense, in the last of the counts."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(512, D)) * 10.0 ** rng.uniform(-1, 0.3, size=(512, 1))
    p = {"head": jnp.asarray(rows, dtype)}
    xs = jnp.asarray(rng.normal(size=(48, D)) * 10.0 ** rng.uniform(-1, 1, size=(48, 1)), dtype)
    fun = lambda p, x: x @ p["head"].T  # noqa: E731
    _, step = calibrated(fun, p, xs)
    packed, dense = step.trace(p, xs[:1]).pack(p), jax.jit(fun)
    site = step.trace(p, xs[:1]).plan.sites[0]
    # Of 16-bit logits the best is mostly told from all others at once.
    assert len(site.rungs) >= (3 if dtype == jnp.float32 else 2)
    total = 0
    for t in range(48):
        logits, counts = step.with_rungs(packed, xs[t : t + 1])
        np.testing.assert_array_equal(logits.argmax(-1), dense(p, xs[t : t + 1]).argmax(-1))
        total = total + np.asarray(*counts.values())
    assert total[0] > 0
    assert total[1:-1].sum() > 0 or dtype != jnp.float32
    assert total[-1] <= round(48 * site.rungs[-1].share)
    _, counts = step.with_rungs(packed, xs[:1].at[0, 3].set(jnp.nan))
    assert [int(n) for n in next(iter(counts.values()))] == [0] * (len(site.rungs) - 1) + [1]
    # The dense form is run after the largest size was tried.
    assert site.rungs[-1].bytes == site.rungs[-2].bytes + site.dense_bytes


def test_layers_of_a_loop_have_ladders_of_their_own():
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b]), weights(bias=-3.0), weights(bias=0.0, seed=3))

    def layers(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x + BLOCK(w, x)), None), x, p)[0]

    xs = tokens(32)
    _, step = calibrated(layers, stack, xs)
    site = step.trace(stack, xs[:1]).plan.sites[0]
    sizes = [r.computed for r in site.rungs[:-1]]
    assert max(sizes[: sizes.index(max(sizes[:3])) + 1]) < site.computed  # those of the first layer come first
    taken = replayed(step, stack, xs, jax.jit(layers))
    assert taken.sum() == 64
    assert sum(taken[i] > 0 for i in range(len(sizes))) >= 3
    np.testing.assert_allclose(taken / 64, [r.share for r in site.rungs], atol=0.02)
    read = sum(int(n) * r.bytes for n, r in zip(taken, site.rungs, strict=True)) / 32
    np.testing.assert_allclose(read, site.sparse_bytes, rtol=0.02)


def branches(jaxpr):
    """Branches of every switch that has a number to choose by, not a platform."""
    for eqn in compat.close(jaxpr)[0].eqns:
        if eqn.primitive is prims.cond_p and eqn.params.get("branches_platforms") is None:
            yield len(eqn.params["branches"])
        for _, sub in compat.sub_jaxprs(eqn):
            yield from branches(sub)


def test_several_tokens_and_vmap():
    p, xs = weights(bias=-0.6), tokens(48)
    _, step = calibrated(BLOCK, p, xs)
    for count in (3, 8):
        site = step.trace(p, xs[:count]).plan.sites[0]
        assert 2 <= len(site.rungs) <= 4
        packed = step.trace(p, xs[:count]).pack(p)
        for t in range(0, 16, 8):
            assert_same(step(packed, xs[t : t + count]), jax.jit(BLOCK)(p, xs[t : t + count]))
    packed = step.trace(p, xs[:1]).pack(p)
    batched = jax.jit(jax.vmap(lambda x: step(packed, x)))
    assert_same(batched(xs[:6, None]), jax.vmap(lambda x: BLOCK(p, x))(xs[:6, None]))
    # One switch over the sizes and the dense form, where vmap of a switch would run all of them.
    rungs = len(step.trace(p, xs[:1]).plan.sites[0].rungs)
    assert [n for n in branches(jax.make_jaxpr(batched)(xs[:6, None])) if n > 1] == [rungs]


def test_a_saved_calibration_gives_the_same_sizes(tmp_path):
    p, xs = weights(bias=-0.6), tokens(48)
    cal, step = calibrated(BLOCK, p, xs)
    cal.save(tmp_path / "calibration")
    again = hx.sparsify(BLOCK, config=LOSSLESS, calibration=hx.Calibration.load(tmp_path / "calibration"))
    assert again.trace(p, xs[:1]).plan.to_json() == step.trace(p, xs[:1]).plan.to_json()


def expected(needs, counts, dense, tried):
    """Bytes of a ladder of rows of one byte, added up token by token."""
    total = 0
    for need in needs:
        size = next((c for c in counts if c >= need), None)
        total += size if size is not None else dense + tried * counts[-1]
    return total / len(needs)


@pytest.mark.parametrize("tried", [False, True])
def test_a_ladder_has_the_fewest_expected_bytes(tried):
    """Against every ladder there is."""
    rng = np.random.default_rng(0)
    for _ in range(4):
        needs = np.minimum(1 + rng.geometric(0.2, size=60), 16)
        found = ladder_of(np.bincount(needs - 1, minlength=16), float, 20.0, tried=tried)
        np.testing.assert_allclose(found.read, expected(needs, found.counts, 20.0, tried))
        every = [(a, b, c) for a in range(1, 15) for b in range(a + 1, 16) for c in range(b + 1, 17)]
        best = min(expected(needs, counts, 20.0, tried) for counts in every)
        assert found.read <= best / (1 - 0.005) + 1e-9
        np.testing.assert_allclose(sum(found.shares), 1.0)


def test_a_ladder_of_many_tokens_and_of_few_sizes():
    needs = np.zeros(100, np.int64)
    needs[[4, 9, 59]] = 90, 9, 1
    assert ladder_of(needs, float, 100.0, tried=True).counts == (5, 10, 60)
    assert ladder_of(needs, float, 100.0, tried=True, last=80).counts[-1] == 80
    assert ladder_of(needs, float, 100.0, tried=True, last=7).counts == (5, 7)
    assert ladder_of(needs, float, 100.0, tried=True, least=20).counts[-1] == 60
    # Of eight tokens one mostly needs more.
    eight = ladder_of(needs, float, 100.0, tried=True, tokens=8)
    np.testing.assert_allclose(eight.shares[0], 0.9**8)
    flat = np.zeros(100, np.int64)
    flat[49] = 10
    assert ladder_of(flat, float, 100.0, tried=True).counts == (50,)
