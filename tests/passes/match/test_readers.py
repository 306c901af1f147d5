"""What reads logits: the evidence that makes a vocabulary, and the proof of what each reader takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same, kinds
from jax import lax

import hire_xform as hx

D, V, T = 24, 512, 2


def weights(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    made = {
        "w": rng.normal(size=(D, V)),
        "embed": rng.normal(size=(V, D)),
        "bias": 6.0 * rng.normal(size=V),
        "a": rng.normal(size=(D, 3)),
        "b": 3.0 * rng.normal(size=(3, V)),
        "scale": np.abs(rng.normal(size=V)) + 0.5,
    }
    return {name: jnp.asarray(value, dtype) for name, value in made.items()}


def inputs(seed, tokens=T, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, D)), dtype)


def forced(config=hx.lossless) -> hx.Config:
    return config(rules=FORCE)


def without_config(fun):
    """The default settings, but for the cost model, which leaves sites of this size dense."""
    return hx.sparsify(fun, config=hx.Config(rules=FORCE))


# --- what is a vocabulary ---

NO_VOCABULARY = {
    "returned": lambda p, x: x @ p["w"],
    "written_to_a_cache": lambda p, x: lax.dynamic_update_slice(jnp.zeros((8, V)), x @ p["w"], (3, 0)),
    "random_features": lambda p, x: jnp.cos(x @ p["w"]),
    "signs": lambda p, x: jnp.sign(x @ p["w"]),
    "bits": lambda p, x: (x @ p["w"]) > 0,
    "mean": lambda p, x: (x @ p["w"]).mean(-1),
    "largest_value": lambda p, x: (x @ p["w"]).max(-1),
    "largest_cosine": lambda p, x: jnp.argmax(jnp.cos(x @ p["w"]), -1),
    "rows_of_another_number": lambda p, x: (p["embed"][:7][jnp.argmax(x, -1) % 7] + x) @ p["w"],
}


@pytest.mark.parametrize("name", NO_VOCABULARY)
def test_a_wide_product_is_no_vocabulary_without_evidence(name):
    fun, p, x = NO_VOCABULARY[name], weights(), inputs(0)
    step = without_config(fun)
    plan = step.trace(p, x).plan
    assert not plan.sites
    (refusal,) = plan.refusals
    assert "nothing says that its outputs are logits" in refusal.reason
    line = f"hx.Rule({refusal.path!r}, vocab=hx.Vocab())"
    assert line in refusal.reason
    assert_same(step(p, x), jax.jit(fun)(p, x), 0.0)


def test_the_line_that_a_refusal_prints_makes_it_a_site():
    p, x = weights(), inputs(0)
    config = hx.Config(rules=(*FORCE, hx.Rule("dot_general[0]", vocab=hx.Vocab())))
    step = hx.sparsify(NO_VOCABULARY["returned"], config=config)
    assert kinds(step.trace(p, x).plan) == ["vocab"]
    np.testing.assert_array_equal(step(p, x).argmax(-1), NO_VOCABULARY["returned"](p, x).argmax(-1))


KEY = jax.random.key(7)
EVIDENCE = {
    "arg max": lambda p, x: jnp.argmax(x @ p["w"], -1),
    "top-k": lambda p, x: lax.top_k(x @ p["w"], 4),
    "softmax": lambda p, x: jax.nn.softmax(x @ p["w"]),
    "log-softmax": lambda p, x: jax.nn.log_softmax(x @ p["w"]),
    "logsumexp": lambda p, x: jax.nn.logsumexp(x @ p["w"], axis=-1),
    "exponentials": lambda p, x: jnp.exp(x @ p["w"]).sum(-1),
    "categorical": lambda p, x: jax.random.categorical(KEY, x @ p["w"]),
    "a pointwise chain": lambda p, x: jnp.argmax(jnp.tanh((x @ p["w"] + p["bias"]) / 30) * 30 / 0.7, -1),
    "negated twice": lambda p, x: jnp.argmin(-(x @ p["w"]), -1),
    "in a branch": lambda p, x: lax.cond(x.sum() > 0, lambda u: u.argmax(-1), lambda u: u.argmax(-1) * 0, x @ p["w"]),
    "in a loop": lambda p, x: lax.scan(lambda c, y: (c, (y @ p["w"]).argmax(-1)), 0, x)[1],
    "after a loop": lambda p, x: lax.scan(lambda c, y: (c, y @ p["w"]), 0, x)[1].argmax(-1),
    "a tied embedding": lambda p, x: (p["embed"][jnp.argmax(x, -1)] + x) @ p["embed"].T,
    "as many rows": lambda p, x: (jnp.take(p["embed"], jnp.argmax(x, -1), axis=0) + x) @ p["w"],
    "one row": lambda p, x: (lax.dynamic_slice(p["embed"], (jnp.argmax(x), 0), (1, D)) + x) @ p["w"],
    "one-hot rows": lambda p, x: (jax.nn.one_hot(jnp.argmax(x, -1), V) @ p["embed"] + x) @ p["w"],
}


@pytest.mark.parametrize("name", EVIDENCE)
def test_a_reader_that_a_head_has_or_a_lookup_is_evidence(name):
    plan = without_config(EVIDENCE[name]).trace(weights(), inputs(0)).plan
    assert [(s.kind, s.units, s.settings.certify) for s in plan.sites] == [("vocab", V, True)], plan.refusals


SMALLEST = {
    "arg min": lambda p, x: jnp.argmin(x @ p["w"], -1),
    "arg max of negated": lambda p, x: jnp.argmax(-(x @ p["w"]), -1),
    "top-k of negated": lambda p, x: lax.top_k(-2.0 * (x @ p["w"]), 3),
    "softmax of distances": lambda p, x: jax.nn.softmax(1.0 - x @ p["w"]),
    "nearest": lambda p, x: lax.approx_min_k(x @ p["w"], 3),
}


@pytest.mark.parametrize("config", [hx.lossless, hx.approximate], ids=["lossless", "approximate"])
@pytest.mark.parametrize("name", SMALLEST)
def test_readers_of_the_smallest_are_refused(name, config):
    fun, p, x = SMALLEST[name], weights(), inputs(0)
    step = hx.sparsify(fun, config=forced(config))
    plan = step.trace(p, x).plan
    assert not plan.sites
    assert "reads the smallest of its outputs" in plan.refusals[0].reason
    assert_same(step(p, x), jax.jit(fun)(p, x), 0.0)


# --- what is proved is what is read ---


def lora(p, x):
    return x @ p["w"] + (x @ p["a"]) @ p["b"]


def banned(logits):
    return logits.at[:, jnp.asarray([3, 5, 300])].set(-jnp.inf)


def sampled_in_a_branch(p, x, key):
    logits = x @ p["w"]
    return lax.cond(x[0, 0] > 0, lambda u: jnp.argmax(u, -1), lambda u: jax.random.categorical(key, u / 0.5), logits)


@jax.jit
def inner_head(p, x):
    return x @ p["w"]


TAKEN = {
    "arg_max": lambda p, x, key: jnp.argmax(x @ p["w"], -1),
    "bias": lambda p, x, key: jnp.argmax(x @ p["w"] + p["bias"], -1),
    "low_rank_update": lambda p, x, key: jnp.argmax(lora(p, x), -1),
    "update_first": lambda p, x, key: jnp.argmax((x @ p["a"]) @ p["b"] + x @ p["w"], -1),
    "scaled_entries": lambda p, x, key: jnp.argmax((x @ p["w"]) * p["scale"], -1),
    "soft_cap": lambda p, x, key: jnp.argmax(30 * jnp.tanh(x @ p["w"] / 30), -1),
    "mask": lambda p, x, key: jnp.argmax(jnp.where(jnp.arange(V) % 3 == 0, x @ p["w"], -jnp.inf), -1),
    "added_mask": lambda p, x, key: jnp.argmax(x @ p["w"] + jnp.where(p["bias"] > 0, 0.0, -jnp.inf), -1),
    "banned": lambda p, x, key: jnp.argmax(banned(x @ p["w"]) / 0.7, -1),
    "log_softmax": lambda p, x, key: jnp.argmax(jax.nn.log_softmax(x @ p["w"] + p["bias"]), -1),
    "softmax": lambda p, x, key: jnp.argmax(jax.nn.softmax(x @ p["w"]), -1),
    "temperature": lambda p, x, key: jnp.argmax(x @ p["w"] / jnp.exp(x[0, 0]), -1),
    "top_5": lambda p, x, key: lax.top_k(x @ p["w"] + p["bias"], 5)[1],
    "top_5_of_logits": lambda p, x, key: lax.top_k(x @ p["w"], 5)[1],
    "sample": lambda p, x, key: jax.random.categorical(key, x @ p["w"] / 0.8),
    "sample_of_log_softmax": lambda p, x, key: jax.random.categorical(key, jax.nn.log_softmax(x @ p["w"])),
    "gumbel": lambda p, x, key: jnp.argmax(x @ p["w"] + jax.random.gumbel(key, (T, V)), -1),
    "branch": sampled_in_a_branch,
    "head_in_a_call": lambda p, x, key: jax.random.categorical(key, inner_head(p, x)),
    "weight_left": lambda p, x, key: jnp.argmax((p["w"].T @ x.T).T + p["bias"], -1),
    "vocabulary_first": lambda p, x, key: jnp.argmax(p["w"].T @ x.T + p["bias"][:, None], 0),
    "cut": lambda p, x, key: jnp.argmax((x @ p["w"] + p["bias"])[:, :500], -1),
    "sign_of_zero": lambda p, x, key: jnp.argmax(
        (lambda u: jnp.where((u == 0) & jnp.signbit(u), -1e-30, u))((p["embed"][jnp.argmax(x, -1)] + x) @ p["w"]), -1
    ),
    "in_a_scan": lambda p, x, key: lax.scan(lambda c, y: (c, jnp.argmax(y @ p["w"] + p["bias"])), 0, x)[1],
    "in_a_vmap": lambda p, x, key: jax.vmap(lambda y: jnp.argmax(y @ p["w"] + p["bias"]))(x),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_is_the_dense_one_and_is_proved(name, evaluated):
    """With few candidates, of which those that what is added makes large must be among them."""
    fun, p = TAKEN[name], weights()
    config = hx.Config(vocab=hx.Vocab(candidates=24, certify=True), rules=FORCE)
    step, dense = hx.sparsify(fun, config=config), jax.jit(fun)
    site = next(s for s in step.trace(p, inputs(0), KEY).plan.sites if s.kind == "vocab")
    assert site.proved
    assert site.units == V
    if not evaluated:
        return
    failed = 0
    for seed in range(24):
        given = p, inputs(seed), jax.random.key(seed)
        got, counts = step.with_fallbacks(*given)
        np.testing.assert_array_equal(got, dense(*given))
        failed += sum(int(n) for n in counts.values())
    assert failed <= (16 if name == "in_a_scan" else 8)


def padded(rows=300):
    """Weights of nearly equal entries behind which stand padded rows, whose logits are the largest."""
    p, rng = weights(), np.random.default_rng(5)
    near = p["w"][:, :1] + 1e-3 * rng.normal(size=(D, rows))
    return p | {"w": jnp.concatenate([near, 8.0 * p["w"][:, rows:]], axis=1)}


CUT = {
    "logits": lambda p, x: jnp.argmax((x @ p["w"])[:, :300], -1),
    "top_3": lambda p, x: lax.top_k((x @ p["w"])[:, :300], 3)[1],
    "softmax_of_the_rest": lambda p, x: jnp.argmax(jax.nn.softmax((x @ p["w"])[:, :300]), -1),
    "vocabulary_first": lambda p, x: jnp.argmax((p["w"].T @ x.T)[:300], 0),
    "of_a_softmax": lambda p, x: jnp.argmax(jax.nn.softmax(x @ p["w"])[:, :300], -1),
    "behind_a_scan": lambda p, x: jnp.argmax(lax.scan(lambda c, y: (c, y @ p["w"]), 0, x)[1][:, :300], -1),
}
CUT_AND_REFUSED = ("behind_a_scan",)


@pytest.mark.parametrize("name", CUT)
def test_padded_rows_that_are_cut_prove_nothing(name):
    """The largest of all logits is a padded row: a proof of it says nothing of those that are read."""
    fun, p = CUT[name], padded()
    step = hx.sparsify(fun, config=hx.Config(vocab=hx.Vocab(candidates=24, certify=True), rules=FORCE))
    plan = step.trace(p, inputs(0)).plan
    assert kinds(plan) == ([] if name in CUT_AND_REFUSED else ["vocab"])
    assert all("it can't be proved what" in refusal.reason for refusal in plan.refusals)
    for seed in range(12):
        np.testing.assert_array_equal(step(p, inputs(seed)), jax.jit(fun)(p, inputs(seed)))


@pytest.mark.parametrize("factor", [1.3, 0.0, -1.0])
def test_a_factor_that_is_known_at_run_time_only(factor):
    """A negative temperature takes the smallest, which no proof of the largest may be taken for."""
    p = weights()
    fun = lambda p, x, by: jnp.argmax((x @ p["w"]) * by, -1)  # noqa: E731
    step = hx.sparsify(fun, config=forced())
    for seed in range(4):
        given = p, inputs(seed), jnp.float32(factor)
        np.testing.assert_array_equal(step(*given), jax.jit(fun)(*given))


def test_a_token_taken_in_the_next_turn_of_a_loop():
    def fun(p, x):
        def turn(state):
            count, x, logits, tokens = state
            token = jnp.argmax(logits, -1)
            x = jnp.tanh(x + p["embed"][token])
            return count + 1, x, x @ p["w"], tokens.at[count].set(token)

        start = 0, x, jnp.zeros((T, V)), jnp.zeros((6, T), int)
        return lax.while_loop(lambda state: state[0] < 6, turn, start)[3]

    p = weights()
    config = hx.Config(vocab=hx.Vocab(candidates=24, certify=True), rules=FORCE)
    step = hx.sparsify(fun, config=config)
    assert kinds(step.trace(p, inputs(0)).plan) == ["vocab"]
    for seed in range(4):
        np.testing.assert_array_equal(step(p, inputs(seed)), jax.jit(fun)(p, inputs(seed)))


def test_outer_vmap_with_noise_of_its_own():
    fun, p = TAKEN["sample"], weights()
    xs, keys = jnp.stack([inputs(i) for i in range(3)]), jax.random.split(KEY, 3)
    step = hx.sparsify(fun, config=forced())
    packed = step.trace(p, xs[0], keys[0]).pack(p)
    got = jax.jit(jax.vmap(lambda x, key: step(packed, x, key)))(xs, keys)
    np.testing.assert_array_equal(got, jax.jit(jax.vmap(lambda x, key: fun(p, x, key)))(xs, keys))


def sampled_in_the_next_turn(p, x):
    def turn(state, key):
        x, logits = state
        token = jax.random.categorical(key, logits)
        x = jnp.tanh(x + p["embed"][token])
        return (x, x @ p["w"]), token

    return lax.scan(turn, (x, jnp.zeros((T, V))), jax.random.split(KEY, 3))[1]


def _doubled(n):
    return n + n


# What is proved by following all that is made of the logits.
AS_A_WHOLE = {
    "a_cap_of_log_probabilities": lambda p, x: jnp.argmax(jnp.tanh(jax.nn.log_softmax(x @ p["w"])), -1),
    "scaled_log_probabilities": lambda p, x: jnp.argmax(jax.nn.log_softmax(x @ p["w"]) * p["scale"], -1),
    "shares_of_the_largest": lambda p, x: (lambda u: jnp.argmax(u / u.max(-1, keepdims=True), -1))(x @ p["w"]),
    "scatter_by_what_is_drawn": lambda p, x: jnp.argmax((x @ p["w"]).at[:, 3].multiply(0.5), -1),
    "a_sum_over_entries": lambda p, x: (lambda u: jnp.argmax(u / jnp.abs(u).sum(-1, keepdims=True), -1))(x @ p["w"]),
    "less_what_is_far_larger": lambda p, x: (lambda u: jnp.argmax(u - (1e6 * u).max(-1, keepdims=True), -1))(
        x @ p["w"]
    ),
    "shares_of_a_negative_sum": lambda p, x: (lambda e: jnp.argmax(e / (e * -1.0).sum(-1, keepdims=True), -1))(
        jnp.exp(x @ p["w"])
    ),
    "less_a_sum_doubled": lambda p, x: (
        lambda u: jnp.argmax(u - _doubled(_doubled(_doubled(_doubled(u.max(-1, keepdims=True))))), -1)
    )(x @ p["w"]),
    "ties_of_16_bit_shares": lambda p, x: jnp.argmax(jax.nn.softmax(x @ p["w"]).astype(jnp.bfloat16), -1),
}


@pytest.mark.parametrize("name", AS_A_WHOLE)
def test_what_is_followed_as_a_whole(name, evaluated):
    fun, p = AS_A_WHOLE[name], weights()
    step, dense = hx.sparsify(fun, config=forced()), jax.jit(fun)
    assert "the arg max" in step.trace(p, inputs(0)).plan.sites[0].proved[0]
    if not evaluated:
        return
    failed = 0
    for seed in range(6):
        got, counts = step.with_fallbacks(p, inputs(seed))
        np.testing.assert_array_equal(got, dense(p, inputs(seed)))
        failed += sum(int(n) for n in counts.values())
    assert failed <= (6 if name in ("less_what_is_far_larger", "ties_of_16_bit_shares") else 2)


REFUSED = {
    "sampled_in_the_next_turn": sampled_in_the_next_turn,
    "beams": lambda p, x: lax.top_k(jax.nn.log_softmax(x @ p["w"]).reshape(-1), 5),
    "a_mean": lambda p, x: jnp.argmax((lambda u: jnp.expm1(u - u.mean(-1, keepdims=True)))(x @ p["w"]), -1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_followed_is_not_certified(name):
    fun, p, x = REFUSED[name], weights(), inputs(0)
    step = hx.sparsify(fun, config=forced())
    plan = step.trace(p, x).plan
    assert not plan.sites
    assert "it can't be proved what" in plan.refusals[0].reason
    assert_same(step(p, x), jax.jit(fun)(p, x), 0.0)
    assert kinds(hx.sparsify(fun, config=forced(hx.approximate)).trace(p, x).plan) == ["vocab"]


def test_what_else_reads_logits_is_told():
    def fun(p, x):
        logits = x @ p["w"]
        return jnp.argmax(logits, -1), logits.sum(-1), jnp.take_along_axis(logits, jnp.zeros((T, 1), int), 1)

    (site,) = hx.sparsify(fun, config=forced()).trace(weights(), inputs(0)).plan.sites
    assert [("reduce_sum" in told, "gather" in told) for told in site.unproved] == [(True, False), (False, True)]


def test_calls_of_one_jitted_head_are_proved_each_for_its_reader():
    """What is added to the logits of one call must not be proved of the other."""

    @jax.jit
    def head(w, x):
        return x @ w

    def fun(p, x):
        return jnp.argmax(30 * jnp.tanh(head(p["w"], x) / 30), -1), lax.top_k(head(p["w"], 2 * x), 3)[1]

    p = weights()
    step = hx.sparsify(fun, config=forced())
    assert len(step.trace(p, inputs(0)).plan.sites) == 2
    for seed in range(6):
        assert_same(step(p, inputs(seed)), jax.jit(fun)(p, inputs(seed)), 0.0)


def by_rank(logits):
    return jnp.where(logits < lax.top_k(logits, 9)[0][:, -1:], -jnp.inf, logits)


def by_rank_in_one_row(logits):
    """Puts the largest of all tokens into one row: nothing follows which is whose."""
    values, index = lax.top_k(logits, 9)
    at = (index + V * jnp.arange(T)[:, None]).reshape(-1)
    return jnp.full(T * V, -jnp.inf).at[at].set(values.reshape(-1)).reshape(T, V)


@pytest.mark.parametrize("keep", [by_rank, by_rank_in_one_row])
def test_what_is_said_of_a_filtered_sample(keep):
    def fun(p, x):
        return jax.random.categorical(KEY, keep(x @ p["w"]))

    traced = hx.sparsify(fun, config=forced()).trace(weights(), inputs(0))
    (site,) = traced.plan.sites
    if keep is by_rank:
        assert "the arg max" in site.proved[0]
        assert site.unproved == ()
    else:
        assert "the 9 largest" in site.proved[0]
        assert "argmax" in site.unproved[0]
        assert "not proved: what argmax" in traced.explain()


def test_of_equal_logits_the_dense_one_is_taken():
    p = weights()
    p["w"] = p["w"].at[:, 100].set(p["w"][:, 40]).at[:, 300].set(p["w"][:, 40])
    for name in ("arg_max", "top_5_of_logits", "bias"):
        fun = TAKEN[name]
        p["bias"] = jnp.zeros(V)
        step = hx.sparsify(fun, config=forced())
        for scale in (1.0, -1.0):
            x = scale * jnp.stack([p["w"][:, 40], p["w"][:, 41]])
            np.testing.assert_array_equal(step(p, x, KEY), jax.jit(fun)(p, x, KEY))


# --- summands ---


def test_a_low_rank_update_is_no_head_of_its_own():
    """The base is computed inside, so no site; the update, which is added to it, must not become one."""
    p = weights()
    q = jnp.clip(jnp.round(p["w"] * 30), -127, 127).astype(jnp.int8)

    def fun(p, x):
        return jnp.argmax(x @ jnp.sinh(q.astype(jnp.float32) / 30) + (x @ p["a"]) @ p["b"], -1)

    for config in (hx.lossless, hx.approximate):
        step = hx.sparsify(fun, config=forced(config))
        plan = step.trace(p, inputs(0)).plan
        assert not plan.sites
        assert any("a summand is no head" in r.reason for r in plan.refusals)
        np.testing.assert_array_equal(step(p, inputs(0)), jax.jit(fun)(p, inputs(0)))


@pytest.mark.parametrize("fill", ["predicted", "-inf"])
def test_candidates_are_those_of_the_sum(fill):
    """Uncertified, too, candidates are chosen by what is read: with the update of the head, or a bias."""
    p = weights()
    for fun in (lambda p, x: jnp.argmax(lora(p, x), -1), lambda p, x: jnp.argmax(x @ p["w"] + p["bias"], -1)):
        step = hx.sparsify(fun, config=hx.Config(vocab=hx.Vocab(candidates=16, fill=fill), rules=FORCE))
        assert kinds(step.trace(p, inputs(0)).plan) == ["vocab"]
        for seed in range(12):
            np.testing.assert_array_equal(step(p, inputs(seed)), jax.jit(fun)(p, inputs(seed)))


def test_guidance_makes_no_nan():
    def fun(p, x):
        logits = (p["embed"][jnp.argmax(x, -1)] + x) @ p["w"]
        return jnp.argmax(logits[1] + 1.5 * (logits[0] - logits[1])), logits[1] + 1.5 * (logits[0] - logits[1])

    p, x = weights(), inputs(0)
    for vocab in (hx.Vocab(candidates=16, fill="-inf"), hx.Vocab(fill="-inf", certify=True), hx.Vocab()):
        step = hx.sparsify(fun, config=hx.Config(vocab=vocab, rules=FORCE))
        token, logits = step(p, x)
        assert not np.isnan(logits).any()
        assert token == jax.jit(fun)(p, x)[0]


# --- 16 bits ---

HALF = {
    "widened": lambda p, x: jnp.argmax((x @ p["w"]).astype(jnp.float32), -1),
    "as_it_is": lambda p, x: jnp.argmax(x @ p["w"], -1),
    "widened_and_scaled": lambda p, x: jnp.argmax((x @ p["w"])[:, :].astype(jnp.float32) / 0.7, -1),
    "widened_bias": lambda p, x: jnp.argmax((x @ p["w"]).astype(jnp.float32) + p["bias"].astype(jnp.float32), -1),
    "soft_cap": lambda p, x: jnp.argmax(20 * jnp.tanh((x @ p["w"]) / 20), -1),
}


def _rounded(p, x):
    return lax.reduce_precision((x.astype(jnp.float32) @ p["w"].astype(jnp.float32)), 8, 7)


HALF_ROUNDED = {
    "widened": lambda p, x: jnp.argmax(_rounded(p, x), -1),
    "as_it_is": lambda p, x: jnp.argmax(_rounded(p, x), -1),
    "widened_and_scaled": lambda p, x: jnp.argmax(_rounded(p, x) / 0.7, -1),
    "widened_bias": lambda p, x: jnp.argmax(_rounded(p, x) + p["bias"].astype(jnp.float32), -1),
}


@pytest.mark.any_jax("cases vary what is done with the logits of one head", every=3)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("name", HALF)
def test_tokens_of_a_16_bit_head_are_those_that_jit_takes(name, dtype):
    """XLA leaves out the rounding of a product that is widened at once; whether it does or not, the token is its."""
    fun, p = HALF[name], weights(dtype=dtype)
    dense = jax.jit(fun)
    step = hx.sparsify(fun, config=forced())
    for seed in range(30):
        x = inputs(seed, 4, dtype)
        np.testing.assert_array_equal(step(p, x), dense(p, x))


@pytest.mark.parametrize("name", ["widened", "as_it_is", "widened_and_scaled", "widened_bias"])
def test_at_full_width_a_16_bit_head_is_rounded_or_not(name):
    """As XLA does it, which differs between its versions and shapes; nothing else is moved."""
    fun, p = HALF[name], weights(dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), p)
    step = hx.sparsify(fun, config=hx.Config(vocab=hx.Vocab(candidates=V), rules=FORCE))
    rounded = HALF_ROUNDED[name]
    for seed in range(30):
        x = inputs(seed, 4, jnp.bfloat16)
        got, exact = step(p, x), fun(wide, x.astype(jnp.float32))
        assert ((got == exact) | (got == rounded(p, x))).all()
