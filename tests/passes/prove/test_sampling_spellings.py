"""How samplers are spelled, and what of each is proved: the token that is drawn, or why it is not.

The spellings are those of samplers that people use, by what they do: filters by rank, by mass and by the largest
probability, each by a cutoff, by places in an order, or by putting back what was sorted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_xform as hx

D, V, T, K, P, MIN_P = 8, 97, 2, 7, 0.8, 0.1
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(V, D)) * 0.9, jnp.float32)
ROWS = jnp.arange(T)[:, None]
# For as many logits as a test has.
BIAS = jnp.asarray(np.resize(RNG.normal(size=V), 512), jnp.float32)


def drawn(logits, key):
    return jax.random.categorical(key, logits)


def of(index, place):
    return jnp.take_along_axis(index, place[:, None], axis=-1)[:, 0]


# --- a draw from all ---


def gumbel_by_hand(u, key):
    noise = jax.random.uniform(key, u.shape, minval=1e-20)
    return jnp.argmax(u / 0.7 - jnp.log(-jnp.log(noise)), -1)


def greedy_where_it_is_cold(u, key):
    cold = jax.random.uniform(key) < 0.5
    return jnp.where(cold, jnp.argmax(u, -1), drawn(u / jnp.maximum(0.7, 1e-6), key))


def with_zeros_replaced(u):
    """As Keras has it on CPU: zeros of negative sign are made smaller, so that they come after others."""
    return jnp.where((u == 0.0) & jnp.signbit(u), -jnp.finfo(u.dtype).tiny, u)


FROM_ALL = {
    "zeros replaced": lambda u, key: jnp.argmax(with_zeros_replaced(u + 0.7 * jax.random.gumbel(key, u.shape)), -1),
    "zeros replaced in a softmax": lambda u, key: jnp.argmax(with_zeros_replaced(jax.nn.softmax(u / 0.7)), -1),
    "categorical": lambda u, key: drawn(u / 0.7, key),
    "categorical of high accuracy": lambda u, key: jax.random.categorical(key, u / 0.7, mode="high"),
    "Gumbel by hand": gumbel_by_hand,
    "noise at a temperature": lambda u, key: jnp.argmax(u + 0.7 * jax.random.gumbel(key, u.shape), -1),
    "a race of exponentials": lambda u, key: jnp.argmax(jax.nn.softmax(u) / jax.random.exponential(key, u.shape), -1),
    "of a log-softmax": lambda u, key: drawn(jax.nn.log_softmax(u / 0.7), key),
    "of the log of a softmax": lambda u, key: drawn(jnp.log(jax.nn.softmax(u / 0.7)), key),
    "greedy where it is cold": greedy_where_it_is_cold,
    "a soft cap and a bias": lambda u, key: drawn(3.0 * jnp.tanh((u + BIAS[: u.shape[-1]]) / 3.0) / 0.7, key),
    "several of each": lambda u, key: jax.random.categorical(key, u / 0.7, shape=(3, T)),
    "ids left out": lambda u, key: drawn(u.at[:, np.array([3, 7])].set(-jnp.inf), key),
    "ids made rarer": lambda u, key: drawn(u.at[:, np.array([3, 7, 7])].add(-1.5), key),
    "ids made rarer by a factor": lambda u, key: drawn(u.at[:, np.array([3, 7])].multiply(0.8), key),
}


def repetition(u, key):
    ids = jnp.array([[3, 7, 7], [4, 5, 9]])
    seen = jnp.take_along_axis(u, ids, axis=-1)
    return drawn(u.at[ROWS, ids].set(jnp.where(seen < 0, seen * 1.2, seen / 1.2)), key)


FROM_ALL["seen ids made rarer by their sign"] = repetition


# --- a draw from the k largest ---


def top_k_by_cutoff(u, key):
    return drawn(jnp.where(u < lax.top_k(u, K)[0][:, -1:], -jnp.inf, u) / 0.7, key)


def top_k_by_cutoff_of_a_sort(u, key):
    return drawn(jnp.where(u >= jnp.sort(u, -1)[:, -K][:, None], u, -1e10), key)


def top_k_and_its_index(u, key):
    values, index = lax.top_k(u, K)
    return of(index, drawn(values / 0.7, key))


def top_k_and_its_index_by_rows(u, key):
    values, index = lax.top_k(u, K)
    return index[jnp.arange(T), drawn(values / 0.7, key)]


def top_k_put_back(u, key):
    values, index = lax.top_k(u, K)
    return drawn(jnp.full_like(u, -jnp.inf).at[ROWS, index].set(values), key)


def top_k_of_each(u, key):
    def one(u, key):
        values, index = lax.top_k(u, K)
        return index[jax.random.categorical(key, values)]

    return jax.vmap(one)(u, jax.random.split(key, T))


# --- a draw from the nucleus ---


def top_p_by_cutoff(u, key):
    falling = jnp.sort(u, axis=-1)[..., ::-1]
    count = jnp.sum(jnp.cumsum(jax.nn.softmax(falling, -1), -1) < P, axis=-1, keepdims=True)
    cutoff = jnp.take_along_axis(falling, count, axis=-1)
    return drawn(jnp.where(u < cutoff, -1e7, u) / 0.7, key)


def top_p_of_shares(u, key):
    """Of the shares of the k largest; the rest is made one again."""
    shares, index = lax.top_k(jax.nn.softmax(u / 0.7, -1), 4 * K)
    total = jnp.cumsum(shares, -1)
    shares = jnp.where(total - shares > P, 0.0, shares)
    shares /= jnp.sum(shares, axis=-1, keepdims=True)
    return of(index, drawn(jnp.log(shares), key))


def top_p_in_the_order(u, key):
    values, index = lax.top_k(u, V)
    shares = jax.nn.softmax(values, -1)
    return of(index, drawn(jnp.where(jnp.cumsum(shares, -1) - shares > P, -jnp.inf, values), key))


def top_p_put_back_by_a_sort(u, key):
    values, index = lax.top_k(u, V)
    kept = jnp.roll(jax.nn.softmax(values, -1).cumsum(-1) < P, 1)
    kept = (kept | kept.at[:, 0].set(True)).at[:, :1].set(True)
    return drawn(lax.sort_key_val(index, jnp.where(kept, values, -jnp.inf))[-1], key)


def top_p_mask_put_back_by_a_sort(u, key):
    order = jnp.argsort(u)[:, ::-1]
    out = jnp.cumsum(jax.nn.softmax(jnp.sort(u)[:, ::-1]), -1) > P
    out = jnp.concatenate((jnp.zeros_like(out[:, :1]), out), axis=-1)[:, :-1]
    return drawn(u - 1e10 * lax.sort_key_val(order, out)[1], key)


def top_p_mask_put_back_by_ranks(u, key):
    order = jnp.argsort(-u, -1)
    total = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(u, order, -1)), -1)
    kept = jnp.concatenate([jnp.ones_like(total[:, :1], bool), total[:, :-1] < P], -1)
    return drawn(jnp.where(jnp.take_along_axis(kept, jnp.argsort(order, -1), -1), u, -1e9), key)


def top_p_mask_put_back_by_a_scatter(u, key):
    order = jnp.argsort(-u, -1)
    total = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(u, order, -1)), -1)
    kept = jnp.concatenate([jnp.ones_like(total[:, :1], bool), total[:, :-1] < P], -1)
    return drawn(jnp.where(jnp.zeros_like(kept).at[ROWS, order].set(kept), u, -1e9), key)


# --- a draw from those that are likely beside the likeliest ---


def min_p(u, key):
    shares = jax.nn.softmax(u)
    return drawn(jnp.where(shares < MIN_P * shares.max(-1, keepdims=True), -jnp.inf, u), key)


def min_p_of_logits(u, key):
    return drawn(jnp.where(u < u.max(-1, keepdims=True) + jnp.log(MIN_P), -jnp.inf, u / 0.7), key)


def one_after_the_other(u, key):
    """Top-k, then top-p, then min-p, each of what the one before left."""
    u = jnp.where(u < lax.top_k(u, 4 * K)[0][:, -1:], -jnp.inf, u)
    falling = jnp.sort(u, axis=-1)[..., ::-1]
    count = jnp.sum(jnp.cumsum(jax.nn.softmax(falling, -1), -1) < P, axis=-1, keepdims=True)
    u = jnp.where(u < jnp.take_along_axis(falling, count, axis=-1), -jnp.inf, u)
    shares = jax.nn.softmax(u)
    return drawn(jnp.where(shares < MIN_P * shares.max(-1, keepdims=True), -jnp.inf, u), key)


BY_MAX = {"min-p": min_p, "min-p of logits": min_p_of_logits, "all of them": one_after_the_other}
BY_RANK = {f.__name__: f for f in (top_k_by_cutoff, top_k_by_cutoff_of_a_sort, top_k_put_back)}
BY_PLACE = {f.__name__: f for f in (top_k_and_its_index, top_k_and_its_index_by_rows, top_k_of_each)}
BY_MASS = {
    f.__name__: f
    for f in (
        top_p_by_cutoff,
        top_p_of_shares,
        top_p_in_the_order,
        top_p_put_back_by_a_sort,
        top_p_mask_put_back_by_a_sort,
        top_p_mask_put_back_by_ranks,
        top_p_mask_put_back_by_a_scatter,
    )
}
PICKED = (*BY_PLACE, "top_p_of_shares", "top_p_in_the_order")
SPELLINGS = FROM_ALL | BY_RANK | BY_PLACE | BY_MASS | BY_MAX


def run(draw, w, xs, keys):
    """Tokens ``[n, T]`` drawn from inputs ``[n, T, D]``, one after the other."""
    return lax.map(lambda given: draw(given[0] @ w.T, given[1]), (xs, keys))


def step_of(draw, candidates=40, **vocab):
    settings = hx.Vocab(candidates=candidates, certify=True, **vocab)
    config = hx.Config(ffn=None, rules=(hx.Rule("*", force=True, vocab=settings),))
    return hx.sparsify(functools.partial(run, draw), config=config)


def draws(n, seed=1, scale=1.0):
    xs = np.random.default_rng(seed).normal(size=(n, T, D)) * scale
    return jnp.asarray(xs, jnp.float32), jax.random.split(jax.random.key(seed), n)


def compared(draw, w, xs, keys, **vocab):
    """How many steps were proved; each token is the dense one."""
    got, counts = step_of(draw, **vocab).with_fallbacks(w, xs, keys)
    jax.tree.map(np.testing.assert_array_equal, got, jax.jit(functools.partial(run, draw))(w, xs, keys))
    (failed,) = counts.values()
    return len(xs) - int(failed)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_token_is_proved_and_nothing_else_is_said_to_be_read(name):
    (site,) = step_of(SPELLINGS[name]).trace(W, *draws(2)).plan.sites
    assert all(("drawn" if name in PICKED else "arg max") in told for told in site.proved)
    assert len(site.proved) == (2 if name == "greedy where it is cold" else 1)
    assert site.unproved == ()


@pytest.mark.any_jax("cases are spellings of few filters", every=4)
@pytest.mark.parametrize("name", SPELLINGS)
def test_tokens_are_the_dense_ones_and_most_are_proved(name):
    proved = compared(SPELLINGS[name], W, *draws(64))
    assert proved >= (48 if name in BY_MASS else 60)


# --- inputs that are hard to prove anything of ---

FAMILIES = (
    *(
        "categorical",
        "of a log-softmax",
        "ids made rarer",
        "zeros replaced",
        "zeros replaced in a softmax",
        "top_k_by_cutoff",
        "top_k_and_its_index",
        "top_k_put_back",
    ),
    *("top_p_by_cutoff", "top_p_of_shares", "top_p_in_the_order", "top_p_mask_put_back_by_a_sort", "min-p"),
    "all of them",
)


def near_and_equal(dtype=jnp.float32):
    """Rows of which a third are another's, and a third are nearly: ties, and near ties at every edge."""
    rng = np.random.default_rng(2)
    third = V // 3
    rows = rng.normal(size=(V, D)) * 0.9
    rows[third : 2 * third] = rows[:third]
    rows[2 * third : 3 * third] = rows[:third] * (1.0 + 1e-6 * rng.normal(size=(third, 1)))
    return jnp.asarray(rows, dtype)


