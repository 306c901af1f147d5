"""What is not proved runs the program's own equations, where the original weights are at hand: the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same, kinds, named
from collectives import arrays_written
from jax import lax

import hire_xform as hx

pytestmark = pytest.mark.filterwarnings("ignore:.*was packed")

D, M, V, LAYERS = 64, 128, 512, 3
HEAD = hx.Config(ffn=None, rules=named(hx.Vocab(candidates=16, certify=True)))
# One group of units is never enough: every call falls back.
BLOCK = hx.Config(vocab=None, ffn=hx.Ffn(active=2 / M, certify=True), rules=FORCE)


def near_rows(count=V, d=D, seed=0):
    """``[count, d]``: rows whose entries are one unit in the last place apart, so that rounding decides the best."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(rng.normal(size=(1, d)).astype(np.float32), count, 0)
    return jnp.asarray(np.nextafter(rows, np.where(rng.random(rows.shape) < 0.5, np.inf, -np.inf).astype(np.float32)))


def array(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def weights(dtype=jnp.float32):
    params = {
        "head": near_rows().T,
        "embed": near_rows(),
        "up": array(LAYERS, D, M, seed=1, scale=D**-0.5),
        "gate": array(LAYERS, M, D, seed=2, scale=D**-0.5),
        "down": array(LAYERS, M, D, seed=3, scale=M**-0.5),
        "both": array(LAYERS, D, 2 * M, seed=4, scale=D**-0.5),
        "bias": array(LAYERS, M, seed=5),
    }
    return {name: leaf.astype(dtype) for name, leaf in params.items()}


def check_every_bit(fun, params, xs, config, kind):
    """Every call falls back, and is what the dense function is compiled to, bit for bit."""
    step, dense = hx.sparsify(fun, config=config), jax.jit(fun)
    traced = step.trace(params, xs[0])
    assert set(kinds(traced.plan)) == {kind}, traced.explain()
    for x in xs:
        got, counts = step.with_fallbacks(params, x)
        assert sum(int(n) for n in counts.values()) > 0
        for one in (got, step(params, x)):
            jax.tree.map(np.testing.assert_array_equal, one, dense(params, x))


HEADS = {
    "matrix": lambda p, x: x @ p["head"],
    "embedding": lambda p, x: x @ p["embed"].T,
    "weight first": lambda p, x: (p["embed"] @ x.T).T,
    "in a scan": lambda p, x: lax.scan(lambda c, x: (c, x[None] @ p["head"]), 0, x)[1][:, 0],
    "vmapped": lambda p, x: jax.vmap(lambda x: x @ p["head"])(x),
}


def tokens(count, number=4):
    return [array(count, D, seed=10 + seed) for seed in range(number)]


@pytest.mark.any_jax("cases vary what falls back, in one way", every=2)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", HEADS)
def test_rows_one_rounding_apart_have_the_dense_logits(name, count):
    def head(params, x):
        logits = HEADS[name](params, x)
        return jnp.argmax(logits, -1), logits

    check_every_bit(head, weights(), tokens(count), HEAD, "vocab")


def relu_block(w, x):
    return x + jax.nn.relu(x @ w["up"]) @ w["down"]


def gated(w, x):
    gate, up = jnp.split(x @ w["both"], 2, -1)
    return x + (jnp.square(jax.nn.relu(gate)) * up) @ w["down"]


def biased(w, x):
    return x + jax.nn.relu(jnp.einsum("md,...d->...m", w["gate"], x) + w["bias"]) @ w["down"]


def own_threshold(w, x):
    u = x @ w["up"]
    return x + jax.nn.relu(u - (u.mean(-1, keepdims=True) + u.std(-1, keepdims=True))) @ w["down"]


BLOCKS = {"relu": relu_block, "gated": gated, "biased": biased, "own threshold": own_threshold}


def layers_of(params):
    return {name: params[name] for name in ("up", "gate", "down", "both", "bias")}


def layer(params, number):
    return {name: leaf[number] for name, leaf in layers_of(params).items()}


def looped(block):
    def fun(params, x):
        return lax.fori_loop(0, LAYERS, lambda i, x: block(layer(params, i), x), x)

    return fun


def scanned(block):
    return lambda params, x: lax.scan(lambda x, w: (block(w, x), None), x, layers_of(params))[0]


NESTINGS = {
    "plain": lambda block: lambda params, x: block(layer(params, 1), x),
    "scan": scanned,
    "jit in scan": lambda block: scanned(jax.jit(block)),
    "remat in scan": lambda block: scanned(jax.checkpoint(block)),
    "fori": looped,
    "vmap": lambda block: lambda params, x: jax.vmap(lambda x: block(layer(params, 0), x))(x),
    "vmap of scan": lambda block: lambda params, x: jax.vmap(lambda x: scanned(block)(params, x[None]))(x),
    "cond": lambda block: lambda params, x: lax.cond(
        x.sum() < 1e3, lambda: block(layer(params, 0), x), lambda: block(layer(params, 1), x)
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_that_falls_back_is_the_dense_one(name):
    for count in (1, 3):
        check_every_bit(NESTINGS["plain"](BLOCKS[name]), weights(), tokens(count), BLOCK, "ffn")


@pytest.mark.parametrize("nesting", [n for n in NESTINGS if n != "plain"])
def test_a_block_falls_back_in_every_nesting(nesting):
    check_every_bit(NESTINGS[nesting](relu_block), weights(), tokens(2), BLOCK, "ffn")


def test_an_overflow_in_a_sum_is_the_dense_programs_own():
    """Whether infinity or NaN comes of huge terms of both signs hangs on the order they are added in."""
    rng = np.random.default_rng(0)
    head = rng.choice([-1.0, 1.0], size=(D, V)) * 2.0**126
    fun = lambda p, x: x @ p["head"]  # noqa: E731
    params = {"head": jnp.asarray(head, jnp.float32)}
    xs = [jnp.asarray(rng.choice([-1.0, 1.0, 2.0], size=(2, D)), jnp.float32) for _ in range(4)]
    dense = jax.jit(fun)(params, xs[0])
    assert bool(jnp.isnan(dense).any() | jnp.isinf(dense).any())
    check_every_bit(fun, params, xs, HEAD, "vocab")


@pytest.mark.parametrize("seed", range(2))
def test_duplicates_and_zeros(seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(4, D))[rng.integers(0, 4, size=V)]
    params = {"head": jnp.asarray(rows.T, jnp.float32)}
    fun = lambda p, x: (jnp.argmax(x @ p["head"], -1), x @ p["head"])  # noqa: E731
    check_every_bit(fun, params, [*tokens(2), jnp.zeros((2, D))], HEAD, "vocab")


STORED = {
    "widened in the loop": (jnp.bfloat16, lambda leaf: leaf, lambda leaf: leaf.astype(jnp.float32)),
    "widened before it": (jnp.bfloat16, lambda leaf: leaf.astype(jnp.float32), lambda leaf: leaf),
    "transposed before it": (jnp.float32, lambda leaf: jnp.swapaxes(leaf, 1, 2), lambda leaf: leaf.T),
}


@pytest.mark.parametrize("way", STORED)
def test_weights_that_a_loop_reads_through_steps(way):
    dtype, before, inside = STORED[way]

    def fun(params, x):
        stacks = {name: before(params[name]) for name in ("up", "down")}

        def body(x, w):
            return relu_block({name: inside(leaf) for name, leaf in w.items()}, x), None

        return lax.scan(body, x, stacks)[0]

    check_every_bit(fun, weights(dtype), tokens(2, 2), BLOCK, "ffn")


def test_an_axis_that_is_indexed_in_the_middle():
    def fun(params, x):
        up, down = jnp.swapaxes(params["up"], 0, 1), jnp.swapaxes(params["down"], 0, 1)
        return lax.fori_loop(0, LAYERS, lambda i, x: relu_block({"up": up[:, i], "down": down[:, i]}, x), x)

    check_every_bit(fun, weights(), tokens(2, 2), BLOCK, "ffn")


@pytest.mark.parametrize("way", STORED)
def test_in_a_loop_no_layer_is_copied_unless_it_falls_back(way):
    dtype, before, inside = STORED[way]

    def fun(params, x):
        stacks = {name: before(params[name]) for name in ("up", "down")}
        body = lambda x, w: (relu_block({name: inside(leaf) for name, leaf in w.items()}, x), None)  # noqa: E731
        return lax.scan(body, x, stacks)[0]

    # Of one token XLA of jaxlib 0.9 copies none in a branch either.
    params, x = weights(dtype), tokens(2)[0]
    step = hx.sparsify(fun, config=BLOCK)
    jitted, operands = step.program(params, x)
    compiled = jitted.lower(*operands).compile()
    assert max(arrays_written(compiled)) >= M * D * 2  # a branch may
    assert max(arrays_written(compiled, in_branches=False)) <= M * D + 8 * M  # a layer's predictor of 8 bits


def test_packed_weights_hold_no_more_for_it():
    """Leaves that are not kept are not kept for a fallback; one that is held as it is serves it."""
    params = weights()
    for name, same in (("matrix", False), ("embedding", True)):
        fun = HEADS[name]
        step = hx.sparsify(fun, config=HEAD)
        packed = step.trace(params, tokens(1)[0]).pack(params)
        held = [leaf for leaf in packed.leaves if leaf.size == V * D and leaf.dtype == jnp.float32]
        assert len(held) == 1
        equal = [bool((step(packed, x) == jax.jit(fun)(params, x)).all()) for x in tokens(1)]
        assert all(equal) if same else not all(equal)


def test_derivatives_are_the_dense_ones():
    fun = NESTINGS["scan"](relu_block)
    params, x = weights(), tokens(2)[0]
    step = hx.sparsify(fun, config=BLOCK)
    loss = lambda f: lambda x: jnp.sum(jnp.square(f(params, x)))  # noqa: E731
    got, want = jax.jit(jax.value_and_grad(loss(step)))(x), jax.jit(jax.value_and_grad(loss(fun)))(x)
    assert_same(got, want, 1e-5)
    head = hx.sparsify(HEADS["matrix"], config=HEAD)
    assert_same(jax.grad(loss(head))(x), jax.grad(loss(HEADS["matrix"]))(x), 1e-5)
    tangent = jax.jvp(lambda x: step(params, x), (x,), (x,))
    assert_same(tangent, jax.jvp(lambda x: fun(params, x), (x,), (x,)), 1e-5)


@pytest.mark.any_jax("cases vary what falls back, in one way", every=3)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["matrix", "biased", "own threshold"])
def test_a_batch_falls_back_to_the_batched_program(name, count):
    """Under ``vmap`` around the step, too: the equations are batched as the program's are."""
    fun = HEADS[name] if name in HEADS else NESTINGS["scan"](BLOCKS[name])
    step, params = hx.sparsify(fun, config=HEAD if name in HEADS else BLOCK), weights()
    xs = jnp.stack(tokens(count))
    step(params, xs[0])  # packs
    got, want = (jax.jit(jax.vmap(functools.partial(f, params)))(xs) for f in (step, fun))
    np.testing.assert_array_equal(got, want)


def test_weights_that_are_closed_over():
    params = weights()
    block = NESTINGS["plain"](relu_block)
    step = hx.sparsify(lambda x: block(params, x), config=BLOCK, weights_argnums=())
    for x in tokens(2, 2):
        np.testing.assert_array_equal(step(x), jax.jit(lambda x: block(params, x))(x))


WIDENED = {
    "two axes": lambda p, x: (x @ p["head"]).astype(jnp.float32),
    "three axes": lambda p, x: (x[None] @ p["head"]).astype(jnp.float32)[0],
    "embedding": lambda p, x: (x @ p["embed"].T).astype(jnp.float32),
}


@pytest.mark.parametrize("name", WIDENED)
def test_a_bfloat16_head_that_is_widened_falls_back_to_the_dense_logits(name):
    """XLA rounds them where a reshape comes before the cast, and not where none does: so does the fallback."""

    def head(params, x):
        logits = WIDENED[name](params, x)
        return jnp.argmax(logits, -1), logits

    check_every_bit(head, weights(jnp.bfloat16), [x.astype(jnp.bfloat16) for x in tokens(2)], HEAD, "vocab")
