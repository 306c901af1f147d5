"""The oracle: with every logit and every unit exact, the sparse function is the dense one."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import assert_same, full_width, kinds, narrow, primitives_of, tolerance

import hire_xform as hx
from hire_xform.lowering.primitives.da_top_k import da_top_k_p

PREDICTORS = [hx.Quantized(8), hx.Quantized(4), hx.LowRank(0.5)]
# All but "eager" are under an outer jit.
CALLS = {"arguments": ("eager", "vmap", "derivative"), "closed over": ("eager", "derivative")}
TOKENS = [1, 3, 8]


def arguments(batch, dtype):
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, models.V, size=batch), jnp.int32)
    shift = jnp.asarray(np.random.default_rng(4).normal(size=models.D) * 0.3, jnp.float32)
    return models.make_cache(batch, dtype), tokens, shift


def call(how, fun, model, cache, tokens, shift):
    if how == "eager":
        return fun(cache, tokens, shift)
    if how == "vmap":
        pair = jax.tree.map(lambda a: jnp.stack([a, a]), (cache, tokens, shift))
        pair = (pair[0], jnp.stack([tokens, (tokens + 5) % models.V]), pair[2])
        return jax.jit(jax.vmap(fun))(*pair)

    def scalar(shift):
        results = fun(cache, tokens, shift)
        return jnp.sum(jnp.sin(results[0])), results

    if "generate" in model.name or "while" in model.name:  # a while loop has no reverse derivative
        return jax.jit(lambda s: jax.jvp(scalar, (s,), (jnp.ones_like(s),), has_aux=True))(shift)
    return jax.jit(jax.value_and_grad(scalar, has_aux=True))(shift)


def check(model, where, how, batch, dtype, predictor, evaluated=True):
    params, (cache, tokens, shift) = model.make_params(dtype), arguments(batch, dtype)
    dense = partial(model.step, params)
    if where == "closed over":
        step = hx.sparsify(dense, config=full_width(predictor, stated=False), weights_argnums=())
        traced, sparse = step.trace(cache, tokens, shift), step
    else:
        step = hx.sparsify(model.step, config=full_width(predictor, stated=False))
        traced = step.trace(params, cache, tokens, shift)
        weights = params if how == "eager" else traced.pack(params)
        sparse = partial(step, weights)
    assert sorted(kinds(traced.plan)) == ["ffn"] * model.ffn + ["vocab"] * model.vocab
    assert len(traced.plan.refusals) == model.refusals, traced.explain()
    if not evaluated:
        # Rewritten, differentiated and batched like the others, and neither compiled nor run.
        got, want = (jax.eval_shape(partial(call, how, fun, model), cache, tokens, shift) for fun in (sparse, dense))
        assert got == want
        return
    assert_same(
        call(how, sparse, model, cache, tokens, shift),
        call(how, jax.jit(dense), model, cache, tokens, shift),
        tolerance(dtype) * (5 if how == "derivative" else 1),
    )


def matrix():
    """Every model x place x call once, with token counts, dtypes and predictors taken in turn."""
    turns = list(itertools.product(TOKENS, (0, 1), PREDICTORS))
    # One more than there are, so that each of them comes to be evaluated where every third case is.
    turn = itertools.cycle([*turns, turns[0]])
    cases = [(model, where, how) for model in models.MODELS for where in CALLS for how in CALLS[where]]
    for model, where, how in cases:
        batch, dtype, predictor = next(turn)
        dtype = model.dtypes[dtype % len(model.dtypes)]
        name = f"{model}-{where}-{how}-{batch}-{jnp.dtype(dtype).name}-{predictor}"
        yield pytest.param(model, where, how, batch, dtype, predictor, id=name)


@pytest.mark.parametrize(("model", "where", "how", "batch", "dtype", "predictor"), list(matrix()))
def test_full_width_is_dense(model, where, how, batch, dtype, predictor, evaluated):
    check(model, where, how, batch, dtype, predictor, evaluated)


@pytest.mark.any_jax("cases vary sizes, dtypes and predictors of one model", every=5)
@pytest.mark.parametrize("predictor", PREDICTORS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("batch", TOKENS)
def test_full_width_is_dense_at_every_size(batch, dtype, predictor):
    check(models.MODELS[3], "arguments", "eager", batch, dtype, predictor)


@pytest.mark.any_jax("the sites of each model are found and rewritten at full width on every JAX", every=3)
@pytest.mark.parametrize("model", models.MODELS, ids=str)
def test_few_units_take_another_path_and_stay_near(model):
    params, (cache, tokens, shift) = model.make_params(), arguments(1, jnp.float32)
    step = hx.sparsify(model.step, config=narrow(0.3, 16))
    traced = step.trace(params, cache, tokens, shift)
    found = primitives_of(traced.sparse_jaxpr)
    assert found.count(da_top_k_p) >= model.ffn + model.vocab
    assert da_top_k_p not in primitives_of(traced.jaxpr)
    sparse, dense = step(params, cache, tokens, shift)[0], jax.jit(model.step)(params, cache, tokens, shift)[0]
    gap = float(jnp.abs(sparse - dense).max())
    assert 1e-4 < gap < 0.8 * float(jnp.abs(dense).max())


def test_a_cond_of_which_one_branch_has_a_site():
    params, (_, tokens, _) = models.list_params(), arguments(3, jnp.float32)
    x = params["embed"][tokens]

    def fun(params, x, flag):
        return jax.lax.cond(flag, lambda x: models.relu_ffn(params["layers"][0], x), lambda x: x * 2, x)

    step = hx.sparsify(fun, config=full_width())
    packed = step.trace(params, x, True).pack(params)
    assert kinds(step.trace(params, x, True).plan) == ["ffn"]
    for flag in (True, False):
        assert_same(step(packed, x, flag), fun(params, x, flag))


def test_a_loop_over_a_model_that_is_packed_once():
    model = models.MODELS[2]
    params, (cache, tokens, shift) = model.make_params(), arguments(3, jnp.float32)
    step = hx.sparsify(model.step, config=full_width())
    packed = step.trace(params, cache, tokens, shift).pack(params)

    def run(fun, weights):
        def body(state, _):
            tokens, cache = state
            logits, cache = fun(weights, cache, tokens, shift)
            return (jnp.argmax(logits, -1).astype(tokens.dtype), cache), logits

        return jax.lax.scan(body, (tokens, cache), None, length=3)

    assert_same(jax.jit(lambda p: run(step, p))(packed), run(model.step, params))


def test_a_bfloat16_gradient_through_remat_is_dense():
    model = next(m for m in models.MODELS if m.name == "remat_unrolled")
    check(model, "closed over", "derivative", 3, jnp.bfloat16, hx.Quantized(8))


def test_a_side_input_reshaped_outside_the_call_of_a_block_reaches_it():
    @jax.jit
    def block(w, x, scale):
        return (jax.nn.relu(x @ w["w1"]) * scale) @ w["w2"]

    w = models.list_params()["layers"][0]
    x, scale = jnp.ones((1, models.D)), jnp.arange(float(models.M))

    def fun(w, x, scale):
        return block(w, x, scale[None, None].reshape(1, models.M))

    step = hx.sparsify(fun, config=full_width())
    assert kinds(step.trace(w, x, scale).plan) == ["ffn"]
    assert_same(step(w, x, scale), fun(w, x, scale))
