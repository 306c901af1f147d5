"""Every spelling of logits: weights x what is done with them x dtype x tokens, each found exactly once."""

import functools
import itertools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width, tolerance
from jax import lax
from test_spellings import pairwise

import hire_xform as hx

# V is prime: no product of other sizes equals it by chance. PADDED has rows that no token stands for.
D, V, PADDED, TOP = 12, 61, 64, 5

SHAPES = {"head": (D, V), "embed": (V, D), "padded": (PADDED, D), "heads": (3, D, V), "bias": (V,)}
KEY = jax.random.key(3)


@functools.cache
def weights(dtype) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape) * 0.3, dtype) for name, shape in SHAPES.items()}


@functools.cache
def tokens(count, dtype) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, D)), dtype)


@dataclass(frozen=True)
class Case:
    """One combination; ``widened`` as in ``test_spellings``."""

    form: str
    use: str
    precision: str
    tokens: int
    widened: bool = False

    @property
    def dtype(self):
        return jnp.float32 if self.precision == "f32" else jnp.bfloat16

    @property
    def width(self) -> int:
        return PADDED if self.form in ("padded_sliced", "padded_masked") else V

    def run(self, params, xs):
        p, x = params[jnp.dtype(self.dtype).name], xs[f"{jnp.dtype(self.dtype).name}/{self.tokens}"]
        return USES[self.use](FORMS[self.form](self, p, x), p)

    def einsum(self, spec, *operands):
        accumulate = jnp.float32 if self.precision == "bf16_f32" else None
        if self.widened and accumulate is not None:
            operands = [operand.astype(accumulate) for operand in operands]
        return jnp.einsum(spec, *operands, preferred_element_type=accumulate)


FORMS = {
    "untied": lambda case, p, x: case.einsum("bd,dv->bv", x, p["head"]),
    "tied": lambda case, p, x: case.einsum("bd,dv->bv", x, p["embed"].T),
    "einsum": lambda case, p, x: case.einsum("bd,vd->bv", x, p["embed"]),
    "weight_left": lambda case, p, x: case.einsum("vd,db->vb", p["embed"], x.T).T,
    "of_a_stack": lambda case, p, x: case.einsum("bd,dv->bv", x, p["heads"][1]),
    "by_token": lambda case, p, x: jax.vmap(lambda y: case.einsum("vd,d->v", p["embed"], y))(x),
    "padded_sliced": lambda case, p, x: case.einsum("bd,vd->bv", x, p["padded"])[:, :V],
    "padded_masked": lambda case, p, x: jnp.where(
        jnp.arange(PADDED) < V, case.einsum("bd,vd->bv", x, p["padded"]), -jnp.inf
    )[:, :V],
}


def top_p_of_a_sort(logits, p):
    descending = jnp.sort(logits, axis=-1)[:, ::-1]
    kept = jnp.sum(jnp.cumsum(jax.nn.softmax(descending), axis=-1) < 0.9, axis=-1, keepdims=True)
    cutoff = jnp.take_along_axis(descending, kept, axis=-1)
    return jax.random.categorical(KEY, jnp.where(logits < cutoff, -jnp.inf, logits))


def top_p_of_an_argsort(logits, p):
    order = jnp.argsort(-logits, axis=-1)
    total = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1)), axis=-1)
    kept = jnp.concatenate([jnp.ones_like(total[:, :1], bool), total[:, :-1] < 0.9], axis=-1)
    kept = jnp.zeros_like(kept).at[jnp.arange(logits.shape[0])[:, None], order].set(kept)
    return jax.random.categorical(KEY, jnp.where(kept, logits, -1e9))


def top_p_of_a_top_k(logits, p):
    values, index = lax.top_k(logits, V)
    probabilities = jax.nn.softmax(values)
    values = jnp.where(jnp.cumsum(probabilities, axis=-1) - probabilities < 0.9, values, -1e9)
    return jnp.take_along_axis(index, jax.random.categorical(KEY, values)[:, None], axis=-1)


def min_p(logits, p):
    probabilities = jax.nn.softmax(logits)
    cut = probabilities < 0.1 * probabilities.max(axis=-1, keepdims=True)
    return jax.random.categorical(KEY, jnp.where(cut, -jnp.inf, logits))


def best_then_next(logits, p):
    def without_best(_, rest):
        return jnp.where(rest == rest.max(axis=-1, keepdims=True), -jnp.inf, rest)

    return lax.fori_loop(0, 2, without_best, logits).argmax(-1)