def hard(n=48):
    """Ordinary inputs of all sizes, zeros, and some that are not finite or nearly so."""
    xs, keys = draws(n, seed=3)
    scales = 10.0 ** np.random.default_rng(4).uniform(-6, 3, size=(n, T, 1))
    xs = xs * scales.astype(np.float32)
    odd = {0: 0.0, 1: np.nan, 2: np.inf, 3: 1e30, 4: -1e30, 5: 1e-38, 6: 3e38}
    for at, value in odd.items():
        xs = xs.at[at].set(value)
    return xs.at[7, 0, 0].set(jnp.nan).at[8, 1].set(-jnp.inf), keys


@pytest.mark.any_jax("cases are spellings of few filters", every=4)
@pytest.mark.parametrize("name", FAMILIES)
def test_hard_inputs_draw_the_dense_tokens(name):
    """Half of the inputs draw from ties, so that little is proved: nothing may be proved wrongly."""
    compared(SPELLINGS[name], near_and_equal(), *hard())


STAGES = hx.Staged((hx.LowRank(6, bits=8), hx.Quantized(8)))


@pytest.mark.any_jax("cases vary predictors and dtypes of one proof", every=3)
@pytest.mark.parametrize("spec", [hx.Quantized(4), hx.LowRank(6, bits=8), STAGES], ids=str)
@pytest.mark.parametrize("name", ["categorical", "top_k_and_its_index"])
def test_hard_inputs_draw_the_dense_tokens_by_other_predictors(name, spec):
    compared(SPELLINGS[name], near_and_equal(), *hard(24), candidates=16, predictor=spec)
    assert compared(SPELLINGS[name], W, *draws(16), candidates=16, predictor=spec) >= 8


