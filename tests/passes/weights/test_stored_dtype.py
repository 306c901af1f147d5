"""Weights that are stored narrower than they are used: rows are packed as stored, and only chosen ones are widened."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width, kinds, named
from collectives import arrays_written
from jax import lax

import hire_xform as hx
from hire_xform.passes.weights.recipe import represents

pytestmark = pytest.mark.any_jax("cases vary dtypes and predictors of one program", every=4)

D, M, V, LAYERS = 32, 64, 96, 2
# The dtype of the leaves, those it is converted to, one after the other, and the one that rows are packed in.
WAYS = {
    "bf16 to f32": ("bfloat16", ["float32"], "bfloat16"),
    "f16 to f32": ("float16", ["float32"], "float16"),
    "f8 to bf16": ("float8_e4m3fn", ["bfloat16"], "float8_e4m3fn"),
    "f8 to f32": ("float8_e5m2", ["float32"], "float8_e5m2"),
    "f8 to bf16 to f32": ("float8_e4m3fn", ["bfloat16", "float32"], "float8_e4m3fn"),
    "f8 to bf16 to f16": ("float8_e4m3fn", ["bfloat16", "float16"], "float8_e4m3fn"),
    "f32 to bf16": ("float32", ["bfloat16"], "bfloat16"),
    "f32 to bf16 to f32": ("float32", ["bfloat16", "float32"], "bfloat16"),
    "f16 to bf16": ("float16", ["bfloat16"], "bfloat16"),
    "bf16 to f16": ("bfloat16", ["float16"], "float16"),
    "bf16 to f32 to bf16": ("bfloat16", ["float32", "bfloat16"], "bfloat16"),
}
CONFIGS = {
    "int8": full_width(),
    "4 bits": full_width(hx.Quantized(4)),
    "low rank": full_width(hx.LowRank(0.25, bits=8)),
    "groups": full_width(group_size=8),
    "lossless": hx.lossless(rules=named(hx.Vocab(certify=True))),
    "certified at full width": hx.Config(
        ffn=hx.Ffn(active=1.0, certify=True), rules=named(hx.Vocab(candidates=V, certify=True))
    ),
}


def make_weights(stored, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"up": (LAYERS, D, M), "gate": (LAYERS, M, D), "down": (LAYERS, M, D), "embed": (V, D)}
    return {
        name: jnp.asarray(rng.normal(size=shape) * 0.4, jnp.float32).astype(stored) for name, shape in shapes.items()
    }


def tokens(count, dtype):
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, D)), jnp.float32).astype(dtype)


def net_of(converted, scanned=True):
    def used(leaf):
        for dtype in converted:
            leaf = lax.convert_element_type(leaf, dtype)
        return leaf

    def layer(x, w):
        return x + (jax.nn.relu(x @ used(w["up"])) * (x @ used(w["gate"]).T)) @ used(w["down"]), None

    def net(params, x):
        stack = {name: params[name] for name in ("up", "gate", "down")}
        if scanned:
            x = lax.scan(layer, x, stack)[0]
        else:
            for i in range(LAYERS):
                x, _ = layer(x, jax.tree.map(lambda leaf: leaf[i], stack))  # noqa: B023 - used before i moves on
        return x @ used(params["embed"]).T

    return net


def check_every_value(way, config, count):
    stored, converted, _ = WAYS[way]
    net, params, x = net_of(converted), make_weights(stored), tokens(count, converted[-1])
    step = hx.sparsify(net, config=CONFIGS[config])
    traced = step.trace(params, x)
    assert kinds(traced.plan) == ["ffn", "vocab"], [r.reason for r in traced.plan.refusals]
    want = jax.jit(net)(params, x)
    for got in (step(params, x), step(traced.pack(params), x)):
        if config == "lossless":
            got, want = jnp.argmax(got, -1), jnp.argmax(want, -1) if want.ndim == 2 else want
        assert_same(got, want, 2e-5 if converted[-1] == "float32" else 6e-2)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("way", ["bf16 to f32", "f8 to bf16", "f32 to bf16 to f32"])
def test_every_value_is_the_dense_one(way, config):
    check_every_value(way, config, 3)


@pytest.mark.parametrize("way", WAYS)
def test_every_value_of_one_token_is_the_dense_one(way):
    check_every_value(way, "int8", 1)


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("way", WAYS)
def test_rows_are_packed_in_the_narrowest_dtype_that_has_their_values(way, scanned):
    stored, converted, kept = WAYS[way]
    params, x = make_weights(stored), tokens(1, converted[-1])
    traced = hx.sparsify(net_of(converted, scanned), config=full_width(hx.Quantized(4))).trace(params, x)
    packed = traced.pack(params)
    rows = [leaf for leaf in packed.leaves if leaf.size % D == 0 and leaf.size >= M * D and leaf.dtype != jnp.int8]
    wide = [leaf for leaf in rows if leaf.dtype != jnp.uint8]
    assert {str(leaf.dtype) for leaf in wide} == {kept}
    assert sum(leaf.size for leaf in wide) == sum(leaf.size for leaf in params.values())
    size = jnp.dtype(kept).itemsize * sum(leaf.size for leaf in params.values())
    assert traced.plan.dense_bytes == size
    predicted = sum(leaf.nbytes for leaf in packed.leaves) - size
    # The predictor of each matrix that is scored, once, and every row.
    assert traced.plan.sparse_bytes == size + predicted


def test_an_embedding_that_the_head_widens_is_held_as_it_is():
    """A weight that is stored as the rows lie is not packed at all, whatever it is widened to."""

    def net(params, token):
        x = params["embed"][token].astype(jnp.float32)
        return x @ params["embed"].astype(jnp.float32).T

    params = {"embed": make_weights("bfloat16")["embed"]}
    step, token = hx.sparsify(net, config=full_width()), jnp.asarray([5, 7])
    traced = step.trace(params, token)
    packed = traced.pack(params)
    held = [leaf for leaf in packed.leaves if leaf.size == V * D and leaf.dtype != jnp.int8]
    assert len(held) == 1
    assert held[0].unsafe_buffer_pointer() == params["embed"].unsafe_buffer_pointer()
    assert_same(step(packed, token), net(params, token))


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("way", ["bf16 to f32", "f8 to bf16", "f16 to f32"])
def test_the_compiled_step_widens_no_whole_matrix(way, scanned):
    """Nothing of the size of a weight is written in the dtype it is used in, nor of all layers in any."""
    stored, converted, _ = WAYS[way]
    net, params, x = net_of(converted, scanned), make_weights(stored), tokens(1, converted[-1])
    config = hx.Config(ffn=hx.Ffn(active=8 / M), rules=named(hx.Vocab(candidates=8)))
    step = hx.sparsify(net, config=config)
    packed = step.trace(params, x).pack(params)
    written = max(arrays_written(step.trace(packed, x).lower().compile()))
    assert written <= M * D  # one layer's predictor of 8 bits
    # XLA of jaxlib 0.9 widens as it reads for one token, not for several.
    dense = max(arrays_written(jax.jit(net).lower(params, tokens(4, converted[-1])).compile()))
    assert dense >= 4 * M * D or way == "f16 to f32"


def test_leaves_come_back_exactly_from_narrow_rows():
    """What another product reads of a weight that is packed is what was stored."""

    def net(params, x):
        y = jax.nn.relu(x @ params["up"].astype(jnp.float32)) @ params["down"].astype(jnp.float32)
        return y, params["up"].sum(), params["up"] * 2, (x.astype(jnp.bfloat16) @ params["up"])[:, :2]

    weights = make_weights("bfloat16")
    params, x = {name: weights[name][0] for name in ("up", "down")}, tokens(2, "float32")
    step = hx.sparsify(net, config=full_width())
    traced = step.trace(params, x)
    assert kinds(traced.plan) == ["ffn"]
    packed = traced.pack(params)
    assert len([leaf for leaf in packed.leaves if leaf.dtype == jnp.bfloat16 and leaf.size == D * M]) == 2
    assert not [leaf for leaf in packed.leaves if leaf.dtype == jnp.float32 and leaf.size == D * M]
    got, want = step(packed, x), net(params, x)
    assert_same(got[0], want[0])
    assert_same(got[1:], want[1:], 2e-2)
    np.testing.assert_array_equal(got[2], want[2])


@pytest.mark.parametrize("way", ["bf16 to f32", "f8 to bf16", "f8 to f32"])
def test_derivatives_are_those_of_the_dense_function(way):
    stored, converted, _ = WAYS[way]
    net, params, x = net_of(converted), make_weights(stored), tokens(3, converted[-1])
    step = hx.sparsify(net, config=full_width())

    def loss(of):
        return lambda x: jnp.square(of(params, x).astype(jnp.float32)).mean()

    limit = 2e-5 if converted[-1] == "float32" else 6e-2
    assert_same(jax.grad(loss(step))(x), jax.grad(loss(jax.jit(net)))(x), limit)
    each = [jax.vmap(lambda x, f=f: f(params, x[None]))(x) for f in (step, jax.jit(net))]
    assert_same(*each, limit)


@pytest.mark.parametrize("narrow", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float16", "bfloat16"])
@pytest.mark.parametrize("wide", ["float8_e5m2", "float16", "bfloat16", "float32"])
def test_a_dtype_represents_another_when_every_value_of_it_comes_back(wide, narrow):
    kind = jnp.dtype(narrow)
    every = np.arange(2 ** (8 * kind.itemsize), dtype=f"uint{8 * kind.itemsize}").view(kind)
    with np.errstate(invalid="ignore"):
        every = every[np.isfinite(every.astype(np.float64))]
        back = every.astype(jnp.dtype(wide)).astype(np.float64)
    if represents(jnp.dtype(wide), kind):
        np.testing.assert_array_equal(back, every.astype(np.float64))
    elif wide != narrow:
        assert (back != every.astype(np.float64)).any()
    if jnp.dtype(wide).itemsize > kind.itemsize and wide != "bfloat16":
        assert represents(jnp.dtype(wide), kind)
