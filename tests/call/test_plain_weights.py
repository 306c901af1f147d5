"""Plain weights: packed once, never stale."""

import gc
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, kinds
from tied import FULL, D, inputs, make_weights, net

import hire_xform as hx


def test_plain_weights_are_packed_once(packs):
    step, params = hx.sparsify(net, config=FULL), make_weights()
    first = step(params, inputs())
    count = len(packs)
    assert count > 0
    for seed in range(3):
        step(params, inputs(seed=seed))
    step({**params}, inputs())  # another dictionary, the same arrays
    assert len(packs) == count
    assert_same(first, net(params, inputs()))


def test_another_number_of_tokens_packs_nothing_again(packs):
    step, params = hx.sparsify(net, config=FULL), make_weights()
    step(params, inputs(1))
    count = len(packs)
    assert_same(step(params, inputs(3)), net(params, inputs(3)))
    assert len(packs) == count


@pytest.mark.filterwarnings("ignore::hire_xform.HireWarning")
def test_new_weights_are_packed_again(packs):
    step = hx.sparsify(net, config=FULL)
    old, new = make_weights(0), make_weights(1)
    for params in (old, new):
        assert_same(step(params, inputs()), net(params, inputs()))
    mixed = {**new, "w2": old["w2"]}
    assert_same(step(mixed, inputs()), net(mixed, inputs()))


def test_only_the_changed_weight_is_packed_again(packs):
    step, params = hx.sparsify(net, config=FULL), make_weights()
    step(params, inputs())
    count, changed = len(packs), {**params, "w1": params["w1"] + 1}
    assert_same(step(changed, inputs()), net(changed, inputs()))
    assert packs[count:]
    assert all(leaf is changed["w1"] for leaf in packs[count:])


def test_weights_that_died_are_not_mistaken_for_new_ones_at_their_address():
    step = hx.sparsify(net, config=FULL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hx.HireWarning)
        for seed in range(8):
            params = make_weights(seed)
            assert_same(step(params, inputs()), net(params, inputs()))
            del params
            gc.collect()


def test_the_memory_does_not_keep_weights_alive():
    import weakref

    step, params = hx.sparsify(net, config=FULL), make_weights()
    step(params, inputs())
    watched = weakref.ref(params["w1"])
    del params
    gc.collect()
    assert watched() is None


def test_numpy_weights_changed_in_place_are_noticed():
    step = hx.sparsify(net, config=FULL)
    params = {name: np.array(value) for name, value in make_weights().items()}
    assert_same(step(params, inputs()), net(params, inputs()))
    for name in ("w1", "b1", "w2", "embed"):
        params[name][3:] *= -1.5
        assert_same(step(params, inputs()), net(params, inputs()))


def test_numpy_weights_left_alone_are_packed_once(packs):
    step = hx.sparsify(net, config=FULL)
    params = {name: np.array(value) for name, value in make_weights().items()}
    step(params, inputs())
    count = len(packs)
    step(params, inputs(seed=4))
    assert len(packs) == count


def test_weights_new_at_every_call_warn_once_by_name():
    step = hx.sparsify(net, config=FULL)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for seed in range(6):
            step(make_weights(seed), inputs())
    seen = [w for w in seen if issubclass(w.category, hx.HireWarning)]
    assert len(seen) == 1
    assert "params['" in str(seen[0].message)
    assert "The result is right" in str(seen[0].message)


def test_weights_of_other_sizes_are_another_plan():
    def wide(params, x):
        u = jnp.einsum("td,dhk->thk", x, params["w1"])
        return jnp.einsum("thk,hkd->td", jax.nn.relu(u), params["w2"])

    step = hx.sparsify(wide, config=FULL)
    for heads in (4, 6, 4):
        w = make_weights(heads)
        params = {"w1": w["w1"][:, : heads * 8].reshape(D, heads, 8), "w2": w["w2"][: heads * 8].reshape(heads, 8, D)}
        assert_same(step(params, inputs()), wide(params, inputs()))


def test_threads_share_a_function():
    step, found = hx.sparsify(net, config=FULL), {}
    weights = [make_weights(seed) for seed in range(2)]

    def work(number):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[number] = [step(weights[number % 2], inputs(seed=i)) for i in range(3)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results in found.items():
        for i, result in enumerate(results):
            assert_same(result, net(weights[number % 2], inputs(seed=i)))
    assert len(found) == 4


def test_a_closed_over_weight_is_packed_once(packs):
    params = make_weights()
    step = hx.sparsify(lambda x: net(params, x), config=FULL)
    assert kinds(step.trace(inputs()).plan) == ["ffn", "vocab"]
    assert_same(step(inputs()), net(params, inputs()))
    count = len(packs)
    assert_same(step(inputs(seed=5)), net(params, inputs(seed=5)))
    assert len(packs) == count > 0


def test_data_first_and_weights_closed_over_needs_no_option():
    params = make_weights()
    step = hx.sparsify(lambda x, scale: net(params, x) * scale, config=FULL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(6):
            assert_same(step(inputs(seed=seed), 2.0), net(params, inputs(seed=seed)) * 2.0)
