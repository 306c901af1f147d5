"""Feed-forward blocks in the ways people spell them fire once; near-miss twins do not, and say why."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same, full_width, kinds, tolerance
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import hire_xform as hx

D, M, N, HEADS = 12, 40, 10, 4

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "maximum": lambda u: jnp.maximum(u, 0),
    "where": lambda u: jnp.where(u > 0, u, 0),
    "relu_squared": lambda u: jnp.square(jax.nn.relu(u)),
    "relu_power": lambda u: jax.nn.relu(u) ** 3,
    "relu6": jax.nn.relu6,
    "relu_scaled": lambda u: 0.5 * jax.nn.relu(u * 2.0),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "leaky_relu": jax.nn.leaky_relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "identity": lambda u: u,
}
ZEROING = {"relu", "maximum", "where", "relu_squared", "relu_power", "relu6", "relu_scaled"}


def weights(dtype=jnp.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {
        "w1": (D, M),
        "wg": (D, M),
        "w2": (M, N),
        "w12": (D, 2 * M),
        "w1t": (M, D),
        "w2t": (N, M),
        "b1": (M,),
        "b2": (N,),
        "b12": (2 * M,),
        "w1h": (D, HEADS, M // HEADS),
        "w2h": (HEADS, M // HEADS, N),
        "wpair": (2, D, M),
        "wpair_last": (D, M, 2),
        "stack": (3, D, M),
    }
    return {name: jnp.asarray(rng.normal(size=shape) * 0.3, dtype) for name, shape in shapes.items()}


def tokens(count, dtype=jnp.float32, lead=()) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(*lead, count, D)), dtype)


def plan_of(fun, p, x, config=None):
    return hx.sparsify(fun, config=config or full_width()).trace(p, x).plan


def fires_once(fun, count=3, dtype=jnp.float32, config=None, x=None, refusals=0, evaluated=True) -> None:
    p, x = weights(dtype), tokens(count, dtype) if x is None else x
    step = hx.sparsify(fun, config=config or full_width())
    traced = step.trace(p, x)
    assert kinds(traced.plan) == ["ffn"], traced.explain()
    assert len(traced.plan.refusals) == refusals, traced.explain()
    site = traced.plan.sites[0]
    assert (site.units, site.tokens) == (M, int(np.prod(x.shape[:-1], dtype=int)))
    assert "test_detect_ffn" in site.source
    if not evaluated:
        return
    assert_same(step(p, x), jax.jit(fun)(p, x), tolerance(dtype))
    assert_same(step(traced.pack(p), x), jax.jit(fun)(p, x), tolerance(dtype))


def refused(fun, *words, config=None, x=None, count=1, p=None) -> None:
    """No block is found; one refusal's reason has all the words; and the result is that of the original."""
    p, x = weights() if p is None else p, tokens(3) if x is None else x
    step = hx.sparsify(fun, config=config or full_width())
    plan = step.trace(p, x).plan
    assert "ffn" not in kinds(plan), plan
    assert len(plan.refusals) >= count
    reasons = [r.reason for r in plan.refusals]
    assert any(all(word in reason for word in words) for reason in reasons), reasons
    assert all(r.source and r.path and r.reason for r in plan.refusals)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_fires_once(name, bias, evaluated):
    act = ACTIVATIONS[name]

    def block(p, x):
        u = x @ p["w1"]
        y = act(u + p["b1"] if bias else u) @ p["w2"]
        return y + p["b2"] if bias else y

    fires_once(block, evaluated=evaluated)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_only_zeroing_activations_pass_by_default(name):
    def block(p, x):
        return ACTIVATIONS[name](x @ p["w1"] + p["b1"]) @ p["w2"]

    config = full_width(activations="zeroing")
    if name in ZEROING:
        assert kinds(plan_of(block, weights(), tokens(1), config)) == ["ffn"]
    else:
        refused(block, "exact zeros", 'activations="any"', config=config, count=2)
        plan = plan_of(block, weights(), tokens(1), config)
        assert [r.kind for r in plan.refusals] == ["ffn", "ffn"]


def gated(act):
    return lambda p, x: (act(x @ p["wg"]) * (x @ p["w1"])) @ p["w2"]


def accumulated(p, x):
    up = jnp.matmul(x, p["w1"], preferred_element_type=jnp.float32) + p["b1"]
    return jnp.matmul(jax.nn.relu(up).astype(x.dtype), p["w2"], preferred_element_type=jnp.float32).astype(x.dtype)


def lax_dot_general(p, x):
    return lax.dot_general(jax.nn.relu(lax.dot(x, p["w1"])), p["w2"], (((1,), (0,)), ((), ())))


def fused(cut):
    def block(p, x):
        gate, up = cut(x @ p["w12"] + p["b12"])
        return (jax.nn.silu(gate) * up) @ p["w2"]

    return block


def interleaved(p, x):
    u = (x @ p["w12"]).reshape(*x.shape[:-1], M, 2)
    return (jax.nn.silu(u[..., 0]) * u[..., 1]) @ p["w2"]


