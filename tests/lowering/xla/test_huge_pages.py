"""What the system is asked for lies within large arrays, and whatever it says, values stay."""

import mmap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_xform as hx
from hire_xform.lowering.xla import huge_pages
from hire_xform.lowering.xla.huge_pages import on_huge_pages


@pytest.fixture
def asked(monkeypatch):
    calls = []

    def advise(first, size, advice):
        calls.append((first, size, advice))
        return -1 if advice == huge_pages._HUGEPAGE and len(calls) > 4 else 0

    monkeypatch.setattr(huge_pages, "_madvise", lambda: advise)
    return calls


def test_whole_pages_of_large_arrays(asked):
    large, small = jnp.arange(2 << 20, dtype=jnp.float32), jnp.arange(64)
    on_huge_pages({"a": large, "b": small, "c": np.zeros(4 << 20), "d": None})
    begin = large.unsafe_buffer_pointer()
    assert [advice for *_, advice in asked] == [huge_pages._HUGEPAGE, huge_pages._COLLAPSE]
    for first, size, _ in asked:
        assert first % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
        assert begin <= first < first + size <= begin + large.nbytes
        assert size > large.nbytes - 2 * mmap.PAGESIZE


def test_what_is_refused_is_not_asked_twice(asked):
    on_huge_pages([jnp.zeros(2 << 20) for _ in range(3)])
    assert [advice for *_, advice in asked] == [14, 25, 14, 25, 14]


def test_off(asked, monkeypatch):
    monkeypatch.setenv(huge_pages.VARIABLE, "off")
    on_huge_pages(jnp.zeros(2 << 20))
    assert not asked


def test_where_there_is_none(monkeypatch):
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    on_huge_pages(jnp.zeros(2 << 20))


def test_values_stay():
    array = jax.random.normal(jax.random.key(0), (1 << 21,))
    before = np.array(array)
    on_huge_pages(array)
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_what_a_site_reads_is_asked_for(asked, packed):
    w, x = jnp.ones((64, 1 << 15)), jnp.ones((1, 64))
    config = hx.Config(rules=(hx.Rule("*", force=True),))
    step = hx.sparsify(lambda w, x: jnp.argmax(x @ w, axis=-1), config=config)
    if packed:
        step.trace(w, x).pack(w)
    else:
        step(w, x)
    sizes = {size >> 20 for _, size, _ in asked}
    assert 7 in sizes or 8 in sizes, sizes
