"""Layouts of tokens and units: under those of its operands an equation makes the canonical array of its result."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from laid_out import laid_out

from hire_xform.passes.ir.axes import (
    Atom,
    Dim,
    UnsupportedLayoutError,
    from_canonical,
    merged,
    operand_layouts,
    row_major,
    spaces,
    to_canonical,
    whole,
)
from hire_xform.passes.ir.axis_rules import is_pointwise, moves_only


def t(stride, size):
    return Atom("t", stride, size)


def h(stride, size):
    return Atom("h", stride, size)


def layout_of(shape, space_of):
    """Each dimension whole, those of one space in row-major order."""
    atoms = {}
    for space in set(space_of):
        dims = [d for d, s in enumerate(space_of) if s == space]
        atoms.update(zip(dims, row_major(space, [shape[d] for d in dims]), strict=True))
    return tuple(whole([atoms[d]], n) for d, n in enumerate(shape))


def sizes_of(layout):
    """How many tokens and units there are."""
    return [math.prod(a.size for d in layout for a in d.atoms if a.space == s) for s in "th"]


def numbered(*shape):
    return np.arange(1, math.prod(shape) + 1, dtype=np.float32).reshape(shape)


def canonical_of(x, layout, tokens, units):
    """``[T or 1, m or 1]``: the entry at each token and unit, digit by digit."""
    tokens, units = (n if space in spaces(layout) else 1 for space, n in (("t", tokens), ("h", units)))
    place = dict(zip("th", np.indices((tokens, units)), strict=True))
    index = []
    for dim in layout:
        at = 0
        for a in dim.atoms:
            at = at * a.size + place[a.space] // a.stride % a.size
        index.append(dim.start + dim.step * at)
    return np.broadcast_to(np.asarray(x)[tuple(index)], (tokens, units))


def traced_back(fun, x, space_of):
    """The canonical result, and those of the operands of ``fun`` at which the way back along layouts ends."""
    found = laid_out(lambda w, *args: fun(*args), (), *x)
    out = found.output
    layout = layout_of(out.shape, space_of)
    layouts = {out: layout}
    for node in reversed(list(found.graph.program_order())):
        assert moves_only(node) or is_pointwise(node)
        for i, value in enumerate(node.outputs):
            if value in layouts:
                for operand, own in zip(node.inputs, operand_layouts(node, i, layouts[value]), strict=True):
                    layouts.setdefault(operand, own)
    inputs, sizes = zip(found.graph.top.inputs, x, strict=True), sizes_of(layout)
    parts = [canonical_of(a, layouts[v], *sizes) for v, a in inputs if v in layouts]
    return canonical_of(fun(*x), layout, *sizes), parts


MOVES = {
    "transposed": (lambda x: x.T, (6, 4), "th"),
    "tokens and units take turns": (lambda x: jnp.transpose(x, (2, 0, 1)), (2, 3, 4), "hth"),
    "units split": (lambda x: x.reshape(2, 3, 4), (2, 12), "thh"),
    "units merged": (lambda x: x.reshape(2, 12), (2, 3, 4), "th"),
    "all of them in one": (lambda x: x.reshape(24), (2, 3, 4), "h"),
    "split elsewhere": (lambda x: x.reshape(6, 4), (2, 3, 4), "hh"),
    "heads swapped and merged": (lambda x: jnp.swapaxes(x, 1, 2).reshape(2, 12), (2, 3, 4), "th"),
    "axes of one": (lambda x: x[:, None, :, None].reshape(1, 4, 3), (4, 3), "tth"),
    "a slice of units": (lambda x: x[:, 2:5], (2, 7), "th"),
    "every second unit": (lambda x: x[:, 1::2], (2, 8), "th"),
    "a slice of a slice": (lambda x: lax.slice(x, (0, 1), (2, 11), (1, 2))[:, 1:4], (2, 12), "th"),
    "one of the halves": (lambda x: x.reshape(2, 2, 6)[:, 1], (2, 12), "th"),
    "the other of pairs": (lambda x: x.reshape(2, 6, 2)[:, :, 1], (2, 12), "th"),
    "tokens cut, units split": (lambda x: x[1:].reshape(2, 3, 2), (3, 6), "thh"),
    "a slice whose rows are whole": (lambda x: x[:, 1:3].reshape(2, 8), (2, 5, 4), "th"),
    "a slice that is split": (lambda x: x[:, 1:].reshape(2, 2, 3), (2, 7), "thh"),
    "slices that are merged": (lambda x: x[:, :, 1:3].reshape(2, 6), (2, 3, 4), "th"),
    "pointwise": (lambda x: jnp.negative(x.T).reshape(3, 2, 2), (4, 3), "hth"),
    "stretched": (lambda x: jnp.broadcast_to(x[None, :], (3, 5)), (5,), "th"),
}


@pytest.mark.parametrize("name", MOVES)
def test_an_operands_layout_is_that_of_its_entries(name):
    fun, shape, space_of = MOVES[name]
    want, (got,) = traced_back(fun, [numbered(*shape)], space_of)
    if name == "pointwise":
        got = -got
    np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)


def test_a_value_that_only_tokens_or_units_have_is_one_long_along_the_other():
    x, bias, scale = numbered(2, 3), 100 * numbered(3), 1000 * numbered(2, 1)
    want, parts = traced_back(lambda x, b, s: x + b + s, [x, bias, scale], "th")
    assert [p.shape for p in parts] == [(2, 3), (1, 3), (2, 1)]
    np.testing.assert_array_equal(sum(parts), want)


def test_tokens_of_which_a_value_has_only_some_digits_are_spread_over_the_others():
    # A mask for each position, the same in each example and for each unit.
    want, (x, mask) = traced_back(lambda x, m: x * m[None, :, None], [numbered(2, 3, 4), numbered(3)], "tth")
    assert (x.shape, mask.shape) == ((6, 4), (6, 1))
    np.testing.assert_array_equal(x * mask, want)


def test_random_moves():
    """Of random reshapes, transposes and slices those that are followed are followed rightly, and most are."""
    rng, followed = np.random.default_rng(0), 0
    for _ in range(60):
        shape, seed = tuple(int(n) for n in rng.choice([1, 2, 3, 4], 3)), int(rng.integers(1 << 30))

        def fun(x, seed=seed):
            draw = np.random.default_rng(seed)
            for _ in range(3):
                kind = draw.integers(3)
                if kind == 0:
                    x = x.transpose(*draw.permutation(x.ndim))
                elif kind == 1:
                    d = int(draw.integers(x.ndim))
                    start, step = int(draw.integers(x.shape[d])), int(draw.integers(1, 3))
                    x = x[(slice(None),) * d + (slice(start, None, step),)]
                else:
                    factors = draw.permutation([f for n in x.shape for f in ((2, 2) if n == 4 else (n,))])
                    cuts = sorted(draw.integers(0, len(factors) + 1, 2))
                    x = x.reshape([math.prod(factors[a:b]) for a, b in itertools.pairwise([0, *cuts, len(factors)])])
            return x

        x = numbered(*shape)
        space_of = "".join(rng.choice(["t", "h"], fun(x).ndim))
        try:
            want, (got,) = traced_back(fun, [x], space_of)
        except UnsupportedLayoutError:
            continue
        followed += 1
        np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)
    assert followed > 30


REFUSED = {
    "cut across": (lambda x: x.reshape(3, 4), (4, 3), "th", "a reshape mixes the hidden axis with others"),
    "tokens among units": (lambda x: x.reshape(2, 6), (4, 3), "th", "a reshape mixes the hidden axis with others"),
    "a slice of what is merged": (lambda x: x.reshape(2, 12)[:, 1:5], (2, 3, 4), "th", "a reshape mixes"),
    "every second of the outer parts": (
        lambda x: x.reshape(2, 4, 3)[:, ::2],
        (2, 12),
        "thh",
        "a slice of the hidden axis is then reshaped",
    ),
    "slices of both parts": (
        lambda x: x.reshape(2, 3, 4)[:, 1:, 1:3],
        (2, 12),
        "thh",
        "a slice of the hidden axis is then reshaped",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_moves_no_whole_units_is_refused(name):
    fun, shape, space_of, words = REFUSED[name]
    with pytest.raises(UnsupportedLayoutError, match=words):
        traced_back(fun, [numbered(*shape)], space_of)


# --- digits ---


def test_neighbouring_digits_are_put_together():
    assert merged([h(4, 3), h(1, 4)]) == (h(1, 12),)
    assert merged([h(4, 3), t(1, 1), h(1, 4)]) == (h(1, 12),)
    assert merged([h(1, 4), h(4, 3)]) == (h(1, 4), h(4, 3))
    assert merged([t(4, 3), h(1, 4)]) == (t(4, 3), h(1, 4))
    assert merged([h(8, 3), h(1, 4)]) == (h(8, 3), h(1, 4))


def test_row_major_digits_count_through_all_places():
    atoms = row_major("h", (2, 3, 4))
    digits = np.indices((2, 3, 4))
    np.testing.assert_array_equal(sum(a.stride * d for a, d in zip(atoms, digits, strict=True)).ravel(), np.arange(24))
    assert [a.size for a in row_major("h", (2, 0))] == [2, 0]


def test_a_dimension_is_full_where_all_its_entries_are_used_in_order():
    assert whole([h(1, 4)], 4).full
    assert not Dim((h(1, 4),), 5).full
    assert not Dim((h(1, 3),), 4, start=1).full
    assert not Dim((h(1, 2),), 4, step=2).full
    assert not Dim((h(1, 4),), 4, step=2).full
    assert Dim((), 1, step=3).full
    assert spaces((whole([h(1, 4)], 4), Dim((), 1))) == {"h"}


# --- to canonical form and back ---

LAYOUTS = {
    "as it is": (Dim((t(1, 2),), 2), Dim((h(1, 12),), 12)),
    "transposed": (Dim((h(1, 12),), 12), Dim((t(1, 2),), 2)),
    "units in two parts, inner first": (Dim((h(1, 4),), 4), Dim((t(1, 2),), 2), Dim((h(4, 3),), 3)),
    "mixed in one dimension": (Dim((h(4, 3), t(1, 2), h(1, 4)), 24),),
    "no tokens": (Dim((h(4, 3),), 3), Dim((), 1), Dim((h(1, 4),), 4)),
    "nothing": (),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back(name):
    layout = LAYOUTS[name]
    x = numbered(*(d.extent for d in layout))
    canonical = to_canonical(jnp.asarray(x), layout, 2, 12)
    held = spaces(layout)
    assert canonical.shape == (2 if "t" in held else 1, 12 if "h" in held else 1)
    np.testing.assert_array_equal(canonical, canonical_of(x, layout, 2, 12))
    np.testing.assert_array_equal(from_canonical(canonical, layout, 2, 12), x)
    np.testing.assert_array_equal(from_canonical(jnp.broadcast_to(canonical, (2, 12)), layout, 2, 12), x)


@pytest.mark.parametrize("own", [h(4, 3), h(2, 2), h(1, 4)])
def test_some_digits_of_the_units_are_the_same_along_the_others(own):
    x = numbered(own.size)
    canonical = to_canonical(jnp.asarray(x), (Dim((own,), own.size),), 1, 12)
    np.testing.assert_array_equal(canonical[0], x[np.arange(12) // own.stride % own.size])
    np.testing.assert_array_equal(from_canonical(canonical, (Dim((own,), own.size),), 1, 12), x)


def test_of_a_dimension_that_is_used_in_part_only_that_part_is_taken():
    layout = (Dim((t(1, 2),), 2), Dim((h(1, 3),), 8, start=1, step=3))
    x = numbered(2, 8)
    np.testing.assert_array_equal(to_canonical(jnp.asarray(x), layout, 2, 3), x[:, 1::3])
