"""Layers of one loop that have sizes of their own."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import FORCE, assert_same

import hire_xform as hx
from hire_xform.passes.plan.levels import levels_of

FORCED = hx.Config(rules=FORCE)
# Few units in the one layer and many in the other.
SIZES = np.asarray([3, 17])


def arguments(seed=0, batch=1):
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, models.V, size=batch), jnp.int32)
    return models.make_cache(batch, jnp.float32), tokens, jnp.zeros(models.D)


def with_sizes(calibration, sizes):
    """A calibration whose stacked blocks have these sizes."""
    sites = {
        path: dataclasses.replace(site, sizes=np.resize(sizes, site.stack)) if site.stack else site
        for path, site in calibration.sites.items()
    }
    return dataclasses.replace(calibration, sites=sites)


def made(model):
    params = model.make_params()
    calibration = hx.calibrate(model.step, [(params, *arguments(s, 3)) for s in range(2)], predictors=[hx.Quantized(8)])
    return params, with_sizes(calibration, SIZES)


def unrolled_config(traced):
    """For the model without its loop: the sizes stated layer by layer, and the head's."""
    flat = hx.sparsify(models.unrolled, config=FORCED).trace(models.list_params(), *arguments())
    paths = [s.path for s in flat.plan.sites if s.kind == "ffn"]
    rules = [hx.Rule(p, ffn=hx.Ffn(active=int(k) / models.M)) for p, k in zip(paths, SIZES, strict=True)]
    head = next(s.computed for s in traced.plan.sites if s.kind == "vocab")
    return hx.Config(vocab=hx.Vocab(candidates=head), rules=(*FORCE, *rules))


NESTED = ("scanned", "scanned_tied", "jit_scan_jit", "indexed", "while_indexed")
STACKED = [m for m in models.MODELS if m.name in NESTED]


@pytest.mark.any_jax("cases vary the model, whose layers differ alike", every=3)
@pytest.mark.parametrize("model", STACKED, ids=str)
def test_each_layer_computes_its_own_number_of_units(model):
    params, calibration = made(model)
    step = hx.sparsify(model.step, config=FORCED, calibration=calibration)
    traced = step.trace(params, *arguments())
    ffn = next(s for s in traced.plan.sites if s.kind == "ffn")
    assert ffn.computed == 17
    assert "each layer has its own in a branch (3, 17)" in ffn.calibrated
    # Without the loop, the sizes stated layer by layer, the same units are chosen.
    if model.name == "scanned":
        want = hx.sparsify(models.unrolled, config=unrolled_config(traced))(models.list_params(), *arguments())
        assert_same(step(params, *arguments()), want)
        packed = traced.pack(params)
        assert_same(step(packed, *arguments()), want)
        assert_same(jax.jit(step)(packed, *arguments()), want)
    shared = hx.sparsify(model.step, config=FORCED, calibration=with_sizes(calibration, [17, 17]))
    most = next(s for s in shared.trace(params, *arguments()).plan.sites if s.kind == "ffn")
    assert "each layer" not in most.calibrated
    per_layer = ffn.sparse_bytes / most.sparse_bytes
    turns = most.dense_bytes / (2 * models.D * models.M * 4)
    saved = (17 - 3) / 2 * 2 * models.D * 4
    assert per_layer == pytest.approx(1 - saved * turns / most.sparse_bytes, rel=1e-3)
    got, dense = step(params, *arguments()), jax.jit(model.step)(params, *arguments())
    assert jax.tree.structure(got) == jax.tree.structure(dense)
    whole = hx.sparsify(model.step, config=FORCED, calibration=with_sizes(calibration, [models.M, models.M - 1]))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(whole(params, *arguments())))


def test_derivatives_and_batches_go_through_the_branches():
    params, calibration = made(STACKED[0])
    step = hx.sparsify(models.scanned, config=FORCED, calibration=calibration)
    traced = step.trace(params, *arguments())
    packed = traced.pack(params)
    cache, tokens, bias = arguments()

    def of(bias):
        return step(packed, cache, tokens, bias)[0].sum()

    flat = hx.sparsify(models.unrolled, config=unrolled_config(traced)).trace(models.list_params(), *arguments())
    plain = hx.sparsify(models.unrolled, config=unrolled_config(traced))
    assert [s.computed for s in flat.plan.sites if s.kind == "ffn"] == [3, 17]
    listed = flat.pack(models.list_params())
    assert_same(jax.grad(of)(bias), jax.grad(lambda b: plain(listed, cache, tokens, b)[0].sum())(bias))
    many = jnp.stack([bias, bias + 0.1])
    assert_same(jax.vmap(of)(many), jnp.stack([of(b) for b in many]))


def test_a_layer_that_its_own_size_is_too_small_for_is_counted():
    """Half of the units fire: three, and seventeen, of the forty do not hold them; thirty-six do."""
    params, calibration = made(STACKED[0])
    for sizes, short in (([3, 17], 2), ([3, 36], 1), ([30, 36], 0)):
        step = hx.sparsify(models.scanned, config=FORCED, calibration=with_sizes(calibration, sizes))
        site = next(s for s in step.trace(params, *arguments()).plan.sites if s.kind == "ffn")
        assert "in a branch" in site.calibrated
        assert int(step.with_fallbacks(params, *arguments())[1][site.path]) == short


def test_few_levels_have_the_smallest_sum():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 30, size=7)
        found = levels_of(sizes, 3)
        own = np.asarray(found.counts)[found.array]
        assert (own >= sizes).all()
        assert len(found.counts) <= 3
        known = np.unique(sizes)
        least = min(
            sum(min(c for c in cut if c >= s) for s in sizes)
            for n in range(1, 4)
            for cut in itertools.combinations(known, n)
            if max(cut) == known[-1]
        )
        assert own.sum() == least


def test_sizes_that_hardly_differ_are_shared_and_it_is_said():
    params, calibration = made(STACKED[0])
    shared = hx.sparsify(models.scanned, config=FORCED, calibration=with_sizes(calibration, [39, 40]))
    site = next(s for s in shared.trace(params, *arguments()).plan.sites if s.kind == "ffn")
    assert "the layers share it, as sizes of their own (39, 40) save 1." in site.calibrated
