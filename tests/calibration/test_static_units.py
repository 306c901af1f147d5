"""Units that fire for almost every token: a calibration finds them; they are always computed and never predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE, assert_same
from jax import lax

import hire_xform as hx

pytestmark = pytest.mark.any_jax("cases vary the predictor and how many units there are", every=2)

D, M, HOT = 16, 128, 24
CONFIG = hx.Config(vocab=None, rules=FORCE)


def weights(seed=0):
    """A block of which some units, strewn over it, are always above zero, and the others seldom."""
    rng = np.random.default_rng(seed)
    made = {n: rng.normal(size=s) * 0.3 for n, s in {"gate": (D, M), "up": (D, M), "down": (M, D)}.items()}
    bias = rng.normal(size=M) * 0.2 - 1.6
    bias[rng.permutation(M)[:HOT]] = 12.0
    return {name: jnp.asarray(a, jnp.float32) for name, a in {**made, "bias": bias}.items()}


def tokens(count=1, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, D)), jnp.float32)


def relu(p, x):
    return jax.nn.relu(x @ p["gate"] + p["bias"]) @ p["down"]


def reglu(p, x):
    return (jax.nn.relu(x @ p["gate"] + p["bias"]) * (x @ p["up"])) @ p["down"]


def layers(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x + reglu(w, x)), None), x, p)[0]


def calibrated(fun, p, recall=0.99, predictor=None):
    return hx.calibrate(
        fun,
        [(p, tokens(64, s)) for s in range(2)],
        recall=recall,
        config=CONFIG,
        predictors=[predictor or hx.Quantized(8)],
    )


@pytest.mark.parametrize("predictor", [hx.Quantized(8), hx.LowRank(0.75)], ids=str)
@pytest.mark.parametrize("fun", [relu, reglu])
def test_a_calibration_finds_them_and_bytes_fall(fun, predictor):
    p = weights()
    cal = calibrated(fun, p, predictor=predictor)
    (found,) = cal.sites.values()
    hot = np.flatnonzero(np.asarray(p["bias"]) > 0)
    assert found.static == HOT
    assert set(found.often[:HOT]) == set(hot)
    step = hx.sparsify(fun, config=CONFIG, calibration=cal)
    traced = step.trace(p, tokens())
    (site,) = traced.plan.sites
    assert (site.static, site.computed) == (HOT, int(found.sizes))
    assert "the 24 units that fire most are always computed and never predicted" in traced.explain()
    # Three tokens read them once.
    together = step.trace(p, tokens(3)).plan.sites[0]
    assert HOT < together.computed <= HOT + 3 * (site.computed - HOT)
    plain = found.chosen_for(0.99, static=False)
    assert found.bytes_at(int(found.sizes)) == site.sparse_bytes < plain.bytes_at(int(plain.sizes))
    if predictor == hx.Quantized(8):
        ups = 2 if fun is reglu else 1
        # A scale and 8 bits a column for each product, and the norm of the down row, of each unit that is predicted.
        assert site.sparse_bytes == (M - HOT) * (ups * (D + 4) + 4) + site.computed * (ups + 1) * 4 * D
    # What is predicted is as wide as the other units.
    widths = {v.shape[0] for form in jax.tree.leaves(traced.pack(p)) for v in [form] if v.dtype == jnp.int8}
    assert predictor != hx.Quantized(8) or widths == {M - HOT}


@pytest.mark.parametrize("fun", [relu, reglu])
@pytest.mark.parametrize("count", [1, 3])
def test_with_all_that_fires_the_result_is_dense(fun, count):
    p = weights()
    cal = calibrated(fun, p, recall=1.0)
    step = hx.sparsify(fun, config=CONFIG, calibration=cal)
    traced = step.trace(p, tokens(count))
    (site,) = traced.plan.sites
    assert site.static == HOT
    packed = traced.pack(p)
    for at in range(0, 60, 7):
        x = tokens(64, 0)[at : at + count]
        got, counts = step.with_fallbacks(packed, x)
        assert_same(got, fun(p, x))
        assert [int(n) for n in counts.values()] == [0]
    slope = jax.grad(lambda x, f, p: jnp.sin(f(p, x)).sum())
    x = tokens(64, 0)[:count]
    assert_same(slope(x, step, packed), slope(x, fun, p), 1e-4)
    batch = tokens(64, 1)[: 2 * count].reshape(2, count, D)
    assert_same(jax.vmap(lambda x: step(packed, x))(batch), jax.vmap(lambda x: fun(p, x))(batch), 1e-4)


def test_where_more_fire_than_are_left_to_be_chosen_it_is_counted():
    p = weights()
    step = hx.sparsify(relu, config=CONFIG, calibration=calibrated(relu, p))
    assert step.trace(p, tokens()).plan.sites[0].static == HOT
    for more, short in ((0.0, 0), (-9.0, 0), (12.0, 1)):
        own = {**p, "bias": p["bias"] + more}
        assert [int(n) for n in step.with_fallbacks(own, tokens(64, 0)[:1])[1].values()] == [short]


def test_layers_of_a_loop_have_units_of_their_own():
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b]), weights(), weights(seed=3))
    cal = calibrated(layers, stack, recall=1.0)
    (found,) = cal.sites.values()
    assert found.static == HOT
    assert set(found.often[0, :HOT]) != set(found.often[1, :HOT])
    step = hx.sparsify(layers, config=CONFIG, calibration=cal)
    traced = step.trace(stack, tokens(2))
    assert traced.plan.sites[0].static == HOT
    x = tokens(64, 0)[:2]
    assert_same(step(traced.pack(stack), x), layers(stack, x), 1e-4)


def test_a_calibration_with_them_is_saved_and_loaded(tmp_path):
    p = weights()
    cal = calibrated(reglu, p)
    cal.save(tmp_path / "c.safetensors")
    plans = [
        hx.sparsify(reglu, config=CONFIG, calibration=c).trace(p, tokens()).plan
        for c in (cal, hx.Calibration.load(tmp_path / "c.safetensors"))
    ]
    assert plans[0].sites == plans[1].sites
    assert plans[0].sites[0].static == HOT


def test_where_they_save_nothing_or_may_not_be_there_are_none():
    p = weights()
    seldom = {**p, "bias": jnp.full(M, -1.6)}
    (found,) = calibrated(relu, seldom).sites.values()
    assert found.static == 0
    cal = calibrated(reglu, p)
    for ffn in (hx.Ffn(active=1.0), hx.Ffn(predictor=hx.Quantized(4))):
        step = hx.sparsify(reglu, config=hx.Config(vocab=None, ffn=ffn, rules=FORCE), calibration=cal)
        assert step.trace(p, tokens()).plan.sites[0].static == 0
    full = hx.sparsify(reglu, config=hx.Config(vocab=None, ffn=hx.Ffn(active=1.0), rules=FORCE), calibration=cal)
    assert_same(full(p, tokens()), reglu(p, tokens()))


def test_their_rows_are_not_gathered():
    """One gather for each matrix, of the units predicted only; the others are sliced."""
    p = weights()
    traced = hx.sparsify(relu, config=CONFIG, calibration=calibrated(relu, p)).trace(p, tokens())
    gathered = [e.outvars[0].aval.shape for e in gathers(traced.sparse_jaxpr)]
    assert gathered
    assert all(shape[0] <= traced.plan.sites[0].computed - HOT for shape in gathered)


def gathers(jaxpr):
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive is lax.gather_p:
            yield eqn
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                    yield from gathers(sub)
