"""Certified blocks whose model chooses its units itself: a top-k of them, or a threshold at mean and deviations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same, kinds
from jax import lax
from test_own_groups import CHOICES
from test_own_sparsity import THRESHOLDS, TOP_K, K, M, Z, gated_block, plain_block, tokens, weights

import hire_xform as hx
from hire_xform.lowering.engine.certified_choice import Largest
from hire_xform.lowering.prove import intervals
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.prove.moment_bounds import bounded_moments, pack_bounded_moments
from hire_xform.lowering.prove.proofs import pack_proof, scores_with_bounds
from hire_xform.passes.ir.known_numbers import known_scalar
from hire_xform.passes.ir.pointwise import known_number
from hire_xform.passes.match.own_choice import OfAll
from hire_xform.passes.match.region import Grouped, Kept, Number, Place, replay
from hire_xform.passes.prove.region_intervals import Evaluation

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was packed"),
    pytest.mark.any_jax("cases vary the thresholds and values that are proved, one program each kind", every=4),
]


def certified(active=0.6, **ffn) -> hx.Config:
    return hx.Config(vocab=None, ffn=hx.Ffn(active=active, certify=True, **ffn), rules=FORCE)


BLOCKS = {
    **{name: plain_block(TOP_K[name]) for name in ("threshold", "threshold_product", "threshold_min", "by_size")},
    **{name: plain_block(CHOICES[name]) for name in ("energy", "largest", "one_hot", "scaled")},
    **{name: plain_block(THRESHOLDS[name]) for name in ("gemma", "by_hand", "standard_score")},
    "gated_scatter": gated_block(TOP_K["scatter"]),
    "gated_gemma": gated_block(THRESHOLDS["gemma"]),
    "gated_mask": gated_block(lambda u: u * (u > u.mean(-1, keepdims=True) + Z * u.std(-1, keepdims=True))),
    "biased_relu": lambda p, x: TOP_K["threshold"](jax.nn.relu(x @ p["gate"] + p["bias"])) @ p["down"],
    "strictly_above": plain_block(lambda u: jnp.where(u > lax.top_k(u, K)[0][..., -1:], u, 0)),
    "less_the_largest_left_out": plain_block(lambda u: jax.nn.relu(u - lax.top_k(u, K)[0][..., -1:])),
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
    assert fallen <= 1
    assert steps(name)[0].trace(p, tokens()).plan.sites[0].computed < M


@pytest.mark.parametrize("name", ["gated_gemma", "gated_scatter", "energy"])
def test_several_tokens(name):
    p, fallen = weights(), 0
    for seed in range(6):
        result, fallbacks, dense = run(name, p, tokens(3, seed=seed), active=0.75)
        assert_same(result, dense)
        fallen += fallbacks
    assert fallen <= 1


def side_value(value):
    """Zeros, and what `jnp.var` has: the number of units, whether it is above zero, and a NaN for where it is not."""
    number = known_number(value) if value.shape else known_scalar(value)
    if value.aval.dtype == jnp.bool_:
        return jnp.asarray(True)
    return jnp.full((), np.nan if number is None else number, value.aval.dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", ["gemma", "by_hand", "gated_gemma", "energy", "threshold", "one_hot"])
def test_what_a_dense_block_computes_is_within_the_bounds(name, dtype):
    """Every expression of the region, with products and sums added up in another order."""
    p, x = weights(dtype), tokens(5, dtype) * jnp.asarray([[1.0], [3.0], [1e-3], [30.0], [1.0]], dtype)
    p["gate"] = p["gate"] + jnp.asarray(0.2, dtype)  # the mean of the units is not near zero
    decision = hx.sparsify(BLOCKS[name], config=certified()).trace(p, x).plan.decisions[0]
    region, spec = decision.match.region, hx.Quantized(8)
    sides = [side_value(side.value) for side in region.sides]
    made = {"gate": p["gate"], "up": p["up"]}
    names = ["gate", "up"][: len(region.ups)]
    backwards = [(x[:, ::-1] @ made[n][::-1]).astype(dtype) for n in names]
    found = [scores_with_bounds(x, pack_proof(made[n].T, spec), spec) for n in names]
    hiddens = [intervals.rounded(Interval(f.lower, f.upper), dtype) for f in found]
    moments = [bounded_moments(x, pack_bounded_moments(made[n].T)) for n in names]
    order = np.random.default_rng(0).permutation(M)
    score = replay(region, backwards, sides, lambda v: v, jax.nn.relu, OfAll(), region.own.score)
    ranked = jnp.sort(score.astype(jnp.float32), axis=1)[:, ::-1]
    evaluation = Evaluation(region, hiddens, sides, lambda v: v, moments, Largest(ranked, ranked, ranked[:, :1]))
    evaluation.value(region.root)
    held = 0
    for number in sorted(evaluation.values):
        bounds = evaluation.values[number]
        if isinstance(region.exprs[number], Kept | Place | Number):
            continue
        grouped = any(isinstance(e, Grouped) for e in region.exprs)
        permuted = backwards if grouped else [b[:, order] for b in backwards]
        value = replay(region, permuted, sides, lambda v: v, jax.nn.relu, OfAll(), number)
        value = jnp.asarray(value)
        if permuted is not backwards and value.shape == (5, M) and region.varies[number]:
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
    """A mask can't be decided, and runs dense, which decides; a difference is as small as its own rounding either way.

    What is run then are the program's own equations: rounding goes the way it goes there.
    """
    p, x = at_the_cutoff(weights(), tokens(), shift), tokens()
    for name, fallen in (("standard_score", 1), ("gated_mask", 1), ("gemma", 0)):
        result, fallbacks, dense = run(name, p, x)
        assert fallbacks == fallen
        assert_same(result, dense, 2e-5 if fallen else 1e-2)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-6, 1e-3])
@pytest.mark.parametrize("name", ["threshold", "gated_scatter", "by_size", "strictly_above"])
def test_ties_and_near_ties_at_the_kth_place(name, gap):
    p, x = weights(), tokens()
    units = (x @ p["gate"])[0]
    order = np.argsort(-np.asarray(jnp.abs(units) if name == "by_size" else units))
    # What is above the k-th is decided at the place before.
    first, second = order[K - 2 : K] if name == "strictly_above" else order[K - 1 : K + 1]
    # The next unit is the k-th, less a little; and one with a lower number for a higher one.
    for kept, left in ((first, second), (max(first, second), min(first, second))):
        q = {**p, "gate": p["gate"].at[:, left].set(p["gate"][:, kept] * (1.0 - gap))}
        result, fallbacks, dense = run(name, q, x)
        assert fallbacks == (gap < 1e-4)
        assert_same(result, dense)


def test_units_that_tie_at_zero_need_no_decision():
    """After a ReLU fewer than k units are above zero: whichever zeros are kept, zeros they are."""
    p, x = weights(), tokens()
    for seed in range(4):
        x = tokens(seed=seed)
        p["bias"] = jnp.full(M, -jnp.sort((x @ p["gate"])[0])[-4:-2].mean())  # three units above zero, and k is six
        result, fallbacks, dense = run("biased_relu", p, x)
        assert_same(result, dense)
        assert not fallbacks


def test_more_open_units_than_the_compiled_size_run_dense():
    p, x = weights(), tokens()
    for name in ("gemma", "threshold"):
        result, fallbacks, dense = run(name, p, x, active=0.05)
        assert fallbacks == 1
        assert_same(result, dense, 1e-6)


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-10, 1e10, 1e18, 1e30])
def test_huge_and_tiny_values(scale):
    for name in ("gemma", "gated_scatter", "energy"):
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
    for name in ("gated_gemma", "gated_scatter"):
        p, x = weights(), tokens()
        if which == "x":
            x = x.at[0, 3].set(bad)
        else:
            p[which] = p[which].at[5, 3].set(bad)
        result, fallbacks, dense = run(name, p, x)
        assert fallbacks == 1
        np.testing.assert_allclose(result, dense, rtol=1e-4, atol=1e-5)


def test_a_mean_that_dwarfs_the_deviation_runs_dense_or_is_right():
    """The variance is lost in the rounding of the products: nothing is known of its root."""
    for lift in (1.0, 1e2, 1e4, 1e6):
        p, x = weights(), tokens()
        p["gate"] = p["gate"] + lift
        for name in ("gemma", "by_hand"):
            result, fallbacks, want = run(name, p, x, active=0.9)
            assert fallbacks or np.abs(result - want).max() <= 1e-2 * np.abs(want).max()
            assert fallbacks or lift < 1e4


@pytest.mark.parametrize("name", ["gemma", "threshold"])
def test_half_precision(name):
    """In 16 bits most top-k run dense, as neighbours round to one value; thresholds are proved all the same."""
    p, fallen = weights(jnp.bfloat16), 0
    for seed in range(6):
        x = tokens(1, jnp.bfloat16, seed)
        result, fallbacks, dense = run(name, p, x, active=0.9)
        fallen += fallbacks
        assert_same(result, dense, 4e-2)
    assert fallen == 0 if name == "gemma" else fallen <= 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated_gemma", "gated_scatter"])
def test_vmap_takes_the_tokens_of_all_examples_together(name):
    p, xs = weights(), jnp.stack([tokens(2, seed=s) for s in range(3)])
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


def test_other_predictors_and_groups():
    for name, options in (
        ("gemma", {"predictor": hx.LowRank(0.9, bits=8)}),
        ("gated_scatter", {"predictor": hx.LowRank(1.0)}),
        ("energy", {"group_size": 16}),
        ("gemma", {"group_size": 4}),
    ):
        p, x = weights(), tokens()
        result, fallbacks, dense = run(name, p, x, active=0.9, **options)
        assert_same(result, dense)
        assert not fallbacks


def test_a_calibration_finds_the_size():
    p, x = weights(), tokens(64)
    for name in ("gated_gemma", "gated_scatter"):
        cal = hx.calibrate(BLOCKS[name], [(p, x)], config=certified(None), predictors=[hx.Quantized(8)])
        step = hx.sparsify(BLOCKS[name], config=certified(None), calibration=cal)
        traced = step.trace(p, x[:1])
        assert K <= traced.plan.sites[0].computed < M / 2
        packed = traced.pack(p)
        for i in range(0, 64, 4):
            result, counts = step.with_fallbacks(packed, x[i : i + 1])
            assert_same(result, BLOCKS[name](p, x[i : i + 1]))
            assert [int(n) for n in counts.values()] == [0]


def test_what_can_not_be_bounded_is_refused():
    fun = plain_block(lambda u: jnp.exp(TOP_K["threshold"](u)) - 1.0)
    plan = hx.sparsify(fun, config=certified()).trace(weights(), tokens()).plan
    assert not plan.sites
    assert "no bounds of exp" in plan.refusals[0].reason


@pytest.mark.slow
def test_calibrated_layers_of_a_loop_have_sizes_of_their_own():
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
    assert "each layer has its own" in traced.plan.sites[0].calibrated
    packed, fallen = traced.pack(stack), 0
    for i in range(64):
        result, counts = step.with_fallbacks(packed, x[i : i + 1])
        assert_same(result, layers(stack, x[i : i + 1]), 1e-4)
        fallen += sum(int(n) for n in counts.values())
    assert 0 < fallen < 64
    assert fallen == site.curve().wanted[:, -1].sum()  # those that no size proves, as was measured


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated_gemma", "gated_mask", "gated_scatter", "energy"])
def test_tokens_of_all_sizes(name):
    p, fallen = weights(), 0
    for seed in range(150):
        size, shift = np.random.default_rng(seed).uniform(-3, 3, 2)
        result, fallbacks, dense = run(name, p, tokens(seed=seed) * 10.0**size + shift * (seed % 3 == 0))
        assert_same(result, dense, 1e-4)
        fallen += fallbacks
    assert fallen < 15
