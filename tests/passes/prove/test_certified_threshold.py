"""Certified blocks with a threshold of their own at mean and deviations; a top-k and a mask are refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same, kinds
from jax import lax
from test_own_groups import CHOICES
from test_own_sparsity import THRESHOLDS, TOP_K, M, Z, gated_block, plain_block, tokens, weights

import hire_xform as hx
from hire_xform.lowering.prove import intervals
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.prove.moment_bounds import bounded_moments, pack_bounded_moments
from hire_xform.lowering.prove.proofs import pack_proof, scores_with_bounds
from hire_xform.passes.ir.known_numbers import known_scalar
from hire_xform.passes.ir.pointwise import known_number
from hire_xform.passes.match.own_choice import OfAll
from hire_xform.passes.match.region import Number, replay
from hire_xform.passes.prove.region_intervals import Evaluation

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was packed"),
    pytest.mark.any_jax("cases vary the thresholds and values that are proved, one program each kind", every=4),
]


def certified(active=0.6, certify=True, **ffn) -> hx.Config:
    return hx.Config(vocab=None, ffn=hx.Ffn(active=active, certify=certify, **ffn), rules=FORCE)


def relu_by_hand(u):
    over = u - (u.mean(-1, keepdims=True) + Z * u.std(-1, keepdims=True))
    return jnp.where(over > 0, over, 0)


def guarded(u):
    """A comparison of what is the same for all units."""
    deviation = u.std(-1, keepdims=True)
    return jax.nn.relu(u - jnp.where(deviation > 1e-3, u.mean(-1, keepdims=True) + Z * deviation, 0.0))


BLOCKS = {
    **{name: plain_block(THRESHOLDS[name]) for name in ("gemma", "quantile")},
    "relu_by_hand": plain_block(relu_by_hand),
    "guarded": plain_block(guarded),
    "gated_gemma": gated_block(THRESHOLDS["gemma"]),
}


@functools.cache
def steps(name, **options):
    """The certified function and the dense one, compiled once for all tests."""
    return hx.sparsify(BLOCKS[name], config=certified(**options)), jax.jit(BLOCKS[name])


def run(name, p, x, **options):
    """The result, how often the dense block was run, and the dense result."""
    step, dense = steps(name, **options)
    assert kinds(step.trace(p, x).plan) == ["ffn"], step.trace(p, x).explain()
    result, counts = step.with_fallbacks(p, x)
    return result, sum(int(n) for n in counts.values()), dense(p, x)


@pytest.mark.parametrize("name", BLOCKS)
def test_units_left_out_change_nothing(name):
    p, fallen = weights(), 0
    for seed in range(6):
        result, fallbacks, dense = run(name, p, tokens(seed=seed))
        assert_same(result, dense)
        fallen += fallbacks
    assert not fallen
    assert steps(name)[0].trace(p, tokens()).plan.sites[0].computed < M


def test_several_tokens():
    p, fallen = weights(), 0
    for seed in range(6):
        result, fallbacks, dense = run("gated_gemma", p, tokens(3, seed=seed), active=0.75)
        assert_same(result, dense)
        fallen += fallbacks
    assert not fallen


def side_value(value):
    """Zeros, and what `jnp.var` has: the number of units, whether it is above zero, and a NaN for where it is not."""
    number = known_number(value) if value.shape else known_scalar(value)
    if value.aval.dtype == jnp.bool_:
        return jnp.asarray(True)
    return jnp.full((), np.nan if number is None else number, value.aval.dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", ["gemma", "by_hand", "gated_gemma", "guarded"])
def test_what_a_dense_block_computes_is_within_the_bounds(name, dtype):
    """Every expression of the region, with products and sums added up in another order."""
    p, x = weights(dtype), tokens(5, dtype) * jnp.asarray([[1.0], [3.0], [1e-3], [30.0], [1.0]], dtype)
    p["gate"] = p["gate"] + jnp.asarray(0.2, dtype)  # the mean of the units is not near zero
    fun = BLOCKS[name] if name in BLOCKS else plain_block(THRESHOLDS[name])
    decision = hx.sparsify(fun, config=certified(certify=False)).trace(p, x).plan.decisions[0]
    region, spec = decision.match.region, hx.Quantized(8)
    sides = [side_value(side.value) for side in region.sides]
    made = {"gate": p["gate"], "up": p["up"]}
    names = ["gate", "up"][: len(region.ups)]
    backwards = [(x[:, ::-1] @ made[n][::-1]).astype(dtype) for n in names]
    found = [scores_with_bounds(x, pack_proof(made[n].T, spec), spec) for n in names]
    hiddens = [intervals.rounded(Interval(f.lower, f.upper), dtype) for f in found]
    moments = [bounded_moments(x, pack_bounded_moments(made[n].T)) for n in names]
    order = np.random.default_rng(0).permutation(M)
    evaluation = Evaluation(region, hiddens, sides, moments)
    evaluation.value(region.root)
    held = 0
    for number in sorted(evaluation.values):
        bounds = evaluation.values[number]
        if isinstance(region.exprs[number], Number):
            continue
        permuted = [b[:, order] for b in backwards]
        value = replay(region, permuted, sides, lambda v: v, jax.nn.relu, OfAll(), number)
        value = jnp.asarray(value)
        if value.shape == (5, M) and region.varies[number]:
            value = value[:, np.argsort(order)]
        if value.dtype == jnp.bool_:
            outside = jnp.where(value, ~bounds.high, bounds.low)
        else:
            outside = (value.astype(jnp.float32) < bounds.low) | (value.astype(jnp.float32) > bounds.high)
        assert not bool(jnp.any(outside)), (number, region.exprs[number])
        held += int(jnp.sum(jnp.isfinite(bounds.low))) if value.dtype != jnp.bool_ else 0
    assert held > 5 * M


def at_the_cutoff(p, x, shift):
    """The block's third unit moved to its cutoff, and so many of its own roundings above it."""
    rows = np.asarray(p["gate"], np.float64).T
    token = np.asarray(x[0], np.float64)
    for _ in range(60):
        units = rows @ token
        rows[2] += token / (token @ token) * ((units.mean() + Z * units.std()) * (1.0 + shift) - units[2])
    return {**p, "gate": jnp.asarray(rows.T, jnp.float32), "down": p["down"].at[2].multiply(1e4)}


