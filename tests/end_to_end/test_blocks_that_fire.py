"""Blocks whose units fire often or seldom: proved, results are dense; not proved, they are, or the call says so."""

import functools
from statistics import NormalDist

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import FORCE, assert_same
from jax import lax

import hire_xform as hx

pytestmark = pytest.mark.any_jax(
    "cases vary how often units fire, which is counted after JAX has done its part", every=3
)

D, M = 32, 96
SHARES = (0.05, 0.25, 0.5, 0.9)
relu = jax.nn.relu


def config(certify=False, active=0.25, **ffn):
    return hx.Config(vocab=None, ffn=hx.Ffn(active=active, certify=certify, **ffn), rules=FORCE)


def weights(share=0.5, seed=0):
    """A block of which this share of the units fires for an ordinary token."""
    rng = np.random.default_rng(seed)
    shapes = {"up": (D, M), "other": (D, M), "down": (M, D)}
    made = {name: jnp.asarray(rng.normal(size=s) * s[0] ** -0.5, jnp.float32) for name, s in shapes.items()}
    return {**made, "bias": jnp.full(M, NormalDist().inv_cdf(share), jnp.float32)}


def tokens(count=1, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, D)), jnp.float32)


def block(p, x):
    return relu(x @ p["up"] + p["bias"]) @ p["down"]


def reglu(p, x):
    return (relu(x @ p["up"] + p["bias"]) * (x @ p["other"])) @ p["down"]


def firing(p, x):
    """Which units fire, bool ``[T, M]``."""
    return np.asarray(x @ p["up"] + p["bias"]) > 0.0


def error(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.maximum(jnp.linalg.norm(want), 0.1))


def count_of(counts):
    (count,) = counts.values()
    return int(count)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("fun", [block, reglu])
def test_a_block_that_is_not_proved_holds_what_fires_or_says_so(fun, share):
    p, seen = weights(share), set()
    step = hx.sparsify(fun, config=config())
    packed = step.trace(p, tokens()).pack(p)
    for seed in range(12):
        x = tokens(1, seed)
        got, counts = step.with_fallbacks(packed, x)
        short, fired = count_of(counts), firing(p, x).sum()
        seen.add(short)
        if short == 0:
            assert error(got, fun(p, x)) < 1e-2
        # Predictions within rounding of zero may fall on either side of it.
        assert short == (fired > M // 4) or abs(fired - M // 4) <= 2
    assert seen == {0.05: {0}, 0.25: {0, 1}, 0.5: {1}, 0.9: {1}}[share]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("count", [1, 3])
def test_a_certified_block_is_dense_whatever_fires(share, count):
    p, x = weights(share), tokens(count)
    step = hx.sparsify(reglu, config=config(certify=True, active=0.5))
    got, counts = step.with_fallbacks(step.trace(p, x).pack(p), x)
    assert_same(got, reglu(p, x), 1e-5)
    assert share == 0.5 or count_of(counts) == (share > 0.5)


def test_several_tokens_share_a_set_that_holds_what_any_of_them_wants_or_says_so():
    outcomes = set()
    for share, active in ((0.05, 0.25), (0.1, 0.1), (0.2, 0.25), (0.5, 0.25)):
        p = weights(share)
        step = hx.sparsify(block, config=config(active=active))
        packed = step.trace(p, tokens(3)).pack(p)
        assert step.trace(p, tokens(3)).plan.sites[0].shared
        for seed in range(6):
            x = tokens(3, seed)
            got, counts = step.with_fallbacks(packed, x)
            outcomes.add(count_of(counts))
            assert count_of(counts) or error(got, block(p, x)) < 1e-2
    assert outcomes == {0, 1}


@pytest.mark.parametrize("model", models.MODELS, ids=str)
@pytest.mark.parametrize("certify", [False, True], ids=["plain", "certified"])
def test_every_model_holds_to_it(model, certify):
    """Half of the units of these models fire; computed are a quarter of them, or nine tenths."""
    params = model.make_params()
    rest = models.make_cache(1), jnp.asarray([3], jnp.int32), jnp.zeros(models.D)
    want = jax.jit(model.step)(params, *rest)
    for active in (0.25, 0.9) if not certify else (0.9,):
        step = hx.sparsify(model.step, config=config(certify, active))
        traced = step.trace(params, *rest)
        got, counts = step.with_fallbacks(traced.pack(params), *rest)
        assert set(counts) == {site.path for site in traced.plan.sites}
        short = sum(int(n) for n in counts.values())
        assert bool(short) == (active == 0.25)
        if certify or not short:
            assert_same(got, want, 1e-5 if certify else 1e-2)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0], ids=["flat", "ordinary", "peaked"])
