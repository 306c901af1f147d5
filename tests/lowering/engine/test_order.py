"""The engine takes the rows that are chosen in any order: a kernel may give them in another than the best first."""

import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.engine.engine import Steps, selected
from hire_xform.lowering.engine.head import vocab_logits
from hire_xform.lowering.engine.selection import select, selection_of
from hire_xform.lowering.predict.predictors import pack_predictor
from hire_xform.lowering.predict.quantized import Quantized
from hire_xform.lowering.primitives import da_top_k as home
from hire_xform.lowering.primitives.da_top_k import best_rows, da_top_k
from hire_xform.lowering.primitives.kernels import register_built_in


@pytest.fixture
def worst_first(portable_forms):
    """Gives the rows of which no order is asked for the other way round, and notes what was asked for."""
    asked = []

    def rule(scores, *, k, shards, ordered):
        asked.append(ordered)
        values, index = home._portable(scores, k=k, shards=shards)
        return (values, index) if ordered else (values[..., ::-1], index[..., ::-1])

    serves = lambda scores, *, k, shards, ordered: True  # noqa: E731
    register_built_in("da_top_k", "cpu", rule, serves, "worst first", takes=frozenset({"ordered"}))
    return asked


def test_only_who_asks_for_no_order_gets_another(worst_first, normal):
    scores = normal((2, 40))
    values, index = da_top_k(scores, 6)
    np.testing.assert_array_equal(best_rows(scores, 6), index[:, ::-1])
    assert np.all(np.diff(values) <= 0)
    assert worst_first == [True, False]


@pytest.mark.parametrize("tokens", [1, 3])
def test_chosen_rows_are_sorted_where_they_have_to_be(worst_first, normal, tokens):
    scores = normal((tokens, 60))
    selection = selection_of(tokens, 60, 9)
    ascending, _ = selected(Steps(scores=scores, compute=lambda index: index, in_order=True), selection)
    np.testing.assert_array_equal(ascending, np.sort(select(scores, selection), axis=-1))
    assert False in worst_first


def test_logits_are_the_same(worst_first, normal):
    x, rows = normal((2, 32)), normal((80, 32), seed=1)
    packed = pack_predictor(rows, Quantized(8))
    got = vocab_logits(x, rows, packed, Quantized(8), candidates=7, fill="-inf", out_dtype=jnp.float32)
    assert False in worst_first
    found = np.isfinite(got)
    assert np.all(found.sum(axis=1) >= 7)
    np.testing.assert_allclose(np.asarray(got)[found], np.asarray(x @ rows.T)[found], rtol=1e-4)