@pytest.mark.parametrize("shift", [0.0, 1e-7, -1e-7, 1e-6, -1e-6])
def test_a_unit_within_rounding_of_the_cutoff(shift):
    """A difference is as small as its own rounding either way."""
    p, x = at_the_cutoff(weights(), tokens(), shift), tokens()
    result, fallbacks, dense = run("gemma", p, x)
    assert not fallbacks
    assert_same(result, dense, 1e-2)


def test_more_open_units_than_the_compiled_size_run_dense():
    result, fallbacks, dense = run("gemma", weights(), tokens(), active=0.05)
    assert fallbacks == 1
    assert_same(result, dense, 1e-6)


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-10, 1e10, 1e18, 1e30])
def test_huge_and_tiny_values(scale):
    for name in ("gemma", "gated_gemma"):
        for which in ("gate", "x", "down"):
            p, x = weights(), tokens()
            if which == "x":
                x = x * scale
            else:
                p[which] = p[which] * scale
            result, _, want = run(name, p, x.astype(jnp.float32))
            np.testing.assert_allclose(result, want, rtol=1e-3, atol=1e-4 * np.abs(np.nan_to_num(want)).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["gate", "up", "down", "x"])
def test_what_is_not_finite_runs_dense(which, bad):
    p, x = weights(), tokens()
    if which == "x":
        x = x.at[0, 3].set(bad)
    else:
        p[which] = p[which].at[5, 3].set(bad)
    result, fallbacks, dense = run("gated_gemma", p, x)
    assert fallbacks == 1
    np.testing.assert_allclose(result, dense, rtol=1e-4, atol=1e-5)