def strided(p, x):
    u = x @ p["w12"]
    return (jax.nn.silu(u[..., ::2]) * u[..., 1::2]) @ p["w2"]


def chunked(p, x):
    u = (x @ p["w12"]).reshape(*x.shape[:-1], 2, M)
    return (jax.nn.relu(u[..., 0, :]) * u[..., 1, :]) @ p["w2"]


@jax.jit
def jitted_up(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b1"])


@jax.jit
def jitted_down(p, u):
    return u @ p["w2"]


SPELLINGS = {
    "reglu": gated(jax.nn.relu),
    "swiglu": gated(jax.nn.silu),
    "geglu": gated(jax.nn.gelu),
    "bilinear": gated(lambda u: u),
    "f32_accumulation": accumulated,
    "lax_dot_general": lax_dot_general,
    "weight_left": lambda p, x: (p["w2t"] @ jax.nn.relu(p["w1t"] @ x.T)).T,
    "weight_left_up_only": lambda p, x: jax.nn.relu(p["w1t"] @ x.T).T @ p["w2"],
    "transposed": lambda p, x: jax.nn.relu(x @ p["w1t"].T) @ p["w2t"].T,
    "einsum": lambda p, x: jnp.einsum("tm,mn->tn", jax.nn.relu(jnp.einsum("td,dm->tm", x, p["w1"])), p["w2"]),
    "einsum_swapped": lambda p, x: jnp.einsum("mn,mt->tn", p["w2"], jax.nn.relu(jnp.einsum("md,td->mt", p["w1t"], x))),
    "einsum_heads": lambda p, x: jnp.einsum(
        "thk,hkn->tn", jax.nn.relu(jnp.einsum("td,dhk->thk", x, p["w1h"])), p["w2h"]
    ),
    "heads_to_flat": lambda p, x: (
        jax.nn.relu(jnp.einsum("td,dhk->thk", x, p["w1h"])).reshape(x.shape[0], M) @ p["w2"]
    ),
    "flat_to_heads": lambda p, x: jnp.einsum(
        "thk,hkn->tn", jax.nn.relu(x @ p["w1"]).reshape(x.shape[0], HEADS, M // HEADS), p["w2h"]
    ),
    "pair_einsum": lambda p, x: (lambda u: (jax.nn.relu(u[:, 0]) * u[:, 1]) @ p["w2"])(
        jnp.einsum("td,cdm->tcm", x, p["wpair"])
    ),
    "pair_last_einsum": lambda p, x: (lambda u: (jax.nn.relu(u[..., 0]) * u[..., 1]) @ p["w2"])(
        jnp.einsum("td,dmc->tmc", x, p["wpair_last"])
    ),
    "fused_slices": fused(lambda u: (u[..., :M], u[..., M:])),
    "fused_split": fused(lambda u: jnp.split(u, 2, axis=-1)),
    "fused_lax_split": fused(lambda u: lax.split(u, (M, M), axis=1)),
    "fused_reshape": chunked,
    "fused_interleaved": interleaved,
    "fused_strided": strided,
    "one_of_a_stack": lambda p, x: jax.nn.relu(x @ p["stack"][1]) @ p["w2"],
    "weight_cut": lambda p, x: jax.nn.relu(x @ p["w12"][:, :M]) @ p["w2"],
    "weights_cast": lambda p, x: jax.nn.relu(x @ p["w1"].astype(jnp.float32)) @ p["w2"].astype(jnp.float32),
    "checkpoint_name": lambda p, x: (checkpoint_name(jax.nn.relu(checkpoint_name(x @ p["w1"], "up")), "act") @ p["w2"]),
    "barrier": lambda p, x: lax.optimization_barrier(jax.nn.relu(lax.optimization_barrier(x @ p["w1"]))) @ p["w2"],
    "stop_gradient": lambda p, x: lax.stop_gradient(jax.nn.relu(x @ p["w1"])) @ p["w2"],
    "jitted_halves": lambda p, x: jitted_down(p, jitted_up(p, x)),
    "remat": jax.checkpoint(lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"]),
    "token_scale": lambda p, x: (jax.nn.relu(x @ p["w1"]) * x[:, :1]) @ p["w2"],
    "unit_scale": lambda p, x: (jax.nn.relu(x @ p["w1"]) * p["b1"] * jnp.exp(p["b1"])) @ p["w2"],
    "mask_by_units": lambda p, x: jnp.where(p["b1"] > 0, jax.nn.relu(x @ p["w1"]), 0.0) @ p["w2"],
    "traced_scale": lambda p, x: (jax.nn.relu(x @ p["w1"]) * p["b1"][3]) @ p["w2"],
    "clipped": lambda p, x: jnp.clip(x @ p["w1"], 0, p["b2"][0]) @ p["w2"],
    "stretched_tokens": lambda p, x: (jax.nn.relu(x[:1] @ p["w1"]) * (x @ p["wg"])) @ p["w2"],
    "dropout_at_rest": lambda p, x: jnp.where(True, jax.nn.relu(x @ p["w1"]) / 0.9, 0.0) @ p["w2"],
    "hidden_times_product": lambda p, x: (jax.nn.relu(x @ p["w1"]) * jax.nn.relu(x @ p["w1"])) @ p["w2"],
    "residual_dead_result": lambda p, x: (lambda u: jax.nn.relu(u) @ p["w2"])(x @ p["w1"]),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_fires_once(name, evaluated):
    fires_once(SPELLINGS[name], evaluated=evaluated)


@pytest.mark.parametrize("lead", [(2,), (2, 1)], ids=str)
def test_leading_axes_are_tokens(lead):
    fires_once(lambda p, x: jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"], x=tokens(3, lead=lead))


def test_no_axis_is_one_token():
    fires_once(lambda p, x: jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"], x=tokens(1)[0])


def test_two_blocks_in_a_row_are_two_sites():
    def blocks(p, x):
        y = jax.nn.relu(x @ p["w1"]) @ p["w2"]
        return jax.nn.relu(jnp.pad(y, ((0, 0), (0, D - N))) @ p["w1"]) @ p["w2"]

    assert kinds(plan_of(blocks, weights(), tokens(1))) == ["ffn", "ffn"]


def test_groups_count_units():
    plan = plan_of(
        lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"],
        weights(),
        tokens(1),
        hx.Config(ffn=hx.Ffn(active=0.5, group_size=4), rules=FORCE),
    )
    assert (plan.sites[0].units, plan.sites[0].computed) == (M, M // 2)


# Near misses: one change each that forbids the rewrite.


def test_a_reused_hidden_is_refused():
    def block(p, x):
        u = jax.nn.relu(x @ p["w1"])
        return u @ p["w2"], u.sum()

    refused(block, "also read by reduce_sum", "test_detect_ffn", count=2)


def test_a_reused_product_before_the_activation_is_refused():
    def block(p, x):
        u = x @ p["w1"]
        return jax.nn.relu(u) @ p["w2"], jnp.max(u)

    refused(block, "reduce_max", "test_detect_ffn", count=2)


def test_a_hidden_contracted_twice_is_a_block_of_three_products():
    def block(p, x):
        u = jax.nn.relu(x @ p["w1"])
        return u @ p["w2"] + u @ p["w2t"].T

    step, p, x = hx.sparsify(block, config=full_width()), weights(), tokens(3)
    (site,) = step.trace(p, x).plan.sites
    assert set(site.weights) == {"p['w1']", "p['w2']", "p['w2t']"}
    assert_same(step(p, x), block(p, x))


def test_a_weight_computed_in_the_program_is_refused():
    refused(lambda p, x: jax.nn.relu(x @ p["w1"]) @ (p["w2"] * p["b1"][:, None]), "computed inside the program", "mul")


def test_two_factors_of_one_matrix_are_refused():
    refused(lambda p, x: (x @ p["w1"][:, :8]) @ p["w2"][:8], "one matrix in two factors", count=2)


def test_linear_attention_is_refused():
    def block(p, x):
        q, k, v = jax.nn.relu(x @ p["w1"]), jax.nn.relu(x @ p["wg"]), x @ p["stack"][0]
        return (q @ (k.T @ v)) @ p["w2"]

    refused(block, "another product", count=4)


def test_groups_that_do_not_divide_are_refused():
    refused(
        lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"],
        "group_size=16",
        "40",
        config=full_width(group_size=16),
        count=2,
    )


def test_too_many_tokens_are_refused():
    refused(
        lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"],
        "9 tokens",
        "max_tokens=8",
        x=tokens(9),
        config=full_width(max_tokens=8),
        count=2,
    )


@jax.custom_vjp
def straight_through(u):
    return jax.nn.relu(u)


straight_through.defvjp(lambda u: (jax.nn.relu(u), None), lambda _, g: (g,))


def test_an_activation_with_its_own_vjp_is_refused():
    refused(lambda p, x: straight_through(x @ p["w1"]) @ p["w2"], "custom_vjp", count=2)


def test_integer_weights_are_refused():
    p = weights()
    p = {"w1": (p["w1"] * 40).astype(jnp.int8), "w2": (p["w2"] * 40).astype(jnp.int8)}
    x = jnp.ones((1, D), jnp.int8)

    def block(p, x):
        u = jax.nn.relu(jnp.matmul(x, p["w1"], preferred_element_type=jnp.int32))
        return jnp.matmul(u.astype(jnp.int8), p["w2"], preferred_element_type=jnp.int32)

    refused(block, "int8", p=p, x=x, count=2)


def test_a_small_block_is_left_dense_by_the_cost_model():
    config = hx.Config(ffn=hx.Ffn(active=0.25))
    refused(
        lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"], "would not be faster", "force=True", config=config, count=2
    )


def test_a_rule_skips_a_block_by_its_path():
    config = hx.Config(ffn=hx.Ffn(active=1.0), rules=(*FORCE, hx.Rule("dot_general[1]", skip=True)))
    refused(lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"], "skip=True", config=config, count=2)


def test_ffn_none_leaves_blocks_dense():
    refused(lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"], "ffn=None", config=hx.Config(ffn=None), count=2)
