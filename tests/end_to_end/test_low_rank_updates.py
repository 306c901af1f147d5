"""Low-rank updates (LoRA) of a block's products, and of a head's: the blocks and heads are found, proved and equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same, full_width, kinds

import hire_xform as hx

D, M, R, V = 32, 96, 4, 4096
FULL = full_width()


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"gate": (D, M), "up": (D, M), "down": (M, D), "head": (D, V)}
    made = {name: rng.normal(size=shape) * 0.3 for name, shape in shapes.items()}
    for name, (n, m) in shapes.items():
        made[f"{name}_a"], made[f"{name}_b"] = rng.normal(size=(n, R)) * 0.3, rng.normal(size=(R, m)) * 0.3
    return {name: jnp.asarray(value, jnp.float32) for name, value in made.items()}


def tokens(count=1, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, D)), jnp.float32)


def product(p, x, name, updated, after=True):
    """With its update, scaled as LoRA is, before or after it in the program."""
    if name not in updated:
        return x @ p[name]
    if after:
        return x @ p[name] + 0.5 * ((x @ p[f"{name}_a"]) @ p[f"{name}_b"])
    update = 0.5 * ((x @ p[f"{name}_a"]) @ p[f"{name}_b"])
    return x @ p[name] + update


def block(*updated, gated=True, after=True):
    def fun(p, x):
        hidden = jax.nn.relu(product(p, x, "gate", updated, after))
        if gated:
            hidden = hidden * product(p, x, "up", updated, after)
        return x + product(p, hidden, "down", updated, after)

    return fun


BLOCKS = {
    "down": block("down"),
    "down, first": block("down", after=False),
    "gate": block("gate"),
    "gate and down": block("gate", "down"),
    "all": block("gate", "up", "down"),
    "all, not gated": block("gate", "down", gated=False),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_with_updates_is_found_and_equal_at_full_width(name):
    fun, p, x = BLOCKS[name], weights(), tokens()
    step = hx.sparsify(fun, config=FULL)
    traced, want = step.trace(p, x), fun(p, x)
    assert kinds(traced.plan) == ["ffn"]
    whole = [r.weights for r in traced.plan.refusals if "low-rank update of a product" in r.reason]
    wanted = [("gate", "up")] if name == "all" else [("gate",)] if "gate" in name or "all" in name else []
    assert whole == [(f"p['{one}_b']",) for pair in wanted for one in pair]
    packed = traced.pack(p)
    assert_same(step(p, x), want)
    assert_same(step(packed, x), want)
    assert_same(jax.jit(step)(packed, x), want)
    assert_same(step(p, tokens(3)), fun(p, tokens(3)))
    many = tokens(6).reshape(3, 2, D)
    assert_same(jax.vmap(lambda x: step(packed, x))(many), jax.vmap(lambda x: fun(p, x))(many))


@pytest.mark.parametrize("name", BLOCKS)
def test_zeros_of_a_block_with_updates_are_proved(name):
    fun, p = BLOCKS[name], weights()
    step = hx.sparsify(fun, config=hx.lossless(rules=(hx.Rule("*", force=True, ffn=hx.Ffn(active=0.8, certify=True)),)))
    (site,) = step.trace(p, tokens()).plan.sites
    assert site.settings.certify
    fell_back = 0
    for seed in range(8):
        x = tokens(seed=seed)
        got, counts = step.with_fallbacks(p, x)
        assert_same(got, fun(p, x))
        fell_back += int(sum(counts.values()))
    assert fell_back < 4
    many = tokens(4).reshape(2, 2, D)
    packed = step.pack(p, tokens(2))
    assert_same(jax.vmap(lambda x: step(packed, x))(many), jax.vmap(lambda x: fun(p, x))(many))
    got = jax.grad(lambda x: step(packed, x).sum())(tokens(2))
    assert_same(got, jax.grad(lambda x: fun(p, x).sum())(tokens(2)))


def test_few_units_are_those_of_the_update_too():
    """What is left out is left out of both contracting products."""
    fun, p, x = block("down"), weights(), tokens()
    config = hx.Config(ffn=hx.Ffn(active=0.75, certify=False), rules=FORCE)
    step = hx.sparsify(fun, config=config)
    # About half of the units are zero: all others are computed.
    assert_same(step(p, x), fun(p, x))
    (site,) = step.trace(p, x).plan.sites
    assert set(site.weights) == {"p['gate']", "p['up']", "p['down']", "p['down_a']"}


def test_layers_with_updates_in_a_scan_and_in_calls():
    one = block("gate", "down")
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b]), weights(0), weights(1))

    def scanned(p, x):
        return jax.lax.scan(lambda x, own: (one(own, x), None), x, p)[0]

    def called(p, x):
        layer = jax.jit(one)
        return layer(jax.tree.map(lambda a: a[1], p), layer(jax.tree.map(lambda a: a[0], p), x))

    for fun, count in ((scanned, 1), (called, 2)):
        for config in (FULL, hx.lossless(rules=FORCE)):
            step = hx.sparsify(fun, config=config)
            assert kinds(step.trace(stack, tokens()).plan) == ["ffn"] * count
            assert_same(step(stack, tokens()), fun(stack, tokens()))
            assert_same(step(step.pack(stack, tokens()), tokens()), fun(stack, tokens()))


def test_a_head_with_an_update_is_proved():
    def fun(p, x):
        return jnp.argmax(product(p, x, "head", ("head",)), -1)

    p = weights()
    step = hx.sparsify(fun, config=hx.lossless(rules=FORCE))
    (site,) = step.trace(p, tokens()).plan.sites
    assert site.kind == "vocab"
    for seed in range(4):
        assert_same(step(p, tokens(2, seed)), fun(p, tokens(2, seed)))


def test_a_calibration_measures_a_block_with_updates():
    fun, p = block("gate", "down"), weights()
    config = hx.Config(rules=FORCE, ffn=hx.Ffn(certify=False))
    calibration = hx.calibrate(
        fun, [(p, tokens(16, seed)) for seed in range(2)], config=config, predictors=[hx.Quantized(8)]
    )
    step = hx.sparsify(fun, config=config, calibration=calibration)
    (site,) = step.trace(p, tokens()).plan.sites
    assert site.calibrated
    assert not site.static
    assert_same(step(p, tokens()), fun(p, tokens()), 1e-2)


def test_hidden_units_that_are_read_otherwise_too_stay():
    def fun(p, x):
        hidden = jax.nn.relu(x @ p["gate"])
        return hidden @ p["down"] + (hidden @ p["down_a"]) @ p["down_b"], hidden.sum()

    plan = hx.sparsify(fun, config=FULL).trace(weights(), tokens()).plan
    assert "ffn" not in kinds(plan)
    assert any("also read by reduce_sum" in r.reason for r in plan.refusals)