def test_a_mean_that_dwarfs_the_deviation_runs_dense_or_is_right():
    """The variance is lost in the rounding of the products: nothing is known of its root."""
    for lift in (1.0, 1e2, 1e4, 1e6):
        p, x = weights(), tokens()
        p["gate"] = p["gate"] + lift
        for name in ("gemma", "quantile"):
            result, fallbacks, want = run(name, p, x, active=0.9)
            assert fallbacks or np.abs(result - want).max() <= 1e-2 * np.abs(want).max()
            assert fallbacks or lift < 1e4


def test_half_precision():
    p, fallen = weights(jnp.bfloat16), 0
    for seed in range(6):
        x = tokens(1, jnp.bfloat16, seed)
        result, fallbacks, dense = run("gemma", p, x, active=0.9)
        fallen += fallbacks
        assert_same(result, dense, 4e-2)
    assert not fallen


@pytest.mark.slow
def test_vmap_takes_the_tokens_of_all_examples_together():
    p, xs, name = weights(), jnp.stack([tokens(2, seed=s) for s in range(3)]), "gated_gemma"
    step = hx.sparsify(BLOCKS[name], config=certified(0.9))
    packed = step.trace(p, xs[0]).pack(p)
    batched = jax.jit(jax.vmap(lambda x: step(packed, x)))
    assert_same(batched(xs), jax.vmap(lambda x: BLOCKS[name](p, x))(xs))
    alone = jax.jit(step).lower(packed, xs[0]).as_text()
    assert batched.lower(xs).as_text().count("stablehlo.case") == alone.count("stablehlo.case")
    slope = jax.grad(lambda x, f, p: jnp.sin(f(p, x)).sum())
    assert_same(slope(xs[0], step, packed), slope(xs[0], BLOCKS[name], p), 1e-4)


def test_blocks_in_a_scan_and_what_they_read():
    stack = jax.tree.map(lambda a: jnp.stack([a, a * 0.9, -a]), weights())

    def layers(p, x):
        return lax.scan(lambda x, w: (x + BLOCKS["gated_gemma"](w, x), None), x, p)[0]

    x = tokens(2)
    step = hx.sparsify(layers, config=certified(0.9))
    traced = step.trace(stack, x)
    site = traced.plan.sites[0]
    d = x.shape[1]
    # int8 rows with a scale, an error and a size; the moments; three matrices of chosen rows; three layers.
    assert site.sparse_bytes == 3 * (M * (d + 12) + 4 * (d * d + d) + 20 + 3 * site.computed * 4 * d)
    result, counts = step.with_fallbacks(traced.pack(stack), x)
    assert_same(result, layers(stack, x), 1e-4)
    assert [int(n) for n in counts.values()] == [0]


@pytest.mark.any_jax("predictors and groups of a proof that other tests run on every JAX")
def test_other_predictors_and_groups():
    for name, options in (
        ("gemma", {"predictor": hx.LowRank(0.9, bits=8)}),
        ("gated_gemma", {"predictor": hx.LowRank(1.0)}),
        ("gemma", {"group_size": 4}),
    ):
        p, x = weights(), tokens()
        result, fallbacks, dense = run(name, p, x, active=0.9, **options)
        assert_same(result, dense)
        assert not fallbacks


@pytest.mark.any_jax("what is chosen of what was measured; test_calibration.py measures on every JAX")
def test_a_calibration_finds_the_sizes():
    p, x = weights(), tokens(64)
    fun = BLOCKS["gated_gemma"]
    cal = hx.calibrate(fun, [(p, x)], config=certified(None), predictors=[hx.Quantized(8)])
    step = hx.sparsify(fun, config=certified(None), calibration=cal)
    traced = step.trace(p, x[:1])
    (site,) = traced.plan.sites
    assert len(site.rungs) > 2  # the smallest that holds the open units is known before one is read
    assert site.computed < M / 2
    packed, taken = traced.pack(p), []
    for i in range(0, 64, 4):
        result, rungs = step.with_rungs(packed, x[i : i + 1])
        assert_same(result, fun(p, x[i : i + 1]))
        taken += [int(np.argmax(counts)) for counts in rungs.values()]
    assert 0 in taken
    assert len(site.rungs) - 1 not in taken