@pytest.mark.any_jax("cases are dtypes of one proof", every=2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("name", ["categorical", "top_k_and_its_index"])
def test_hard_inputs_draw_the_dense_tokens_in_16_bits(name, dtype):
    xs, keys = hard(24)
    xs = xs.at[6].set(1e30)  # of what overflows or does not by the order of a sum two dense programs differ
    fun = lambda u, key: SPELLINGS[name](u.astype(jnp.float32), key)  # noqa: E731
    compared(fun, near_and_equal(dtype), xs.astype(dtype), keys)


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-6, 1e6, 1e30, np.inf])
def test_temperatures_of_nothing_and_of_everything(temperature):
    """Of zero every logit is infinite or none: nothing is known of what is divided by it, nor by infinity."""

    def draw(u, key):
        return drawn(u / jnp.float32(temperature), key)

    proved = compared(draw, W, *draws(16))
    assert proved == 0 if temperature in (0.0, np.inf) else proved >= 14


@pytest.mark.any_jax("cases are dtypes of one proof", every=2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("name", ["categorical", "top_k_by_cutoff", "top_p_by_cutoff", "min-p"])
def test_16_bits_that_are_widened(name, dtype):
    xs, keys = draws(48)
    proved = compared(
        lambda u, key: SPELLINGS[name](u.astype(jnp.float32), key), W.astype(dtype), xs.astype(dtype), keys
    )
    assert proved >= 24


@pytest.mark.parametrize("name", ["top_k_and_its_index", "top_p_by_cutoff", "top_p_of_shares", "top_p_in_the_order"])
def test_of_one_token(name):
    """Gathers from one row are spelled otherwise than from several."""
    (site,) = step_of(SPELLINGS[name]).trace(W, *one_each(2)).plan.sites
    assert (len(site.proved), site.unproved) == (1, ())
    assert compared(SPELLINGS[name], W, *one_each(32)) >= 24


def one_each(n):
    xs, keys = draws(n)
    return xs[:, :1], keys


@pytest.mark.parametrize("name", ["categorical", "top_k_and_its_index"])
def test_noise_of_16_bits_is_not_known(name):
    """XLA rounds it here and there; so what is drawn with it is not proved, with a reason that says what to do."""
    xs, keys = draws(2)
    plan = step_of(SPELLINGS[name]).trace(W.astype(jnp.bfloat16), xs.astype(jnp.bfloat16), keys).plan
    said = [r.reason for r in plan.refusals] + [told for site in plan.sites for told in site.unproved]
    assert any("widen the logits to float32 before they are sampled" in told for told in said)
    assert not any("arg max" in told or "drawn" in told for site in plan.sites for told in site.proved)


@pytest.mark.parametrize(
    ("name", "temperature", "fewest"),
    [("top_k_by_cutoff", 1e-6, 30), ("top_k_by_cutoff", 1e6, 30), ("min-p", 1e-3, 30), ("min-p", 1e6, 0)],
)
def test_temperatures_near_zero_and_near_infinity(name, temperature, fewest):
    proved = compared(lambda u, key: SPELLINGS[name](u / temperature, key), W, *draws(32))
    assert proved >= fewest


@pytest.mark.parametrize("fill", [-jnp.inf, -1e9, float(jnp.finfo(jnp.float32).min)])
def test_masks_by_id_and_rows_that_are_masked_altogether(fill):
    """Of a row of which nothing is left the first entry is drawn, where all are minus infinity, or any."""

    def draw(u, key):
        which = jax.random.randint(key, (), 0, 4)
        allowed = jnp.arange(V) % jnp.where(which == 0, V + 1, 2) == 1 - (which == 1) * V
        return top_k_by_cutoff(jnp.where(allowed, u, fill), key)

    assert compared(draw, W, *draws(48)) >= 12


@pytest.mark.any_jax("cases are spellings of few filters", every=4)
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SPELLINGS if name != "top_p_put_back_by_a_sort"])  # sorts its V
def test_many_tokens(name):
    """800 tokens of each spelling, from flat distributions to peaked ones."""
    rng = np.random.default_rng(5)
    w = jnp.asarray(rng.normal(size=(512, D)), jnp.float32)
    n, proved = 100, 0
    for seed, scale in enumerate((0.3, 1.0, 2.0, 6.0)):
        proved += compared(SPELLINGS[name], w, *draws(n, seed, scale), candidates=96)
    assert proved >= 0.5 * 4 * n


