"""Every spelling of a feed-forward block: activation x weights x dtype x bias x tokens, each found exactly once."""

import functools
import itertools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same, full_width, tolerance
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import hire_xform as hx

D, M, N, HEADS = 12, 40, 10, 4


def constrained(u):
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    return lax.with_sharding_constraint(u, NamedSharding(mesh, PartitionSpec()))


@jax.custom_jvp
def own_relu(u):
    return jnp.maximum(u, 0)


@own_relu.defjvp
def _own_relu_rule(primals, tangents):
    return own_relu(*primals), jnp.where(primals[0] > 0, tangents[0], 0)


def gated(act):
    return lambda gate, up: act(gate) * up


gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
gelu_erf = functools.partial(jax.nn.gelu, approximate=False)

PLAIN = {
    "relu": jax.nn.relu,
    "relu_squared": lambda u: jnp.square(jax.nn.relu(u)),
    "gelu_tanh": gelu_tanh,
    "gelu_erf": gelu_erf,
    "silu": jax.nn.silu,
    "cast": lambda u: jax.nn.silu(u.astype(jnp.float32)).astype(u.dtype),
    "cast_down": lambda u: jax.nn.relu(u).astype(jnp.bfloat16).astype(u.dtype),
    "checkpoint_name": lambda u: checkpoint_name(jax.nn.relu(checkpoint_name(u, "up")), "hidden"),
    "sharding_constraint": lambda u: constrained(jax.nn.relu(constrained(u))),
    "custom_jvp": own_relu,
    "optimization_barrier": lambda u: lax.optimization_barrier(jax.nn.relu(lax.optimization_barrier(u))),
    "jitted": jax.jit(lambda u: jax.nn.relu(u) * 2),
    "remat": jax.checkpoint(lambda u: jax.nn.silu(u) + u),
}
GATED = {
    "swiglu": gated(jax.nn.silu),
    "geglu": gated(gelu_tanh),
    "reglu": gated(jax.nn.relu),
    "gate_of_a_cast": lambda g, u: (jax.nn.silu(g.astype(jnp.float32)) * u.astype(jnp.float32)).astype(u.dtype),
    "gate_barrier": lambda g, u: jax.nn.relu(lax.optimization_barrier((g, u))[0]) * u,
}
ACTIVATIONS = {**PLAIN, **GATED}
ZEROING = {"relu", "relu_squared", "cast_down", "checkpoint_name", "sharding_constraint", "custom_jvp"} | {
    "optimization_barrier",
    "jitted",
    "reglu",
    "gate_barrier",
}

# What the weights and biases are called, and their shapes, for all forms.
SHAPES = {
    "up": (D, M),
    "gate": (D, M),
    "down": (M, N),
    "up_t": (M, D),
    "gate_t": (M, D),
    "down_t": (N, M),
    "up_h": (D, HEADS, M // HEADS),
    "gate_h": (D, HEADS, M // HEADS),
    "down_h": (HEADS, M // HEADS, N),
    "ups": (3, D, M),
    "downs": (3, M, N),
    "pair": (2, D, M),
    "pair_last": (D, M, 2),
    "both": (D, 2 * M),
    "both_t": (2 * M, D),
    "b_up": (M,),
    "b_gate": (M,),
    "b_both": (2 * M,),
    "b_down": (N,),
}


@functools.cache
def weights(dtype) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape) * 0.3, dtype) for name, shape in SHAPES.items()}


@functools.cache
def tokens(count, dtype) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, D)), dtype)


@dataclass(frozen=True)
class Case:
    """One combination.

    ``widened`` spells the products of bfloat16 with float32 sums by float32 operands, which is the same: XLA's CPU
    backend has no product of bfloat16 into float32 with the weight on the left.
    """

    activation: str
    form: str
    precision: str
    bias: bool
    tokens: int
    widened: bool = False

    @property
    def dtype(self):
        return jnp.float32 if self.precision == "f32" else jnp.bfloat16

    @property
    def accumulate(self):
        """The dtype in which products are summed; None leaves it to JAX."""
        return jnp.float32 if self.precision == "bf16_f32" else None

    @property
    def is_gated(self) -> bool:
        return self.activation in GATED or self.form in FUSED

    @property
    def dense_bytes(self) -> int:
        return (D * M * (2 if self.is_gated else 1) + M * N) * np.dtype(self.dtype).itemsize

    def run(self, params, xs):
        p, x = params[jnp.dtype(self.dtype).name], xs[f"{jnp.dtype(self.dtype).name}/{self.tokens}"]
        return FORMS[self.form](self, p, x)

    def einsum(self, spec, *operands):
        if self.widened and self.accumulate is not None:
            operands = [operand.astype(self.accumulate) for operand in operands]
        return jnp.einsum(spec, *operands, preferred_element_type=self.accumulate)

    def matmul(self, a, b):
        return self.einsum("ij,jk->ik", a, b)

    def plus(self, u, b):
        return u + b.astype(u.dtype) if self.bias else u

    def hidden(self, x, up, gate):
        """The activation of the products; a gate is computed by gated ones only."""
        act = ACTIVATIONS[self.activation]
        if self.form in FUSED and self.activation in PLAIN:
            act = gated(act)
        return (act(gate(), up()) if self.is_gated else act(up())).astype(x.dtype)


