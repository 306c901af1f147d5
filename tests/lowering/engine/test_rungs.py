"""Several sizes of a certified head or block: each input takes the smallest that will do, and the result is dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_certified_logits import V, dense, jitted_dense, made, trained_like
from test_certified_logits import step as certified

from hire_xform.lowering.engine.head import certified_logits
from hire_xform.lowering.engine.selection import rungs
from hire_xform.lowering.predict.quantized import Quantized
from hire_xform.lowering.prove.goals import Nucleus, TopSet, candidates_needed
from hire_xform.lowering.prove.proofs import scores_with_bounds
from hire_xform.lowering.prove.readings import Reading

pytestmark = pytest.mark.any_jax("cases vary numbers, dtypes and predictors of arithmetic that is our own", every=3)

SPEC = Quantized(8)


def climbed(x, rows, proof, sizes, out, options):
    *smaller, candidates = sizes
    return certified(x, rows, proof, candidates, SPEC, out, (*options, ("smaller", tuple(smaller))))


def run(x, rows, sizes, out=jnp.float32, **options):
    logits, rung = climbed(x, rows, made(rows, SPEC), sizes, out, tuple(options.items()))
    want = np.asarray(jitted_dense(x, rows, out))
    np.testing.assert_array_equal(np.argmax(logits, -1), np.argmax(want, -1))
    return logits, int(rung)


@jax.jit
def needed(x, rows):
    found = scores_with_bounds(x, made(rows, SPEC), SPEC)
    return candidates_needed(True, dense(x, rows), found.upper, found.exact_error), found.upper


def close(seed, gap, dtype=jnp.float32, tokens=1):
    """A token's best row, and others a little below it that the predictor can't tell from it."""
    x, rows = trained_like(seed, dtype, tokens)
    best = int(jnp.argmax(x[0] @ rows.T))
    others = np.random.default_rng(seed).choice(np.delete(np.arange(V), best), 24, replace=False)
    shrunk = rows[best] * (1 - gap * jnp.arange(1, 25, dtype=dtype)[:, None])
    return x, rows.at[others].set(shrunk.astype(dtype))


GAPS = (1e-2, 4e-3, 3e-3, 2e-3, 1e-3, 7e-4, 5e-4)


def test_a_head_takes_the_smallest_size_that_holds_what_it_needs():
    met, beyond = set(), 0
    for sizes in ((4, 7, 16), (2, 8, 12), (5,)):
        for seed, gap in enumerate(GAPS * 2):
            x, rows = close(seed, gap)
            if seed >= 10:
                # Rows that are kept badly: their bounds are above that of the best, which is not among the first.
                x = x.at[:, 0].set(0.0)
                rows = rows.at[seed : seed + 6].set(rows[seed : seed + 6].at[:, 0].set(300.0))
            need, upper = needed(x, rows)
            need = int(need[0])
            logits, rung = run(x, rows, sizes, fill="-inf")
            assert rung == sum(need > size for size in sizes), (sizes, need)
            shown = jnp.isfinite(logits)
            assert int(shown.sum()) == (*sizes, V)[rung]
            np.testing.assert_allclose(logits[shown], dense(x, rows)[shown], rtol=1e-5, atol=1e-5)
            met |= {need - size for size in sizes}
            beyond += int(jnp.sum(upper[0] > upper[0, jnp.argmax(dense(x, rows)[0])])) >= sizes[0]
    # At an edge, and one above it; and the best row was not always among the first.
    assert met >= {0, 1}
    assert beyond


@pytest.mark.parametrize("sizes", [(2, 8, 32), (4, 64)], ids=str)
def test_ties_across_an_edge_run_dense(sizes):
    for copies in (1, sizes[0], sizes[-1] + 4):
        x, rows = trained_like(3)
        best = int(jnp.argmax(x @ rows.T))
        others = np.random.default_rng(copies).choice(np.delete(np.arange(V), best), copies, replace=False)
        logits, rung = run(x, rows.at[others].set(rows[best]), sizes)
        assert rung == len(sizes)
        np.testing.assert_array_equal(logits, jitted_dense(x, rows.at[others].set(rows[best]), jnp.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_runs_dense_at_once_or_in_the_end(bad):
    x, rows = trained_like(tokens=2)
    for given in ((x.at[1, 3].set(bad), rows), (x, rows.at[7, 3].set(bad))):
        logits, rung = run(*given, (4, 16, 64))
        assert rung == 3
        np.testing.assert_array_equal(logits, jitted_dense(*given, jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_several_tokens_take_the_size_of_the_neediest(dtype):
    taken = set()
    for seed, gap in enumerate(GAPS[1::2]):
        x, rows = close(seed, gap, dtype, tokens=3)
        _, rung = run(x, rows, (3, 8, 30), out=dtype)
        assert rung == max(run(x[t : t + 1], rows, (3, 8, 30), out=dtype)[1] for t in range(3))
        taken.add(rung)
        _, rung = run(x, rows, (2, 20, 150), out=dtype)  # one set for all of them
        # So near to each other rows are equal in 16 bits, and which of equal ones is the dense one is not proved.
        assert (rung == 3) == (dtype == jnp.bfloat16 and gap < 1e-3)
    assert len(taken) >= 2
    assert [rungs(3, V, sizes)[0].mode for sizes in ((3, 8, 30), (2, 20, 150))] == ["per_token", "shared"]


@pytest.mark.parametrize("goal", [TopSet(5), Nucleus(0.05)], ids=str)
def test_other_goals(goal):
    taken = set()
    for seed in range(16):
        x, rows = close(seed, 10.0 ** -(seed % 4) * 0.05)
        logits, rung = run(x, rows, (6, 24, 96), readings=(Reading(goal),), fill="-inf")
        want = dense(x, rows)
        if isinstance(goal, TopSet):
            got = np.argsort(-np.asarray(logits[0]), kind="stable")[: goal.k]
            assert set(got) == set(np.argsort(-np.asarray(want[0]), kind="stable")[: goal.k])
        else:
            assert float(jnp.where(jnp.isfinite(logits), 0, jax.nn.softmax(want)).sum()) <= goal.eps
        taken.add(rung)
    assert len(taken) >= 3


def test_vmap_climbs_for_all_examples_together():
    x, rows = close(4, 2e-3, tokens=6)
    proof = made(rows, SPEC)

    def step(x):
        return certified_logits(x, rows, proof, SPEC, dense, candidates=64, smaller=(2, 16), out_dtype=jnp.float32)

    alone, batched = jax.jit(step), jax.jit(jax.vmap(step))
    xs = x.reshape(3, 2, -1)
    assert batched.lower(xs).as_text().count("stablehlo.case") == alone.lower(x).as_text().count("stablehlo.case")
    logits, rung = batched(xs)
    together, whole = alone(x)
    np.testing.assert_allclose(logits.reshape(6, V), together, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rung, [int(whole)] * 3)


def test_the_derivative_is_that_of_the_dense_product_in_every_rung():
    for gap, sizes in ((0.1, (4, 16)), (2e-3, (2, 64)), (0.0, (2, 4))):
        x, rows = close(5, gap)
        proof = made(rows, SPEC)
        *_, slope = jax.jvp(
            lambda x, rows=rows, proof=proof, sizes=sizes: climbed(x, rows, proof, sizes, jnp.float32, ())[0],
            (x,),
            (x,),
        )
        np.testing.assert_allclose(slope, dense(x, rows), rtol=1e-4, atol=1e-4)


def test_bounds_of_minus_infinity_prove_nothing_twice():
    """Rows that overflow: what is left to add may be rows that are there already."""
    x, rows = trained_like(2)
    for scale in (-3e38, 3e38):
        given = (x * 1e3, jnp.full_like(rows, scale).at[0].set(0.0))
        logits, _ = climbed(
            *given, made(given[1], SPEC), (1, 5, 9), jnp.float32, (("readings", (Reading(TopSet(1)),)),)
        )
        want = jitted_dense(*given, jnp.float32)
        np.testing.assert_array_equal(jnp.argmax(logits, -1), jnp.argmax(want, -1))


def test_inside_a_shard_map():
    x, rows = close(4, 2e-3, tokens=2)
    proof = made(rows, SPEC)

    def step(x):
        return certified_logits(x, rows, proof, SPEC, dense, candidates=64, smaller=(2, 16), out_dtype=jnp.float32)

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(lambda x: step(x)[0], mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(jax.jit(mapped)(x), jax.jit(step)(x)[0], rtol=1e-5, atol=1e-5)


def test_sizes_have_to_ascend():
    with pytest.raises(ValueError, match="ascending"):
        rungs(1, 10, (4, 4))
    assert [s.size for s in rungs(1, 10, (2, 4))] == [2, 4]
    assert [s.mode for s in rungs(8, 100, (20, 60))] == ["shared", "shared"]
