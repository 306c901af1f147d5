"""Random JAX programs: a hypothesis strategy, and what its programs mean.

A program is a list of statements, plain tuples. Each turns a state ``x [T, D]`` into another and may keep results
besides, which the program returns too. Statements that nest hold lists of statements.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

D, HEADS, V, SHARED, LAYERS = 6, 2, 17, 2, 3
MS = (8, 16, 1, 0)

POINTWISE = {
    "relu": jax.nn.relu,
    "squared": lambda u: jnp.square(jax.nn.relu(u)),
    "silu": jax.nn.silu,
    "where": lambda u: jnp.where(u > 0, u, 0),
    "identity": lambda u: u,
    "half": lambda u: jax.nn.relu(u.astype(jnp.bfloat16)).astype(u.dtype),
    "bf16": lambda u: jax.nn.relu(u).astype(jnp.bfloat16),
    "sign": lambda u: jnp.sign(u) * u,
    "clip": lambda u: jnp.clip(u, 0, 6),
    "shifted": lambda u: jax.nn.relu(u + 5),
    "hard_swish": jax.nn.hard_swish,
    "capped": lambda u: jnp.where(u < 5.3, u, 0),
    "cut": lambda u: u.at[..., :1].set(0.5) if u.shape[-1] else u,
    "first": lambda u: jax.nn.relu(u) * (lax.broadcasted_iota(jnp.int32, u.shape, u.ndim - 1) < 3),
    "integer": lambda u: jnp.round(u * 4).astype(jnp.int32).astype(u.dtype),
}
MIXING = {
    "softmax": jax.nn.softmax,
    "norm": lambda u: u - u.sum(-1, keepdims=True) * 0.1,
    "cumsum": lambda u: jnp.cumsum(u, -1),
    "sort": lambda u: jnp.sort(u, -1),
    "reverse": lambda u: u[..., ::-1],
    "roll": lambda u: jnp.roll(u, 1, -1),
    "top2": lambda u: jnp.where(u >= lax.top_k(u, min(2, u.shape[-1]))[0][..., -1:], u, 0) if u.shape[-1] else u,
    "halves": lambda u: jnp.concatenate(jnp.split(u, 2, -1)[::-1], -1) if u.shape[-1] % 2 == 0 else u,
    "padded": lambda u: jnp.pad(u, ((0, 0), (1, 0)))[..., :-1],
    "maxout": lambda u: u + u.max(-1, keepdims=True, initial=-1.0),
    "permuted": lambda u: u[..., np.arange(u.shape[-1])[::-1]],
}
ACTS = {**POINTWISE, **MIXING}

act = st.one_of(st.sampled_from(sorted(POINTWISE)), st.sampled_from(sorted(ACTS)))
which = st.integers(0, SHARED - 1)
size = st.sampled_from([0, 0, 0, 1, 1, 1, 2, 3])
WAYS = {
    "w[i]": lambda w, i: w[i],
    "take": lambda w, i: jnp.take(w, i, axis=0),
    "clip": lambda w, i: jnp.take(w, i, axis=0, mode="clip"),
    "dynamic": lambda w, i: lax.dynamic_index_in_dim(w, i, 0, keepdims=False),
    "fill": lambda w, i: w.at[i].get(mode="fill", fill_value=0),
    "array": lambda w, i: w[i[None]][0],
}
way = st.sampled_from(sorted(WAYS))
# Dtypes that weights are stored in, and those they are converted to before a product.
STORED = ("bfloat16", "float16", "float8_e4m3fn")
USED = {"f32": ["float32"], "bf16": ["bfloat16"], "f16": ["float16"], "bf16, f32": ["bfloat16", "float32"]}
stored, used = st.sampled_from(STORED), st.sampled_from(sorted(USED))

# Weights ``[n, m]`` of integers, and products with them: of each, ``q`` with scales by name.
INTEGERS = ("int8", "int4", "uint8")
SCALED = {
    "inputs": lambda x, w: x @ (w["q"].astype(x.dtype) * w["inputs"][:, None]),
    "outputs": lambda x, w: x @ (w["outputs"] * w["q"].astype(x.dtype)),
    "groups": lambda x, w: x @ (w["q"].astype(x.dtype) * jnp.repeat(w["groups"], 2, axis=0)),
    "reshaped": lambda x, w: x @ (_in_pairs(w["q"].astype(x.dtype)) * w["groups"][:, None]).reshape(w["q"].shape),
    "zero": lambda x, w: x @ ((w["q"].astype(jnp.int32) - w["zero"]).astype(x.dtype) * w["outputs"]),
    "number": lambda x, w: x @ ((w["q"].astype(x.dtype) - 3.0) * w["outputs"]),
    "offset": lambda x, w: x @ (w["q"].astype(x.dtype) * w["outputs"] + w["inputs"][:, None]),
    "half": lambda x, w: x @ (w["q"].astype(jnp.bfloat16) * w["outputs"].astype(jnp.bfloat16)).astype(x.dtype),
    "after": lambda x, w: lax.dot(x, w["q"], preferred_element_type=x.dtype) * w["outputs"],
    "converted": lambda x, w: (x @ w["q"].astype(x.dtype)) * w["outputs"],
    "data": lambda x, w: x @ (w["q"].astype(x.dtype) * (w["outputs"] * (1 + jnp.tanh(x.sum())))),
    "twice": lambda x, w: x @ (w["q"].astype(x.dtype) * w["outputs"] * w["inputs"][:, None]),
}


def _in_pairs(q):
    return q.reshape(q.shape[0] // 2, 2, q.shape[1])


# What takes a token of logits ``[T, V]``; ``w`` has what is added.
READ = {
    "arg max": lambda u, w, x: jnp.argmax(u, -1),
    "bias": lambda u, w, x: jnp.argmax(u + w["spread"], -1),
    "update": lambda u, w, x: jnp.argmax(u + (x @ w["square"][0][:, :2]) @ w["back"].T[:2], -1),
    "cap": lambda u, w, x: jnp.argmax(jnp.tanh(u / 8) * 8 + w["spread"], -1),
    "temperature": lambda u, w, x: jnp.argmax(u / (0.5 + jnp.abs(x[:, :1])), -1),
    "mask": lambda u, w, x: jnp.argmax(jnp.where(jnp.arange(V) % 3 > 0, u, -jnp.inf), -1),
    "banned": lambda u, w, x: jnp.argmax(u.at[:, jnp.asarray([0, 5])].set(-jnp.inf), -1),
    "log_softmax": lambda u, w, x: jnp.argmax(jax.nn.log_softmax(u + w["spread"]), -1),
    "softmax": lambda u, w, x: jnp.argmax(jax.nn.softmax(u), -1),
    "sampled": lambda u, w, x: jax.random.categorical(jax.random.key(3), u / 0.7),
    "smallest": lambda u, w, x: jnp.argmin(u, -1),
    "negated": lambda u, w, x: jnp.argmin(-u, -1),
    "second": lambda u, w, x: lax.top_k(u, 2)[1][:, 1],
    "filtered": lambda u, w, x: jnp.argmax(jnp.where(u < lax.top_k(u, 3)[0][:, -1:], -jnp.inf, u), -1),
    "branch": lambda u, w, x: lax.cond(x.sum() > 0, lambda v: jnp.argmax(v, -1), lambda v: jnp.argmax(v * 2.0, -1), u),
}
# Wide products that are no logits.
FEATURES = {
    "cos": jnp.cos,
    "sign": jnp.sign,
    "positive": lambda u: (u > 0).astype(u.dtype),
    "mean": lambda u: u.mean(-1),
}

simple = st.one_of(
    st.tuples(st.just("ffn"), which, size, act, st.booleans()),
    st.tuples(st.just("ffn"), which, size, act, st.booleans()),
    st.tuples(st.just("gated"), which, act),
    st.tuples(st.just("left"), which, act),
    st.tuples(st.just("heads"), which, act),
    st.tuples(st.just("packed"), act),
    st.tuples(st.just("cast"), which, act, st.sampled_from(["bfloat16", "float16", "int8", "unrounded"])),
    st.tuples(st.just("widened"), act, stored, used, st.sampled_from(["layer", "scan", "head"])),
    st.tuples(
        *(st.just("integers"), act, st.sampled_from(INTEGERS), st.sampled_from(sorted(SCALED))),
        st.sampled_from(["layer", "scan", "head"]),
    ),
    st.tuples(st.just("product"), which),
    st.tuples(st.just("leak"), which, act),
    st.tuples(st.just("attention"), which),
    st.tuples(st.just("logits"), which, st.sampled_from(["keep", "max", "feed", "drop", "row", "sample"])),
    st.tuples(st.just("token"), which, st.sampled_from(sorted(READ))),
    st.tuples(st.just("features"), which, st.sampled_from(sorted(FEATURES))),
    st.tuples(st.just("stacked"), act),
    st.tuples(st.just("indexed"), act, way, st.integers(-1, LAYERS)),
    st.tuples(st.just("expert"), act),
    st.tuples(st.just("scaled"), which, act),
    st.tuples(st.just("callback")),
    st.tuples(st.just("norm")),
    st.tuples(st.just("embed")),
)


def nested(inner):
    body = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.tuples(st.just("jit"), body, st.integers(1, 2), st.booleans()),
        st.tuples(st.just("remat"), body),
        st.tuples(st.just("scan"), body, st.integers(0, LAYERS), st.booleans(), st.integers(1, 2)),
        st.tuples(st.just("fori"), body, way, st.integers(0, 2)),
        st.tuples(st.just("while"), body, st.integers(0, 2)),
        st.tuples(st.just("carried"), body),
        st.tuples(st.just("cond"), body, body),
        st.tuples(st.just("switch"), body, body, body),
        st.tuples(st.just("vmap"), body),
        st.tuples(st.just("custom_jvp"), body),
        st.tuples(st.just("custom_vjp"), body),
    )


programs = st.lists(st.recursive(simple, nested, max_leaves=5), min_size=1, max_size=4)
token_counts = st.sampled_from([1, 2, 3, 1, 2, 3, 0])


def make_weights(seed):
    rng = np.random.default_rng(seed)

    def array(*shape, dtype="f4"):
        scale = max(1, shape[-2]) ** -0.5 if len(shape) > 1 else 1
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    def integers(dtype, *shape):
        """Of matrices of a stack, or one, the integers and what they are scaled by."""
        *lead, n, m = shape
        top = jnp.iinfo(dtype)
        sizes = {"inputs": (n,), "outputs": (m,), "groups": (n // 2, m)}
        found = {
            name: jnp.asarray(rng.uniform(0.5, 1.5, (*lead, *own)) / int(top.max), "f4") for name, own in sizes.items()
        }
        q = rng.integers(int(top.min), int(top.max) + 1, shape)
        return {"q": jnp.asarray(q).astype(dtype), "zero": jnp.asarray(rng.integers(-3, 4, (*lead, m)), "i4"), **found}

    return {
        "up": [[array(D, m) for m in MS] for _ in range(SHARED)],
        "gate": [array(D, MS[0]) for _ in range(SHARED)],
        "down": [[array(m, D) for m in MS] for _ in range(SHARED)],
        "bias": [[array(m) for m in MS] for _ in range(SHARED)],
        "square": [array(D, D) for _ in range(SHARED)],
        "head": [array(V, D) for _ in range(SHARED)],
        "half": [array(D, MS[0], dtype="bfloat16") for _ in range(SHARED)],
        "narrow": {
            dtype: {
                "up": array(LAYERS, D, MS[1], dtype=dtype),
                "down": array(LAYERS, MS[1], D, dtype=dtype),
                "head": array(V, D, dtype=dtype),
            }
            for dtype in STORED
        },
        "integers": {
            dtype: {
                "up": integers(dtype, LAYERS, D, MS[1]),
                "down": integers(dtype, LAYERS, MS[1], D),
                "head": integers(dtype, D, V),
            }
            for dtype in INTEGERS
        },
        "both": array(D, 2 * MS[0]),
        "back": array(V, D),
        "spread": 3 * array(V),
        "stack": {"up": array(LAYERS, D, MS[1]), "down": array(LAYERS, MS[1], D)},
    }


def make_state(tokens, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, D)), jnp.float32)


def kinds_of(statements) -> set[str]:
    """The kinds of all statements and the names of all activations in a program."""
    found: set[str] = set()
    for statement in statements:
        for part in statement:
            if isinstance(part, list):
                found |= kinds_of(part)
            elif isinstance(part, str):
                found.add(part)
    return found


def meaning(statements, called=lambda value: None):
    """The program as a function of weights and a state; ``called`` is what its callbacks call."""

    def program(w, x):
        kept = []
        return _run(statements, {**w, "called": called}, x, kept), kept

    return program


def _run(statements, w, x, kept):
    for statement in statements:
        x = _step(statement, w, x, kept)
    return x


def _step(statement, w, x, kept):
    kind, *rest = statement
    if kind in _SIMPLE:
        return _SIMPLE[kind](w, x, kept, *rest).astype(x.dtype)
    return _NESTED[kind](w, x, kept, *rest)


def _ffn(w, x, kept, number, size, name, bias):
    u = x @ w["up"][number][size]
    u = ACTS[name](u + w["bias"][number][size] if bias else u)
    return jnp.tanh(x + (u @ w["down"][number][size].astype(u.dtype)).astype(x.dtype))


def _gated(w, x, kept, number, name):
    u = ACTS[name](x @ w["gate"][number]) * (x @ w["up"][number][0])
    return jnp.tanh((u.astype(x.dtype) @ w["down"][number][0]) * 0.5)


def _left(w, x, kept, number, name):
    u = POINTWISE.get(name, jax.nn.relu)(w["up"][number][0].T @ x.T)
    return jnp.tanh((w["down"][number][0].T @ u.astype(x.dtype)).T)


def _heads(w, x, kept, number, name):
    one = MS[1] // HEADS
    u = jnp.einsum("td,dhm->thm", x, w["up"][number][1].reshape(D, HEADS, one))
    u = ACTS[name](u.reshape(-1, MS[1])).reshape(u.shape).astype(x.dtype)
    return jnp.tanh(jnp.einsum("thm,hmd->td", u, w["down"][number][1].reshape(HEADS, one, D)))


def _packed(w, x, kept, name):
    first, second = jnp.split(x @ w["both"], 2, -1)
    return jnp.tanh((ACTS[name](first) * second).astype(x.dtype) @ w["down"][0][0])


def _cast(w, x, kept, number, name, dtype):
    half, down = w["half"][number], w["down"][number][0]
    if dtype == "unrounded":  # by XLA: a product that is widened at once
        return jnp.tanh(ACTS[name]((x.astype(half.dtype) @ half).astype(x.dtype)) @ down)
    up = (half * 8).astype(dtype) if dtype == "int8" else half.astype(dtype)
    u = ACTS[name](x.astype(jnp.bfloat16) @ up.astype(jnp.bfloat16))
    return jnp.tanh(u.astype(x.dtype) @ down)


def _widened(w, x, kept, name, stored, ways, where):
    """Weights that are narrower where they are stored than where they are used, or rounded on the way."""
    held, ways = w["narrow"][stored], USED[ways]

    def used(leaf):
        for dtype in ways:
            leaf = leaf.astype(dtype)
        return leaf

    def layer(x, one):
        u = ACTS[name](x.astype(ways[-1]) @ used(one["up"]))
        return jnp.tanh(x + (u.astype(ways[-1]) @ used(one["down"])).astype(x.dtype)), None

    if where == "head":
        kept.append(x.astype(ways[-1]) @ used(held["head"]).T)
        return x
    stack = {"up": held["up"], "down": held["down"]}
    return (lax.scan(layer, x, stack) if where == "scan" else layer(x, jax.tree.map(lambda a: a[1], stack)))[0]


def _integers(w, x, kept, name, stored, scaled, where):
    """Weights that are integers times scales."""
    held, product = w["integers"][stored], SCALED[scaled]

    def layer(x, one):
        return jnp.tanh(x + product(ACTS[name](product(x, one["up"])).astype(x.dtype), one["down"])), None

    if where == "head":
        kept.append(product(x, held["head"]))
        return x
    stack = {"up": held["up"], "down": held["down"]}
    return (lax.scan(layer, x, stack) if where == "scan" else layer(x, jax.tree.map(lambda a: a[1], stack)))[0]


def _leak(w, x, kept, number, name):
    u = ACTS[name](x @ w["up"][number][0]).astype(x.dtype)
    return jnp.tanh(x + u @ w["down"][number][0] + u.sum(-1, keepdims=True))


def _attention(w, x, kept, number):
    q, k, v = x @ w["square"][number], x @ w["square"][0].T, x @ w["square"][1]
    mixed = jax.nn.softmax(q @ k.T) @ v if x.shape[0] else v
    return jnp.tanh(x + mixed)


def _logits(w, x, kept, number, use):
    logits = x @ w["head"][number].T
    if use == "keep":
        kept.append(jax.nn.log_softmax(logits))
    elif use == "max":
        kept.append(jnp.max(logits, -1))
    elif use == "row" and x.shape[0]:
        kept.append(logits[jnp.int32(x.sum() > 0)])
    elif use == "sample":
        drawn = jax.random.categorical(jax.random.key(0), logits)
        kept.append(jnp.take_along_axis(logits, drawn[:, None], -1))
    elif use == "feed":
        return jnp.tanh(logits @ w["back"])
    return x


def _token(w, x, kept, number, use):
    """A token that is taken of logits and embedded: a wrong one changes all that follows."""
    if not x.shape[0]:
        return x
    taken = READ[use](x @ w["head"][number].T, w, x)
    kept.append(taken)
    return jnp.tanh(x + 0.5 * w["back"][taken])


def _features(w, x, kept, number, use):
    kept.append(FEATURES[use](x @ w["head"][number].T))
    return x


def _stacked(w, x, kept, name):
    for i in range(2):
        x = jnp.tanh(x + ACTS[name](x @ w["stack"]["up"][i]).astype(x.dtype) @ w["stack"]["down"][i])
    return x


def _layer(w, x, name, pick, i):
    return jnp.tanh(x + ACTS[name](x @ pick(w["stack"]["up"], i)).astype(x.dtype) @ pick(w["stack"]["down"], i))


def _indexed(w, x, kept, name, way, offset):
    """A layer whose number hangs on the data; some are out of range, where some ways give NaN."""
    found = _layer(w, x, name, WAYS[way], jnp.int32(x.sum() > 0) + offset)
    return jnp.where(jnp.isnan(found), 0.25, found)


def _expert(w, x, kept, name):
    """A layer of the stack for each token: a product with a batch of matrices."""
    chosen = (x.sum(-1) > 0).astype(jnp.int32)
    u = ACTS[name](jnp.einsum("td,tdm->tm", x, w["stack"]["up"][chosen]))
    return jnp.tanh(x + jnp.einsum("tm,tmd->td", u.astype(x.dtype), w["stack"]["down"][chosen]))


def _scaled(w, x, kept, number, name):
    """Weights that are computed inside: one masked and scaled by the data, one chosen by it."""
    up = jnp.triu(w["up"][number][0], 1) * (1 + jnp.tanh(x.sum()))
    down = jnp.where(x.sum() > 0, w["down"][0][0], w["down"][1][0])
    return jnp.tanh(ACTS[name](x @ up).astype(x.dtype) @ down)


def _callback(w, x, kept):
    # Of magnitudes: a sum that cancels says nothing of how close its terms are.
    jax.debug.callback(w["called"], jnp.abs(x).sum())
    return x


def _norm(w, x, kept):
    return x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-3)


def _embed(w, x, kept):
    """Rows of the vocabulary that the data chooses, which are no weight."""
    return jnp.tanh(x + w["head"][0][jnp.argmax(x, -1)]) if x.shape[0] else x


_SIMPLE = {
    "ffn": _ffn,
    "gated": _gated,
    "left": _left,
    "heads": _heads,
    "packed": _packed,
    "cast": _cast,
    "widened": _widened,
    "integers": _integers,
    "product": lambda w, x, kept, number: jnp.tanh(x @ w["square"][number]),
    "leak": _leak,
    "attention": _attention,
    "logits": _logits,
    "token": _token,
    "features": _features,
    "stacked": _stacked,
    "indexed": _indexed,
    "expert": _expert,
    "scaled": _scaled,
    "callback": _callback,
    "norm": _norm,
    "embed": _embed,
}


def _jit(w, x, kept, body, times, inline):
    arrays, called = _arrays(w)

    @partial(jax.jit, inline=inline)
    def inner(arrays, x):
        found = []
        return _run(body, {**arrays, "called": called}, x, found), found

    for _ in range(times):
        x, found = inner(arrays, x)
        kept.extend(found)
    return x


def _arrays(w):
    return {name: value for name, value in w.items() if name != "called"}, w["called"]


def _remat(w, x, kept, body):
    arrays, called = _arrays(w)
    return jax.checkpoint(lambda a, x: _run(body, {**a, "called": called}, x, []))(arrays, x)


def _scan(w, x, kept, body, length, reverse, unroll):
    stack = jax.tree.map(lambda a: a[:length], w["stack"])

    def scanned(x, slices):
        u = jax.nn.relu(x @ slices["up"]) @ slices["down"]
        return _run(body, w, jnp.tanh(x + u), []), u.sum()

    x, ys = lax.scan(scanned, x, stack, reverse=reverse, unroll=unroll)
    kept.append(ys)
    return x


def _fori(w, x, kept, body, way, start):
    return lax.fori_loop(start, LAYERS, lambda i, x: _run(body, w, _layer(w, x, "relu", WAYS[way], i), []), x)


def _while(w, x, kept, body, times):
    """The condition reads a weight, too."""

    def going(state):
        return (state[0] < times) & (jnp.sum(state[1] @ w["square"][0]) < 1e3)

    return lax.while_loop(going, lambda s: (s[0] + 1, _run(body, w, s[1], [])), (0, x))[1]


def _carried(w, x, kept, body):
    """Weights in the state of a loop: one unchanged, one that changes, one that swaps places with another."""

    def turn(state, _):
        square, first, second, x = state
        x = jnp.tanh(x @ square) + jax.nn.relu(x @ first) @ w["down"][0][0]
        return (square * 0.5, second, first, _run(body, w, x, [])), None

    start = (w["square"][0], w["up"][0][0], w["up"][1][0], x)
    return lax.scan(turn, start, None, length=2)[0][-1]


def _cond(w, x, kept, body, other):
    return lax.cond(x.sum() > 0, lambda x: _run(body, w, x, []), lambda x: _run(other, w, x, []), x)


def _switch(w, x, kept, *bodies):
    number = jnp.argmax(x.sum(0)[: len(bodies)])
    return lax.switch(number, [partial(lambda body, x: _run(body, w, x, []), body) for body in bodies], x)


def _vmap(w, x, kept, body):
    return jax.vmap(lambda row: _run(body, w, row[None], [])[0])(x) if x.shape[0] else x


def _custom_jvp(w, x, kept, body):
    arrays, called = _arrays(w)

    @jax.custom_jvp
    def fun(a, x):
        return _run(body, {**a, "called": called}, x, [])

    @fun.defjvp
    def _rule(primals, tangents):
        return fun(*primals), 2 * tangents[1]

    return fun(arrays, x)


def _custom_vjp(w, x, kept, body):
    arrays, called = _arrays(w)

    @jax.custom_vjp
    def fun(a, x):
        return _run(body, {**a, "called": called}, x, [])

    fun.defvjp(lambda a, x: (fun(a, x), a), lambda a, x_bar: (jax.tree.map(jnp.zeros_like, a), 3 * x_bar))
    return fun(arrays, x)


_NESTED = {
    "jit": _jit,
    "remat": _remat,
    "scan": _scan,
    "fori": _fori,
    "while": _while,
    "carried": _carried,
    "cond": _cond,
    "switch": _switch,
    "vmap": _vmap,
    "custom_jvp": _custom_jvp,
    "custom_vjp": _custom_vjp,
}
