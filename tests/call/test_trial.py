"""The first calls are a trial: what is slower than dense in them is left dense, and said once."""

import copy
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same

import hire_xform as hx
from hire_xform.call import trial
from hire_xform.call.trial import FIRST_CALLS

D, V = 64, 512
CERTIFIED = hx.Config(vocab=hx.Vocab(candidates=4, certify=True), ffn=None, rules=FORCE)


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch, request):
    """Sites are as if not forced: the cost model would leave some of this size dense."""
    if "forced" not in request.node.name:
        monkeypatch.setattr(trial, "_is_kept", lambda site: False)


def head(params, x):
    return jnp.argmax(x @ params["head"].T, -1)


def flat_weights(seed=0):
    """Rows that differ by less than int8 can tell: no proof holds."""
    rng = np.random.default_rng(seed)
    return {"head": jnp.asarray(1.0 + 1e-4 * rng.normal(size=(V, D)), jnp.float32)}


def peaked_weights(seed=0):
    """Rows of which one leads by far for positive inputs: every proof holds."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(V, D)) * 0.01
    rows[7] += 1.0
    return {"head": jnp.asarray(rows, jnp.float32)}


def x_of(seed=0, tokens=1):
    return jnp.asarray(np.abs(np.random.default_rng(seed).normal(size=(tokens, D))) + 0.1, jnp.float32)


def calls(step, params, count, seen=None):
    """Calls a step; returns the warnings of the library."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for seed in range(count):
            got = step(params, x_of(seed))
            if seen is not None:
                seen.append(np.asarray(got))
    return [str(w.message) for w in told if issubclass(w.category, hx.HireWarning)]


def site(step, params):
    return [s.path for s in step.trace(params, x_of()).plan.sites]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_site_whose_proofs_fail_is_left_dense_and_told_once(packed):
    step, params, results = hx.sparsify(head, config=CERTIFIED), flat_weights(), []
    weights = step.trace(params, x_of()).pack(params) if packed else params
    (path,) = site(step, params)
    assert calls(step, weights, FIRST_CALLS, results) == []
    assert site(step, params) == [path]
    told = calls(step, weights, 6, results)
    assert len(told) == 1
    assert path in told[0]
    assert "test_trial.py" in told[0]
    assert f"{FIRST_CALLS} of its first {FIRST_CALLS}" in told[0]
    assert "hx.calibrate" in told[0]
    assert site(step, params) == []
    explained = step.trace(params, x_of()).explain()
    assert f"its proofs failed for {FIRST_CALLS} of its first {FIRST_CALLS}" in explained
    assert calls(step, weights, FIRST_CALLS + 2) == []
    want = [np.asarray(jax.jit(head)(params, x_of(seed))) for seed in [*range(FIRST_CALLS), *range(6)]]
    assert all(np.array_equal(a, b) for a, b in zip(results, want, strict=True))


def test_plain_weights_left_dense_are_not_held_packed():
    step, params = hx.sparsify(head, config=CERTIFIED), flat_weights()
    calls(step, params, FIRST_CALLS)
    held = sum(a.nbytes for a in jax.live_arrays())
    calls(step, params, 3)
    assert sum(a.nbytes for a in jax.live_arrays()) <= held - V * D  # the compressed copy at least


def test_a_site_whose_proofs_hold_stays():
    step, params = hx.sparsify(head, config=CERTIFIED), peaked_weights()
    assert calls(step, params, FIRST_CALLS + 3) == []
    assert len(site(step, params)) == 1


def test_a_forced_site_stays():
    step, params = hx.sparsify(head, config=CERTIFIED), flat_weights()
    assert calls(step, params, FIRST_CALLS + 3) == []
    assert len(site(step, params)) == 1


