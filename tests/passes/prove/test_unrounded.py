"""Products in bfloat16 that are widened at once: XLA does not round them, or does, as their shapes have it."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import FORCE, assert_same, full_width, kinds
from jax import lax

import hire_xform as hx
from hire_xform.lowering.prove import intervals
from hire_xform.passes.match.zeros import gate_of, upper_of

pytestmark = pytest.mark.filterwarnings("ignore:.*was packed")

D, M, K = 32, 256, 16
CERTIFIED = hx.Config(vocab=None, ffn=hx.Ffn(active=0.9, certify=True), rules=FORCE)


def weights(dtype=jnp.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"up": (D, M), "gate": (D, M), "down": (M, D), "bias": (M,)}
    return {name: jnp.asarray(rng.normal(size=s) * s[0] ** -0.5, dtype) for name, s in shapes.items()}


def tokens(seed, count=1, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(100 + seed).normal(size=(count, D)), dtype)


def largest(u):
    return lax.top_k(u, K)[0][..., -1:]


def scatter(u):
    values, index = lax.top_k(u, K)
    return jnp.zeros_like(u).at[jnp.arange(u.shape[0])[:, None], index].set(values)


def gaussian(u):
    return jax.nn.relu(u - (u.mean(-1, keepdims=True) + 1.2 * u.std(-1, keepdims=True)))


CHOICES = {
    "kept": lambda u: jnp.where(u >= largest(u), u, 0),
    "masked": lambda u: u * (u >= largest(u)),
    "sorted": lambda u: jnp.where(u >= jnp.sort(u, -1)[..., -K][..., None], u, 0),
    "scattered": scatter,
    "by size": lambda u: jnp.where(jnp.abs(u) >= largest(jnp.abs(u)), u, 0),
    "gaussian": gaussian,
    "relu": jax.nn.relu,
}
# What is certified: nothing jumps.
CONTINUOUS = ("gaussian", "relu")


def widened(choice):
    """All but the products into the units in f32."""
    return lambda p, x: CHOICES[choice]((x @ p["up"]).astype(jnp.float32)) @ p["down"].astype(jnp.float32)


def widened_gated(choice):
    def block(p, x):
        gate, up = ((x @ p[name]).astype(jnp.float32) for name in ("gate", "up"))
        return (CHOICES[choice](gate) * up) @ p["down"].astype(jnp.float32)

    return block


def inputs(seed, count=1):
    return [tokens(seed + i, count) for i in range(40)]


def apart(got, want):
    return float(jnp.abs(got - want).max() / jnp.abs(want).max())


@pytest.mark.any_jax("cases vary the choice of units, and whether there is a gate", every=3)
@pytest.mark.parametrize("block", [widened, widened_gated], ids=["plain", "gated"])
@pytest.mark.parametrize("choice", CHOICES)
def test_at_full_width_a_widened_product_is_not_rounded(choice, block):
    """Within the rounding of f32 sums; rounded to bfloat16, others tie at the k-th place, and go elsewhere."""
    fun, p = block(choice), weights()
    step, dense = hx.sparsify(fun, config=full_width()), jax.jit(fun)
    assert kinds(step.trace(p, tokens(0)).plan) == ["ffn"]
    assert max(apart(step(p, x), dense(p, x)) for x in inputs(0)) < 2e-5


def test_at_full_width_a_product_of_three_axes_is_rounded():
    """As the dense program's is, where a reshape stands before the cast."""
    fun, p = NESTED["three axes"](widened("kept")), weights()
    step, dense = hx.sparsify(fun, config=full_width()), jax.jit(fun)
    assert kinds(step.trace(p, tokens(0)).plan) == ["ffn"]
    far = sum(apart(step(p, x), dense(p, x)) > 2e-5 for x in inputs(0))
    assert far <= 2  # sums in two orders may round to two neighbours


NESTED = {
    "plain": lambda fun: fun,
    "three axes": lambda fun: lambda p, x: fun(p, x[None])[0],
    "scan": lambda fun: lambda p, x: lax.scan(lambda c, x: (c, fun(p, x[None])[0]), 0, x)[1],
}


@pytest.mark.any_jax("cases vary the choice of units in three nestings", every=2)
@pytest.mark.parametrize("nesting", NESTED)
@pytest.mark.parametrize("choice", CONTINUOUS)
def test_certified_is_dense_whether_or_not_it_is_rounded(choice, nesting):
    fun, p = NESTED[nesting](widened(choice)), weights()
    # Where XLA rounds, sums in two orders may round to two neighbours.
    limit = 2**-7 if nesting == "three axes" else 2e-5
    step, dense = hx.sparsify(fun, config=CERTIFIED), jax.jit(fun)
    assert kinds(step.trace(p, tokens(0)).plan) == ["ffn"], step.trace(p, tokens(0)).explain()
    assert max(apart(step(p, x), dense(p, x)) for x in inputs(40)) < limit


GATES = {
    "alone": lambda p, u: u,
    "biased": lambda p, u: u + p["bias"],
    "there and back": lambda p, u: (u + 100 * p["bias"]) - 100 * p["bias"] + p["bias"],
    "cast between": lambda p, u: ((u + p["bias"]).astype(jnp.float32) - 1e-3).astype(u.dtype),
}


