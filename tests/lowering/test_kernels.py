"""Steps are primitives: they keep their results in every context, and kernels take their place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from hire_xform.lowering.predict.predictors import pack_predictor, predict_scores
from hire_xform.lowering.predict.quantized import Quantized
from hire_xform.lowering.primitives import kernels
from hire_xform.lowering.primitives.chosen_block import chosen_block, chosen_block_p
from hire_xform.lowering.primitives.combine_rows import combine_rows, combine_rows_p, combine_stored_rows_p
from hire_xform.lowering.primitives.da_top_k import da_top_k, da_top_k_p
from hire_xform.lowering.primitives.kernels import backends, register_kernel
from hire_xform.lowering.primitives.scores import bounds_p, scores_p
from hire_xform.lowering.primitives.select_rows import select_rows_dot, select_rows_dot_p, select_stored_rows_dot_p
from hire_xform.lowering.primitives.stored_rows import Operation, StoredRows
from hire_xform.lowering.prove.proofs import pack_proof, scores_with_bounds

N, D, T, K = 24, 8, 3, 5
SPEC = Quantized(8)


def stored(rows):
    """Rows in eight bits, with a scale for each."""
    scale = jnp.abs(rows).max(axis=1, keepdims=True) / 127
    values = jnp.round(rows / scale).astype(jnp.int8)
    return StoredRows(values, (scale,), (Operation("mul", jnp.dtype("float32")),), (False,))


def block_of(x, rows, index):
    """One product into the units, and the same rows for their sum."""
    settings = {"group_size": 1, "dtypes": [x.dtype], "out_dtype": x.dtype}
    return chosen_block([x], [rows], rows, index, [0, 0], lambda hiddens: jax.nn.relu(hiddens[0]), **settings)


STEPS = {
    "hire_scores": (scores_p, lambda x, rows, index: predict_scores(x, pack_predictor(rows, SPEC), SPEC, N)),
    "hire_bounds": (bounds_p, lambda x, rows, index: scores_with_bounds(x, pack_proof(rows, SPEC), SPEC).scores),
    "hire_select_rows_dot": (select_rows_dot_p, select_rows_dot),
    "hire_combine_rows": (combine_rows_p, lambda x, rows, index: combine_rows(x[:, :K], rows, index)),
    "hire_select_stored_rows_dot": (
        select_stored_rows_dot_p,
        lambda x, rows, index: select_rows_dot(x, stored(rows), index),
    ),
    "hire_combine_stored_rows": (
        combine_stored_rows_p,
        lambda x, rows, index: combine_rows(x[:, :K], stored(rows), index),
    ),
    "hire_chosen_block": (chosen_block_p, lambda x, rows, index: block_of(x, rows, index)),
    "da_top_k": (da_top_k_p, lambda x, rows, index: da_top_k(x @ rows.T, K)[0]),
}


@pytest.fixture
def operands(normal):
    return normal((T, D)), normal((N, D), seed=1), jnp.array([3, 1, 20, 7, 8])


@pytest.fixture
def kernel(portable_forms):
    removed = []
    yield lambda *args, **more: removed.append(register_kernel(*args, **more))
    for remove in removed:
        remove()
    jax.clear_caches()


def test_every_step_is_listed(portable_forms):
    inner = {
        "hire_quantized_scores",
        "hire_fine_scores",
        "hire_products",
        "hire_arg_max",
        "hire_open_rows",
        "hire_scores_in_two",
    }
    found = {name: set(platforms.values()) for name, platforms in backends().items()}
    assert found == {name: {"portable"} for name in inner | set(STEPS)}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_one_equation_and_runs_in_every_context(name, operands):
    primitive, step = STEPS[name]
    x, *rest = operands
    assert primitive in [eqn.primitive for eqn in jax.make_jaxpr(step)(*operands).eqns]
    want = step(*operands)
    np.testing.assert_allclose(jax.jit(step)(*operands), want, rtol=1e-5, atol=1e-5)
    batched = jax.vmap(jax.vmap(step, (0, None, None)), (None, 0, None))(
        jnp.stack([x, -x]), jnp.stack([rest[0], 2 * rest[0]]), rest[1]
    )
    assert batched.shape == (2, 2, *want.shape)
    np.testing.assert_allclose(batched[0, 0], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(batched[1, 1], step(-x, 2 * rest[0], rest[1]), rtol=1e-5, atol=1e-5)
    _, scanned = jax.lax.scan(lambda carry, x: (carry, step(x, *rest)), None, jnp.stack([x, -x]))
    np.testing.assert_allclose(scanned[0], want, rtol=1e-5, atol=1e-5)
    sent = export.export(jax.jit(step), platforms=("cpu", "tpu"))(*operands).serialize()
    np.testing.assert_allclose(export.deserialize(sent).call(*operands), want, rtol=1e-5, atol=1e-5)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("model"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(whole, split, whole), out_specs=split)
    np.testing.assert_allclose(jax.jit(mapped)(*operands), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_derivatives_are_those_of_the_portable_form(name, operands):
    _, step = STEPS[name]
    x, *rest = operands
    moved, forward = jax.jvp(lambda x: step(x, *rest), (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(moved, step(x, *rest), rtol=1e-5, atol=1e-5)
    back = jax.jit(jax.grad(lambda x: step(x, *rest).sum()))(x)
    np.testing.assert_allclose(back.sum(), forward.sum(), rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(back).max()) > 0


def fresh():
    """The step in a function that no other test compiled: what is compiled stays as it is."""
    return jax.jit(lambda *operands: select_rows_dot(*operands))


def doubled(x, rows, index, *, group_size, out_dtype, magnitudes):
    return (2 * x @ rows[index].T).astype(out_dtype)


def test_a_kernel_takes_the_place_of_the_portable_form_in_every_context(kernel, operands):
    x, rows, index = operands
    want = select_rows_dot(*operands)
    kernel("hire_select_rows_dot", "cpu", doubled)
    np.testing.assert_allclose(select_rows_dot(*operands), 2 * want, rtol=1e-5)
    np.testing.assert_allclose(fresh()(*operands), 2 * want, rtol=1e-5)
    pair = jnp.stack([x, -x])
    batched = jax.vmap(select_rows_dot, (0, None, None))(pair, rows, index)
    np.testing.assert_allclose(batched, jnp.stack([2 * want, -2 * want]), rtol=1e-5)
    value, change = jax.jvp(lambda x: select_rows_dot(x, rows, index), (x,), (x,))
    np.testing.assert_allclose(value, 2 * want, rtol=1e-5)
    np.testing.assert_allclose(change, want, rtol=1e-5)
    both = fresh().trace(*operands).lower(lowering_platforms=("cpu", "tpu")).as_text()
    assert both.count("dense<2.0") == 1  # it is for CPUs
    assert "dense<2.0" not in fresh().trace(*operands).lower(lowering_platforms=("tpu",)).as_text()
    # What is exported runs where there may be no such kernel.
    sent = export.export(fresh(), platforms=("cpu", "tpu"))(*operands)
    np.testing.assert_allclose(sent.call(*operands), want, rtol=1e-5)


def test_a_kernel_that_needs_nothing_of_this_process_is_exported(kernel, operands):
    """In the branch of its platform, and where it serves."""
    x, rows, index = operands
    for_few = lambda x, *rest, **settings: x.shape[0] == T  # noqa: E731
    kernel("hire_select_rows_dot", "cpu", doubled, serves=for_few, exported=True)
    sent = export.deserialize(export.export(fresh(), platforms=("cpu", "cuda", "tpu"))(*operands).serialize())
    assert sent.mlir_module().count("dense<2.0") == 1
    np.testing.assert_allclose(sent.call(*operands), 2 * x @ rows[index].T, rtol=1e-5)
    alone = export.export(fresh(), platforms=("cpu",))(x[:1], rows, index)
    np.testing.assert_allclose(alone.call(x[:1], rows, index), x[:1] @ rows[index].T, rtol=1e-5)


def test_a_users_kernel_stands_before_one_that_is_built_in(operands, monkeypatch):
    x, rows, index = operands
    monkeypatch.setattr(kernels, "_built_in", {})
    kernels.register_built_in("hire_select_rows_dot", "cpu", doubled, lambda *a, **s: True, "native")
    assert backends()["hire_select_rows_dot"]["cpu"] == "native"
    np.testing.assert_allclose(fresh()(*operands), 2 * x @ rows[index].T, rtol=1e-5)

    def tripled(x, rows, index, **settings):
        return 3 * x @ rows[index].T

    remove = register_kernel("hire_select_rows_dot", "cpu", tripled, lambda x, *rest, **settings: x.shape[0] == T)
    assert "tripled" in backends()["hire_select_rows_dot"]["cpu"]
    np.testing.assert_allclose(fresh()(*operands), 3 * x @ rows[index].T, rtol=1e-5)
    np.testing.assert_allclose(fresh()(x[:1], rows, index), 2 * x[:1] @ rows[index].T, rtol=1e-5)
    remove()
    np.testing.assert_allclose(fresh()(*operands), 2 * x @ rows[index].T, rtol=1e-5)


def test_a_reason_is_told_where_there_are_no_kernels(portable_forms, monkeypatch):
    monkeypatch.setattr(kernels, "_missing", {})
    kernels.no_built_in("cpu", "they are not built")
    assert backends()["da_top_k"]["cpu"] == "portable: they are not built"
    assert backends()["da_top_k"]["tpu"] == "portable"


def test_a_kernel_may_choose(kernel, normal):
    scores = normal((2, N))

    def last(scores, *, k, shards):
        index = jnp.broadcast_to(jnp.arange(N - k, N, dtype=jnp.int32), (*scores.shape[:-1], k))
        return jnp.take_along_axis(scores, index, -1), index

    kernel("da_top_k", "cpu", last, serves=lambda scores, *, k, shards: shards == 1)
    assert (jax.jit(lambda s: da_top_k(s, 3))(scores)[1] == jnp.arange(N - 3, N)).all()
    assert (jax.jit(jax.vmap(lambda s: da_top_k(s, 3)))(scores)[1] == jnp.arange(N - 3, N)).all()
    best = jax.lax.top_k(scores.reshape(2, 2, N // 2), 2)[0].reshape(2, 4)
    np.testing.assert_array_equal(jax.jit(lambda s: da_top_k(s, 4, shards=2))(scores)[0], best)


def test_a_kernel_that_is_taken_away_is_gone_for_what_is_lowered_next(operands, portable_forms):
    remove = register_kernel("hire_select_rows_dot", "cpu", doubled)
    assert backends()["hire_select_rows_dot"]["cpu"] == "doubled"
    remove()
    remove()
    assert backends()["hire_select_rows_dot"]["cpu"] == "portable"
    x, rows, index = operands
    np.testing.assert_allclose(fresh()(*operands), x @ rows[index].T, rtol=1e-5)


def test_wrong_kernels_are_refused(kernel, operands):
    for args, error, message in (
        (
            ("hire_nothing", "cpu", doubled),
            ValueError,
            "primitive='hire_nothing'; expected one of da_top_k, hire",
        ),
        (("da_top_k", "gpu", doubled), ValueError, "platform='gpu'; expected one of cpu, cuda, rocm, tpu"),
        (("da_top_k", "cpu", 3), TypeError, "rule=3; expected a function"),
        (("da_top_k", "cpu", doubled, 3), TypeError, "serves=3; expected a function"),
    ):
        with pytest.raises(error, match=message):
            register_kernel(*args)
    kernel("hire_select_rows_dot", "cpu", lambda x, rows, index, **settings: x)
    with pytest.raises(ValueError, match="has a kernel on cpu already"):
        register_kernel("hire_select_rows_dot", "cpu", doubled)
    with pytest.raises(
        ValueError, match=r"hire_select_rows_dot: the kernel .*lambda.* makes .*\(3, 8\).*expected .*\(3, 5\)"
    ):
        fresh()(*operands)
