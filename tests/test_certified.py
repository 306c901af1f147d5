"""``Vocab(certify=True)`` through the pass: every nesting, the fallbacks counted, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import FORCE, kinds

import hire_xform as hx


def certified(candidates=16, **vocab) -> hx.Config:
    return hx.Config(vocab=hx.Vocab(candidates=candidates, certify=True, **vocab), ffn=None, rules=FORCE)


def arguments(batch=3, dtype=jnp.float32, seed=3):
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, models.V, size=batch), jnp.int32)
    return models.make_cache(batch, dtype), tokens, jnp.zeros(models.D)


@pytest.mark.parametrize("model", models.MODELS, ids=str)
def test_the_greedy_token_is_the_dense_one_in_every_nesting(model):
    params, rest = model.make_params(), arguments()
    step = hx.sparsify(model.step, config=certified())
    traced = step.trace(params, *rest)
    assert kinds(traced.plan) == ["vocab"] * model.vocab
    packed = traced.pack(params)
    (logits, cache), counts = step.with_fallbacks(packed, *rest)
    want, want_cache = jax.jit(model.step)(params, *rest)
    np.testing.assert_array_equal(jnp.argmax(logits, -1), jnp.argmax(want, -1))
    assert jax.tree.structure(cache) == jax.tree.structure(want_cache)
    assert list(counts) == [traced.plan.sites[0].path]
    assert all(n.dtype == jnp.int32 and n.shape == () and n == 0 for n in counts.values())
    np.testing.assert_array_equal(step(packed, *rest)[0], logits)


def head_only(params, xs):
    """A head in a scan over inputs, in a cond."""

    def body(total, x):
        logits = jax.lax.cond(x.sum() < 100, lambda x: x @ params["head"], lambda x: 2 * (x @ params["head"]), x)
        return total + 1, logits

    return jax.lax.scan(body, 0, xs)


def test_fallbacks_are_counted_over_a_loops_iterations():
    params = models.list_params()
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(5, 1, models.D)), jnp.float32)
    xs = xs.at[2].set(0.0).at[4].set(jnp.nan)  # all rows tie; nothing is known
    step = hx.sparsify(head_only, config=certified())
    (_, logits), counts = step.with_fallbacks(params, xs)
    # NaN compares false and goes to the first branch, zeros to the second.
    assert {path: int(n) for path, n in counts.items()} == {
        "scan[0]/cond[0]/branch[0]/dot_general[0]": 1,
        "scan[0]/cond[0]/branch[1]/dot_general[0]": 1,
    }
    np.testing.assert_array_equal(logits.argmax(-1), head_only(params, xs)[1].argmax(-1))


def test_a_loop_that_tests_counts_as_well():
    params = models.list_params()

    def run(params, x):
        def body(state):
            return state[0] + 1, state[1] * 0.0, (state[1] @ params["head"]).argmax(-1)

        return jax.lax.while_loop(lambda s: s[0] < 4, body, (0, x, jnp.zeros(1, jnp.int32)))

    step = hx.sparsify(run, config=certified())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, models.D)), jnp.float32)
    result, counts = step.with_fallbacks(params, x)
    assert [int(n) for n in counts.values()] == [3]  # the first input is proved, the zeros after it are not
    assert [int(r.sum()) for r in result] == [int(r.sum()) for r in run(params, x)]


def test_nobody_pays_for_a_counter_that_is_not_read():
    params, rest = models.list_params(), arguments()
    step = hx.sparsify(models.unrolled, config=certified())
    packed = step.trace(params, *rest).pack(params)
    jitted, operands = step.program(packed, *rest)
    assert len(jax.tree.leaves(jax.eval_shape(jitted, *operands))) == len(
        jax.tree.leaves(models.unrolled(params, *rest))
    )
    assert "hire_fallback" not in jitted.lower(*operands).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_half_precision_logits(dtype):
    params = models.list_params(dtype)
    for seed in range(4):
        rest = arguments(8, dtype, seed)
        step = hx.sparsify(models.unrolled, config=certified(candidates=32))
        (logits, _), _ = step.with_fallbacks(params, *rest)
        np.testing.assert_array_equal(logits.argmax(-1), jax.jit(models.unrolled)(params, *rest)[0].argmax(-1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("spec", [hx.Projected(0.5, bits=8), hx.LowRank(0.75, bits=4)], ids=str)
def test_a_predictor_fitted_to_the_inputs(spec, dtype):
    """Inputs in a plane of few dimensions: half the directions prove all."""
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(models.D // 4, models.D))

    def inputs(seed):
        found = np.random.default_rng(seed).normal(size=(8, models.D // 4)) @ plane
        return jnp.asarray(found + 0.01 * rng.normal(size=found.shape), dtype)

    params = {"head": models.list_params(dtype)["head"]}
    fun = lambda p, x: x @ p["head"]  # noqa: E731
    config = certified(candidates=64, predictor=spec)
    cal = hx.calibrate(fun, [(params, inputs(seed)) for seed in range(4)], config=config)
    step = hx.sparsify(fun, config=config, calibration=cal)
    for seed in range(10, 14):
        x = inputs(seed)
        logits, counts = step.with_fallbacks(params, x)
        np.testing.assert_array_equal(logits.argmax(-1), jax.jit(fun)(params, x).argmax(-1))
        if dtype == jnp.float32:
            assert [int(n) for n in counts.values()] == [0]


def test_vmap_over_sequences_counts_once():
    params = models.list_params()
    step = hx.sparsify(lambda p, x: x @ p["head"], config=certified())
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, models.D)), jnp.float32)
    packed = step.trace(params, xs[0]).pack(params)
    got = jax.jit(jax.vmap(functools.partial(step, packed)))(xs)
    np.testing.assert_array_equal(got.argmax(-1), (xs @ params["head"]).argmax(-1))


def test_bytes_hold_the_bounds():
    params = models.list_params()
    x = jnp.ones((1, models.D))
    plain = hx.sparsify(lambda p, x: x @ p["head"], config=hx.Config(vocab=hx.Vocab(candidates=16), rules=FORCE))
    proved = hx.sparsify(lambda p, x: x @ p["head"], config=certified())
    gap = proved.trace(params, x).plan.sparse_bytes - plain.trace(params, x).plan.sparse_bytes
    assert gap == 8 * models.V


def test_what_can_not_be_proved_is_refused():
    preset = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    step = hx.sparsify(lambda p, x: jnp.dot(x, p["head"], precision=preset), config=certified())
    plan = step.trace(models.list_params(), jnp.ones((1, models.D))).plan
    assert [("precision" in r.reason, r.kind) for r in plan.refusals] == [(True, "vocab")]


def test_a_function_without_certified_sites_counts_nothing():
    step = hx.sparsify(lambda p, x: x + 1)
    result, counts = step.with_fallbacks(jnp.ones(2), jnp.ones(2))
    assert counts == {}
    np.testing.assert_array_equal(result, [2, 2])
