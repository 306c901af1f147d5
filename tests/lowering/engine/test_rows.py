from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.primitives.combine_rows import combine_rows
from hire_xform.lowering.primitives.select_rows import select_rows_dot

TOLERANCE = {jnp.float32: 1e-4, jnp.bfloat16: 0.1}


def units(index, group):
    return (np.asarray(index)[..., None] * group + np.arange(group)).reshape(*index.shape[:-1], -1)


def choices(tokens, groups, size, per_token):
    rng = np.random.default_rng(3)
    picks = np.stack([rng.permutation(groups)[:size] for _ in range(tokens)]).astype(np.int32)
    return picks if per_token else picks[0]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    ("tokens", "group", "size", "dtype", "small_blocks"),
    [
        (1, 1, 1, jnp.float32, True),
        (1, 4, 11, jnp.bfloat16, False),
        (3, 1, 44, jnp.float32, False),
        (3, 1, 44, jnp.bfloat16, True),
        (8, 2, 7, jnp.float32, True),
        (17, 1, 5, jnp.bfloat16, False),
    ],
)
def test_products_of_chosen_rows(tokens, group, size, per_token, dtype, small_blocks, normal, monkeypatch):
    if small_blocks:
        monkeypatch.setattr("hire_xform.lowering.xla.slabs._WHOLE_BYTES", 0)
        monkeypatch.setattr("hire_xform.lowering.xla.slabs._BLOCK_BYTES", 4 * 9 * 4)
    rows, x = normal((44, 9), dtype), normal((tokens, 9), dtype, 1)
    index = choices(tokens, 44 // group, size, per_token)
    wide = np.asarray(rows, np.float32)[units(index, group)]
    options = {"group_size": group, "preferred_element_type": jnp.float32}
    got = jax.jit(partial(select_rows_dot, **options))(x, rows, index)
    equation = "td,tkd->tk" if per_token else "td,kd->tk"
    np.testing.assert_allclose(got, np.einsum(equation, np.asarray(x, np.float32), wide), atol=1e-4)
    h = normal((tokens, size * group), dtype, 2)
    back = jax.jit(partial(combine_rows, **options))(h, rows, index)
    equation = "tk,tkd->td" if per_token else "tk,kd->td"
    np.testing.assert_allclose(back, np.einsum(equation, np.asarray(h, np.float32), wide), atol=1e-3)
    assert jax.eval_shape(partial(select_rows_dot, group_size=group), x, rows, index).dtype == dtype
    assert jax.eval_shape(partial(combine_rows, group_size=group), h, rows, index).dtype == dtype


def test_dtypes_are_promoted_and_f32_sums_are_kept(normal):
    rows, x = normal((8, 300), jnp.bfloat16), normal((1, 300), jnp.float32, 1)
    assert select_rows_dot(x, rows, jnp.arange(3)).dtype == jnp.float32
    x = x.astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T
    got = select_rows_dot(x, rows, jnp.arange(8), preferred_element_type=jnp.float32)
    np.testing.assert_allclose(got, exact, atol=1e-4)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("small_blocks", [False, True])
def test_gradients_equal_those_of_dense(per_token, small_blocks, normal, monkeypatch):
    if small_blocks:
        monkeypatch.setattr("hire_xform.lowering.xla.slabs._WHOLE_BYTES", 0)
        monkeypatch.setattr("hire_xform.lowering.xla.slabs._BLOCK_BYTES", 4 * 6 * 4)
    rows, x = normal((20, 6)), normal((3, 6), seed=1)
    index = choices(3, 20, 10, per_token)

    def sparse(x):
        h = jax.nn.relu(select_rows_dot(x, rows, index))
        return (combine_rows(h, rows, index) ** 2).sum()

    def dense(x):
        mask = np.zeros((3, 20), np.float32)
        np.put_along_axis(mask, np.broadcast_to(index, (3, 10)), 1.0, axis=1)
        return ((jax.nn.relu(x @ rows.T) * mask) @ rows) ** 2

    np.testing.assert_allclose(jax.grad(sparse)(x), jax.grad(lambda x: dense(x).sum())(x), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(
        jax.jvp(sparse, (x,), (x,))[1], jax.jvp(lambda x: dense(x).sum(), (x,), (x,))[1], rtol=1e-3
    )


def test_vmap_and_scan(normal):
    rows, x = normal((4, 20, 6)), normal((4, 2, 6), seed=1)
    index = jnp.asarray(np.stack([np.random.default_rng(i).permutation(20)[:5] for i in range(4)]), jnp.int32)
    expected = jnp.stack([select_rows_dot(*args) for args in zip(x, rows, index, strict=True)])
    np.testing.assert_allclose(jax.vmap(select_rows_dot)(x, rows, index), expected, atol=1e-5)
    _, scanned = jax.jit(lambda args: jax.lax.scan(lambda c, a: (c, select_rows_dot(*a)), None, args))((x, rows, index))
    np.testing.assert_allclose(scanned, expected, atol=1e-5)


@pytest.mark.usefixtures("portable_forms")
def test_no_inner_loop_at_usual_sizes():
    """A loop inside a scan over layers would copy the layer's whole matrix out of the stack."""
    struct = jax.ShapeDtypeStruct
    for index in (struct((2048,), jnp.int32), struct((8, 256), jnp.int32)):
        tokens = 8 if len(index.shape) == 2 else 1
        args = (struct((tokens, 2048), jnp.float32), struct((8192, 2048), jnp.float32), index)
        for platform in ("cpu", "cuda"):
            text = jax.jit(select_rows_dot).trace(*args).lower(lowering_platforms=(platform,)).as_text()
            assert "stablehlo.gather" in text
            assert "stablehlo.while" not in text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": jnp.zeros(4)}, ValueError, "rows has shape"),
        ({"group_size": 3}, ValueError, "group_size=3"),
        ({"group_size": 0}, ValueError, "group_size=0"),
        ({"index": jnp.zeros((3, 2), jnp.int32)}, ValueError, r"expected \[K\] or \[2, K\]"),
        ({"index": jnp.zeros(2)}, TypeError, "expected integers"),
    ],
)
def test_bad_input_is_named(change, error, message):
    args = {
        "x": jnp.zeros((2, 4)),
        "rows": jnp.zeros((8, 4)),
        "index": jnp.zeros(2, jnp.int32),
        "group_size": 1,
        **change,
    }
    with pytest.raises(error, match=message):
        select_rows_dot(args["x"], args["rows"], args["index"], group_size=args["group_size"])


def test_combine_checks_the_hidden_width():
    with pytest.raises(ValueError, match=r"expected \[T, 4\]"):
        combine_rows(jnp.zeros((1, 3)), jnp.zeros((8, 4)), jnp.zeros(2, jnp.int32), group_size=2)
