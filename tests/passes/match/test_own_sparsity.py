"""A model's own top-k, or threshold at mean and deviation, is recognised and computed with the model's own k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same, full_width, kinds, narrow, primitives_of, tolerance
from jax import lax
from jax.extend.core import primitives as prims
from observe import observe

import hire_xform as hx
from hire_xform.lowering.primitives.da_top_k import da_top_k_p

D, M, K, Z = 16, 96, 6, 1.2815516


def weights(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"gate": (D, M), "up": (D, M), "down": (M, D), "bias": (M,)}
    return {name: jnp.asarray(rng.normal(size=shape) * 0.3, dtype) for name, shape in shapes.items()}


def tokens(count=1, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, D)), dtype)


def rows(u):
    return jnp.arange(u.shape[0])[:, None]


def by_vmap(u):
    def one(row):
        values, index = lax.top_k(row, K)
        return jnp.zeros_like(row).at[index].set(values)

    return jax.vmap(one)(u)


def smallest_kept(u):
    values = lax.top_k(u, K)[0]
    return jnp.where(u < values.min(-1, keepdims=True), 0, u)


def activated_before_placing(u):
    values, index = lax.top_k(u, K)
    return jnp.zeros_like(u).at[rows(u), index].set(jax.nn.gelu(values))


def by_size(u):
    _, index = lax.top_k(jnp.abs(u), K)
    return u * jax.nn.one_hot(index, M, dtype=u.dtype).sum(-2)


def sorted_threshold(u):
    return jnp.where(u >= jnp.sort(u, -1)[..., -K][..., None], u, 0)


TOP_K = {
    "threshold": lambda u: jnp.where(u >= lax.top_k(u, K)[0][..., -1:], u, 0),
    "threshold_product": lambda u: u * (u >= lax.top_k(u, K)[0][..., -1, None]),
    "threshold_min": smallest_kept,
    "threshold_sort": sorted_threshold,
    "threshold_approx": lambda u: jnp.where(u >= lax.approx_max_k(u, K)[0][..., -1:], u, 0),
    "mask_one_hot": lambda u: u * jax.nn.one_hot(lax.top_k(u, K)[1], M, dtype=u.dtype).sum(-2),
    "mask_equal": lambda u: jnp.where((lax.top_k(u, K)[1][..., None] == jnp.arange(M)).any(-2), u, 0),
    "mask_scatter": lambda u: u * jnp.zeros_like(u).at[rows(u), lax.top_k(u, K)[1]].set(1.0),
    "mask_approx": lambda u: u * jnp.zeros_like(u).at[rows(u), lax.approx_max_k(u, K)[1]].set(1.0),
    "mask_bool": lambda u: jnp.where(jnp.zeros(u.shape, bool).at[rows(u), lax.top_k(u, K)[1]].set(True), u, 0),
    "scatter": lambda u: jnp.zeros_like(u).at[rows(u), lax.top_k(u, K)[1]].set(lax.top_k(u, K)[0]),
    "scatter_add": lambda u: jnp.zeros_like(u).at[rows(u), lax.top_k(u, K)[1]].add(lax.top_k(u, K)[0]),
    "scatter_activated": activated_before_placing,
    "scatter_vmap": by_vmap,
    "by_size": by_size,
    "relu_then": lambda u: smallest_kept(jax.nn.relu(u)),
}


def mean_and_std(u):
    return jax.nn.relu(u - (u.mean(-1, keepdims=True) + Z * u.std(-1, keepdims=True)))


def quantile_in_the_graph(u):
    z = jax.scipy.stats.norm.ppf(0.9)
    return jax.nn.gelu(jax.nn.relu(u - (jnp.mean(u, -1, keepdims=True) + jnp.std(u, -1, keepdims=True) * z)))


def moments_by_hand(u):
    mean = u.sum(-1, keepdims=True) / M
    variance = (u * u).sum(-1, keepdims=True) / M - mean * mean
    return jnp.where(u > mean + Z * jnp.sqrt(variance), u, 0)


def standard_score(u):
    return u * ((u - u.mean(-1, keepdims=True)) / jnp.std(u, -1, keepdims=True) > Z)


THRESHOLDS = {
    "standard_score": standard_score,
    "gemma": mean_and_std,
    "quantile": quantile_in_the_graph,
    "by_hand": moments_by_hand,
}


def plain_block(select):
    return lambda p, x: select(x @ p["gate"]) @ p["down"]


def gated_block(select):
    return lambda p, x: (jax.nn.gelu(select(x @ p["gate"])) * (x @ p["up"])) @ p["down"]


def site_of(fun, p, x, config):
    traced = hx.sparsify(fun, config=config).trace(p, x)
    assert kinds(traced.plan) == ["ffn"], traced.explain()
    assert not traced.plan.refusals
    return traced.plan.sites[0]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", [*TOP_K, *THRESHOLDS])
def test_every_spelling_fires_once_and_is_dense_at_full_width(name, count, evaluated):
    fun, p, x = plain_block({**TOP_K, **THRESHOLDS}[name]), weights(), tokens(count)
    config = full_width(activations="zeroing")
    site = site_of(fun, p, x, config)
    assert site.own == (f"top {K}" if name in TOP_K else "units above mean + 1.28 deviations")
    if not evaluated:
        return
    step = hx.sparsify(fun, config=config)
    packed = step.trace(p, x).pack(p)
    assert_same(step(packed, x), fun(p, x))
    slope = jax.grad(lambda x, f, p: jnp.sin(f(p, x)).sum())
    assert_same(slope(x, step, packed), slope(x, fun, p), 1e-4)


@pytest.mark.parametrize("name", ["threshold", "mask_one_hot", "scatter", "gemma"])
@pytest.mark.parametrize("count", [1, 8])
def test_a_gated_block_predicts_its_gate_only(name, count):
    p, x = weights(), tokens(count)
    fun = gated_block({**TOP_K, **THRESHOLDS}[name])
    step = hx.sparsify(fun, config=hx.approximate(rules=FORCE))
    traced = step.trace(p, x)
    site = traced.plan.sites[0]
    predictor, row = M * (D + 4), 4 * D  # int8 and a scale for each row; three matrices of f32 rows
    moments = 4 * (D * D + D) if name == "gemma" else 0
    assert site.sparse_bytes == predictor + moments + 3 * site.computed * row
    assert_same(step(traced.pack(p), x), fun(p, x))


def test_the_models_own_k_is_the_default_and_half_as_much_again_is_computed():
    p, x = weights(), tokens(1)
    own = hx.approximate(rules=FORCE)
    assert site_of(plain_block(TOP_K["scatter"]), p, x, own).computed == round(1.5 * K)
    assert site_of(plain_block(mean_and_std), p, x, own).computed == int(np.ceil(1.5 * 0.1 * M))
    assert site_of(plain_block(jax.nn.relu), p, x, own).computed == M // 4
    stated = hx.Config(ffn=hx.Ffn(active=0.5), rules=FORCE)
    assert site_of(plain_block(TOP_K["scatter"]), p, x, stated).computed == M // 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("name", ["threshold", "scatter", "gemma"])
def test_half_precision_is_dense_at_full_width(name, dtype):
    fun, p, x = gated_block({**TOP_K, **THRESHOLDS}[name]), weights(dtype), tokens(3, dtype)
    step = hx.sparsify(fun, config=full_width(activations="zeroing"))
    site_of(fun, p, x, full_width(activations="zeroing"))
    # Units within a rounding of the threshold may fall to either side: compare what is far from it.
    got, want = np.asarray(step(p, x), np.float64), np.asarray(jax.jit(fun)(p, x), np.float64)
    assert np.median(np.abs(got - want)) <= tolerance(dtype) * np.abs(want).max()


def check_held(fun, settings, wanted):
    """A poor predictor, so that candidates sometimes miss one: the result is dense's exactly when they don't.

    ``wanted`` gives what the dense function keeps of the products into the units.
    """
    p = weights()
    step = hx.sparsify(fun, config=hx.Config(ffn=settings, rules=FORCE))
    traced = step.trace(p, tokens(1))
    packed = traced.pack(p)
    run = jax.jit(
        lambda packed, x: observe(
            traced.sparse_jaxpr, jax.tree.leaves((packed, x)), lambda _, eqn: eqn.primitive is da_top_k_p
        )
    )
    met = {True: 0, False: 0}
    for seed in range(40):
        x = tokens(1, seed=seed)
        (result,), (((_,), (_, index)),) = run(packed, x)
        held = bool(np.isin(np.asarray(wanted(x @ p["gate"])), np.asarray(index)).all())
        met[held] += 1
        same = bool(np.allclose(result, fun(p, x), rtol=1e-4, atol=1e-5))
        assert same == held
    assert min(met.values()) >= 5, met


@pytest.mark.parametrize("name", ["threshold", "mask_one_hot", "scatter"])
def test_units_are_the_dense_ones_whenever_the_candidates_hold_them(name):
    settings = hx.Ffn(active=0.25, predictor=hx.LowRank(6))
    check_held(plain_block(TOP_K[name]), settings, lambda hidden: lax.top_k(hidden, K)[1])


def test_ties_go_to_the_unit_the_dense_function_takes():
    p = weights()
    p["gate"] = jnp.tile(p["gate"][:, : M // 4], (1, 4))  # every unit four times: k = 6 cuts through a tie
    for name in ("mask_one_hot", "scatter"):
        fun = plain_block(TOP_K[name])
        step = hx.sparsify(fun, config=hx.Config(ffn=hx.Ffn(active=0.5), rules=FORCE))
        for seed in range(5):
            x = tokens(3, seed=seed)
            assert_same(step(p, x), fun(p, x))


def test_blocks_in_a_scan_share_one_form():
    fun = gated_block(mean_and_std)
    stack = jax.tree.map(lambda a: jnp.stack([a, a * 0.9, -a]), weights())

    def layers(p, x):
        return lax.scan(lambda x, w: (x + fun(w, x), None), x, p)[0]

    x = tokens(2)
    step = hx.sparsify(layers, config=hx.approximate(rules=FORCE))
    traced = step.trace(stack, x)
    assert [s.own for s in traced.plan.sites] == ["units above mean + 1.28 deviations"]
    assert_same(step(traced.pack(stack), x), layers(stack, x), 1e-4)


def test_groups_are_scored_by_their_best_unit():
    p, x = weights(), tokens(2)
    fun = plain_block(TOP_K["scatter"])
    step = hx.sparsify(fun, config=hx.Config(ffn=hx.Ffn(active=0.5, group_size=4), rules=FORCE))
    assert_same(step(p, x), fun(p, x))


def test_no_unit_is_computed_outside_the_chosen():
    """The hidden products of the rewritten program are int8 or as wide as the candidates, never all units in f32."""
    p, x = weights(), tokens(1)
    traced = hx.sparsify(plain_block(TOP_K["scatter"]), config=hx.approximate(rules=FORCE)).trace(p, x)
    before = primitives_of(traced.jaxpr).count(prims.top_k_p)
    assert before == 2  # values and indices asked for apart
    assert da_top_k_p in primitives_of(traced.sparse_jaxpr)
    wide = [e for e in equations(traced.sparse_jaxpr) if e.primitive is prims.dot_general_p]
    for eqn in wide:
        assert M not in eqn.outvars[0].aval.shape or eqn.invars[0].aval.dtype == jnp.int8


def equations(jaxpr):
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                    yield from equations(sub)


def layer_norm(u):
    return jax.nn.relu((u - u.mean(-1, keepdims=True)) * lax.rsqrt(u.var(-1, keepdims=True) + 1e-5))


def returned_index(p, x):
    values, index = lax.top_k(x @ p["gate"], K)
    u = x @ p["gate"]
    return jnp.zeros_like(u).at[rows(u), index].set(values) @ p["down"], index


TWINS = {
    "centred": lambda u: u - u.mean(-1, keepdims=True),
    "softmax_of_top_k": lambda u: jax.nn.softmax(TOP_K["scatter"](u)),
    "normalised_top_k": lambda u: TOP_K["scatter"](u) / TOP_K["scatter"](u).sum(-1, keepdims=True),
    "smallest": lambda u: jnp.where(u <= -lax.top_k(-u, K)[0][..., -1:], u, 0) + u * 0.5,
    "below_the_mean": lambda u: jnp.where(u < u.mean(-1, keepdims=True), u, 1.0),
    "largest_left_out": lambda u: jnp.where(u >= lax.top_k(u, K)[0][..., -1:], 0, u),
    "moved": lambda u: jnp.zeros_like(u).at[rows(u), lax.top_k(u, K)[1][:, ::-1]].set(lax.top_k(u, K)[0]),
    "along_tokens": lambda u: jnp.where(u >= lax.top_k(u.T, 2)[0][..., -1:].T, u, 0),
    "onto_ones": lambda u: jnp.ones_like(u).at[rows(u), lax.top_k(u, K)[1]].set(lax.top_k(u, K)[0]),
    "biased_mean": lambda u: mean_and_std(u + jnp.arange(M) * 0.01),
    "median": lambda u: jax.nn.relu(u - jnp.median(u, -1, keepdims=True)),
    "cumulative": lambda u: jnp.cumsum(TOP_K["scatter"](u), -1),
    "layer_norm": layer_norm,
}


@pytest.mark.parametrize("name", TWINS)
def test_near_misses_are_refused_and_unchanged(name):
    fun, p, x = plain_block(TWINS[name]), weights(), tokens(3)
    for config in (full_width(), narrow()):
        step = hx.sparsify(fun, config=config)
        plan = step.trace(p, x).plan
        assert "ffn" not in kinds(plan)
        assert plan.refusals
        assert all(r.reason for r in plan.refusals)
        assert_same(step(p, x), jax.jit(fun)(p, x))


def test_an_index_that_is_returned_is_not_left_out():
    p, x = weights(), tokens(3)
    step = hx.sparsify(returned_index, config=full_width())
    assert_same(step(p, x), jax.jit(returned_index)(p, x))


def cut(u, z):
    return jax.nn.relu(u - (u.mean(-1, keepdims=True) + z * u.std(-1, keepdims=True)))


def multiplied(how, z, dtype):
    """A block cut at mean and ``z`` deviations, by where ``z`` comes from, and its arguments."""
    p, x, number = weights(dtype), tokens(1, dtype), jnp.asarray(z, dtype)
    if how == "literal":
        return lambda p, x: cut(x @ p["gate"], z) @ p["down"], (p, x)
    if how == "closed_over":
        return lambda p, x: cut(x @ p["gate"], number) @ p["down"], (p, x)
    if how == "argument":
        return lambda p, x, z: cut(x @ p["gate"], z) @ p["down"], (p, x, number)
    if how == "leaf":
        return lambda p, x: cut(x @ p["gate"], p["z"]) @ p["down"], ({**p, "z": number}, x)
    return lambda p, x, z: cut(x @ p["gate"], z) @ p["down"], (p, x, number[None])


Z_TRIED = (0.0, -1.0, 1.645)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("how", ["literal", "closed_over"])
def test_a_multiplier_that_can_be_read_is_read(how, dtype):
    for z, told, share in zip(Z_TRIED, ("+ 0.00", "- ", "+ 1.6"), (0.5, 0.8413, 0.05), strict=True):
        fun, arguments = multiplied(how, z, dtype)
        config = hx.Config(ffn=hx.Ffn(certify=False), rules=FORCE)
        (site,) = hx.sparsify(fun, config=config).trace(*arguments).plan.sites
        assert site.own.startswith(f"units above mean {told}")
        assert site.computed == pytest.approx(min(1.0, 1.5 * share) * M, abs=1)


@pytest.mark.filterwarnings("ignore:.*was packed")
@pytest.mark.parametrize(
    ("how", "dtype"), [("argument", jnp.bfloat16), ("leaf", jnp.float32), ("of_one", jnp.float32)], ids=str
)
def test_a_multiplier_that_is_data_is_never_taken_for_a_number(how, dtype, evaluated):
    asked = hx.Config(ffn=hx.Ffn(active=1.0, certify=False), rules=FORCE)
    proved = hx.Config(ffn=hx.Ffn(active=0.5, certify=True), rules=FORCE)
    fun, arguments = multiplied(how, 1.0, dtype)
    with_default = hx.sparsify(fun, config=hx.Config(ffn=hx.Ffn(certify=False), rules=FORCE))
    plan = with_default.trace(*arguments).plan
    assert not plan.sites
    assert "mean + a multiplier known only at run time" in plan.refusals[0].reason
    assert "hx.Ffn(active=...)" in plan.refusals[0].reason
    steps, dense = [hx.sparsify(fun, config=config) for config in (asked, proved)], jax.jit(fun)
    for step in steps:
        (site,) = step.trace(*arguments).plan.sites
        assert site.own == "units above mean + a multiplier known only at run time"
    if not evaluated:
        return
    fallen = []
    for z in Z_TRIED:
        _, arguments = multiplied(how, z, dtype)
        for step in steps:
            (site,) = step.trace(*arguments).plan.sites
            assert site.own == "units above mean + a multiplier known only at run time"
            result, counts = step.with_fallbacks(*arguments)
            assert_same(result, dense(*arguments), tolerance(dtype))
        fallen.append(sum(int(n) for n in counts.values()))
    # Half of the units hold what is above 1.6 deviations, not what is above -1.
    assert fallen[1:] == [1, 0]


def test_units_near_the_kth_largest_are_not_counted_as_k():
    def above_a_part(p, x):
        u = x @ p["gate"]
        return jnp.where(u >= 0.1 * lax.top_k(u, 1)[0], u, 0) @ p["down"]

    p, x = weights(), tokens(1)
    plan = hx.sparsify(above_a_part, config=hx.Config(ffn=hx.Ffn(certify=False), rules=FORCE)).trace(p, x).plan
    assert not plan.sites
    assert "units above a number made of the least of their top 1" in plan.refusals[0].reason
    step = hx.sparsify(above_a_part, config=hx.Config(ffn=hx.Ffn(active=1.0, certify=False), rules=FORCE))
    assert kinds(step.trace(p, x).plan) == ["ffn"]
    assert_same(step(p, x), above_a_part(p, x))


def test_what_is_not_known_at_planning_can_be_calibrated():
    fun, (p, x, z) = multiplied("argument", Z, jnp.float32)
    batches = [(p, tokens(20, seed=seed), z) for seed in range(3)]
    config = hx.Config(ffn=hx.Ffn(certify=False), rules=FORCE)
    calibration = hx.calibrate(fun, batches, config=config, predictors=[hx.Quantized(8)])
    step = hx.sparsify(fun, config=config, calibration=calibration)
    (site,) = step.trace(p, x, z).plan.sites
    assert "calibrated" in site.calibrated
    assert site.computed < M // 2
    assert_same(step(p, x, z), fun(p, x, z))