def right(case, p, x):
    """``x @ w``."""
    h = case.hidden(
        x,
        lambda: case.plus(case.matmul(x, p["up"]), p["b_up"]),
        lambda: case.plus(case.matmul(x, p["gate"]), p["b_gate"]),
    )
    return case.plus(case.matmul(h, p["down"]), p["b_down"])


def left(case, p, x):
    """``w @ x`` throughout: tokens are the last axis."""
    h = case.hidden(
        x,
        lambda: case.plus(case.matmul(p["up_t"], x.T), p["b_up"][:, None]),
        lambda: case.plus(case.matmul(p["gate_t"], x.T), p["b_gate"][:, None]),
    )
    return case.plus(case.matmul(p["down_t"], h), p["b_down"][:, None]).T


def transposed(case, p, x):
    """``x @ w.T``, as PyTorch's linear layers are ported."""
    h = case.hidden(
        x,
        lambda: case.plus(case.matmul(x, p["up_t"].T), p["b_up"]),
        lambda: case.plus(case.matmul(x, p["gate_t"].T), p["b_gate"]),
    )
    return case.plus(case.matmul(h, p["down_t"].T), p["b_down"])


def heads(case, p, x):
    """The hidden axis split in two throughout."""
    shape = (HEADS, M // HEADS)
    h = case.hidden(
        x,
        lambda: case.plus(case.einsum("td,dhk->thk", x, p["up_h"]), p["b_up"].reshape(shape)),
        lambda: case.plus(case.einsum("td,dhk->thk", x, p["gate_h"]), p["b_gate"].reshape(shape)),
    )
    return case.plus(case.einsum("thk,hkn->tn", h, p["down_h"]), p["b_down"])


def merged_heads(case, p, x):
    """Split where it is made, merged where it is contracted."""
    h = case.hidden(
        x,
        lambda: case.plus(case.einsum("td,dhk->thk", x, p["up_h"]).reshape(-1, M), p["b_up"]),
        lambda: case.plus(case.einsum("dhk,td->thk", p["gate_h"], x).reshape(-1, M), p["b_gate"]),
    )
    return case.plus(case.matmul(h, p["down"]), p["b_down"])


def stacked(case, p, x):
    """One matrix of a stack of three."""
    h = case.hidden(
        x,
        lambda: case.plus(case.matmul(x, p["ups"][1]), p["b_up"]),
        lambda: case.plus(case.matmul(x, p["ups"][2]), p["b_gate"]),
    )
    return case.plus(case.matmul(h, p["downs"][0]), p["b_down"])


def pair(case, p, x):
    """Gate and up as one weight with a leading axis of two."""
    u = case.einsum("td,cdm->tcm", x, p["pair"])
    h = case.hidden(x, lambda: case.plus(u[:, 0], p["b_up"]), lambda: case.plus(u[:, 1], p["b_gate"]))
    return case.plus(case.matmul(h, p["down"]), p["b_down"])


def pair_last(case, p, x):
    """Gate and up as one weight with a last axis of two."""
    u = case.einsum("td,dmc->tmc", x, p["pair_last"])
    h = case.hidden(x, lambda: case.plus(u[..., 0], p["b_up"]), lambda: case.plus(u[..., 1], p["b_gate"]))
    return case.plus(case.matmul(h, p["down"]), p["b_down"])


def sliced(case, p, x):
    """Gate and up in one product, cut by slices."""
    u = case.plus(case.matmul(x, p["both"]), p["b_both"])
    return case.plus(case.matmul(case.hidden(x, lambda: u[..., M:], lambda: u[..., :M]), p["down"]), p["b_down"])


def split(case, p, x):
    """Gate and up in one product, cut by a split; the weight lies transposed."""
    gate, up = jnp.split(case.plus(case.matmul(x, p["both_t"].T), p["b_both"]), 2, axis=-1)
    return case.plus(case.matmul(case.hidden(x, lambda: up, lambda: gate), p["down"]), p["b_down"])


def interleaved(case, p, x):
    """Gate and up in one product, unit by unit in turn."""
    u = case.plus(case.matmul(x, p["both"]), p["b_both"])
    return case.plus(case.matmul(case.hidden(x, lambda: u[..., 1::2], lambda: u[..., ::2]), p["down"]), p["b_down"])


FUSED = {f.__name__: f for f in (pair, pair_last, sliced, split, interleaved)}
FORMS = {f.__name__: f for f in (right, left, transposed, heads, merged_heads, stacked)} | FUSED
PRECISIONS = ("f32", "bf16", "bf16_f32")
BIASES = (False, True)
COUNTS = (1, 3, 8)
LEVELS = (tuple(ACTIVATIONS), tuple(FORMS), PRECISIONS, BIASES, COUNTS)

ALL_WEIGHTS = {jnp.dtype(t).name: weights(t) for t in (jnp.float32, jnp.bfloat16)}
ALL_TOKENS = {f"{name}/{n}": tokens(n, name) for name in ALL_WEIGHTS for n in COUNTS}


def program(cases):
    """All cases as one function of weights and tokens."""
    return lambda params, xs: [case.run(params, xs) for case in cases]


def assert_one_site_each(plan, cases) -> None:
    """A site for each case, in order, each of the right size; and no refusals."""
    assert not plan.refusals, plan.refusals
    found = [(s.kind, s.units, s.inputs, s.tokens, s.dense_bytes, s.computed) for s in plan.sites]
    want = [("ffn", M, D, case.tokens, case.dense_bytes, M) for case in cases]
    assert found == want
    assert all("test_spellings" in s.source and s.path and s.activation for s in plan.sites)


def test_the_cross_product_is_as_large_as_it_says():
    assert [len(level) for level in LEVELS] == [18, 11, 3, 2, 3]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_combination_is_exactly_one_site(activation, form):
    cases = [Case(activation, form, *rest) for rest in itertools.product(PRECISIONS, BIASES, COUNTS)]
    step = hx.sparsify(program(cases), config=full_width())
    assert_one_site_each(step.trace(ALL_WEIGHTS, ALL_TOKENS).plan, cases)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_zeroing_activations_are_sites_by_default(activation):
    cases = [Case(activation, form, "f32", True, 1) for form in FORMS]
    plan = hx.sparsify(program(cases), config=full_width(activations="zeroing")).trace(ALL_WEIGHTS, ALL_TOKENS).plan
    if activation in ZEROING:
        assert_one_site_each(plan, cases)
    else:
        assert not plan.sites
        assert {r.kind for r in plan.refusals} == {"ffn"}
        assert all("does not leave exact zeros" in r.reason for r in plan.refusals)


def pairwise(levels) -> list[tuple]:
    """Combinations in which every pair of levels of two factors occurs; greedy, the same at every run."""
    factors = range(len(levels))
    left = {(i, a, j, b) for i, j in itertools.combinations(factors, 2) for a in levels[i] for b in levels[j]}
    chosen = []
    every = list(itertools.product(*levels))
    # Strides coprime to the number of combinations visit all of them, far apart.
    every = [every[(i * 1009) % len(every)] for i in range(len(every))]
    for least in (10, 8, 6, 4, 3, 2, 1):
        for row in every:
            new = {(i, row[i], j, row[j]) for i, j in itertools.combinations(factors, 2)} & left
            if len(new) >= least:
                chosen.append(row)
                left -= new
    return chosen


COVER = [Case(*row) for row in pairwise(LEVELS)]
BATCH = 12


def test_the_cover_has_every_pair_of_levels():
    rows = [(c.activation, c.form, c.precision, c.bias, c.tokens) for c in COVER]
    for i, j in itertools.combinations(range(len(LEVELS)), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(LEVELS[i], LEVELS[j]))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, len(COVER), BATCH))
