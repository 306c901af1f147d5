"""Training with the top-k in the block: which units are kept, what is differentiated, and where it stands."""

import functools
import warnings

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import assert_same, tolerance
from jax import lax

import hire_xform as hx
from hire_xform.lowering.engine.top_groups import keep_top_groups

D, M, G = 12, 48, 8


def weights(seed=0, dtype=jnp.float32, **shapes):
    rng = np.random.default_rng(seed)
    shapes = {"w1": (D, M), "b1": (M,), "w2": (M, D), **shapes}
    return {name: models.random_array(rng, *shape, dtype=dtype) for name, shape in shapes.items()}


def tokens(count=5, seed=1, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, D)), dtype)


def masked(hidden, w2, active, group=G):
    """By hand: groups ranked by NumPy, all but the first ones multiplied with zero."""
    norms = np.linalg.norm(np.asarray(w2, np.float64), axis=1)
    energy = np.square(np.asarray(hidden, np.float64) * norms).reshape(-1, len(norms) // group, group).sum(-1)
    best = np.argsort(-energy, axis=1, kind="stable")[:, :active]
    keep = np.zeros(energy.shape, bool)
    np.put_along_axis(keep, best, True, axis=1)
    return np.repeat(keep, group, axis=1).reshape(hidden.shape)


def block(w, x, act=jax.nn.relu):
    return act(x @ w["w1"] + w["b1"]) @ w["w2"]


def glu(w, x, act=jax.nn.silu):
    return (act(x @ w["w1"]) * (x @ w["wg"])) @ w["w2"]


def loss(w, x):
    return jnp.sum(jnp.sin(block(w, x)))


@pytest.mark.parametrize("act", [jax.nn.relu, jax.nn.silu, jax.nn.gelu, jnp.square], ids=lambda f: f.__name__)
def test_the_groups_of_largest_energy_are_kept_whatever_the_activation(act):
    w, x = weights(), tokens()
    hidden = act(x @ w["w1"] + w["b1"])
    keep = masked(hidden, w["w2"], 2)
    assert keep.sum(1).tolist() == [2 * G] * len(x)
    got = hx.topk_ffn(functools.partial(block, act=act), active=2 * G / M)(w, x)
    np.testing.assert_allclose(got, np.where(keep, hidden, 0) @ w["w2"], rtol=1e-5, atol=1e-6)


def test_gated_blocks_with_more_than_one_dimension_of_tokens():
    w, x = weights(wg=(D, M)), tokens(6).reshape(2, 3, D)
    hidden = jax.nn.silu(x @ w["w1"]) * (x @ w["wg"])
    got = hx.topk_ffn(glu, active=0.5)(w, x)
    np.testing.assert_allclose(got, np.where(masked(hidden, w["w2"], 3), hidden, 0) @ w["w2"], rtol=1e-5, atol=1e-6)


def test_units_in_two_dimensions_and_the_weight_on_the_left():
    """Units are numbered in the order of the activation's dimensions, as where the block is decoded."""
    rng = np.random.default_rng(0)
    w1, w2 = models.random_array(rng, D, 6, 8), models.random_array(rng, D, 8, 6)
    x = tokens(4)

    def fun(w, x):
        hidden = jax.nn.relu(jnp.einsum("td,dab->atb", x, w["w1"]))
        return jnp.einsum("dba,atb->dt", w["w2"], hidden)

    hidden = jax.nn.relu(jnp.einsum("td,dab->tab", x, w1)).reshape(4, 48)
    rows = jnp.transpose(w2, (2, 1, 0)).reshape(48, D)
    got = hx.topk_ffn(fun, active=2 / 6)({"w1": w1, "w2": w2}, x)
    np.testing.assert_allclose(got.T, np.where(masked(hidden, rows, 2), hidden, 0) @ rows, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_kept_units():
    w, x = weights(), tokens()

    keep = masked(jax.nn.relu(x @ w["w1"] + w["b1"]), w["w2"], 1)

    def by_hand(w, x):
        return jnp.sum(jnp.sin((jax.nn.relu(x @ w["w1"] + w["b1"]) * keep) @ w["w2"]))

    topk = hx.topk_ffn(loss, active=G / M)
    assert_same(jax.grad(topk, argnums=(0, 1))(w, x), jax.grad(by_hand, argnums=(0, 1))(w, x))
    along = jax.tree.map(jnp.ones_like, w)
    assert_same(*(jax.jvp(lambda w, f=f: f(w, x), (w,), (along,)) for f in (topk, by_hand)))
    never = ~keep.any(0)
    assert never.any()
    assert not np.asarray(jax.grad(topk)(w, x)["w2"])[never].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("act", [jax.nn.relu, jax.nn.silu], ids=["relu", "silu"])
def test_with_all_groups_it_is_the_function_bit_for_bit(dtype, act):
    w, x = weights(dtype=dtype), tokens(dtype=dtype)
    fun = functools.partial(block, act=act)
    assert_same(jax.jit(hx.topk_ffn(fun, active=1.0))(w, x), jax.jit(fun)(w, x), 0.0)


def test_bfloat16_keeps_the_same_groups_and_dtypes():
    w, x = weights(dtype=jnp.bfloat16), tokens(dtype=jnp.bfloat16)
    hidden = block({**w, "w2": jnp.eye(M, dtype=jnp.bfloat16)}, x)
    want = np.where(masked(hidden.astype(jnp.float32), w["w2"].astype(jnp.float32), 2), hidden, 0).astype(jnp.bfloat16)
    got = hx.topk_ffn(block, active=2 * G / M)(w, x)
    assert got.dtype == jnp.bfloat16
    assert_same(got, jnp.asarray(want) @ w["w2"], tolerance(jnp.bfloat16))


def layer_by_hand(w, x, k, v, pos):
    def ffn(w, x):
        hidden = jax.nn.relu(x @ w["w1"] + w["b1"])
        energy = jnp.square(hidden * jnp.sqrt(jnp.sum(jnp.square(w["w2"]), axis=1))).reshape(len(x), -1, G).sum(-1)
        keep = jax.nn.one_hot(lax.top_k(energy, 2)[1], energy.shape[-1]).sum(-2)
        return (hidden * jnp.repeat(lax.stop_gradient(keep), G, axis=-1)) @ w["w2"] + w["b2"]

    return models.layer(w, x, k, v, pos, ffn)


NESTINGS = {
    "unrolled": (lambda layer: functools.partial(models.unrolled, one_layer=layer), models.list_params),
    "jitted layers": (lambda layer: functools.partial(models.unrolled, one_layer=jax.jit(layer)), models.list_params),
    "remat of jitted layers": (
        lambda layer: functools.partial(
            models.unrolled,
            one_layer=jax.checkpoint(jax.jit(layer), policy=jax.checkpoint_policies.dots_saveable),
        ),
        models.list_params,
    ),
    "scan": (lambda layer: functools.partial(models.scanned, one_layer=layer), models.stacked_params),
    "scan of remat": (
        lambda layer: functools.partial(models.scanned, one_layer=jax.checkpoint(layer)),
        models.stacked_params,
    ),
    "jit of a scan of jit": (
        lambda layer: jax.jit(functools.partial(models.scanned, one_layer=jax.jit(layer))),
        models.stacked_params,
    ),
}


@pytest.mark.any_jax("cases vary nestings, which test_full_width.py runs on every JAX", every=3)
@pytest.mark.parametrize("outer", ["eager", "jit", "vmap"])
@pytest.mark.parametrize("name", NESTINGS)
def test_nestings_and_transformations(name, outer):
    """Value and gradient are those of the same model with the top-k written into its block."""
    nest, make = NESTINGS[name]
    params, cache = make(), models.make_cache(2)

    def objective(step, params, shift):
        logits, _ = step(params, cache, jnp.array([3, 5]), shift)
        return jnp.sum(jax.nn.log_softmax(logits)[:, 0])

    def wrap(fun):
        found = jax.value_and_grad(fun, argnums=(0, 1))
        if outer == "vmap":
            return jax.vmap(found, in_axes=(None, 0))
        return jax.jit(found) if outer == "jit" else found

    dense = functools.partial(objective, nest(models.layer))
    topk = hx.topk_ffn(dense, active=2 * G / models.M)
    shift = jnp.linspace(-0.1, 0.1, models.D)
    plan = topk.trace(params, shift).plan
    blocks = models.L if make is models.list_params else 1
    assert [(s.kind, s.units, s.computed) for s in plan.sites] == [("ffn", models.M, 16)] * blocks
    assert sum(r.kind == "vocab" for r in plan.refusals) == 1
    if outer == "vmap":
        shift = jnp.stack([shift, -shift, 2 * shift])
    got, without = wrap(topk)(params, shift), wrap(dense)(params, shift)
    assert np.abs(np.asarray(got[0] - without[0])).max() > 1e-4
    assert_same(got, wrap(functools.partial(objective, nest(layer_by_hand)))(params, shift), 1e-4)


def test_weights_closed_over_inside_grad():
    """What the function closes over may be a tracer, a new one at each call."""
    w, x = weights(), tokens()

    def outer(w):
        return jnp.sum(hx.topk_ffn(lambda x: jnp.sin(block(w, x)), active=G / M)(x))

    assert_same(jax.grad(outer)(w), jax.grad(hx.topk_ffn(loss, active=G / M))(w, x))


def test_a_training_loop_lowers_the_loss():
    w, x = weights(), tokens(64)
    target = jnp.sin(3 * x)

    @hx.topk_ffn(active=1 / 3)
    def objective(w, x):
        return jnp.mean(jnp.square(block(w, x) - target))

    def step(w, _):
        value, slopes = jax.value_and_grad(objective)(w, x)
        return jax.tree.map(lambda p, g: p - 0.2 * g, w, slopes), value

    _, values = jax.jit(lambda w: lax.scan(step, w, length=60))(w)
    assert values[-1] < 0.8 * values[0]


def test_what_was_trained_is_what_is_decoded():
    """With as many exact units as were trained, and a predictor that errs little, decoding gives the trained values."""
    w, x = weights(), tokens(1)
    trained = hx.topk_ffn(functools.partial(block, act=jax.nn.gelu), active=2 * G / M)(w, x)
    config = hx.Config(ffn=hx.Ffn(active=2 * G / M, group_size=G, activations="any"), rules=(hx.Rule("*", force=True),))
    step = hx.sparsify(functools.partial(block, act=jax.nn.gelu), config=config)
    assert step.trace(w, x).plan.sites[0].computed == 2 * G
    assert_same(step(w, x), jax.jit(lambda v: v)(trained), 1e-5)


@pytest.mark.parametrize("act", [jax.nn.relu, jax.nn.gelu], ids=["relu", "gelu"])
def test_sparsified_the_top_k_is_the_models_own_choice(act):
    """Half as many groups again are computed, and the trained number of them is kept."""
    w, x = weights(), tokens(1)
    trained = hx.topk_ffn(functools.partial(block, act=act), active=2 * G / M)
    rules = (hx.Rule("*", force=True),)
    assert "no ranking of units" in hx.sparsify(trained, config=hx.Config(rules=rules)).explain(w, x)
    step = hx.sparsify(trained, config=hx.approximate(rules=rules))
    (site,) = step.trace(w, x).plan.sites
    assert (site.own, site.computed) == ("top 2 groups of 8", 3 * G)
    assert_same(step(w, x), jax.jit(trained)(w, x), 1e-5)


def test_shares_by_path():
    w, x = {"a": weights(), "b": weights(1)}, tokens()

    def two(w, x):
        return block(w["b"], block(w["a"], x))

    first, second = (s.path for s in hx.topk_ffn(two).trace(w, x).plan.sites)
    config = hx.Config(
        ffn=hx.Ffn(active=0.5, group_size=4),
        rules=(hx.Rule(second, ffn=hx.Ffn(active=1 / 6, group_size=8)),),
    )
    plan = hx.topk_ffn(two, config=config).trace(w, x).plan
    assert [(s.computed, s.settings.group_size) for s in plan.sites] == [(24, 4), (8, 8)]
    skipped = hx.Config(ffn=hx.Ffn(active=1.0), rules=(hx.Rule(first, skip=True),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [s.path for s in hx.topk_ffn(two, config=skipped).trace(w, x).plan.sites] == [second]


def test_static_arguments_and_keywords():
    w, x = weights(), tokens()

    def fun(w, x, mode, *, scale=1.0):
        return scale * (block(w, x) if mode == "train" else x)

    topk = hx.topk_ffn(fun, active=0.5, static_argnames="mode")
    assert_same(topk(w, x, "train", scale=2.0), 2 * hx.topk_ffn(block, active=0.5)(w, x))
    jitted = jax.jit(topk, static_argnames="mode")
    assert_same(jitted(w, x, mode="train"), topk(w, x, mode="train"))


def test_explain_says_what_is_kept():
    text = hx.topk_ffn(block, active=0.5).trace(weights(), tokens()).explain()
    assert "1 feed-forward block with a top-k" in text
    assert "3 of 6 groups of 8 kept" in text
    assert "w['w1'], w['w2']" in text


@jax.custom_vjp
def own_derivative(w, x):
    return block(w, x)


own_derivative.defvjp(lambda w, x: (block(w, x), (w, x)), lambda saved, bar: jax.vjp(block, *saved)[1](bar))


def has_own_top_k(w, x):
    hidden = jax.nn.relu(x @ w["w1"])
    kth = lax.top_k(hidden, 6)[0][..., -1:]
    return jnp.where(hidden >= kth, hidden, 0) @ w["w2"]


def gives_its_units(w, x):
    hidden = jax.nn.relu(x @ w["w1"])
    return hidden @ w["w2"], hidden


@pytest.mark.parametrize(
    ("fun", "words"),
    [
        (lambda w, x: x @ w["w1"], "no feed-forward block gets a top-k"),
        (own_derivative, "inside a custom_jvp or custom_vjp"),
        (has_own_top_k, "chooses units of it itself"),
        (gives_its_units, "also returned"),
        (lambda w, x: jax.value_and_grad(loss)(w, x), "no feed-forward block gets a top-k"),
    ],
    ids=["no block", "custom_vjp", "own top-k", "returned units", "derivative inside"],
)
def test_a_function_without_a_block_to_train_is_an_error_with_the_reason(fun, words):
    with pytest.raises(ValueError, match=words):
        hx.topk_ffn(fun)(weights(), tokens())


def test_a_block_that_stays_dense_beside_another_is_told_once():
    w, x = weights(), tokens()
    topk = hx.topk_ffn(lambda w, x: own_derivative(w, block(w, x)))
    with pytest.warns(hx.HireWarning, match="stays dense: it stands inside a custom"):
        topk(w, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topk(w, x)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"active": 0}, ValueError, "active=0"),
        ({"active": 1.5}, ValueError, "active=1.5"),
        ({"group_size": 0}, ValueError, "group_size=0"),
        ({"config": 3}, TypeError, "config=3"),
        ({"config": hx.Config(ffn=hx.Ffn(active=0.5)), "active": 0.5}, TypeError, "config and active are both given"),
        ({"config": hx.Config()}, ValueError, "active=None"),
        ({"weights_argnums": 7}, ValueError, "weights_argnums=7"),
    ],
)
def test_wrong_arguments_are_named(options, error, words):
    with pytest.raises(error, match=words):
        hx.topk_ffn(block, **options)
    with pytest.raises(TypeError, match="fun=3"):
        hx.topk_ffn(3)


def test_a_group_size_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="group_size=7 does not divide the 48 hidden units"):
        hx.topk_ffn(block, group_size=7)(weights(), tokens())
    with pytest.raises(ValueError, match="does not divide"):
        keep_top_groups(jnp.ones((1, 8)), jnp.ones(8), active=1, group_size=3)
    with pytest.raises(ValueError, match="active=5"):
        keep_top_groups(jnp.ones((1, 8)), jnp.ones(8), active=5, group_size=2)


def test_rules_that_match_nothing_are_told():
    config = hx.Config(ffn=hx.Ffn(active=0.5), rules=(hx.Rule("scan[9]/*", skip=True),))
    with pytest.warns(hx.HireWarning, match="rules that match nothing"):
        hx.topk_ffn(block, config=config)(weights(), tokens())
