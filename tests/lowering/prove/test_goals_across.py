"""What is proved across devices holds for whatever the dense products are within their bounds; devices by ``vmap``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.prove.goals import Nucleus, TopSet, proved, proved_across
from hire_xform.lowering.xla.devices import Devices

pytestmark = pytest.mark.any_jax("cases vary numbers, dtypes and predictors of arithmetic that is our own", every=3)

SHARDS, K, ROWS, TOKENS, DRAWS = 4, 3, 6, 400, 12


def case(seed, step):
    """Products and errors in steps so coarse that many tie; of each device's rows the candidates are the first."""
    rng = np.random.default_rng(seed)
    exact = np.round(rng.normal(size=(SHARDS, TOKENS, K)) * 4) * step
    exact[0, : TOKENS // 2, 0] += 3 * step  # half of the tokens have a clear best
    error = rng.choice([0.0, 0.0, 0.0, 0.5, 1.0], size=exact.shape) * step
    upper = np.round(rng.normal(size=(SHARDS, TOKENS, ROWS)) * 2 - 6) * step
    upper[..., :K] = -np.inf
    return tuple(a.astype(np.float32) for a in (exact, error, upper))


def across(goal, dtype, exact, error, upper):
    def one(*own):
        return proved_across(goal, *own, dtype, Devices(("devices",), SHARDS))

    found = np.asarray(jax.jit(jax.vmap(one, axis_name="devices"))(exact, error, upper))
    assert (found == found[0]).all()  # every device must branch alike
    return found[0]


def rounded(values, dtype):
    return np.asarray(jnp.asarray(values).astype(dtype).astype(jnp.float32))


def everything(of_candidates, of_others):
    """``[T, V]``: row ``i`` of device ``b`` is row ``b * ROWS + i``."""
    both = np.concatenate([of_candidates, of_others[..., K:]], axis=-1)
    return np.moveaxis(both, 0, 1).reshape(TOKENS, SHARDS * ROWS)


def drawn(exact, error, upper, rng):
    """Dense products at the ends of what they can be, and between."""
    inside = exact + error * rng.choice([-1.0, 0.0, 0.5, 1.0], size=error.shape).astype(np.float32)
    return everything(inside, upper - rng.choice([0.0, 0.0, 2.0], size=upper.shape).astype(np.float32))


def largest(values, k):
    """The ids of the k largest, the lowest id first among equal ones."""
    return np.argsort(-values, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("goal", [True, TopSet(1), TopSet(3)], ids=str)
def test_what_is_proved_holds_for_every_dense_product(goal, dtype):
    k = goal.k if isinstance(goal, TopSet) else 1
    for seed in range(4):
        # The larger values are as far apart as bf16 is there: half a step is lost in rounding.
        exact, error, upper = case(seed, 1.0 if seed % 2 else 0.25)
        exact, upper = (a + (128.0 if seed % 2 else 0.0) for a in (exact, upper))
        sure = across(goal, dtype, exact, error, upper)
        assert 0.2 < sure.mean() < 1.0
        made = largest(everything(rounded(exact, dtype), rounded(upper, dtype)), k)
        rng = np.random.default_rng(seed)
        for _ in range(DRAWS):
            dense = largest(rounded(drawn(exact, error, upper, rng), dtype), k)
            same = (np.sort(dense) == np.sort(made)).all(axis=1)
            assert same[sure].all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("goal", [True, TopSet(3), Nucleus(0.3)], ids=str)
def test_of_16_bits_it_holds_whether_the_dense_product_is_rounded_or_not(goal, dtype):
    devices, index = Devices(("devices",), SHARDS), jnp.arange(K)

    def one(*own):
        return proved(goal, *own, index, jnp.dtype(dtype), devices=devices)

    k, proved_at_all = goal.k if isinstance(goal, TopSet) else 1, []
    # Steps that are lost in rounding, or not; and products so small that few bits of them are left.
    for seed, step, shift in ((0, 0.25, 0.0), (1, 0.25, 30.0), (2, 1.0, 200.0), (3, 2.0**-25, 0.0)):
        exact, error, upper = case(seed, step)
        exact, upper = exact + np.float32(shift), upper + np.float32(shift)
        sure = np.asarray(jax.jit(jax.vmap(one, axis_name="devices"))(exact, error, upper))
        assert (sure == sure[0]).all()
        sure = sure[0]
        proved_at_all.append(sure.mean())
        rng = np.random.default_rng(seed)
        for _ in range(DRAWS):
            dense = drawn(exact, error, upper, rng)
            for values in (dense, rounded(dense, dtype)):
                if isinstance(goal, Nucleus):
                    shares = np.asarray(jax.nn.softmax(values, axis=-1)).reshape(TOKENS, SHARDS, ROWS)
                    assert (shares[..., :K].sum(axis=(1, 2))[sure] >= 1.0 - goal.eps - 1e-5).all()
                    continue
                for returned in (everything(exact, upper), everything(rounded(exact, dtype), rounded(upper, dtype))):
                    same = (np.sort(largest(values, k)) == np.sort(largest(returned, k))).all(axis=1)
                    assert same[sure].all()
    assert max(proved_at_all) > 0.2


def test_a_nucleus_holds_the_mass_of_every_dense_product():
    exact, error, upper = case(0, 0.5)
    for eps in (0.3, 0.05, 1e-3):
        sure = across(Nucleus(eps), jnp.float32, exact, error, upper)
        rng = np.random.default_rng(1)
        for _ in range(DRAWS):
            shares = np.asarray(jax.nn.softmax(drawn(exact, error, upper, rng), axis=-1))
            held = shares.reshape(TOKENS, SHARDS, ROWS)[..., :K].sum(axis=(1, 2))
            assert (held[sure] >= 1.0 - eps - 1e-5).all()
        assert (eps == 1e-3) or sure.any()


@pytest.mark.parametrize("goal", [True, TopSet(3), Nucleus(0.3)], ids=str)
def test_it_proves_what_one_device_proves_but_for_some_ties(goal):
    exact, error, upper = case(5, 0.25)
    whole = everything(exact, upper), everything(error, upper)
    index = np.concatenate([np.arange(K) + b * ROWS for b in range(SHARDS)]).astype(np.int32)
    others = np.full((TOKENS, SHARDS * ROWS), -np.inf, np.float32)
    rest = np.setdiff1d(np.arange(SHARDS * ROWS), index)
    others[:, rest] = whole[0][:, rest]
    alone = proved(goal, whole[0][:, index], whole[1][:, index], jnp.asarray(others), jnp.asarray(index), jnp.float32)
    alone, together = np.asarray(alone), across(goal, jnp.float32, exact, error, upper)
    assert not (together & ~alone).any() or goal is True
    assert (alone & ~together).mean() < 0.05
    assert together.mean() > 0.2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_proves_nothing(value):
    exact, error, upper = case(0, 0.25)
    for goal in (True, TopSet(2), Nucleus(0.3)):
        for number in range(3):
            given = [a.copy() for a in (exact, error, upper)]
            given[number][2, :, 1 if number < 2 else K] = value
            if number == 2 and value == -np.inf:
                continue  # a row that can't be anything
            assert not across(goal, jnp.float32, *given).any()


def test_fewer_candidates_than_a_set_wants():
    exact, error, upper = case(0, 0.25)
    assert not across(TopSet(SHARDS * K + 1), jnp.float32, exact, error, upper).any()
    assert across(TopSet(SHARDS * K + 1), jnp.float32, exact, error, upper[..., :K]).all()