def test_full_width_is_the_dense_result(start):
    cases = COVER[start : start + BATCH]
    step = hx.sparsify(program(cases), config=full_width())
    traced = step.trace(ALL_WEIGHTS, ALL_TOKENS)
    assert_one_site_each(traced.plan, cases)
    want = jax.jit(program([replace(case, widened=True) for case in cases]))(ALL_WEIGHTS, ALL_TOKENS)
    got = step(traced.pack(ALL_WEIGHTS), ALL_TOKENS)
    for case, one, other in zip(cases, got, want, strict=True):
        limit = tolerance(jnp.bfloat16 if case.activation == "cast_down" else case.dtype)
        assert_same(one, other, limit)


# Every other four units are dead, whatever the input: what is left of a block is exact at half its width.
DEAD = np.arange(M) // 4 % 2 == 0
SIDES = {"b_up": DEAD, "b_gate": DEAD, "b_both": np.tile(DEAD, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("activation", ["relu", "reglu"])
def test_half_the_units_are_enough_where_the_others_are_dead(activation, group_size):
    forms = [form for form in FORMS if form != "interleaved"]
    cases = [Case(activation, form, "f32", True, count) for form in forms for count in (1, 3)]
    params = {name: dict(leaves) for name, leaves in ALL_WEIGHTS.items()}
    for name, dead in SIDES.items():
        params["float32"][name] = jnp.where(dead, -100.0, params["float32"][name])
    config = hx.Config(ffn=hx.Ffn(active=0.5, group_size=group_size), rules=FORCE)
    step = hx.sparsify(program(cases), config=config)
    plan = step.trace(params, ALL_TOKENS).plan
    assert [s.kind for s in plan.sites] == ["ffn"] * len(cases)
    assert all(s.computed == M // 2 if s.tokens == 1 else s.computed < 3 * M for s in plan.sites)
    for one, other in zip(step(params, ALL_TOKENS), program(cases)(params, ALL_TOKENS), strict=True):
        assert_same(one, other)
