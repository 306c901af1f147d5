"""Random programs: at full width each gives what the original gives, and nothing raises that it does not."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

import hire_xform as hx

D, MS, V, SHARED = 5, (7, 16), 11, 2

# More than the suite's number are drawn anew at every run: HIRE_TEST_EXAMPLES=1000 looks further.
EXAMPLES = int(os.environ.get("HIRE_TEST_EXAMPLES", "60"))

ACTS = {
    "relu": jax.nn.relu,
    "squared": lambda u: jnp.square(jax.nn.relu(u)),
    "silu": jax.nn.silu,
    "where": lambda u: jnp.where(u > 0, u, 0),
    "softmax": jax.nn.softmax,
    "norm": lambda u: u - u.mean(-1, keepdims=True),
    "identity": lambda u: u,
    "half": lambda u: jax.nn.relu(u.astype(jnp.bfloat16)).astype(u.dtype),
    "bf16": lambda u: jax.nn.relu(u).astype(jnp.bfloat16),
}

# A program is a list of statements; each turns the state ``x [T, D]`` into another, and may keep extra results.
act = st.sampled_from(sorted(ACTS))
which = st.integers(0, SHARED - 1)
simple = st.one_of(
    st.tuples(st.just("ffn"), which, st.integers(0, 1), act, st.booleans()),
    st.tuples(st.just("gated"), which, act),
    st.tuples(st.just("left"), which, act),
    st.tuples(st.just("product"), which),
    st.tuples(st.just("leak"), which, act),
    st.tuples(st.just("logits"), which, st.sampled_from(["keep", "argmax", "feed", "drop"])),
    st.tuples(st.just("stacked"), act),
    st.tuples(st.just("callback")),
    st.tuples(st.just("norm")),
)


def nested(inner):
    body = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.tuples(st.just("jit"), body, st.integers(1, 2)),
        st.tuples(st.just("remat"), body),
        st.tuples(st.just("scan"), body, st.integers(0, 3), st.booleans()),
        st.tuples(st.just("while"), body, st.integers(0, 2)),
        st.tuples(st.just("cond"), body, body),
        st.tuples(st.just("vmap"), body),
    )


programs = st.lists(st.recursive(simple, nested, max_leaves=5), min_size=1, max_size=4)


def make_weights(seed):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(
            rng.normal(size=shape) * shape[-2] ** -0.5 if len(shape) > 1 else rng.normal(size=shape), "f4"
        )

    return {
        "up": [[array(D, m) for m in MS] for _ in range(SHARED)],
        "gate": [array(D, MS[0]) for _ in range(SHARED)],
        "down": [[array(m, D) for m in MS] for _ in range(SHARED)],
        "bias": [[array(m) for m in MS] for _ in range(SHARED)],
        "square": [array(D, D) for _ in range(SHARED)],
        "head": [array(V, D) for _ in range(SHARED)],
        "back": array(V, D),
        "stack": {"up": array(3, D, MS[1]), "down": array(3, MS[1], D)},
    }


def run(statements, w, x, kept):
    for statement in statements:
        x = step(statement, w, x, kept)
    return x


def step(statement, w, x, kept):
    kind, *rest = statement
    if kind == "ffn":
        number, size, name, bias = rest
        u = x @ w["up"][number][size]
        u = ACTS[name](u + w["bias"][number][size] if bias else u)
        return jnp.tanh(x + (u @ w["down"][number][size].astype(u.dtype)).astype(x.dtype))
    if kind == "gated":
        number, name = rest
        u = ACTS[name](x @ w["gate"][number]) * (x @ w["up"][number][0])
        return jnp.tanh((u.astype(x.dtype) @ w["down"][number][0]) * 0.5)
    if kind == "left":
        number, name = rest
        u = ACTS[name](w["up"][number][0].T @ x.T)
        return jnp.tanh((w["down"][number][0].T @ u.astype(x.dtype)).T)
    if kind == "product":
        return jnp.tanh(x @ w["square"][rest[0]])
    if kind == "leak":
        number, name = rest
        u = ACTS[name](x @ w["up"][number][0]).astype(x.dtype)
        return jnp.tanh(x + u @ w["down"][number][0] + u.sum(-1, keepdims=True))
    if kind == "logits":
        number, use = rest
        logits = x @ w["head"][number].T
        if use == "keep":
            kept.append(jax.nn.log_softmax(logits))
        elif use == "argmax":
            kept.append(jnp.max(logits, -1))
        elif use == "feed":
            return jnp.tanh(logits @ w["back"])
        return x
    if kind == "stacked":
        for i in range(2):
            x = jnp.tanh(x + ACTS[rest[0]](x @ w["stack"]["up"][i]).astype(x.dtype) @ w["stack"]["down"][i])
        return x
    if kind == "callback":
        jax.debug.callback(lambda v: None, x.sum())
        return x
    if kind == "norm":
        return x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-3)
    return compound(kind, rest, w, x, kept)


def compound(kind, rest, w, x, kept):
    body = partial(run, rest[0])
    if kind == "jit":
        inner = jax.jit(lambda w, x: (lambda k: (body(w, x, k), k))([]))
        for _ in range(rest[1]):
            x, found = inner(w, x)
            kept.extend(found)
        return x
    if kind == "remat":
        return jax.checkpoint(lambda w, x: body(w, x, []))(w, x)
    if kind == "scan":
        _, length, reverse = rest
        stack = jax.tree.map(lambda a: a[:length], w["stack"])

        def scanned(x, slices):
            u = jax.nn.relu(x @ slices["up"]) @ slices["down"]
            return body(w, jnp.tanh(x + u), []), u.sum()

        x, ys = lax.scan(scanned, x, stack, reverse=reverse)
        kept.append(ys)
        return x
    if kind == "while":
        return lax.while_loop(lambda s: s[0] < rest[1], lambda s: (s[0] + 1, body(w, s[1], [])), (0, x))[1]
    if kind == "cond":
        other = partial(run, rest[1])
        return lax.cond(x.sum() > 0, lambda x: body(w, x, []), lambda x: other(w, x, []), x)
    return jax.vmap(lambda row: body(w, row[None], [])[0])(x)


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 60, suppress_health_check=list(HealthCheck))
@given(programs, st.integers(1, 3), st.sampled_from(["plain", "packed", "closed", "jit"]), st.integers(0, 9))
def test_full_width_is_the_original(statements, tokens, how, seed):
    w = make_weights(seed)
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, D)), jnp.float32)

    def original(w, x):
        kept = []
        return run(statements, w, x, kept), kept

    want = jax.jit(original)(w, x)
    predictor = (hx.Quantized(8), hx.Quantized(4), hx.LowRank(0.5))[seed % 3]
    step = hx.sparsify(original, config=full_width(predictor))
    if how == "closed":
        got = hx.sparsify(partial(original, w), config=full_width(predictor), weights_argnums=())(x)
    elif how == "plain":
        got = step(w, x)
    else:
        packed = step.trace(w, x).pack(w)
        got = (jax.jit(step) if how == "jit" else step)(packed, x)
    # Some steps round to bfloat16, where an f32 rounding may fall to either side.
    assert_same(got, want, 3e-2 if "bf16" in str(statements) or "half" in str(statements) else 1e-4)