def test_what_can_not_be_bounded_is_refused():
    fun = plain_block(lambda u: jnp.exp(THRESHOLDS["gemma"](u)) - 1.0)
    plan = hx.sparsify(fun, config=certified()).trace(weights(), tokens()).plan
    assert not plan.sites
    assert "no bounds of exp" in plan.refusals[0].reason


BORDERS = {
    **{name: (plain_block(TOP_K[name]), "no ranking of units") for name in ("threshold", "by_size", "relu_then")},
    "scatter": (gated_block(TOP_K["scatter"]), "no ranking of units"),
    "energy": (plain_block(CHOICES["energy"]), "no ranking of units"),
    **{name: (plain_block(THRESHOLDS[name]), "no mask at a threshold") for name in ("by_hand", "standard_score")},
    "product": (
        gated_block(lambda u: u * (u > u.mean(-1, keepdims=True) + Z * u.std(-1, keepdims=True))),
        "no mask at a threshold",
    ),
}


@pytest.mark.parametrize("name", BORDERS)
def test_what_rounding_can_move_across_a_border_stays_dense_unless_asked_for(name):
    (fun, why), p, x = BORDERS[name], weights(), tokens()
    for config in (certified(), hx.Config(rules=FORCE)):
        step = hx.sparsify(fun, config=config)
        plan = step.trace(p, x).plan
        assert not plan.sites
        (reason,) = {refusal.reason for refusal in plan.refusals if refusal.kind == "ffn"}
        assert "the model itself keeps " in reason
        assert why in reason
        assert "allow what is not proved with hx.approximate(), a size, or a calibration" in reason
        assert_same(step(p, x), jax.jit(fun)(p, x), 0.0)
    asked = hx.Config(ffn=hx.Ffn(active=0.6, certify=False), rules=FORCE)
    assert kinds(hx.sparsify(fun, config=asked).trace(p, x).plan) == ["ffn"]


@pytest.mark.slow
def test_calibrated_layers_of_a_loop_fall_back_where_no_size_proves_them():
    """The second layer's rows have one large entry each, where tokens are small: bounds are wide, or say nothing."""
    loose = weights()
    loose["gate"] = loose["gate"].at[0].multiply(60.0)
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b]), weights(), loose)

    def layers(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x + BLOCKS["gated_gemma"](w, x)).at[:, 0].multiply(1e-3), None), x, p)[0]

    x = tokens(64).at[:, 0].multiply(1e-3)
    cal = hx.calibrate(layers, [(stack, x)], config=certified(None), predictors=[hx.Quantized(8)])
    (site,) = cal.sites.values()
    few, many = site.sizes
    assert few < many
    step = hx.sparsify(layers, config=certified(None), calibration=cal)
    traced = step.trace(stack, x[:1])
    assert traced.plan.sites[0].computed == many
    packed, fallen = traced.pack(stack), 0
    for i in range(64):
        result, counts = step.with_fallbacks(packed, x[i : i + 1])
        assert_same(result, layers(stack, x[i : i + 1]), 1e-4)
        fallen += sum(int(n) for n in counts.values())
    assert 0 < fallen < 64
    assert fallen == site.curve().wanted[:, -1].sum()  # those that no size proves, as was measured


@pytest.mark.slow
def test_tokens_of_all_sizes():
    p, fallen, name = weights(), 0, "gated_gemma"
    for seed in range(150):
        size, shift = np.random.default_rng(seed).uniform(-3, 3, 2)
        result, fallbacks, dense = run(name, p, tokens(seed=seed) * 10.0**size + shift * (seed % 3 == 0))
        assert_same(result, dense, 1e-4)
        fallen += fallbacks
    assert fallen < 15
