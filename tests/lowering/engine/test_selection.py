import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hire_xform.lowering.engine.selection import Selection, select, selection_of
from hire_xform.lowering.primitives.da_top_k import da_top_k

pytestmark = pytest.mark.any_jax("cases vary numbers of arithmetic that is our own", every=3)


def test_one_token_and_full_width_are_shared():
    assert selection_of(1, 100, 7) == Selection(mode="shared", size=7, k=7)
    assert selection_of(8, 100, 100) == Selection(mode="shared", size=100, k=100)


def test_the_fewer_rows_win():
    # 8 x 6.25 %: the union is 40 % of the rows, the sets 50 %.
    assert selection_of(8, 8192, 512) == Selection(mode="shared", size=3304, k=512)
    # 4 x 0.2 % hardly overlap: nothing to share.
    assert selection_of(4, 131072, 256) == Selection(mode="per_token", size=256, k=256)
    for tokens in (1, 2, 8):
        for k in (1, 50, 500, 1000):
            selection = selection_of(tokens, 1000, k)
            assert selection.rows_read(tokens) <= tokens * k
            assert selection.k == k <= selection.size <= 1000


@pytest.mark.parametrize(
    ("args", "message"),
    [((0, 8, 1), "tokens=0"), ((1, 8, 0), "k=0"), ((1, 8, 9), "expected 1 <= k <= 8")],
)
def test_bad_sizes_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        selection_of(*args)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_shared_set_holds_every_tokens_own_best(data):
    """On each of one or two devices, which choose their share of the rows that they have."""
    shards = data.draw(st.sampled_from([1, 2]))
    tokens, n, k = 3, 24 // shards, 4 // shards
    size = data.draw(st.sampled_from([4, 8, 12, 24])) // shards
    pool = st.sampled_from([-3.0, -1e30, 0.0, 1e-30, 1.0, 2.5, 1e30, np.inf, -np.inf, np.nan])
    scores = np.array(data.draw(st.lists(pool, min_size=tokens * n, max_size=tokens * n)), np.float32).reshape(
        tokens, n
    )
    index = np.asarray(select(jnp.asarray(scores), Selection(mode="shared", size=size, k=k)))
    assert len(set(index.tolist())) == size
    union = set(np.asarray(da_top_k(scores, k)[1]).ravel().tolist())
    if len(union) <= size:
        assert union <= set(index.tolist())


def test_an_overfull_shared_set_takes_better_ranks_first(normal):
    scores = normal((4, 60)) * jnp.array([[1.0], [100.0], [0.01], [1.0]]) - 50.0
    own = np.asarray(da_top_k(scores, 5)[1])
    index = select(scores, Selection(mode="shared", size=len(set(own[:, :3].ravel().tolist())), k=5))
    assert set(own[:, :3].ravel().tolist()) == set(np.asarray(index).tolist())


def test_per_token_sets_are_each_tokens_best(normal):
    scores = normal((4, 60))
    index = select(scores, Selection(mode="per_token", size=5, k=5))
    # In any order, as it says.
    np.testing.assert_array_equal(np.sort(index), np.sort(jax.lax.top_k(scores, 5)[1]))


def test_full_width_takes_every_row_once(normal):
    for tokens in (1, 3):
        index = select(normal((tokens, 30)), selection_of(tokens, 30, 30))
        np.testing.assert_array_equal(np.sort(index), np.arange(30))
