"""``Packed`` wherever weights may stand, under every transformation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width, kinds, named
from jax.experimental import checkify
from tied import FULL, D, M, V, inputs, make_weights, net

import hire_xform as hx

LOSSLESS = hx.lossless(rules=named(hx.Vocab(certify=True)))


def test_packed_stands_where_the_weights_stood():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    packed = step.trace(params, inputs()).pack(params)
    assert isinstance(packed, hx.Packed)
    assert_same(step(packed, inputs()), net(params, inputs()))
    assert_same(step(packed, inputs(3)), net(params, inputs(3)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_the_original_weights_may_be_deleted(dtype):
    step, params = hx.sparsify(net, config=FULL), make_weights(dtype=dtype)
    x = inputs().astype(dtype)
    want = jax.jit(net)(params, x)
    packed = step.trace(params, x).pack(params)
    leaves = jax.tree.leaves(params)
    dropped = [i for i in range(len(leaves)) if i not in packed.layout.kept]
    assert dropped
    for i in dropped:
        leaves[i].delete()
    assert_same(step(packed, x), want, 2e-2 if dtype == jnp.bfloat16 else 2e-5)


def test_a_tied_weight_is_held_once():
    step, params = hx.sparsify(net, config=full_width(hx.Quantized(4))), make_weights()
    packed = step.trace(params, inputs()).pack(params)
    whole = [a for a in jax.tree.leaves(packed) if a.dtype == jnp.float32 and sorted(a.shape) == sorted((V, D))]
    assert len(whole) == 1
    plain = sum(a.nbytes for a in params.values())
    assert packed.nbytes < 1.3 * plain


def test_a_weight_used_by_two_blocks_is_held_once():
    def twice(params, x):
        for _ in range(2):
            x = x + jax.nn.relu(x @ params["w1"]) @ params["w2"]
        return x

    step, params = hx.sparsify(twice, config=FULL), make_weights()
    traced = step.trace(params, inputs())
    assert kinds(traced.plan) == ["ffn", "ffn"]
    packed = traced.pack(params)
    assert len([a for a in jax.tree.leaves(packed) if a.dtype == jnp.float32 and a.size == D * M]) == 2
    assert_same(step(packed, inputs()), twice(params, inputs()))


def test_a_weight_transposed_in_one_use_is_held_once():
    def both(params, x):
        y = jax.nn.relu(x @ params["w1"]) @ params["w2"]
        return y, x @ params["w1"] @ jnp.ones((M, 2)) * 1.0

    step, params = hx.sparsify(both, config=FULL), make_weights()
    traced = step.trace(params, inputs())
    packed = traced.pack(params)
    assert kinds(traced.plan) == ["ffn"]
    assert len([a for a in jax.tree.leaves(packed) if a.dtype == jnp.float32 and a.size == D * M]) == 2
    assert_same(step(packed, inputs()), both(params, inputs()))


def test_packed_is_a_pytree_of_arrays():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    packed = step.trace(params, inputs()).pack(params)
    leaves, tree = jax.tree.flatten(packed)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = jax.tree.unflatten(tree, [jnp.array(leaf) for leaf in leaves])
    assert_same(step(again, inputs()), net(params, inputs()))
    assert sum(leaf.nbytes for leaf in leaves) == packed.nbytes
    named = jax.tree_util.tree_flatten_with_path(packed)[0]
    assert len({jax.tree_util.keystr(path) for path, _ in named}) == len(leaves)


def test_packed_goes_through_jit_as_argument_and_constant():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    packed, want = step.trace(params, inputs()).pack(params), net(params, inputs())
    assert_same(jax.jit(step)(packed, inputs()), want)
    assert_same(jax.jit(partial(step, packed))(inputs()), want)
    assert_same(step(jax.jit(lambda p: p)(packed), inputs()), want)


def test_packed_can_be_traced_again():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    packed = step.trace(params, inputs()).pack(params)
    assert kinds(step.trace(packed, inputs(2)).plan) == ["ffn", "vocab"]


def test_prefill_and_decode_share_one_packed():
    config = hx.Config(ffn=hx.Ffn(active=1.0, max_tokens=4), rules=named(hx.Vocab(candidates=V, max_tokens=4)))
    step, params = hx.sparsify(net, config=config), make_weights()
    packed = step.trace(params, inputs(1)).pack(params)
    assert not step.trace(params, inputs(9)).plan.sites
    assert_same(step(packed, inputs(9)), net(params, inputs(9)))
    assert_same(step(packed, inputs(2)), net(params, inputs(2)))


def test_packed_of_a_prefill_serves_no_decode_but_is_right():
    config = hx.Config(ffn=hx.Ffn(active=1.0, max_tokens=4), rules=named(hx.Vocab(candidates=V, max_tokens=4)))
    step, params = hx.sparsify(net, config=config), make_weights()
    packed = step.trace(params, inputs(9)).pack(params)
    with pytest.warns(hx.HireWarning, match=r"dot_general.* dense.*hx.pack\(weights"):
        assert_same(step(packed, inputs(1)), net(params, inputs(1)))


def test_packed_beside_plain_weights_serves_shapes_that_have_no_site():
    """Of the plain weights one is not read: a program with no site asks for it no more than one with sites does."""

    def two(p, q, x):
        return (jax.nn.relu(x @ p["up"]) @ p["down"]) @ q["out"]

    rng = np.random.default_rng(0)
    up, down, out, unread, x = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(8, 32), (32, 8), (8, 4), (4,), (64, 8)]
    )
    config = hx.Config(ffn=hx.Ffn(active=1.0, certify=False), rules=(hx.Rule("*", force=True),))
    step = hx.sparsify(two, config=config, weights_argnums=(0, 1))
    weights = {"up": up, "down": down}, {"out": out, "unread": unread}
    packed = step.trace(*weights, x[:1]).pack(*weights)[0]
    assert not step.trace(*weights, x).plan.sites
    for tokens in (1, 64, 1):
        assert_same(step(packed, weights[1], x[:tokens]), jax.jit(two)(*weights, x[:tokens]))


def test_traced_plain_weights_ask_for_packed():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    with pytest.raises(hx.TracedWeightsError, match=r"params\['\w+'\] is a tracer.*pack"):
        jax.jit(step)(params, inputs())
    with pytest.raises(hx.TracedWeightsError, match="pack"):
        jax.grad(lambda p: step(p, inputs()).sum())(params)


def test_concrete_weights_under_an_outer_trace_are_packed_outside(packs):
    step, params = hx.sparsify(net, config=FULL), make_weights()
    want = net(params, inputs())
    assert_same(jax.jit(lambda x: step(params, x))(inputs()), want)
    assert_same(jax.vmap(lambda x: step(params, x))(inputs(3)[:, None]), net(params, inputs(3))[:, None])
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in packs)


def test_the_gradient_by_the_inputs_is_dense():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    packed = step.trace(params, inputs()).pack(params)
    want = jax.grad(lambda x: jnp.sin(net(params, x)).sum())(inputs())
    assert_same(jax.grad(lambda x: jnp.sin(step(packed, x)).sum())(inputs()), want, 1e-4)
    assert_same(jax.grad(lambda x: jnp.sin(step(params, x)).sum())(inputs()), want, 1e-4)


def test_a_function_called_in_a_scan_packs_nothing_inside(packs):
    step, params = hx.sparsify(net, config=FULL), make_weights()
    packed = step.trace(params, inputs()).pack(params)
    count = len(packs)

    def run(packed):
        return jax.lax.scan(lambda x, _: (jnp.tanh(step(packed, x)[:, :D]), None), inputs(), None, length=3)[0]

    got = jax.jit(run)(packed)
    assert len(packs) == count
    x = inputs()
    for _ in range(3):
        x = jnp.tanh(net(params, x)[:, :D])
    assert_same(got, x)


@pytest.mark.parametrize(
    "config", [FULL, hx.lossless(rules=named(hx.Vocab(certify=True)))], ids=["full width", "lossless"]
)
@pytest.mark.parametrize("order", ["outside", "inside"])
def test_checkify_finds_the_checks_of_the_model(order, config):
    def checked(params, x):
        checkify.check(jnp.all(x < 100), "too large: {most}", most=x.max())
        x = x + jnp.maximum(x @ params["w1"] + params["b1"], 0.0) @ params["w2"]
        return x @ params["embed"].T

    params, x = make_weights(), inputs()
    wrapped = checkify.checkify(checked) if order == "inside" else checked
    step = hx.sparsify(wrapped, config=config)
    assert kinds(step.trace(params, x).plan) == ["ffn", "vocab"]
    packed = step.trace(params, x).pack(params)
    run = jax.jit(checkify.checkify(step) if order == "outside" else step)
    error, logits = run(packed, x)
    assert error.get() is None
    dense = checkify.checkify(checked)(params, x)[1]
    assert_same(jnp.argmax(logits, -1), jnp.argmax(dense, -1))
    assert "too large" in run(packed, 1000 * x)[0].get()


def test_checkify_of_every_operation_passes_through():
    params, x = make_weights(), inputs()
    packed = hx.sparsify(net, config=FULL).trace(params, x).pack(params)
    every = jax.jit(checkify.checkify(hx.sparsify(net, config=FULL), errors=checkify.float_checks))
    error, logits = every(packed, x)
    assert error.get() is None
    assert_same(logits, net(params, x))
    assert "nan" in every(packed, x.at[0, 0].set(jnp.nan))[0].get()
