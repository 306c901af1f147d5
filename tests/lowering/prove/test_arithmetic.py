"""Sums as other platforms make them, imitated bit by bit: bounds that assume them hold, and closer ones would not."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hire_xform.lowering.prove.arithmetic import ALL_BITS, TABLE, WHOLE_BITS, kept_bits
from hire_xform.lowering.prove.bounds import flushed, product_error, slack

pytestmark = pytest.mark.any_jax("cases vary numbers of arithmetic that is our own", every=3)

D = 512


def cut(value, unit):
    """Towards zero, to a multiple of a power of two."""
    return np.trunc(value / unit) * unit


def unit_of(value):
    """What the last of 24 bits of a value stands for."""
    return 2.0 ** (np.floor(np.log2(value)) - 23) if value > 0 else 1.0


def tensor_core(products, block=4):
    """A sum in blocks that are aligned to the largest of them and of the sum so far, and cut off to 24 bits."""
    total = 0.0
    for start in range(0, len(products), block):
        parts = [total, *products[start : start + block]]
        unit = unit_of(max(map(abs, parts)))
        total = sum(cut(part, unit) for part in parts)
        total = cut(total, unit_of(abs(total)))
    return total


def one_by_one(products):
    """Each addition towards zero."""
    total = 0.0
    for product in products:
        exact = total + product
        total = cut(exact, unit_of(abs(exact)))
    return total


def bound(products, input_bits):
    """How far one sum may be from the exact one: half of what two may differ by."""
    terms = np.abs(products).sum()
    return float(product_error(jnp.float32(terms), len(products), input_bits, jnp.float32(sum(products)))) / 2.0


def lost_again_and_again():
    return np.array([1.0, *[0.999 * 2.0**-23] * (D - 1)])


def drawn(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=D) * 2.0 ** rng.integers(-20, 1, size=D)


@pytest.mark.parametrize("add", [tensor_core, one_by_one])
def test_sums_that_are_cut_off(add):
    for products in (lost_again_and_again(), *map(drawn, range(20)), *(np.abs(drawn(s)) for s in range(20))):
        assert abs(add(products) - products.sum()) <= bound(products, WHOLE_BITS)
    worst = lost_again_and_again()
    assert abs(add(worst) - worst.sum()) > bound(worst, ALL_BITS)


def tf32(x):
    return (np.float32(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def bf16(x):
    return np.float64(x.astype(ml_dtypes.bfloat16))


def three_passes(x, w):
    high = [np.float32(a.astype(ml_dtypes.bfloat16)) for a in (x, w)]
    low = [np.float32((a - h).astype(ml_dtypes.bfloat16)) for a, h in zip((x, w), high, strict=True)]
    return [np.float64(a) * b for a, b in ((high[0], high[1]), (high[0], low[1]), (low[0], high[1]))]


def inputs():
    rng = np.random.default_rng(0)
    yield np.full(D, 1.0 + 2.0**-10 - 2.0**-23, np.float32), np.full(D, 1.0 + 2.0**-10 - 2.0**-23, np.float32)
    for _ in range(10):
        yield rng.normal(size=D).astype(np.float32), rng.normal(size=D).astype(np.float32)


@pytest.mark.parametrize(
    ("way", "platform", "multiply"),
    [
        ("f32", "gpu", lambda x, w: np.float64(tf32(x)) * tf32(w)),
        (
            "f32",
            "tpu",
            lambda x, w: np.float64(x.astype(ml_dtypes.bfloat16)) * np.float64(w.astype(ml_dtypes.bfloat16)),
        ),
        ("f32, HIGH", "tpu", lambda x, w: np.concatenate(three_passes(x, w))),
    ],
)
def test_inputs_that_are_cut_off_or_rounded(way, platform, multiply):
    bits = kept_bits(way, platform)
    for x, w in inputs():
        exact = np.float64(x) * w
        made = tensor_core(multiply(x, w))
        assert abs(made - exact.sum()) <= bound(exact, bits)
        norms = np.linalg.norm(np.float64(x)) * np.linalg.norm(np.float64(w))
        assert abs(made - exact.sum()) <= slack(D, bits) * norms


def test_tf32_that_is_cut_off_keeps_a_bit_less_than_it_has():
    x, w = next(inputs())
    exact = np.float64(x) * w
    assert abs((np.float64(tf32(x)) * tf32(w)).sum() - exact.sum()) > bound(exact, 11)


def test_what_is_stated_of_every_platform():
    assert all(set(of) == {"cpu", "gpu", "tpu"} for of in TABLE.values())
    assert kept_bits("f32", "another") is None
    # One program for all platforms takes for granted what each of them keeps.
    assert {bits for way in ("bf16", "f32, HIGHEST") for bits in TABLE[way].values()} == {WHOLE_BITS}


def test_denormal_entries_beside_large_ones():
    x = jnp.asarray([[1.0, 2.0**100]])
    assert float(flushed(x)[0, 0]) >= 2 * 2.0**-126 * 2.0**100