# --- what can't be proved, and what is said of it ---


def inverse_of_the_sums(u, key):
    return jnp.argmax(jnp.cumsum(jax.nn.softmax(u), -1) > jax.random.uniform(key, (T, 1)), -1)


def shifted_index(u, key):
    """The entry behind the drawn one: an order that is picked at another place is followed all the same."""
    values, index = lax.top_k(u, K)
    return of(index, jnp.minimum(drawn(values, key) + 1, K - 1))


def index_and_values(u, key):
    values, index = lax.top_k(u, K)
    return of(index, drawn(values, key)), index


def flattened_top_k(u, key):
    values, index = lax.top_k(u, K)
    at = (index + ROWS * V).reshape(-1)
    return drawn(jnp.full(T * V, -jnp.inf).at[at].set(values.reshape(-1)).reshape(T, V), key)


def while_it_is_likely(u, key):
    """A loop over ranks, which nothing here looks into."""
    values, index = lax.top_k(u, K)
    place = lax.fori_loop(0, 3, lambda i, at: jnp.where(values[:, i] > 1.0, at + 1, at), jnp.zeros(T, jnp.int32))
    return of(index, place)


# The words of what is proved and of what is not.
SAID = {
    "inverse_of_the_sums": (inverse_of_the_sums, ["arg max"], []),
    "shifted_index": (shifted_index, ["drawn"], []),
    "index_and_values": (index_and_values, ["7 largest", "drawn"], []),
    "flattened_top_k": (flattened_top_k, ["7 largest"], ["scatter", "no bounds"]),
    "while_it_is_likely": (while_it_is_likely, ["7 largest"], []),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_said_of_others(name):
    draw, proved, unproved = SAID[name]
    (site,) = step_of(draw).trace(W, *draws(2)).plan.sites
    assert len(site.proved) == len(proved)
    assert all(word in told for word, told in zip(proved, site.proved, strict=True))
    assert all(word in " ".join(site.unproved) for word in unproved)
    compared(draw, W, *draws(16))
