"""Random programs: at full width each gives what the original gives, and so it does with every product "compressed" to
all that it is; nothing raises that the original does not; every product with a weight is a site's or a refusal."""

import os
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from checks import FORCE, compressed, full_width, narrow
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jaxprs import count_weight_products, evaluate

import hire_xform as hx

# More than the suite's number are drawn anew at every run; `make random` spreads many over processes.
EXAMPLES = int(os.environ.get("HIRE_TEST_EXAMPLES", "300"))

# A failing program is small enough as it is drawn; making it smaller takes minutes. HIRE_TEST_SHRINK=1 does.
PHASES = [p for p in Phase if p is not Phase.shrink or os.environ.get("HIRE_TEST_SHRINK", "0") == "1"]
# What comes first is drawn most.
HOWS = ("lossless", "packed", "plain", "closed", "compiled", "compressed", "narrow", "derivative", "vmap")
SIXTEEN_BITS = {"half", "bf16", "cast", "widened"}
PREDICTORS = (hx.Quantized(8), hx.Quantized(4), hx.LowRank(0.5))
TALLY: Counter = Counter()

drawn = (programs.programs, programs.token_counts, st.sampled_from(HOWS), st.integers(0, 3))


def check(statements, tokens, how, seed, run_it=True) -> None:
    """One program, checked one way; only rewritten unless ``run_it``. Adds to ``TALLY`` what was met."""
    w, x = programs.make_weights(seed), programs.make_state(tokens, seed)
    called: list[float] = []
    program = programs.meaning(statements, lambda value: called.append(np.asarray(value).sum()))
    config = {"narrow": narrow, "lossless": lossless, "compressed": compressed}.get(
        how, partial(full_width, PREDICTORS[seed % 3])
    )()
    step = hx.sparsify(program, config=config)
    traced = step.trace(w, x)
    _count(statements, how, traced.plan)
    check_products(traced, w)
    kinds = programs.kinds_of(statements)
    if how == "derivative":
        if "while" in kinds and "custom_vjp" in kinds:
            return  # has neither kind of derivative
        change = _jvp if "while" in kinds else _grad
    else:
        change = {"vmap": _vmap}.get(how, lambda fun: fun)
    if not run_it and how in ("packed", "compiled", "narrow", "lossless"):
        assert _avals(traced.sparse_jaxpr) == _avals(traced.jaxpr), "other shapes or dtypes"
        return
    if how == "closed":
        run = hx.sparsify(partial(program, w), config=config, weights_argnums=())
    else:
        run = partial(step, w if how == "plain" else traced.pack(w))
    x = jnp.stack([x, -x]) if how == "vmap" else x

    def sparse(x):
        return jax.jit(change(run))(x)

    def dense(x):
        return change(partial(program, w))(x)

    if not run_it:
        assert _outline(sparse, x) == _outline(dense, x), "other shapes or dtypes"
        return
    TALLY["programs evaluated"] += 1
    if how in ("compiled", "lossless"):
        want, got = _compiled(dense, x, called), _compiled(sparse, x, called)
    else:
        want, got = _stepwise(dense, x, called), _stepwise(sparse, x, called)
    assert got[0] == want[0], "other shapes or dtypes"
    if how == "narrow":
        return
    if how == "lossless":
        # Of logits only what is taken of them is promised.
        want, got = (_promised(*found) for found in (want, got))
    limit = 3e-2 if kinds & SIXTEEN_BITS else 1e-4
    limit *= 5 if how == "derivative" else 1
    gap = difference(got[1], want[1])
    if gap > limit and (gap <= 30 * _sensitivity(dense, x, limit) or gap <= 4 * _unrounded(dense, x)):
        TALLY["unstable: the original moves as much under rounding"] += 1
        return
    assert gap <= limit, f"differs by {gap:.2g} of the largest entry"
    if how != "derivative":  # a derivative may run what is recomputed once or twice
        assert len(got[2]) == len(want[2]), "other callbacks"
        assert difference([np.sort(got[2])], [np.sort(want[2])]) <= 10 * limit, "other values in callbacks"


def lossless() -> hx.Config:
    """Proved, with few candidates and few units, at every site whatever its size."""
    vocab, ffn = hx.Vocab(candidates=6, certify=True), hx.Ffn(active=0.4, certify=True)
    return hx.Config(vocab=vocab, ffn=ffn, rules=FORCE)


