"""Each pointwise equation on intervals: what it makes of operands that lie between is between what its rule says."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from laid_out import laid_out

from hire_xform.lowering.prove.intervals import Interval
from hire_xform.passes.ir import compat
from hire_xform.passes.prove.interval_rules import applied, can_be_bounded

pytestmark = pytest.mark.any_jax("cases vary numbers of arithmetic that is our own", every=2)

N = 32
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}
ONE = {
    "tanh": jnp.tanh,
    "logistic": lax.logistic,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "abs": jnp.abs,
    "neg": lambda x: -x,
    "square": jnp.square,
    "itself times itself": lambda x: x * x,
    "cube": lambda x: x**3,
    "fourth power": lambda x: lax.integer_pow(x, 4),
    "copied": jnp.copy,
    "no gradient": lax.stop_gradient,
    "converted": lambda x: x.astype(jnp.float16 if x.dtype == jnp.float32 else jnp.float32),
    "converted to 16 bits": lambda x: x.astype(jnp.bfloat16 if x.dtype == jnp.float16 else jnp.float16),
}
POSITIVE = {"sqrt": jnp.sqrt, "rsqrt": lax.rsqrt}
TWO = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
}
BY_POSITIVE = {"div": lambda x, y: x / y}


def spread(seed, positive):
    """Ends on a coarse grid, so that many of them meet, and values between them."""
    rng = np.random.default_rng(seed)
    low = rng.integers(1 if positive else -8, 9, N) / 4
    high = low + rng.integers(0, 3, N) / 4
    values = [low, high, (low + high) / 2, low + (high - low) * rng.uniform(size=N)]
    return Interval(jnp.float32(low), jnp.float32(high)), [np.float32(v) for v in values]


def last_node(fun, *operands):
    *_, node = laid_out(lambda w, *args: fun(*args), (), *operands).graph.program_order()
    return node


def check(fun, dtype, positive):
    operands = [spread(seed, p) for seed, p in enumerate(positive)]
    typed = [jnp.zeros(N, dtype) for _ in operands]
    node = last_node(fun, *typed)
    assert can_be_bounded(node)
    same = len({id(v) for v in node.inputs}) < len(node.inputs)
    found = applied(node, [o for o, _ in operands] * (2 if same else 1), same=same)
    for chosen in itertools.product(*(values for _, values in operands)):
        made = compat.bind(node.eqn, [jnp.asarray(v, dtype) for v in chosen] * (2 if same else 1))[0]
        if made.dtype == jnp.bool_:
            assert bool(jnp.all((made | ~found.low) & (~made | found.high)))
            continue
        made = made.astype(jnp.float32)
        assert bool(jnp.all((found.low <= made) & (made <= found.high)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*ONE, *POSITIVE])
def test_of_one_operand(name, dtype):
    check({**ONE, **POSITIVE}[name], DTYPES[dtype], [name in POSITIVE])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*TWO, *BY_POSITIVE])
def test_of_two_operands(name, dtype):
    check({**TWO, **BY_POSITIVE}[name], DTYPES[dtype], [False, name in BY_POSITIVE])


def test_a_clamp_takes_its_operands_in_their_order():
    node = last_node(lambda x, low, high: lax.clamp(low, x, high), *[jnp.float32(0)] * 3)
    low, x, high = (Interval(jnp.float32(a), jnp.float32(b)) for a, b in ((0, 1), (-5, 9), (3, 4)))
    assert [float(e) for e in applied(node, [low, x, high])] == [0, 4]


def test_a_choice_that_is_not_decided_holds_both():
    node = last_node(lambda c, x, y: lax.select(c, x, y), jnp.asarray(True), jnp.float32(0), jnp.float32(0))
    which = Interval(jnp.asarray([False, True, False]), jnp.asarray([False, True, True]))
    no, yes = (Interval(jnp.float32([a] * 3), jnp.float32([b] * 3)) for a, b in ((1, 2), (5, 6)))
    # `select_n` has the operand of False first.
    found = applied(node, [which, no, yes])
    assert np.asarray(found).tolist() == [[1, 5, 1], [2, 6, 6]]


def test_truth_values_and_what_they_are_converted_to():
    one = Interval(jnp.asarray([False, True, False]), jnp.asarray([False, True, True]))
    flag = jnp.zeros(3, bool)
    assert np.asarray(applied(last_node(lambda a: ~a, flag), [one])).tolist() == [
        [True, False, False],
        [True, False, True],
    ]
    for fun in (lambda a, b: a & b, lambda a, b: a | b):
        assert np.asarray(applied(last_node(fun, flag, flag), [one, one])).tolist() == np.asarray(one).tolist()
    found = applied(last_node(lambda a: a.astype(jnp.float32), flag), [one])
    assert found.low.dtype == jnp.float32
    assert np.asarray(found).tolist() == [[0, 1, 0], [0, 1, 1]]


def test_a_value_times_itself_is_not_negative():
    node = last_node(lambda x, y: x * y, jnp.float32(0), jnp.float32(0))
    some = Interval(jnp.float32(-2), jnp.float32(3))
    assert float(applied(node, [some, some], same=True).low) == 0
    assert float(applied(node, [some, some]).low) < -5.9


X = jnp.zeros(N)
UNBOUNDED = {
    "exp": (jnp.exp, [X]),
    "log": (jnp.log, [X]),
    "sin": (jnp.sin, [X]),
    "a fifth power": (lambda x: lax.integer_pow(x, 5), [X]),
    "a negative power": (lambda x: lax.integer_pow(x, -1), [X]),
    "a sign": (jnp.sign, [X]),
    "whole numbers": (lambda x, y: x + y, [X.astype(jnp.int32)] * 2),
    "to whole numbers": (lambda x: x.astype(jnp.int32), [X]),
    "a sum of many": (jnp.sum, [X]),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_has_no_rule(name):
    fun, operands = UNBOUNDED[name]
    assert not can_be_bounded(last_node(fun, *operands))
