"""Certified feed-forward blocks, and a whole step with head and blocks certified: ``hx.lossless()``."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import FORCE, assert_same, kinds, tolerance
from jax import lax

import hire_xform as hx

pytestmark = pytest.mark.any_jax("cases vary numbers and dtypes that are proved, one program each kind", every=3)

D, M = 24, 96


def certified(active=0.5, **ffn) -> hx.Config:
    return hx.Config(vocab=None, ffn=hx.Ffn(active=active, certify=True, **ffn), rules=FORCE)


def weights(dtype=jnp.float32, bias=-1.0, seed=0):
    """Biases that keep most units at zero, as trained ReLU models have them."""
    rng = np.random.default_rng(seed)
    made = {
        name: rng.normal(size=shape) * 0.3 for name, shape in {"up": (D, M), "gate": (D, M), "down": (M, D)}.items()
    }
    return {name: jnp.asarray(a, dtype) for name, a in {**made, "bias": rng.normal(size=M) * 0.3 + bias}.items()}


def tokens(count=1, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, D)), dtype)


BLOCKS = {
    "relu": lambda p, x: jax.nn.relu(x @ p["gate"] + p["bias"]) @ p["down"],
    "squared": lambda p, x: jnp.square(jax.nn.relu(x @ p["gate"] + p["bias"])) @ p["down"],
    "maximum": lambda p, x: jnp.maximum(0.0, x @ p["gate"] - 1.0) @ p["down"],
    "reglu": lambda p, x: (jax.nn.relu(x @ p["gate"] + p["bias"]) * (x @ p["up"])) @ p["down"],
    "reglu_bias": lambda p, x: ((x @ p["up"] + p["bias"]) * jax.nn.relu(x @ p["gate"] + p["bias"])) @ p["down"],
    "relu6": lambda p, x: jax.nn.relu6(x @ p["gate"] + p["bias"]) @ p["down"],
    "scaled": lambda p, x: (-0.5 * jax.nn.relu(p["bias"] + x @ p["gate"])) @ p["down"],
    "left": lambda p, x: (p["down"].T @ jax.nn.relu(p["gate"].T @ x.T + p["bias"][:, None])).T,
}


def run(fun, p, x, config):
    step = hx.sparsify(fun, config=config)
    traced = step.trace(p, x)
    assert kinds(traced.plan) == ["ffn"], traced.explain()
    result, counts = step.with_fallbacks(traced.pack(p), x)
    return result, sum(int(n) for n in counts.values())


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", BLOCKS)
def test_units_left_out_change_nothing(name, count):
    p, proved = weights(), 0
    for seed in range(4):
        x = tokens(count, seed=seed)
        result, fallbacks = run(BLOCKS[name], p, x, certified(0.75 if count > 1 else 0.5))
        assert_same(result, jax.jit(BLOCKS[name])(p, x))
        proved += not fallbacks
    assert proved >= 3


@pytest.mark.parametrize("spec", [hx.LowRank(0.75, bits=8), hx.LowRank(1.0, bits=4), hx.LowRank(0.75)], ids=str)
def test_units_are_proved_zero_by_other_predictors(spec):
    """Two blocks whose weights are stacked; the predictor is made of each by itself."""
    p = jax.tree.map(lambda a, b: jnp.stack([a, b]), weights(bias=-2.0), weights(bias=-2.0, seed=3))

    def layers(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x + BLOCKS["reglu_bias"](w, x)), None), x, p)[0]

    proved = 0
    for seed in range(3):
        x = tokens(2, seed=seed)
        result, fallbacks = run(layers, p, x, certified(0.9, predictor=spec))
        assert_same(result, layers(p, x))
        proved += 2 - fallbacks
    assert proved >= 4
    bad = {**p, "gate": p["gate"].at[0, 3, 5].set(jnp.nan)}
    result, _ = run(layers, bad, x, certified(0.9, predictor=spec))
    np.testing.assert_array_equal(jnp.isnan(result), jnp.isnan(layers(bad, x)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("name", ["relu", "reglu"])
def test_half_precision(name, dtype):
    p, x = weights(dtype), tokens(1, dtype)
    result, fallbacks = run(BLOCKS[name], p, x, certified(0.6))
    assert_same(result, jax.jit(BLOCKS[name])(p, x), tolerance(dtype))
    assert not fallbacks


def test_more_open_units_than_the_compiled_size_run_dense():
    p, x = weights(bias=2.0), tokens()  # most units are open
    for name in BLOCKS:
        if name != "maximum":
            result, fallbacks = run(BLOCKS[name], p, x, certified(0.25))
            assert fallbacks == 1
            assert_same(result, jax.jit(BLOCKS[name])(p, x), 1e-6)


def test_a_unit_a_rounding_above_zero_is_never_left_out():
    """Units at, and a rounding above and below, zero; each contributes hugely when it is not left out."""
    p, x = weights(), tokens()
    fallen = 0
    for shift in (0.0, 1e-3, 1e-5, 1e-7, -1e-7, -1e-3):
        q = {**p, "bias": -(x @ p["gate"])[0] + shift * jnp.asarray([1.0, -1.0] * (M // 2)), "down": p["down"] * 1e6}
        result, fallbacks = run(BLOCKS["relu"], q, x, certified(0.6))
        fallen += fallbacks
        want = np.asarray(jax.nn.relu(np.float64(x) @ np.float64(q["gate"]) + np.float64(q["bias"])) @ q["down"])
        # What is at rounding's mercy in the dense block is so here, and no more: 1e6 times some roundings of a sum.
        assert np.abs(np.asarray(result) - want).max() < 1e6 * 96 * 1e-6
    assert fallen >= 3


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-10, 1e10, 1e18, 1e30])
def test_huge_and_tiny_values(scale):
    for name in ("relu", "reglu"):
        for which in ("gate", "down", "x", "up"):
            p, x = weights(), tokens()
            if which == "x":
                x = x * scale
            else:
                p[which] = p[which] * scale
            result, _ = run(BLOCKS[name], p, x.astype(jnp.float32), certified(0.6))
            np.testing.assert_allclose(result, jax.jit(BLOCKS[name])(p, x), rtol=1e-3, atol=1e-5 * min(scale, 1.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["gate", "up", "down", "bias", "x"])
def test_what_is_not_finite_is_as_in_the_dense_block(which, bad):
    p, x = weights(), tokens()
    if which == "x":
        x = x.at[0, 3].set(bad)
    else:
        p[which] = p[which].at[(5, 3) if p[which].ndim == 2 else 5].set(bad)
    result, fallbacks = run(BLOCKS["reglu"], p, x, certified(0.6))
    # A unit whose own row is not finite ranks first and is computed; all else runs dense.
    assert fallbacks == (which != "gate")
    np.testing.assert_allclose(result, jax.jit(BLOCKS["reglu"])(p, x), rtol=1e-4, atol=1e-5)


def test_vmap_takes_the_tokens_of_all_examples_together():
    p, xs = weights(), jnp.stack([tokens(2, seed=s) for s in range(3)])
    step = hx.sparsify(BLOCKS["reglu"], config=certified(0.9))
    packed = step.trace(p, xs[0]).pack(p)
    batched = jax.jit(jax.vmap(lambda x: step(packed, x)))
    assert_same(batched(xs), jax.vmap(lambda x: BLOCKS["reglu"](p, x))(xs))
    # As many branches as without vmap, where vmap of a cond would run both sides and select.
    alone = jax.jit(step).lower(packed, xs[0]).as_text()
    assert batched.lower(xs).as_text().count("stablehlo.case") == alone.count("stablehlo.case")


def test_vmap_over_a_side_input():
    p, x = weights(), tokens(2)
    scales = jnp.asarray([[1.0], [2.0], [0.5]])

    def block(p, x, scale):
        return (jax.nn.relu(x @ p["gate"] + p["bias"]) * scale) @ p["down"]

    step = hx.sparsify(block, config=certified(0.9))
    packed = step.trace(p, x, scales[0]).pack(p)
    got = jax.jit(jax.vmap(lambda s: step(packed, x, s)))(scales)
    assert_same(got, jax.vmap(lambda s: block(p, x, s))(scales))


def test_the_derivative_is_the_dense_blocks():
    p, x = weights(), tokens(2)
    step = hx.sparsify(BLOCKS["reglu"], config=certified(0.9))
    packed = step.trace(p, x).pack(p)
    slope = jax.grad(lambda x, f, p: jnp.sin(f(p, x)).sum())
    assert_same(slope(x, step, packed), slope(x, BLOCKS["reglu"], p))


def test_groups_are_left_out_when_all_their_units_are_zero():
    p, x = weights(bias=-2.0), tokens()
    result, fallbacks = run(BLOCKS["relu"], p, x, certified(0.9, group_size=4))
    assert_same(result, BLOCKS["relu"](p, x))
    assert not fallbacks


def test_blocks_in_a_scan_are_counted_together():
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b]), weights(), weights(bias=2.0, seed=3))

    def layers(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x + BLOCKS["relu"](w, x)), None), x, p)[0]

    x = tokens()
    result, fallbacks = run(layers, stack, x, certified(0.6))
    assert_same(result, layers(stack, x))
    assert fallbacks == 1  # the second layer's biases open most of its units


@pytest.mark.parametrize(
    "act",
    [jax.nn.silu, jax.nn.gelu, jnp.tanh, lambda u: jnp.where(u > -1, u, 0), lambda u: jax.nn.relu(-u)],
    ids=["silu", "gelu", "tanh", "where", "negated"],
)
def test_what_is_not_proved_is_refused(act):
    config = hx.Config(vocab=None, ffn=hx.Ffn(certify=True, activations="any"), rules=FORCE)
    plan = hx.sparsify(lambda p, x: act(x @ p["gate"]) @ p["down"], config=config).trace(weights(), tokens()).plan
    assert not plan.sites
    assert all("certify=True proves zeros of max(u, 0)" in r.reason for r in plan.refusals)


def test_calls_of_one_jitted_layer_are_counted_apart():
    stack = [weights(), weights(bias=2.0, seed=3)]
    layer = jax.jit(lambda w, x: jnp.tanh(x + BLOCKS["relu"](w, x)))
    step = hx.sparsify(lambda p, x: layer(p[1], layer(p[0], x)), config=certified(0.6))
    result, counts = step.with_fallbacks(stack, tokens())
    assert [int(n) for n in counts.values()] == [0, 1]
    assert_same(result, layer(stack[1], layer(stack[0], tokens())))


def test_a_lossless_step_has_the_dense_tokens_and_logits():
    model = models.MODELS[0]
    params = model.make_params()
    for w in params["layers"]:
        w["b1"] = w["b1"] - 1.0
    config = hx.lossless(rules=(*FORCE, hx.Rule("*", ffn=hx.Ffn(certify=True, active=0.9))))
    assert config.vocab.certify
    assert config.ffn.certify
    step = hx.sparsify(model.step, config=config)
    cache, tokens_in = models.make_cache(1), jnp.asarray([3], jnp.int32)
    traced = step.trace(params, cache, tokens_in, jnp.zeros(models.D))
    packed, want_cache, want_tokens = traced.pack(params), cache, tokens_in
    for _ in range(3):
        (logits, cache), counts = step.with_fallbacks(packed, cache, tokens_in, jnp.zeros(models.D))
        want, want_cache = model.step(params, want_cache, want_tokens, jnp.zeros(models.D))
        assert len(counts) == model.ffn + model.vocab
        tokens_in, want_tokens = logits.argmax(-1), want.argmax(-1)
        assert int(tokens_in[0]) == int(want_tokens[0])
        assert_same(cache, want_cache, 1e-4)


def test_calibrated_layers_of_a_loop_have_sizes_of_their_own():
    """The first layer leaves few units open and the second many; neither runs dense."""
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b]), weights(bias=-3.0), weights(bias=0.0, seed=3))

    def layers(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x + BLOCKS["relu"](w, x)), None), x, p)[0]

    config = hx.lossless(rules=FORCE)
    cal = hx.calibrate(layers, [(stack, tokens(64))], config=config, predictors=[hx.Quantized(8)])
    few, many = next(iter(cal.sites.values())).sizes
    assert few < many / 2
    step = hx.sparsify(layers, config=config, calibration=cal)
    traced = step.trace(stack, tokens())
    assert "each layer has its own" in traced.plan.sites[0].calibrated
    x = tokens(64)[5:6]
    result, counts = step.with_fallbacks(traced.pack(stack), x)
    assert_same(result, layers(stack, x))
    assert [int(n) for n in counts.values()] == [0]