def _promised(outline, results, called):
    """Of a lossless program's results: tokens, and the state, which is the first; values of logits are not promised."""
    keep = [results[0], *(r for r in results[1:] if jnp.issubdtype(r.dtype, jnp.integer))]
    return outline, keep, called


def check_products(traced, w) -> None:
    """Every weight product is in a site or a refusal, and none is in two."""
    leaves = len(jax.tree.leaves(w))
    closed = traced.jaxpr
    wanted = count_weight_products(closed, [i < leaves for i in range(len(closed.in_avals))])
    TALLY["weight products"] += wanted
    told = sum(len(site.weights) for site in traced.plan.sites) + len(traced.plan.refusals)
    assert told >= wanted, f"{wanted} weight products, {told} told of:\n{traced.explain()}\n{closed}"
    paths = [entry.path for entry in (*traced.plan.sites, *traced.plan.refusals)]
    assert len(set(paths)) == len(paths)
    assert all(refusal.reason for refusal in traced.plan.refusals)


def _count(statements, how, plan) -> None:
    TALLY["programs"] += 1
    TALLY[f"checked {how}"] += 1
    for site in plan.sites:
        TALLY[f"{site.kind} sites"] += 1
    TALLY["refusals"] += len(plan.refusals)


def _outline(fun, x):
    jaxpr, shapes = jax.make_jaxpr(fun, return_shape=True)(x)
    return jax.tree.structure(shapes), _avals(jaxpr)


def _avals(jaxpr):
    return [(a.shape, a.dtype, a.weak_type) for a in jaxpr.out_avals]


def _stepwise(fun, x, called):
    jaxpr, shapes = jax.make_jaxpr(fun, return_shape=True)(x)
    called.clear()
    results = evaluate(jaxpr, [x])
    jax.effects_barrier()
    return (jax.tree.structure(shapes), _avals(jaxpr)), results, list(called)


def _compiled(fun, x, called):
    called.clear()
    results = jax.jit(fun)(x)
    jax.block_until_ready(results)
    jax.effects_barrier()
    leaves, tree = jax.tree.flatten(results)
    return (tree, [(a.shape, a.dtype, a.weak_type) for a in leaves]), leaves, list(called)


def _scalar(fun):
    def total(x):
        results = jax.tree.leaves(fun(x))
        return sum(jnp.sum(jnp.sin(r.astype(jnp.float32))) for r in results if jnp.issubdtype(r.dtype, jnp.floating))

    return total


def _grad(fun):
    return jax.value_and_grad(_scalar(fun))


def _jvp(fun):
    return lambda x: jax.jvp(_scalar(fun), (x,), (jnp.cos(x),))


def _vmap(fun):
    return jax.vmap(fun)


def difference(got, want) -> float:
    """The largest difference as a share of the largest entry of its result; infinity where they do not compare."""
    worst = 0.0
    for one, other in zip(got, want, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if one.shape != other.shape or not np.array_equal(np.isfinite(one), np.isfinite(other)):
            return np.inf
        finite = np.isfinite(other)
        scale = max(1e-3, np.abs(other[finite]).max(initial=0.0))
        worst = max(worst, np.abs(one[finite] - other[finite]).max(initial=0.0) / scale)
    return worst


def _unrounded(fun, x) -> float:
    """How far the original moves when XLA may not leave out its roundings to 16 bits, as it may between fused steps."""
    strict = jax.jit(fun, compiler_options={"xla_allow_excess_precision": False})
    return difference(jax.tree.leaves(strict(x)), jax.tree.leaves(jax.jit(fun)(x)))


def _sensitivity(fun, x, limit) -> float:
    """How far the original moves when its input does by a rounding error or a few."""
    want = evaluate(jax.make_jaxpr(fun)(x), [x])
    rng = np.random.default_rng(0)
    moved = [x * (1 + limit / 10 * jnp.asarray(rng.normal(size=x.shape), x.dtype)) for _ in range(4)]
    return max(difference(evaluate(jax.make_jaxpr(fun)(m), [m]), want) for m in moved)


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 300,
    phases=PHASES,
    suppress_health_check=list(HealthCheck),
)
@given(*drawn)
def test_a_random_program(statements, tokens, how, seed):
    check(statements, tokens, how, seed)