@pytest.mark.any_jax("cases vary numbers of arithmetic that is our own", every=3)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("gate", GATES)
def test_a_gates_bound_holds_rounded_and_not(gate, dtype):
    p = weights(dtype)
    fun = lambda p, x: jax.nn.relu(GATES[gate](p, x @ p["up"])) @ p["down"]  # noqa: E731
    match = hx.sparsify(fun, config=CERTIFIED).trace(p, tokens(0, dtype=dtype)).plan.decisions[0].match
    wide = {name: leaf.astype(jnp.float32) for name, leaf in p.items()}
    x = tokens(0, 200, dtype).astype(jnp.float32)
    hidden = x @ wide["up"]
    region, bias = match.region, p["bias"]
    given = iter([100 * bias, 100 * bias, bias] if gate == "there and back" else [bias])
    sides = [next(given)[None] if side.value.shape else jnp.zeros((), dtype) for side in region.sides]
    bound = upper_of(region, gate_of(region).expr, intervals.rounded_up(hidden, dtype), sides)
    exact = GATES[gate](wide, hidden)
    rounded = GATES[gate](p, hidden.astype(dtype)).astype(jnp.float32)
    assert bool(jnp.all(exact <= bound))
    assert bool(jnp.all(rounded <= bound))
    assert float(jnp.mean(bound <= 0)) > 0.4


SCALED = {
    "scaled": lambda p, u: u * p["scale"],
    "scaled and biased": lambda p, u: u * p["scale"] + p["bias"],
    "biased and scaled": lambda p, u: (u + p["bias"]) * p["scale"],
}


@pytest.mark.any_jax("cases vary numbers of arithmetic that is our own", every=3)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("gate", SCALED)
def test_a_scaled_gates_bound_holds_rounded_fused_and_not(gate, dtype):
    """Scales of all sizes, zero and below among them: there nothing is proved."""
    p = weights(dtype)
    m = p["up"].shape[1]
    scale = jnp.exp2(jnp.arange(m) % 41 - 20.0) * jnp.where(jnp.arange(m) % 8 == 3, -1, 1)
    p["scale"] = scale.at[5].set(0).astype(dtype)
    fun = lambda p, x: jax.nn.relu(SCALED[gate](p, x @ p["up"])) @ p["down"]  # noqa: E731
    match = hx.sparsify(fun, config=CERTIFIED).trace(p, tokens(0, dtype=dtype)).plan.decisions[0].match
    hidden = np.asarray(tokens(0, 200, dtype) @ p["up"], np.float32)
    region = match.region
    named = {"scaled": ["scale"], "scaled and biased": ["scale", "bias"], "biased and scaled": ["bias", "scale"]}[gate]
    bound = np.asarray(upper_of(region, gate_of(region).expr, jnp.asarray(hidden), [p[n][None] for n in named]))
    bound = np.where(np.isnan(bound), np.inf, bound)  # neither proves a zero
    rounded = np.asarray(SCALED[gate](p, jnp.asarray(hidden).astype(dtype)), np.float64)
    assert (rounded <= bound).all()
    # Multiplied and added in one, the exact value is rounded once.
    exact = SCALED[gate]({n: np.asarray(p[n], np.float64) for n in named}, hidden.astype(np.float64))
    if gate != "biased and scaled":
        assert (exact.astype(np.float32) <= bound).all()
    assert np.isposinf(bound[:, np.asarray(p["scale"], np.float32) < 0]).all()
    assert np.mean(bound <= 0) > 0.3


@pytest.mark.parametrize("gate", SCALED)
def test_blocks_of_a_scaled_gate_are_certified(gate):
    p = weights()
    m = p["up"].shape[1]
    p["scale"] = jnp.where(jnp.arange(m) % 8 == 3, -1, 1) * jnp.linspace(0.0, 2.0, m)
    fun = lambda p, x: jax.nn.relu(SCALED[gate](p, x @ p["up"])) @ p["down"]  # noqa: E731
    step, dense = hx.sparsify(fun, config=CERTIFIED), jax.jit(fun)
    assert kinds(step.trace(p, tokens(0)).plan) == ["ffn"]
    # Scales of both signs leave some units unproved, fewer than are computed.
    assert max(apart(step(p, x), dense(p, x)) for x in inputs(5)) < 2e-5


@pytest.mark.any_jax("cases vary nestings, which test_full_width.py runs on every JAX", every=2)
@pytest.mark.parametrize("name", ["unrolled", "scanned", "jit_scan_jit", "remat_scan", "indexed"])
def test_blocks_of_a_bfloat16_model(name):
    """Certified, some of them by their fallbacks: within a rounding or two to bfloat16 of the dense step."""
    model = next(m for m in models.MODELS if m.name == name)
    params, cache = model.make_params(jnp.bfloat16), models.make_cache(2, jnp.bfloat16)
    step, dense = hx.sparsify(model.step, config=CERTIFIED), jax.jit(model.step)
    rest = cache, jnp.asarray([3, 5]), jnp.zeros(models.D)
    traced = step.trace(params, *rest)
    assert kinds(traced.plan) == ["ffn"] * model.ffn
    assert_same(step(traced.pack(params), *rest), dense(params, *rest), 2e-2)
    assert_same(step(params, *rest), dense(params, *rest), 2e-2)