def test_a_certified_head_says_the_dense_token_whatever_its_logits_are(spread):
    rng = np.random.default_rng(5)
    p = {"head": jnp.asarray(rng.normal(size=(D, 300)) * spread, jnp.float32)}
    config = hx.Config(vocab=hx.Vocab(candidates=8, certify=True), ffn=None, rules=FORCE)
    step = hx.sparsify(lambda p, x: jnp.argmax(x @ p["head"], -1), config=config)
    packed = step.trace(p, tokens()).pack(p)
    for seed in range(6):
        x = tokens(1, seed)
        assert step(packed, x) == jnp.argmax(x @ p["head"], -1)


def layers(stack, x, one=block):
    return lax.scan(lambda x, p: (x + one(p, x), None), x, stack)[0]


def test_layers_of_a_loop_are_counted_one_by_one():
    stack = jax.tree.map(lambda *a: jnp.stack(a), weights(0.03), weights(0.9), weights(0.8))
    for one in (block, jax.checkpoint(block), jax.jit(block)):
        step = hx.sparsify(functools.partial(layers, one=one), config=config())
        _, counts = step.with_fallbacks(stack, tokens())
        assert count_of(counts) == 2
        assert [int(n) for n in next(iter(step.with_rungs(stack, tokens())[1].values()))] == [1, 2]


def test_derivatives_batches_and_outer_transformations_go_through():
    p, x = weights(0.05), tokens()
    step = hx.sparsify(block, config=config())
    packed = step.trace(p, x).pack(p)
    got = jax.grad(lambda x: jnp.sin(step(packed, x)).sum())(x)
    assert_same(got, jax.grad(lambda x: jnp.sin(block(p, x)).sum())(x), 1e-2)
    many = tokens(5)[:, None]
    assert_same(jax.jit(jax.vmap(lambda x: step(packed, x)))(many), jnp.stack([step(packed, x) for x in many]), 1e-5)
    for share in (0.05, 0.9):
        _, counts = jax.vmap(functools.partial(step.with_fallbacks, weights(share)))(many)
        assert [list(map(int, each)) for each in counts.values()] == [[int(share == 0.9)] * 5]


def test_what_is_asked_for_without_zeros_is_not_counted():
    p, x = weights(0.9), tokens()
    asked = hx.sparsify(block, config=config(activations="any"))
    assert asked.with_fallbacks(p, x)[1] == {}

    def chosen(p, x):
        u = relu(x @ p["up"])
        return jnp.where(u >= lax.top_k(u, 8)[0][..., -1:], u, 0.0) @ p["down"]

    own = hx.sparsify(chosen, config=config(active=0.25))
    assert own.trace(p, x).plan.sites[0].own
    assert own.with_fallbacks(p, x)[1] == {}


def test_like_layers_that_are_jitted_share_a_function_and_are_counted_apart():
    shares = (0.03, 0.9, 0.03, 0.8)
    params = [weights(s, seed) for seed, s in enumerate(shares)]
    one = jax.jit(lambda p, x: x + block(p, x))

    def deep(params, x):
        for p in params:
            x = one(p, x / jnp.linalg.norm(x) * D**0.5)
        return x

    x = tokens()
    for certify in (False, True):
        step = hx.sparsify(deep, config=config(certify))
        traced = step.trace(params, x)
        text = traced.lower().as_text()
        assert text.count("func.func private @hire_ffn") == 1
        _, counts = step.with_fallbacks(params, x)
        assert [int(counts[site.path]) for site in traced.plan.sites] == [0, 1, 0, 1]


def test_a_loop_in_a_jitted_layer_is_counted_for_each_call():
    stacks = [jax.tree.map(lambda a, b: jnp.stack([a, b]), weights(s), weights(0.9)) for s in (0.03, 0.9)]
    several = jax.jit(layers)

    def deep(stacks, x):
        for stack in stacks:
            x = several(stack, x / jnp.linalg.norm(x) * D**0.5)
        return x

    step = hx.sparsify(deep, config=config())
    _, counts = step.with_fallbacks(stacks, tokens())
    assert sorted(int(n) for n in counts.values()) == [1, 2]