def test_the_share_that_may_fail(monkeypatch):
    """A quarter may run dense; the counts decide, whatever else is called in between."""
    monkeypatch.setattr(trial, "FIRST_CALLS", 8)
    both = {"head": jnp.where(jnp.arange(V)[:, None] == 7, 1.5, flat_weights()["head"])}
    # The leading row is far ahead for positive inputs, and the last for negative ones, where all others are alike.
    for failing, stays in ((2, True), (3, False)):
        step = hx.sparsify(head, config=CERTIFIED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number in range(10):
                step(both, -x_of(number) if number < failing else x_of(number))
        assert (len(site(step, both)) == 1) is stays


def test_nothing_is_counted_under_an_outer_trace():
    step, params = hx.sparsify(head, config=CERTIFIED), flat_weights()
    packed = step.trace(params, x_of()).pack(params)
    outer = jax.jit(step)
    assert "hire_rung" in str(jax.make_jaxpr(step)(packed, x_of()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(FIRST_CALLS + 3):
            outer(packed, x_of(seed))
    assert len(site(step, params)) == 1
    constant = jax.jit(lambda: step(packed, x_of()))  # no argument is a tracer here
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(FIRST_CALLS + 3):
            constant()
    assert len(site(step, params)) == 1


def test_loops_results_types_and_donation_are_as_without_a_trial():
    """A scan over layers: each execution counts."""

    def layers(params, state, x):
        def body(carry, row):
            return carry + 1, jnp.argmax(x @ row.T, -1)

        count, tokens = jax.lax.scan(body, 0, params["heads"])
        return {"tokens": tokens, "count": count, "one": 1.0, "state": state + 1, "x": x}

    params = {"heads": jnp.stack([flat_weights(seed)["head"] for seed in range(3)])}
    step = hx.sparsify(layers, config=CERTIFIED, donate_argnums=1)
    want = jax.jit(layers)(params, jnp.int32(3), x_of())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(FIRST_CALLS + 1):
            state = jnp.int32(3)
            got = step(params, state, x_of())
            assert state.is_deleted()
            assert_same(got, want)
    assert any(f"{3 * FIRST_CALLS} of its first {3 * FIRST_CALLS}" in str(w.message) for w in told)


def test_shardings_of_results_are_the_users():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step = hx.sparsify(head, config=CERTIFIED, out_shardings=device)
    assert step(peaked_weights(), x_of()).sharding == device


def test_the_trial_in_threads():
    step, params = hx.sparsify(head, config=CERTIFIED), flat_weights()
    want, wrong = np.asarray(head(params, x_of())), []

    def work():
        for _ in range(FIRST_CALLS):
            if not np.array_equal(step(params, x_of()), want):
                wrong.append(1)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert sum("leaves dense" in str(w.message) for w in told) == 1
    assert site(step, params) == []


def test_a_copy_starts_anew():
    step, params = hx.sparsify(head, config=CERTIFIED), flat_weights()
    calls(step, params, FIRST_CALLS + 1)
    assert site(step, params) == []
    assert len(site(copy.copy(step), params)) == 1


def block(params, x):
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]


@pytest.mark.parametrize("short", [1, 2], ids=["in 1 of 32", "in 2 of 32"])
def test_a_block_that_is_too_small_for_its_units_says_so_once(short):
    """Above a twentieth of its executions. All units fire for positive inputs, none for negative ones."""
    config = hx.Config(vocab=None, ffn=hx.Ffn(active=0.25, certify=False), rules=FORCE)
    params = {"w1": jnp.ones((D, 128)), "w2": jnp.ones((128, D))}
    step = hx.sparsify(block, config=config)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for number in range(FIRST_CALLS + 3):
            step(params, x_of() if number < short else -x_of())
    told = [str(w.message) for w in seen if issubclass(w.category, hx.HireWarning)]
    assert len(told) == short - 1
    expected = (f"2 of its first {FIRST_CALLS}", *site(step, params), "active=", "hx.calibrate", "hx.lossless()")
    assert all(word in text for text in told for word in expected)
    assert len(site(step, params)) == 1


def test_packed_that_can_not_serve_the_dense_product_keeps_the_site(monkeypatch):
    step, params = hx.sparsify(head, config=CERTIFIED), flat_weights()
    packed, want = step.trace(params, x_of()).pack(params), head(params, x_of())
    monkeypatch.setattr(type(step.trace(params, x_of())), "served_by", lambda self, layouts: False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(FIRST_CALLS + 3):
            assert_same(step(packed, x_of()), want)
    assert step.left_dense
    assert_same(step(packed, x_of()), want)
