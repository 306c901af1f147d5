"""``compare``: its figures of agreement, bytes and counts, its notes and its errors; no time is asserted."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import FORCE, assert_says, narrow
from tied import FULL, V, inputs, make_weights, net

import hire_xform as hx
from hire_xform.comparing import run, timing
from hire_xform.comparing.agreement import agreements

LOSSLESS = hx.Config(rules=FORCE)


@pytest.fixture(autouse=True)
def _little_is_streamed(monkeypatch):
    monkeypatch.setattr(timing, "STREAMED", {"cpu": 1 << 20})
    timing.memory_speed.cache_clear()
    yield
    timing.memory_speed.cache_clear()


def looked_up(params, token):
    """Logits of a token ``[1]``, and its id."""
    logits = net(params, params["embed"][token])
    return logits, jnp.argmax(logits, -1)


TOKEN = jnp.array([3])


def test_a_lossless_step_agrees_and_says_what_it_read():
    step, params = hx.sparsify(looked_up, config=LOSSLESS), make_weights()
    found = hx.compare(step, params, TOKEN, repeats=3)
    plan = step.trace(params, TOKEN).plan
    assert (found.name, found.platform, found.repeats) == ("looked_up", "cpu", 3)
    assert [(s.kind, s.path, s.dense_bytes, s.sparse_bytes) for s in found.sites] == [
        (s.kind, s.path, s.dense_bytes, s.sparse_bytes) for s in plan.sites
    ]
    assert [s.kind for s in found.sites] == ["ffn", "vocab"]
    assert all(s.executions == 1 and s.short is None and s.saved is None for s in found.sites)
    # The cost model would leave either dense, were it not forced.
    assert all(0 < s.predicted < 1 for s in found.sites)
    assert found.dense.weight_bytes == plan.dense_bytes
    logits, token = found.agreement
    assert (logits.path, logits.shape, logits.dtype) == ("result[0]", (1, V), "float32")
    assert logits.argmax == 1
    assert token == dataclasses.replace(token, path="result[1]", dtype="int32", equal=1.0, largest=None, argmax=None)
    assert found.ratio == found.dense.seconds / found.sparse.seconds
    for one in (found.dense, found.sparse):
        assert one.speed == pytest.approx(one.weight_bytes / one.seconds)
        assert one.share == pytest.approx(one.speed / found.memory_speed)


def test_executions_that_are_not_proved_are_counted_and_their_bytes_are_those_of_the_dense_form():
    step, params = hx.sparsify(models.scanned, config=LOSSLESS), models.stacked_params()
    call = params, models.make_cache(1), jnp.array([3]), jnp.zeros(models.D)
    _, rungs = step.with_rungs(*call)
    found, plan = hx.compare(step, *call, repeats=1), step.trace(*call).plan
    read = found.refused_bytes
    for site, planned in zip(found.sites, plan.sites, strict=True):
        taken = np.asarray(rungs[site.path])
        assert (site.executions, site.ran_dense) == (taken.sum(), taken[-1])
        read += int(taken @ [rung.bytes for rung in planned.rungs])
    assert [site.executions for site in found.sites] == [models.L, 1]
    assert found.sites[0].ran_dense > 0  # a quarter of its units are not enough for random weights
    assert found.sparse.weight_bytes == read > plan.sparse_bytes + plan.refused_bytes
    assert any("not proved for these arguments" in note and found.sites[0].path in note for note in found.notes)
    assert f"not proved, and run dense, in {found.sites[0].ran_dense} of {models.L} executions" in str(found)


def test_figures_of_what_is_approximate_are_those_of_its_results():
    step, params = hx.sparsify(looked_up, config=narrow(certify=False, activations="any")), make_weights()
    found = hx.compare(step, params, TOKEN, repeats=1)
    (dense, _), (sparse, _) = jax.jit(looked_up)(params, TOKEN), step(params, TOKEN)
    logits = found.agreement[0]
    dense, sparse = (np.asarray(x, np.float64) for x in (dense, sparse))
    largest = np.abs(dense - sparse).max()
    assert largest > 0.1
    assert logits.largest == pytest.approx(largest)
    assert logits.relative == pytest.approx(largest / np.sqrt(np.mean(dense**2)))
    assert logits.equal == np.mean(dense == sparse)
    assert logits.unlike == 0
    p, q = (np.exp(x) / np.exp(x).sum() for x in (dense, sparse))
    assert logits.kl == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-3)
    assert logits.argmax == (dense.argmax() == sparse.argmax())


def test_a_block_that_is_short_says_so():
    config = hx.approximate(rules=(hx.Rule("*", force=True, ffn=hx.Ffn(active=0.05, certify=False), vocab=None),))
    found = hx.compare(hx.sparsify(looked_up, config=config), make_weights(), TOKEN, repeats=1)
    block = found.sites[0]
    assert (block.executions, block.short, block.ran_dense) == (1, 1, None)
    assert any("short of units" in note for note in found.notes)


def test_infinite_and_masked_entries_are_told_apart_from_differences():
    most = float(jnp.finfo(jnp.float32).max)
    dense = {"a": jnp.array([1.0, jnp.inf, jnp.nan, -most, 3.0]), "none": jnp.zeros((0, 2))}
    sparse = {"a": jnp.array([1.5, jnp.inf, jnp.nan, -most, -jnp.inf]), "none": jnp.zeros((0, 2))}
    one, none = agreements(dense, sparse, {})
    assert (one.path, one.largest, one.unlike, one.equal) == (
        "result['a']",
        0.5,
        pytest.approx(0.2),
        pytest.approx(0.6),
    )
    assert one.relative == pytest.approx(0.5 / np.sqrt(5))
    assert (none.equal, none.largest) == (1.0, None)
    (infinite,) = agreements([jnp.zeros((1, 3))], [jnp.array([[0.0, 0.0, -jnp.inf]])], {0: 1})
    assert infinite.kl == np.inf
    assert infinite.unlike == pytest.approx(1 / 3)


def test_leaves_of_any_dtype_are_compared():
    dense = jax.random.split(jax.random.key(1)), jnp.arange(4), jnp.array([True, False])
    sparse = jax.random.split(jax.random.key(1)), jnp.array([0, 1, 2, 0]), jnp.array([True, True])
    assert [(one.equal, one.largest) for one in agreements(dense, sparse, {})] == [(1, None), (0.75, None), (0.5, None)]
    for dtype in (jnp.float8_e4m3fn, jnp.bfloat16, jnp.float16, jnp.complex64):
        (one,) = agreements([jnp.ones(2, dtype)], [jnp.array([1, 1.5], dtype)], {})
        assert (one.equal, one.largest, one.relative, one.unlike) == (0.5, 0.5, 0.5, 0)


def test_probabilities_are_compared_as_they_are():
    p, q = np.array([[0.5, 0.25, 0.25]], np.float32), np.array([[0.25, 0.5, 0.25]], np.float32)
    (found,) = agreements([jnp.asarray(p)], [jnp.asarray(q)], {0: 1})
    assert (found.argmax, found.kl) == (0, pytest.approx(np.sum(p * np.log(p / q)), rel=1e-5))


def test_only_what_a_site_returns_is_taken_for_logits():
    """A leaf as wide as the vocabulary that comes from elsewhere is an array of floats."""

    def fun(params, token):
        logits, chosen = looked_up(params, token)
        return {"logits": logits.T, "other": params["embed"][:, 0], "chosen": chosen}

    found = hx.compare(hx.sparsify(fun, config=LOSSLESS), make_weights(), TOKEN, repeats=1)
    by_path = {one.path: one for one in found.agreement}
    assert by_path["result['logits']"].argmax == 1
    assert by_path["result['other']"].argmax is None
    assert by_path["result['other']"].equal == 1
    dense = hx.compare(hx.sparsify(fun, config=hx.Config(vocab=None, rules=FORCE)), make_weights(), TOKEN, repeats=1)
    assert not [one for one in dense.agreement if one.argmax is not None]


def test_the_text_and_the_json_hold_all_of_it():
    step = hx.sparsify(looked_up, config=dataclasses.replace(LOSSLESS, vocab=None))
    found = hx.compare(step, make_weights(), TOKEN, repeats=2)
    text, data = str(found), json.loads(found.to_json())
    assert text.startswith("looked_up on cpu: sparse is ")
    for part in ("1 site rewritten:", "predicted 0.", "result[1]  int32[1]: 100.0000% of entries equal", "Mind:"):
        assert part in text
    assert "1 product stays dense" in text
    assert found.largest_refusals[0].reason in text
    assert set(data) == {field.name for field in dataclasses.fields(hx.Comparison)}
    assert data["sites"][0]["path"] == found.sites[0].path
    assert data["agreement"][0]["shape"] == [1, V]
    assert (data["refused"], data["refused_bytes"]) == (1, found.refused_bytes)
    unknown = dataclasses.replace(found, ratio=float("inf"), memory_speed=None)
    assert json.loads(unknown.to_json())["ratio"] is None
    assert "memory gives" not in str(unknown)


def test_refusals_are_counted_and_the_largest_told():
    def fun(params, x):
        for w in params:
            x = jnp.sin(x @ w)
        return x

    params = [jnp.eye(8 + n, 9 + n) for n in range(7)]
    found = hx.compare(hx.sparsify(fun), params, jnp.ones((1, 8)), repeats=1)
    assert (found.refused, found.refused_bytes) == (7, sum(w.nbytes for w in params))
    assert [r.dense_bytes for r in found.largest_refusals] == [w.nbytes for w in params[:1:-1]]
    assert "7 products stay dense" in str(found)
    assert "the largest of them" in str(found)
    assert any("no site is rewritten" in note for note in found.notes)
    assert found.agreement[0].equal == 1


def test_notes_say_where_times_mean_little(monkeypatch):
    step, params = hx.sparsify(looked_up, config=LOSSLESS), make_weights()

    def notes(cache, repeats, spread):
        monkeypatch.setattr(run, "cache_bytes", lambda: cache)
        monkeypatch.setattr(run, "spread_of", lambda seconds: spread)
        return " ".join(hx.compare(step, params, TOKEN, repeats=repeats).notes)

    wrong = notes(1 << 20, 4, 0.3)
    for part in ("less than 2 times the third-level cache, 1.0 MB", "4 calls are few", "sparse times spread by 30%"):
        assert part in wrong
    monkeypatch.setattr(run, "memory_speed", lambda device: 1.0)
    assert "dense and sparse: faster than memory gives" in notes(100, 5, 0.0)
    monkeypatch.setattr(run, "memory_speed", lambda device: 1e15)
    assert "the size of the last cache is not known" in notes(None, 5, 0.0)
    right = notes(100, 5, 0.2)
    assert not [part for part in ("cache", "are few", "spread", "faster than") if part in right]


def test_what_is_donated_static_or_passed_by_keyword():
    def fun(token, state, scale, *, params):
        logits, chosen = looked_up(params, token)
        return logits * (2 if scale == "twice" else 1), chosen, state + 1

    options = {"static_argnames": "scale", "donate_argnums": 1, "weights_argnames": "params"}
    step = hx.sparsify(fun, config=LOSSLESS, **options)
    state, params = jnp.arange(1000.0), make_weights()
    found = hx.compare(step, TOKEN, state, scale="twice", params=params, repeats=2, sites=True)
    assert [one.argmax for one in found.agreement] == [1, None, None]
    assert found.agreement[2].equal == 1
    assert all(isinstance(site.saved, float) for site in found.sites)
    assert "alone it makes the call" in str(found)
    # Nothing was used up, and the step has noticed nothing.
    np.testing.assert_array_equal(state, np.arange(1000.0))
    assert not step._shapes
    assert not step._traces
    step(TOKEN, state, "twice", params=params)
    assert state.is_deleted()


def test_a_site_alone_leaves_the_others_dense():
    step, params = hx.sparsify(looked_up, config=LOSSLESS), make_weights()
    traced = step.trace(params, TOKEN)
    for decision in traced.plan.decisions:
        alone = run._alone(step, traced, decision).trace(params, TOKEN).plan
        assert [site.path for site in alone.sites] == [decision.site.path]
        assert alone.sites[0] == decision.site


def test_numpy_weights_and_those_closed_over():
    params = make_weights()
    given = hx.compare(hx.sparsify(looked_up, config=LOSSLESS), jax.tree.map(np.asarray, params), TOKEN, repeats=1)
    closed = hx.compare(hx.sparsify(lambda t: looked_up(params, t), config=LOSSLESS), TOKEN, repeats=1)
    for found in (given, closed):
        assert [site.kind for site in found.sites] == ["ffn", "vocab"]
        assert found.agreement[0].argmax == 1


def test_weights_in_a_while_loop_have_no_speed():
    step, params = hx.sparsify(models.generate, config=LOSSLESS), models.list_params()
    found = hx.compare(step, params, models.make_cache(1), jnp.array([3]), jnp.zeros(models.D), repeats=1)
    assert (found.dense.speed, found.sparse.share) == (None, None)
    assert any("while loop" in note for note in found.notes)
    assert {site.executions for site in found.sites} == {3}


def test_without_room_or_cache_sizes_it_says_less(monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(timing.jnp, "ones", full)
    assert timing.memory_speed(jax.devices()[0]) is None
    monkeypatch.setattr(timing.sys, "platform", "linux")
    monkeypatch.setattr(timing, "_CACHES", tmp_path)
    assert timing.cache_bytes() is None
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2")):
        for level, size in ((2, "512K"), (3, "1024K")):
            index = tmp_path / f"cpu{cpu}" / "cache" / f"index{level}"
            index.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (index / name).write_text(f"{text}\n")
    assert timing.cache_bytes() == 2 << 20


def test_programs_take_turns():
    order = []

    class Program:
        def __init__(self, name):
            self.name = name

        def timed(self):
            order.append(self.name)
            return None, 1.0

    times = timing.seconds_in_turn([Program("a"), Program("b")], 3)
    assert [list(one) for one in times] == [[1.0] * 3] * 2
    assert len(order) == 2 * (3 + timing.WARM_UP)
    assert order[:4] == ["b", "a", "a", "b"]


def test_errors_name_the_argument():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    struct = jax.ShapeDtypeStruct((1, 16), jnp.float32)
    gone = inputs()
    gone.delete()
    assert_says(lambda: hx.compare(net, params, inputs()), TypeError, ["step=<function net", "hx.sparsify returns"])
    assert_says(lambda: hx.compare(step, params), TypeError, ["missing a required argument: 'x'"])
    assert_says(lambda: hx.compare(step, params, struct), TypeError, ["x is a ShapeDtypeStruct; expected an array"])
    assert_says(lambda: hx.compare(step, params, gone), ValueError, ["x was donated or deleted"])
    packed = step.pack(params, inputs())
    assert_says(lambda: hx.compare(step, packed, inputs()), TypeError, ["params is Packed; expected the plain weights"])
    for repeats in (0, 2.0, True):
        assert_says(lambda n=repeats: hx.compare(step, params, inputs(), repeats=n), ValueError, ["repeats="])
    assert_says(lambda: hx.compare(step, params, inputs(), sites="all"), TypeError, ["sites='all'"])
    traced = jax.jit(lambda x: hx.compare(step, params, x) and x)
    assert_says(lambda: traced(inputs()), TypeError, ["x is traced; expected an array"])