# Activations by the share of ordinary inputs that they leave zeros for, and whether that makes zeros of units left out.
OFTEN = {
    "relu": (relu, 0.5),
    "squared": (lambda h: jnp.square(relu(h)), 0.5),
    "negative": (lambda h: relu(-h), 0.5),
    "relu6": (jax.nn.relu6, 0.5),
    "clip": (lambda h: jnp.clip(h, 0.0, 4.0), 0.5),
    "biased_a_little": (lambda h: relu(h + 0.5), 0.31),
    "biased_the_other_way": (lambda h: relu(h - 1.0), 0.84),
    "where": (lambda h: jnp.where(h > 0.0, h, 0.0), 0.5),
    "where_below": (lambda h: jnp.where(h < -0.2, h, 0.0), 0.58),
    "hard_shrink": (lambda h: jnp.where(jnp.abs(h) > 0.5, h, 0.0), 0.38),
}
SELDOM = {
    "hard_swish": (jax.nn.hard_swish, "under 1 %"),
    "hard_sigmoid": (jax.nn.hard_sigmoid, "under 1 %"),
    "relu_plus_5": (lambda h: relu(h + 5.0), "under 1 %"),
    "relu_plus_an_array": (lambda h: relu(h + jnp.full(M, 1.5)), "about 7 %"),
    "relu_minus": (lambda h: relu(5.0 - h), "under 1 %"),
    "below_five": (lambda h: jnp.where(h < 5.3, h, 0.0), "under 1 %"),
    "sparse_plus": (jax.nn.sparse_plus, "about 16 %"),
    "narrow_shrink": (lambda h: jnp.where(jnp.abs(h) > 0.1, h, 0.0), "about 8 %"),
    "relu_of_a_tenth": (lambda h: relu(0.1 * h + 0.3), "under 1 %"),
}


def through(act, pre=lambda p, h: h):
    return lambda p, x: act(pre(p, x @ p["up"])) @ p["down"]


@pytest.mark.parametrize("name", OFTEN)
def test_an_activation_that_is_often_zero_is_a_site(name):
    act, share = OFTEN[name]
    plan = hx.sparsify(through(act), config=config()).trace(weights(), tokens()).plan
    assert [s.kind for s in plan.sites] == ["ffn"]
    assert plan.decisions[0].match.region.zero_share == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("name", SELDOM)
def test_an_activation_that_is_seldom_zero_is_refused_unless_asked_for(name):
    act, often = SELDOM[name]
    plan = hx.sparsify(through(act), config=config()).trace(weights(), tokens()).plan
    assert not plan.sites
    for refusal in plan.refusals:
        assert (
            f"is zero for {often} of ordinary inputs only, so units left out would change the result" in refusal.reason
        )
        assert 'activations="any"' in refusal.reason
    asked = hx.sparsify(through(act), config=config(activations="any")).trace(weights(), tokens()).plan
    assert [s.kind for s in asked.sites] == ["ffn"]


def test_zeros_are_found_behind_what_is_learned_or_added():
    kept = {
        "learned": through(relu, lambda p, h: h + p["bias"]),
        "learned_where": through(lambda h: jnp.where(h > 0, h, 0.0), lambda p, h: h + p["bias"]),
        "scaled": through(lambda h: jnp.where(h > 0, h, 0.0), lambda p, h: h * p["bias"]),
        "sum_of_two": lambda p, x: relu(x @ p["up"] + x @ p["other"]) @ p["down"],
        "bfloat16": through(lambda h: relu(h.astype(jnp.bfloat16)).astype(jnp.float32)),
        "reglu": reglu,
    }
    for name, fun in kept.items():
        plan = hx.sparsify(fun, config=config()).trace(weights(), tokens()).plan
        assert [s.kind for s in plan.sites] == ["ffn"], (name, plan.refusals)
    scaled = through(jax.nn.hard_swish, lambda p, h: h * p["bias"])
    assert not hx.sparsify(scaled, config=config()).trace(weights(), tokens()).plan.sites


def test_thresholds_decide_by_the_share_of_ordinary_inputs_on_their_side():
    rng = np.random.default_rng(0)
    for threshold in rng.uniform(-3.0, 3.0, size=25):
        t = float(threshold)
        below = NormalDist().cdf(t)
        forms = {
            "shifted": (lambda h, t=t: relu(h - t), below),
            "where": (lambda h, t=t: jnp.where(h > t, h, 0.0), below),
            "turned": (lambda h, t=t: jnp.where(h < t, h, 0.0), 1.0 - below),
            "scaled": (lambda h, t=t: relu(3.0 * h - 3.0 * t), below),
        }
        name = rng.choice(list(forms))
        act, share = forms[name]
        if abs(share - 0.3) < 0.01:
            continue
        plan = hx.sparsify(through(act), config=config()).trace(weights(), tokens()).plan
        assert bool(plan.sites) == (share > 0.3), (name, t, share)


@pytest.mark.parametrize("name", ["relu_plus_5", "relu_plus_an_array", "hard_swish", "hard_sigmoid"])
def test_rare_zeros_are_proved_for_each_input(name):
    """A gate tells zeros however rare they are; where all units fire, the dense block runs and is counted."""
    fun = through(SELDOM[name][0])
    p = weights()
    step = hx.sparsify(fun, config=config(certify=True, active=0.5))
    for shift, dense in ((0.0, 1), (-12.0, 0)):
        # Another input's products: pushed to where the activation is zero.
        own = {**p, "up": p["up"].at[0].set(shift)}
        x = tokens().at[0, 0].set(1.0)
        got, counts = step.with_fallbacks(own, x)
        assert count_of(counts) == dense
        assert_same(got, fun(own, x), 1e-5)
