"""Threads that share one sparsified function, each with weights of its own: every result is that of its weights."""

import contextlib
import sys
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same
from tied import FULL, inputs, make_weights, net

import hire_xform as hx

THREADS = 8


@contextlib.contextmanager
def switching_often():
    """Threads take turns every microsecond or so."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_threads(work, count=THREADS):
    """Runs ``work(number)`` in threads that start together; raises what one of them raised."""
    start, errors = threading.Barrier(count), []

    def run(number):
        try:
            start.wait()
            work(number)
        except Exception as error:
            errors.append(error)

    with warnings.catch_warnings(), switching_often():
        warnings.simplefilter("ignore", hx.HireWarning)
        threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    if errors:
        raise errors[0]


def take_turns(step, weights, want, turns):
    """Each thread calls ``step`` with one after the other of some weights, each starting elsewhere."""

    def work(number):
        for turn in range(turns):
            one = (number + turn) % len(weights)
            assert_same(step(weights[one], inputs()), want[one])

    in_threads(work)


def as_jax(weights):
    return weights


def as_numpy(weights):
    return {name: np.array(value) for name, value in weights.items()}


def as_views(weights):
    """Other arrays at every call."""
    return {name: jnp.asarray(np.array(value)) for name, value in weights.items()}


@pytest.mark.parametrize("kind", [as_jax, as_numpy, as_views], ids=["jax", "numpy", "new-at-each-call"])
def test_each_thread_gets_the_results_of_its_own_weights(kind):
    step = hx.sparsify(net, config=FULL)
    models = [make_weights(seed) for seed in range(THREADS)]
    held = [kind(model) for model in models]
    want = [[np.asarray(net(model, inputs(1, seed=i))) for i in range(3)] for model in models]
    wrong = []

    def work(number):
        for turn in range(50):
            weights = kind(models[number]) if kind is as_views else held[number]
            got = np.asarray(step(weights, inputs(1, seed=turn % 3)))
            if not np.allclose(got, want[number][turn % 3], atol=1e-3):
                wrong.append((number, turn))

    in_threads(work)
    assert not wrong


def test_threads_with_several_shapes_at_once():
    step = hx.sparsify(net, config=FULL)
    models = [make_weights(seed) for seed in range(2)]
    want = [{t: np.asarray(net(model, inputs(t))) for t in (1, 2, 3)} for model in models]

    def work(number):
        for turn in range(6):
            tokens = 1 + (number + turn) % 3
            assert_same(step(models[number % 2], inputs(tokens)), jnp.asarray(want[number % 2][tokens]))

    in_threads(work)


def test_weights_of_several_sizes_at_once():
    step = hx.sparsify(net, config=FULL)
    models = [make_weights(0, m=m) for m in (32, 48)]
    want = [net(model, inputs()) for model in models]

    take_turns(step, models, want, 6)


def test_threads_pack_the_same_weights_once(packs):
    step, params = hx.sparsify(net, config=FULL), make_weights()
    want = net(params, inputs())
    in_threads(lambda number: assert_same(step(params, inputs()), want))
    alone = hx.sparsify(net, config=FULL)
    count = len(packs)
    alone(params, inputs())
    assert count == len(packs) - count > 0


def test_steps_that_call_each_other_do_not_wait_for_each_other():
    """A trace of one calls the other: no lock is held while a user's function is traced."""
    met = threading.Barrier(2, timeout=20)

    def meet():
        with contextlib.suppress(threading.BrokenBarrierError):
            met.wait()

    def first(params, x, deep):
        if not deep:
            return net(params, x)
        meet()
        return steps[1](weights, x, False) + net(params, x)

    def second(params, x, deep):
        if not deep:
            return net(params, x)
        meet()
        return steps[0](weights, x, False) + net(params, x)

    weights = make_weights()
    steps = [hx.sparsify(f, config=FULL, static_argnums=2) for f in (first, second)]
    want = 2 * net(weights, inputs())
    in_threads(lambda number: assert_same(steps[number](weights, inputs(), True), want), 2)


def test_packed_weights_in_threads():
    step = hx.sparsify(net, config=FULL)
    models = [make_weights(seed) for seed in range(4)]
    packed = [step.trace(model, inputs()).pack(model) for model in models]
    want = [net(model, inputs()) for model in models]

    take_turns(step, packed, want, 8)


def test_a_trace_under_jit_in_threads():
    step = hx.sparsify(net, config=FULL)
    models = [make_weights(seed) for seed in range(4)]
    want = [net(model, inputs()) for model in models]

    def work(number):
        one = number % 4
        assert_same(jax.jit(lambda x: step(models[one], x))(inputs()), want[one])

    in_threads(work)
