"""A model that keeps its best groups of neighbouring units, as one trained for HiRE does, is computed by groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same, full_width, kinds
from jax import lax
from test_own_sparsity import THRESHOLDS, check_held, gated_block, plain_block, rows, site_of, tokens, weights

import hire_xform as hx
from hire_xform.lowering.primitives.ranks import over_groups

M, G, K = 96, 8, 3


def grouped(u):
    return u.reshape(*u.shape[:-1], -1, G)


def kept(u, score, best=lambda s: lax.top_k(s, K)[0][..., -1:]):
    """Groups whose score is among the best; others are zero."""
    return jnp.where((score >= best(score))[..., None], grouped(u), 0).reshape(u.shape)


def by_indices(u):
    score = jnp.abs(grouped(u)).max(-1)
    mask = jnp.zeros_like(score).at[rows(score), lax.top_k(score, K)[1]].set(1.0)
    return (grouped(u) * mask[..., None]).reshape(u.shape)


def by_one_hot(u):
    index = lax.top_k(jnp.linalg.norm(grouped(u), axis=-1), K)[1]
    return u * jnp.repeat(jax.nn.one_hot(index, M // G, dtype=u.dtype).sum(-2), G, axis=-1)


def after_relu(u):
    u = jax.nn.relu(u)
    return kept(u, jnp.square(grouped(u)).sum(-1))


CHOICES = {
    "energy": lambda u: kept(u, jnp.square(grouped(u)).sum(-1)),
    "mean": lambda u: kept(u, jnp.mean(grouped(u), -1)),
    "largest": lambda u: kept(u, grouped(u).max(-1)),
    "approx": lambda u: kept(u, jnp.abs(grouped(u)).sum(-1), lambda s: lax.approx_max_k(s, K)[0][..., -1:]),
    "sorted": lambda u: kept(u, jnp.square(grouped(u)).sum(-1), lambda s: jnp.sort(s, -1)[..., -K][..., None]),
    "indices": by_indices,
    "one_hot": by_one_hot,
    "after_relu": after_relu,
    # The largest of each group once more times each of its units.
    "scaled": lambda u: jnp.repeat(jnp.where(*_largest(u), 0), G, axis=-1) * u,
}


def _largest(u):
    score = grouped(u).max(-1)
    return score >= lax.top_k(score, K)[0][..., -1:], score


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", CHOICES)
def test_every_spelling_fires_once_and_is_dense_at_full_width(name, count, evaluated):
    fun, p, x = plain_block(CHOICES[name]), weights(), tokens(count)
    site = site_of(fun, p, x, full_width(activations="zeroing"))
    assert (site.own, site.settings.group_size, site.computed) == (f"top {K} groups of {G}", G, M)
    if not evaluated:
        return
    step = hx.sparsify(fun, config=full_width(activations="zeroing"))
    packed = step.trace(p, x).pack(p)
    assert_same(step(packed, x), fun(p, x))
    slope = jax.grad(lambda x, f, p: jnp.sin(f(p, x)).sum())
    assert_same(slope(x, step, packed), slope(x, fun, p), 1e-4)


def test_the_models_own_groups_and_half_as_many_again_are_computed():
    p, x = weights(), tokens(1)
    own = site_of(plain_block(CHOICES["energy"]), p, x, hx.approximate(rules=FORCE))
    assert own.computed == G * round(1.5 * K + 0.5)
    coarse = hx.Config(ffn=hx.Ffn(active=0.5, group_size=2 * G), rules=FORCE)
    assert site_of(plain_block(CHOICES["energy"]), p, x, coarse).computed == M // 2
    assert_same(hx.sparsify(plain_block(CHOICES["energy"]), config=coarse)(p, x), plain_block(CHOICES["energy"])(p, x))


SCORES = {
    "energy": lambda u: jnp.square(grouped(u)).sum(-1),
    "indices": lambda u: jnp.abs(grouped(u)).max(-1),
    "one_hot": lambda u: jnp.linalg.norm(grouped(u), axis=-1),
}


@pytest.mark.parametrize("name", SCORES)
def test_groups_are_the_dense_ones_whenever_the_candidates_hold_them(name):
    settings = hx.Ffn(active=0.34, predictor=hx.LowRank(4))
    check_held(plain_block(CHOICES[name]), settings, lambda hidden: lax.top_k(SCORES[name](hidden), K)[1])


def test_a_gated_block_in_a_scan_under_vmap():
    fun = gated_block(CHOICES["energy"])
    stack = jax.tree.map(lambda a: jnp.stack([a, a * 0.9, -a]), weights())

    def layers(p, x):
        return lax.scan(lambda x, w: (x + fun(w, x), None), x, p)[0]

    step = hx.sparsify(layers, config=hx.Config(ffn=hx.Ffn(active=0.6), rules=FORCE))
    traced = step.trace(stack, tokens(2))
    assert [s.own for s in traced.plan.sites] == [f"top {K} groups of {G}"]
    packed = traced.pack(stack)
    batch = jnp.stack([tokens(2, seed=s) for s in range(3)])
    assert_same(jax.vmap(lambda x: step(packed, x))(batch), jax.vmap(lambda x: layers(stack, x))(batch), 1e-4)


def test_equal_groups_go_the_way_the_dense_function_goes():
    p = weights()
    p["gate"] = jnp.tile(p["gate"][:, :G], (1, M // G))
    for name in ("indices", "one_hot"):
        fun = plain_block(CHOICES[name])
        step = hx.sparsify(fun, config=hx.Config(ffn=hx.Ffn(active=0.5), rules=FORCE))
        assert_same(step(p, tokens(3)), fun(p, tokens(3)))


def test_a_group_size_that_would_cut_the_models_groups_is_refused():
    p, x = weights(), tokens(1)
    step = hx.sparsify(plain_block(CHOICES["energy"]), config=hx.Config(ffn=hx.Ffn(group_size=12), rules=FORCE))
    plan = step.trace(p, x).plan
    assert not plan.sites
    assert "group_size=12 is no multiple of the 8 units" in plan.refusals[0].reason
    assert_same(step(p, x), jax.jit(plain_block(CHOICES["energy"]))(p, x), 0.0)


def strided(u):
    groups = u.reshape(*u.shape[:-1], G, M // G)
    score = jnp.square(groups).sum(-2)
    return jnp.where((score >= lax.top_k(score, K)[0][..., -1:])[..., None, :], groups, 0).reshape(u.shape)


def group_norm(u):
    return (grouped(u) / (1e-3 + jnp.linalg.norm(grouped(u), axis=-1, keepdims=True))).reshape(u.shape)


TWINS = {
    "strided": strided,
    "group_norm": group_norm,
    "group_softmax": lambda u: jax.nn.softmax(grouped(u), -1).reshape(u.shape),
    "best_left_out": lambda u: u - CHOICES["energy"](u),
    "two_sizes": lambda u: CHOICES["energy"](u) * (jnp.abs(u) >= lax.top_k(jnp.abs(u), 40)[0][..., -1:]),
    "kept_in_one_of_two": lambda u: CHOICES["energy"](u) + jax.nn.gelu(u),
    "max_out": lambda u: jnp.repeat(grouped(u).max(-1), G, axis=-1),
}


@pytest.mark.parametrize("name", TWINS)
def test_near_misses_are_refused_and_unchanged(name):
    fun, p, x = plain_block(TWINS[name]), weights(), tokens(3)
    for config in (full_width(), hx.Config(ffn=hx.Ffn(active=0.2, group_size=G, activations="any"), rules=FORCE)):
        step = hx.sparsify(fun, config=config)
        plan = step.trace(p, x).plan
        assert "ffn" not in kinds(plan)
        assert plan.refusals
        assert_same(step(p, x), jax.jit(fun)(p, x))


def test_sums_and_maxima_over_groups():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(3, 24)), jnp.float32)
    groups = np.asarray(values).reshape(3, 4, 6)
    np.testing.assert_allclose(over_groups(values, 6, False), np.repeat(groups.sum(-1), 6, -1), rtol=1e-5)
    np.testing.assert_array_equal(over_groups(values, 6, True), np.repeat(groups.max(-1), 6, -1))


def test_groups_behind_a_threshold_are_chosen_whole():
    """Each unit times the largest of its group, of what is left above the threshold."""

    def scaled(u):
        kept = THRESHOLDS["gemma"](u)
        return jnp.repeat(grouped(kept).max(-1), G, axis=-1) * kept

    fun, p, x = plain_block(scaled), weights(), tokens(2)
    site = site_of(fun, p, x, full_width(activations="zeroing"))
    assert (site.own, site.settings.group_size) == ("units above mean + 1.28 deviations", G)
    config = hx.Config(ffn=hx.Ffn(active=0.9, certify=False), rules=FORCE)
    assert_same(hx.sparsify(fun, config=config)(p, x), fun(p, x))
    assert "groups of units" in hx.sparsify(fun, config=hx.Config(rules=FORCE)).explain(p, x)


def test_groups_of_the_model_are_calibrated_as_they_are():
    held = weights()
    dense = plain_block(CHOICES["energy"])
    given = [(held, tokens(4))] * 2
    config = hx.Config(rules=FORCE)
    calibration = hx.calibrate(dense, given, config=config, predictors=[hx.Quantized(8)])
    (measured,) = calibration.sites.values()
    assert (measured.group_size, measured.order) == (G, None)
    (site,) = hx.sparsify(dense, config=config, calibration=calibration).trace(*given[0]).plan.sites
    assert site.calibrated.startswith("calibrated: ")
    # In a function of the same weights without the top-k they are not made other groups of, either.
    same = hx.sparsify(
        plain_block(jax.nn.relu), config=hx.Config(ffn=hx.Ffn(group_size=G), rules=FORCE), calibration=calibration
    )
    (site,) = same.trace(*given[0]).plan.sites
    assert "neighbours" not in site.calibrated
