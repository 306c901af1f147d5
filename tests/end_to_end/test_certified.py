"""``Vocab(certify=True)`` through the pass: every nesting, the fallbacks counted, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import kinds, named

import hire_xform as hx


def certified(candidates=16, **vocab) -> hx.Config:
    return hx.Config(ffn=None, rules=named(hx.Vocab(candidates=candidates, certify=True, **vocab)))


def arguments(batch=3, dtype=jnp.float32, seed=3):
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, models.V, size=batch), jnp.int32)
    return models.make_cache(batch, dtype), tokens, jnp.zeros(models.D)


@pytest.mark.parametrize("model", models.MODELS, ids=str)
def test_the_greedy_token_is_the_dense_one_in_every_nesting(model, evaluated):
    params, rest = model.make_params(), arguments()
    step = hx.sparsify(model.step, config=certified())
    traced = step.trace(params, *rest)
    assert kinds(traced.plan) == ["vocab"] * model.vocab
    if not evaluated:
        return
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
    assert "hire_rung" not in jitted.lower(*operands).as_text()


@pytest.mark.any_jax("cases are dtypes of one proof", every=2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_half_precision_logits(dtype):
    params = models.list_params(dtype)
    for seed in range(4):
        rest = arguments(8, dtype, seed)
        step = hx.sparsify(models.unrolled, config=certified(candidates=32))
        (logits, _), _ = step.with_fallbacks(params, *rest)
        np.testing.assert_array_equal(logits.argmax(-1), jax.jit(models.unrolled)(params, *rest)[0].argmax(-1))


@pytest.mark.any_jax("cases vary sizes, dtypes and predictors of one proof", every=4)
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
    plain = hx.sparsify(lambda p, x: x @ p["head"], config=hx.Config(rules=named(hx.Vocab(candidates=16))))
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


def skewed(seed, tokens=1, dtype=jnp.float32):
    """A head whose rows matter very differently, and a token: [512, 24]."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(512, 24)) * 10.0 ** rng.uniform(-1, 0.3, size=(512, 1))
    return {"head": jnp.asarray(rows, dtype)}, jnp.asarray(rng.normal(size=(tokens, 24)) * 2, dtype)


def goal_step(goal, fill="-inf", candidates=128, **vocab):
    fun = lambda p, x: x @ p["head"].T  # noqa: E731
    config = hx.Config(ffn=None, rules=named(hx.Vocab(certify=goal, fill=fill, candidates=candidates, **vocab)))
    return jax.jit(fun), hx.sparsify(fun, config=config)


@pytest.mark.any_jax("cases vary sizes, dtypes and predictors of one proof", every=4)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("k", [1, 8, 40])
def test_a_certified_set_of_the_largest_is_the_dense_one(k, dtype):
    dense, step = goal_step(hx.TopSet(k), fill="predicted")
    fallbacks = 0
    for seed in range(8):
        p, x = skewed(seed, dtype=dtype)
        if seed >= 6:  # planted ties, at the border and within
            order = jnp.argsort(-dense(p, x)[0])
            p["head"] = p["head"].at[order[300]].set(p["head"][order[k - 1 if seed == 6 else 0]])
        logits, counts = step.with_fallbacks(p, x)
        fallbacks += sum(int(n) for n in counts.values())
        want = jax.lax.top_k(dense(p, x), k)
        got = jax.lax.top_k(logits, k)
        np.testing.assert_array_equal(np.sort(got[1]), np.sort(want[1]))
        np.testing.assert_allclose(np.float32(got[0]), np.float32(want[0]), rtol=1e-5 if dtype == jnp.float32 else 1e-2)
    assert 1 <= fallbacks < 8 or dtype != jnp.float32


def test_a_certified_nucleus_misses_no_more_than_eps():
    for eps in (0.3, 0.01):
        dense, step = goal_step(hx.Nucleus(eps), candidates=96)
        fallbacks, missed = 0, []
        for seed in range(12):
            p, x = skewed(seed, tokens=2)
            logits, counts = step.with_fallbacks(p, x)
            fallbacks += sum(int(n) for n in counts.values())
            q, exact = jax.nn.softmax(logits), jax.nn.softmax(dense(p, x))
            missed.append(float(jnp.where(logits == -jnp.inf, exact, 0).sum(-1).max()))
            assert float(jnp.abs(q - exact).sum(-1).max()) / 2 <= eps + 1e-5
        assert max(missed) <= eps
        assert fallbacks < 12
    flat, x = {"head": jnp.ones((512, 24))}, jnp.ones((1, 24))
    assert [int(n) for n in step.with_fallbacks(flat, x)[1].values()] == [1]
    assert [int(n) for n in step.with_fallbacks(flat, x.at[0, 0].set(jnp.nan))[1].values()] == [1]


def test_goals_are_calibrated_each_for_itself():
    p, x = skewed(0, tokens=64)
    sizes = []
    for goal in (True, hx.TopSet(40), hx.Nucleus(0.01)):
        _, step = goal_step(goal, candidates=None)
        fun = lambda p, x: x @ p["head"].T  # noqa: E731
        config = hx.Config(ffn=None, rules=named(hx.Vocab(certify=goal, fill="-inf")))
        cal = hx.calibrate(fun, [(p, x)], config=config, predictors=[hx.Quantized(8)])
        step = hx.sparsify(fun, config=config, calibration=cal)
        sizes.append(step.trace(p, x[:1]).plan.sites[0].computed)
        for i in range(8):
            assert sum(int(n) for n in step.with_fallbacks(p, x[i : i + 1])[1].values()) == 0
    assert sizes[0] < sizes[1]
    other = hx.Config(ffn=None, rules=named(hx.Vocab(certify=True)))
    told = hx.sparsify(fun, config=other, calibration=cal).trace(p, x[:1]).plan.sites[0].calibrated
    assert "Nucleus" in told


def test_goals_out_of_range_are_refused():
    for make in (lambda: hx.TopSet(0), lambda: hx.Nucleus(1.0), lambda: hx.Ffn(certify=hx.TopSet(2))):
        with pytest.raises(ValueError, match="expected"):
            make()
    with pytest.raises(ValueError, match="candidates=4"):
        hx.Vocab(certify=hx.TopSet(5), candidates=4)