USES = {
    "logits": lambda logits, p: logits,
    "f32": lambda logits, p: logits.astype(jnp.float32),
    "bias": lambda logits, p: logits + p["bias"].astype(logits.dtype),
    "soft_cap": lambda logits, p: 30 * jnp.tanh(logits / 30),
    "temperature": lambda logits, p: logits / 0.7,
    "where_mask": lambda logits, p: jnp.where(jnp.arange(V) < 50, logits, -jnp.inf),
    "additive_mask": lambda logits, p: logits + jnp.where(jnp.arange(V) < 50, 0.0, -1e9).astype(logits.dtype),
    "bool_mask_by_weight": lambda logits, p: jnp.where(p["bias"] > 0, logits, -1e9),
    "sliced": lambda logits, p: logits[:, :40],
    "padded": lambda logits, p: jnp.pad(logits, ((0, 0), (0, 3)), constant_values=-1e9),
    "reversed": lambda logits, p: logits[:, ::-1],
    "log_softmax": lambda logits, p: jax.nn.log_softmax(logits),
    "softmax": lambda logits, p: jax.nn.softmax(logits),
    "logsumexp": lambda logits, p: jax.nn.logsumexp(logits, axis=-1),
    "argmax": lambda logits, p: jnp.argmax(logits, axis=-1),
    "top_k": lambda logits, p: lax.top_k(logits, TOP),
    "top_k_mask": lambda logits, p: jnp.where(logits < lax.top_k(logits, TOP)[0][:, -1:], -jnp.inf, logits),
    "top_k_mask_of_a_sort": lambda logits, p: jnp.where(
        logits < jnp.sort(logits, axis=-1)[:, -TOP][:, None], -1e9, logits
    ),
    "categorical": lambda logits, p: jax.random.categorical(KEY, logits / 0.8),
    "gumbel": lambda logits, p: jnp.argmax(logits + jax.random.gumbel(KEY, logits.shape, logits.dtype), axis=-1),
    "choice": lambda logits, p: jax.vmap(lambda q: jax.random.choice(KEY, V, p=q))(jax.nn.softmax(logits)),
    "inverse_of_the_cdf": lambda logits, p: jnp.argmax(jnp.cumsum(jax.nn.softmax(logits), axis=-1) > 0.5, axis=-1),
    "top_p_of_a_sort": top_p_of_a_sort,
    "top_p_of_an_argsort": top_p_of_an_argsort,
    "top_p_of_a_top_k": top_p_of_a_top_k,
    "min_p": min_p,
    "penalty": lambda logits, p: logits.at[:, jnp.array([3, 7])].multiply(0.9),
    "penalty_by_sign": lambda logits, p: jnp.where(
        jnp.arange(V) == 3, jnp.where(logits > 0, logits / 1.2, logits * 1.2), logits
    ),
    "two_entries": lambda logits, p: logits[:, 3] - logits[:, 5],
    "one_token": lambda logits, p: logits[-1],
    "one_token_by_index": lambda logits, p: logits[jnp.argmax(p["bias"]) % logits.shape[0]],
    "loss": lambda logits, p: -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.full((logits.shape[0], 1), 3), 1),
    "one_hot_loss": lambda logits, p: -(jax.nn.one_hot(3, V) * jax.nn.log_softmax(logits)).sum(-1),
    "token_and_logprob": lambda logits, p: (logits.argmax(-1), jax.nn.log_softmax(logits).max(-1), logits),
    "guidance": lambda logits, p: logits[:1] + 2 * (logits[-1:] - logits[:1]),
    "loop": best_then_next,
    "branch": lambda logits, p: lax.cond(p["bias"][0] > 0, lambda u: u.argmax(-1), lambda u: (-u).argmax(-1), logits),
    "everything": lambda logits, p: jax.nn.log_softmax(
        jnp.where(jnp.arange(V) < 50, jnp.tanh((logits + p["bias"]) / 30) * 30, -1e9).astype(jnp.float32) / 0.8
    ),
}
PRECISIONS = ("f32", "bf16", "bf16_f32")
COUNTS = (1, 3, 8)
LEVELS = (tuple(FORMS), tuple(USES), PRECISIONS, COUNTS)

ALL_WEIGHTS = {jnp.dtype(t).name: weights(t) for t in (jnp.float32, jnp.bfloat16)}
ALL_TOKENS = {f"{name}/{n}": tokens(n, name) for name in ALL_WEIGHTS for n in COUNTS}


def program(cases):
    """All cases as one function of weights and tokens."""
    return lambda params, xs: [case.run(params, xs) for case in cases]


def assert_one_site_each(plan, cases) -> None:
    """A site for each case, in order, each of the right size; and no refusals."""
    assert not plan.refusals, plan.refusals
    found = [(s.kind, s.units, s.inputs, s.tokens, s.dense_bytes, s.computed) for s in plan.sites]
    want = [("vocab", c.width, D, c.tokens, c.width * D * np.dtype(c.dtype).itemsize, c.width) for c in cases]
    assert found == want
    assert all("test_spellings_vocab" in s.source and s.path for s in plan.sites)


def test_the_cross_product_is_as_large_as_it_says():
    assert [len(level) for level in LEVELS] == [8, 38, 3, 3]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("form", FORMS)
def test_every_combination_is_exactly_one_site(form, use):
    cases = [Case(form, use, *rest) for rest in itertools.product(PRECISIONS, COUNTS)]
    step = hx.sparsify(program(cases), config=full_width())
    assert_one_site_each(step.trace(ALL_WEIGHTS, ALL_TOKENS).plan, cases)


COVER = [Case(*row) for row in pairwise(LEVELS)]
BATCH = 12


def test_the_cover_has_every_pair_of_levels():
    rows = [(c.form, c.use, c.precision, c.tokens) for c in COVER]
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
        assert_same(one, other, tolerance(case.dtype))
