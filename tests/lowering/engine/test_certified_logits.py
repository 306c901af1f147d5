"""The certified arg max is the dense one, or the dense product is run: no mismatch, on adversarial inputs either."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hire_xform.lowering.engine.head import certified_logits
from hire_xform.lowering.predict.low_rank import LowRank
from hire_xform.lowering.predict.projected import Projected
from hire_xform.lowering.predict.quantized import Quantized
from hire_xform.lowering.predict.staged import Staged
from hire_xform.lowering.primitives.select_rows import select_rows_dot
from hire_xform.lowering.prove.bounds import norm, product_error
from hire_xform.lowering.prove.goals import Nucleus, TopSet
from hire_xform.lowering.prove.proofs import pack_proof, scores_with_bounds
from hire_xform.lowering.prove.readings import Reading

pytestmark = pytest.mark.any_jax("cases vary numbers, dtypes and predictors of arithmetic that is our own", every=4)

V, D = 300, 48
SPECS = [
    Quantized(8),
    Quantized(4),
    LowRank(0.75, bits=4),
    LowRank(0.75),
    Projected(40, bits=8),
    Staged((LowRank(24, bits=4), Quantized(8))),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def rng(seed=0):
    return np.random.default_rng(seed)


def dense(x, rows, out=jnp.float32):
    return lax.dot_general(x, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).astype(out)


@functools.partial(jax.jit, static_argnames=("candidates", "spec", "out", "options"))
def step(x, rows, proof, candidates, spec, out, options):
    return certified_logits(
        x,
        rows,
        proof,
        spec,
        lambda x, rows: dense(x, rows, out),
        candidates=candidates,
        out_dtype=out,
        **dict(options),
    )


def run(x, rows, *, candidates=16, spec=SPECS[0], out=jnp.float32, **options):
    """The logits, and the number of the size; without the rows that stages have read."""
    logits, taken = step(x, rows, made(rows, spec), candidates, spec, out, tuple(options.items()))
    assert taken.shape == (() if len(spec.stages) == 1 else (len(spec.stages),))
    return logits, taken[0] if taken.ndim else taken


@functools.partial(jax.jit, static_argnums=1)
def made(rows, spec):
    """Fitted to inputs like the rows, as those of `trained_like` are."""
    inputs = jnp.nan_to_num(rows.astype(jnp.float32), posinf=0.0, neginf=0.0)
    inputs = inputs / jnp.maximum(jnp.abs(inputs).max(), 1e-30)
    return pack_proof(rows, spec, inputs.T @ inputs)


jitted_dense = jax.jit(dense, static_argnums=2)


def assert_certified(x, rows, out=jnp.float32, **options) -> bool:
    """The arg max is the dense one; returns whether the dense product was run."""
    logits, fallback = run(x, rows, out=out, **options)
    want = jitted_dense(x, rows, out)
    np.testing.assert_array_equal(np.argmax(np.asarray(logits), -1), np.argmax(np.asarray(want), -1))
    assert logits.dtype == want.dtype
    return bool(fallback)


def trained_like(seed=0, dtype=jnp.float32, tokens=1, scale=1.0):
    """Rows and a token that one of them fits well, as trained models have it."""
    r = rng(seed)
    decay = 0.95 ** np.arange(D)
    rows = r.normal(size=(V, D)) * decay
    x = r.normal(size=(tokens, D)) * 0.3 * decay + rows[r.integers(0, V, tokens)]
    return jnp.asarray(x * scale, dtype), jnp.asarray(rows, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"])
@every_spec
def test_bounds_hold_for_every_row(spec, dtype):
    for seed in range(6):
        x, rows = trained_like(seed, dtype, tokens=3, scale=10.0 ** (seed % 5 - 2))
        scores, upper, exact_error = bounded(x, made(rows, spec), spec)
        exact = np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T
        assert (exact <= upper).all()
        assert (exact >= scores - (upper - scores) * (1 + 1e-6)).all()
        assert (np.abs(exact - np.asarray(dense(x, rows), np.float64)) <= exact_error / 2).all()
        # The bound is worth having.
        assert np.median(upper - scores) < 0.3 * float(norm(x).max() * norm(rows).max())


@functools.partial(jax.jit, static_argnums=2)
def _bounded(x, proof, spec):
    found = scores_with_bounds(x, proof, spec)
    return found.scores, found.upper, found.exact_error


def bounded(x, proof, spec):
    return [np.asarray(a, np.float64) for a in _bounded(x, proof, spec)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_the_rounding_of_computed_rows_is_bounded_by_their_terms(dtype):
    """Sums in several orders, forwards one by one too, and rows whose terms cancel."""
    sums = jax.jit(lambda terms: lax.scan(lambda total, term: (total + term, None), jnp.zeros(V), terms.T)[0])
    for seed in range(4):
        x, rows = trained_like(seed, dtype, scale=10.0 ** (seed - 2))
        if seed % 2:
            rows = rows.at[:, D // 2 :].set(-rows[:, : D // 2] * x[0, : D // 2] / x[0, D // 2 :])
        index = jnp.arange(V)
        size = select_rows_dot(x, rows, index, preferred_element_type=jnp.float32, magnitudes=True)
        error = np.asarray(product_error(size, D), np.float64)[0]
        terms = np.asarray(x, np.float64) * np.asarray(rows, np.float64)
        np.testing.assert_allclose(size[0], np.abs(terms).sum(1), rtol=1e-5)
        product = select_rows_dot(x, rows, index, preferred_element_type=jnp.float32)[0]
        wide = x.astype(jnp.float32) * rows.astype(jnp.float32)
        closer = np.asarray(product_error(size, D, product=product), np.float64)[0]
        assert (closer <= error).all()
        for found in (product, dense(x, rows)[0], sums(wide), sums(wide[:, ::-1])):
            assert (np.abs(np.asarray(found, np.float64) - terms.sum(1)) <= closer / 2).all()
        # It is tighter than what is known of a row before it is read.
        assert (error <= bounded(x, made(rows, SPECS[0]), SPECS[0])[2][0] * (1 + 1e-6)).all()


@every_spec
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-15, 1e15, 1e30])
def test_bounds_hold_for_huge_and_tiny_values(spec, scale):
    x, rows = trained_like(1, tokens=2)
    for tokens, table in ((x * scale, rows), (x, rows * scale), (x * scale, rows / scale)):
        tokens, table = tokens.astype(jnp.float32), table.astype(jnp.float32)
        _, upper, _ = bounded(tokens, made(table, spec), spec)
        with np.errstate(invalid="ignore"):
            exact = np.asarray(tokens, np.float64) @ np.asarray(table, np.float64).T
        assert not (exact > upper).any()  # a NaN bounds nothing, and proves nothing


@every_spec
def test_bounds_hold_for_rows_that_are_alike_or_few(spec):
    x, rows = trained_like(2, tokens=2)
    for table in (rows + 100.0, jnp.tile(rows[:1], (V, 1)), rows[:5], rows[:1], rows.at[3:9].set(0.0), rows * 0.0):
        _, upper, _ = bounded(x, made(table, spec), spec)
        assert (np.asarray(x, np.float64) @ np.asarray(table, np.float64).T <= upper).all()


@every_spec
def test_bounds_hold_for_inputs_unlike_those_it_was_fitted_to(spec):
    _, rows = trained_like(3)
    x = jnp.asarray(rng(9).normal(size=(4, D)) / 0.9 ** np.arange(D), jnp.float32)
    _, upper, _ = bounded(x, made(rows, spec), spec)
    assert (np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T <= upper).all()


@every_spec
def test_most_inputs_are_proved_and_none_is_wrong(spec):
    fallbacks = 0
    for seed in range(40):
        fallbacks += assert_certified(*trained_like(seed), spec=spec, candidates=64)
    assert fallbacks <= 4


@every_spec
def test_planted_ties_go_to_the_lowest_row(spec):
    for seed in range(5):
        x, rows = trained_like(seed)
        best = int(jnp.argmax(x @ rows.T))
        copies = rng(seed).choice(V, size=3, replace=False)
        rows = rows.at[copies].set(rows[best])
        assert assert_certified(
            x, rows, spec=spec
        )  # equal rows can't be told apart by any interval: dense, as it breaks ties


@pytest.mark.parametrize("spec", [Quantized(8), LowRank(1.0, bits=8)], ids=str)
def test_ties_of_rounded_logits_are_broken_as_dense_breaks_them(spec):
    fallbacks = 0
    for seed in range(40):
        r = rng(seed)
        # Small integers: products are exact, and many round to the same bfloat16.
        rows = jnp.asarray(r.integers(-8, 9, size=(V, D)), jnp.bfloat16)
        x = jnp.asarray(r.integers(-8, 9, size=(1, D)), jnp.bfloat16)
        fallbacks += assert_certified(x, rows, out=jnp.bfloat16, spec=spec, candidates=64)
    assert fallbacks < 40


@every_spec
def test_a_row_just_above_another_is_told_from_it_or_dense_is_run(spec):
    for step in (1e-1, 1e-3, 1e-5, 1e-6, 1e-7):
        for seed in range(3):
            x, rows = trained_like(seed)
            best = int(jnp.argmax(x @ rows.T))
            other = (best * 7 + 1) % V
            rows = rows.at[other].set(rows[best] * (1 + step))
            fallback = assert_certified(x, rows, spec=spec, candidates=64)
            assert fallback or step >= 1e-5


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-15, 1e15, 1e18, 1e30, 3e38])
@pytest.mark.parametrize("spec", [Quantized(8), LowRank(0.75, bits=4)], ids=str)
def test_huge_and_tiny_values(spec, scale):
    for seed in range(3):
        x, rows = trained_like(seed)
        assert_certified((x * scale).astype(jnp.float32), rows, spec=spec)
        assert_certified(x, (rows * scale).astype(jnp.float32), spec=spec)
        assert_certified((x * scale).astype(jnp.float32), (rows / scale).astype(jnp.float32), spec=spec)


@every_spec
def test_rows_of_very_different_norms(spec):
    for seed in range(5):
        x, rows = trained_like(seed)
        norms = jnp.asarray(10.0 ** rng(seed).uniform(-6, 6, size=(V, 1)), jnp.float32)
        assert_certified(x, rows * norms, spec=spec)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "row"])
@every_spec
def test_what_is_not_finite_goes_to_the_dense_product(spec, bad, where):
    x, rows = trained_like(tokens=2)
    if where == "x":
        x = x.at[1, 3].set(bad)
    else:
        rows = rows.at[7, 3].set(bad)
    logits, fallback = run(x, rows, spec=spec)
    assert bool(fallback)
    np.testing.assert_array_equal(np.asarray(logits), np.asarray(jitted_dense(x, rows, jnp.float32)))


def test_zeros_and_one_row_and_all_rows():
    x, rows = trained_like()
    assert assert_certified(jnp.zeros_like(x), rows)
    assert_certified(x, jnp.zeros_like(rows))
    assert not assert_certified(x, rows[:1], candidates=1)
    assert not assert_certified(x, rows, candidates=V)
    logits, fallback = run(x, rows, candidates=V)
    np.testing.assert_allclose(logits, dense(x, rows), rtol=1e-5, atol=1e-5)
    assert not bool(fallback)


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("spec", [Quantized(8), LowRank(0.75, bits=4)], ids=str)
def test_one_failing_token_runs_one_dense_product_for_all(spec, tokens):
    x, rows = trained_like(3, tokens=tokens)
    assert not assert_certified(x, rows, candidates=96, spec=spec)
    x = x.at[0].set(0.0)
    logits, fallback = run(x, rows, candidates=96, spec=spec)
    assert bool(fallback)
    np.testing.assert_allclose(logits, dense(x, rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec", [Quantized(8), LowRank(0.75, bits=4)], ids=str)
def test_vmap_takes_the_tokens_of_all_examples_together(spec):
    x, rows = trained_like(4, tokens=6)
    proof = made(rows, spec)

    def step(x):
        return certified_logits(x, rows, proof, spec, dense, candidates=32, out_dtype=jnp.float32)

    batched = jax.vmap(step)
    text = jax.jit(batched).lower(x.reshape(3, 2, D)).compile().as_text()
    assert text.count(" conditional(") == 1  # a branch is taken, where vmap of a cond would run both sides
    logits, fallback = jax.jit(batched)(x.reshape(3, 2, D))
    together, _ = step(x)
    np.testing.assert_allclose(logits.reshape(6, V), together, rtol=1e-5, atol=1e-5)
    assert fallback.shape == (3,)
    twice, _ = jax.jit(jax.vmap(batched))(x.reshape(1, 3, 2, D))
    np.testing.assert_allclose(twice.reshape(6, V), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("candidates", [8, V])
@pytest.mark.parametrize("spec", [Quantized(8), LowRank(0.75, bits=4)], ids=str)
def test_the_derivative_is_that_of_the_dense_product(spec, candidates):
    x, rows = trained_like(5)
    slope = jax.grad(lambda x: run(x, rows, spec=spec, candidates=candidates)[0].sum())(x)
    np.testing.assert_allclose(slope, rows.sum(0)[None], rtol=1e-4, atol=1e-4)
    change = jax.jvp(lambda x: run(x, rows, spec=spec, candidates=candidates, fill="-inf")[0], (x,), (x,))[1]
    assert int((change != 0).sum()) == candidates


def test_vmap_over_the_rows_as_well():
    x, rows = trained_like(8, tokens=2)
    several = jnp.stack([rows, rows[::-1]])
    for spec in (Quantized(8), LowRank(0.75, bits=4)):
        logits, fallback = jax.vmap(lambda rows, spec=spec: run(x, rows, spec=spec, candidates=32))(several)
        np.testing.assert_array_equal(logits.argmax(-1), jax.vmap(lambda rows: dense(x, rows))(several).argmax(-1))
        assert fallback.shape == (2,)


def test_fill_with_minus_infinity_keeps_the_arg_max():
    x, rows = trained_like(6)
    assert not assert_certified(x, rows, fill="-inf")
    logits, _ = run(x, rows, fill="-inf")
    assert int(jnp.isfinite(logits).sum()) == 16


def test_fewer_bits_of_the_dense_inputs_widen_the_intervals():
    for spec in (Quantized(8), LowRank(0.75, bits=4)):
        check_fewer_bits(spec)


def check_fewer_bits(spec):
    x, rows = trained_like(7)
    proof = made(rows, spec)
    exact, tpu = scores_with_bounds(x, proof, spec), scores_with_bounds(x, proof, spec, input_bits=8)
    assert (tpu.upper > exact.upper).all()
    rounded = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(rows.astype(jnp.bfloat16), np.float64).T
    full = np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T
    assert (np.abs(rounded - full) <= np.asarray(tpu.exact_error)).all()
    assert (rounded <= np.asarray(tpu.upper)).all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_head_in_stages_proves_with_as_few_candidates_as_its_last_stage_does(tokens):
    """Rows that only its first stage has bounds of are below what is computed, so that none stands in the way."""
    staged, last = Staged((LowRank(12, bits=4), Quantized(8))), Quantized(8)
    proved = {staged: 0, last: 0}
    for seed in range(12):
        r = rng(seed)
        x, rows = (jnp.asarray(r.normal(size=shape), jnp.float32) for shape in ((tokens, D), (V, D)))
        for spec in proved:
            proved[spec] += not assert_certified(x, rows, spec=spec, candidates=4)
    assert proved[staged] >= proved[last] > 6


@pytest.mark.parametrize("goal", [TopSet(5), Nucleus(0.05)], ids=str)
def test_a_head_in_stages_proves_sets_and_mass(goal):
    staged, last = Staged((LowRank(24, bits=4), Quantized(8))), Quantized(8)
    proved = {staged: 0, last: 0}
    for seed in range(6):
        x, rows = trained_like(seed, scale=3.0)
        for spec in proved:
            logits, fallback = run(x, rows, spec=spec, candidates=40, readings=(Reading(goal),))
            proved[spec] += not fallback
            if isinstance(goal, TopSet):
                best, want = (set(np.argsort(-np.asarray(a[0]))[:5]) for a in (logits, dense(x, rows)))
                assert best == want
    assert proved[staged] >= proved[last] >= 3
