"""Copies and pickles of a step: what it is made of goes along, what it remembers does not."""

import copy
import pickle

import jax
import pytest
from checks import assert_same
from tied import FULL, inputs, make_weights, net

import hire_xform as hx


@hx.sparsify(config=FULL)
def decorated(params, x):
    return net(params, x)


class Model:
    """A function with state."""

    def __init__(self, scale):
        self.scale = [scale]

    def __call__(self, params, x):
        return net(params, x) * self.scale[0]


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda step: pickle.loads(pickle.dumps(step))}


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_step_that_was_called_is_copied(how, packs):
    step, params = hx.sparsify(net, config=FULL), make_weights()
    want = step(params, inputs())
    again = how(step)
    assert again is not step
    assert repr(again) == repr(step)
    assert again.config == step.config
    count = len(packs)
    assert_same(again(params, inputs()), want, 0.0)
    assert len(packs) == 2 * count > 0  # what it remembers stays where it was
    assert_same(step(params, inputs()), want, 0.0)
    assert len(packs) == 2 * count


def test_options_go_along():
    def doubled(p, x, double):
        return net(p, x) * (2 if double else 1)

    step = hx.sparsify(doubled, config=FULL, static_argnums=2, keep_unused=True)
    for how in (copy.copy, copy.deepcopy):
        again = how(step)
        assert again.jit_options == step.jit_options
        assert_same(again(make_weights(), inputs(), True), 2 * net(make_weights(), inputs()))


def test_a_deep_copy_has_a_function_of_its_own():
    step = hx.sparsify(Model(2.0), config=FULL)
    deep, flat = copy.deepcopy(step), copy.copy(step)
    step.signature.fun.scale[0] = 3.0
    assert_same(deep(make_weights(), inputs()), 2.0 * net(make_weights(), inputs()))
    assert_same(flat(make_weights(), inputs()), 3.0 * net(make_weights(), inputs()))


def test_a_decorated_function_is_pickled_by_its_name():
    decorated(make_weights(), inputs())
    assert pickle.loads(pickle.dumps(decorated)) is decorated
    assert copy.deepcopy(decorated) is not decorated


def test_what_pickle_does_not_take_is_said():
    step = hx.sparsify(lambda p, x: net(p, x), config=FULL)
    with pytest.raises(TypeError, match=r"(?s)can't be pickled.*by its name.*hx\.Config.*leaves of a Packed"):
        pickle.dumps(step)


def test_parts_of_a_step_are_pickled():
    config = pickle.loads(pickle.dumps(FULL))
    assert config == FULL
    step, params = hx.sparsify(net, config=FULL), make_weights()
    packed = step.trace(params, inputs()).pack(params)
    leaves = pickle.loads(pickle.dumps(jax.tree.leaves(packed)))
    again = jax.tree.unflatten(jax.tree.structure(packed), leaves)
    assert_same(step(again, inputs()), net(params, inputs()))
