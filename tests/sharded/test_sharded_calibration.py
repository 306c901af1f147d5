"""A calibration does not mind where the weights are: over devices, and under a mesh that is set, it finds the same."""

import contextlib
import warnings

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width, kinds, named
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_xform as hx

D, M, V, LAYERS = 16, 64, 128, 2
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SPECS = {
    "over devices": {"up": P(None, None, "model"), "down": P(None, "model", None), "head": P(None, "model")},
    "over both axes": {
        "up": P(None, None, ("data", "model")),
        "down": P(None, ("data", "model"), None),
        "head": P(None, ("data", "model")),
    },
    "on each": {"up": P(), "down": P(), "head": P()},
}
EIGHT_BITS = [hx.Quantized(8)]
PLAIN, LOSSLESS = hx.Config(rules=named(hx.Vocab())), hx.lossless(rules=named(hx.Vocab(certify=True)))
SETTINGS = {
    "plain": {"config": PLAIN, "predictors": EIGHT_BITS},
    "fitted": {"config": PLAIN, "predictors": [hx.LowRank(0.5), hx.LowRank(0.5, bits=8)]},
    "groups": {"config": hx.Config(ffn=hx.Ffn(group_size=4), rules=PLAIN.rules), "predictors": EIGHT_BITS},
    "certified": {"config": LOSSLESS, "predictors": EIGHT_BITS},
    "divergence": {
        "config": hx.Config(rules=named(hx.Vocab(fill="predicted"))),
        "predictors": EIGHT_BITS,
        "max_kl": 0.05,
    },
}


@pytest.fixture(scope="module")
def found(request):
    return devices.outcomes(__name__, names=devices.asked_for(request))


def weights():
    rng = np.random.default_rng(0)
    w = {
        name: rng.normal(size=shape).astype(np.float32) * 0.3
        for name, shape in {"up": (LAYERS, D, M), "down": (LAYERS, M, D), "head": (D, V)}.items()
    }
    w["up"][:, :, :8] *= 4  # some units matter more
    return {name: jnp.asarray(a) for name, a in w.items()}


def batches(count=4):
    return [jnp.asarray(np.random.default_rng(i).normal(size=(32, D)), jnp.float32) for i in range(count)]


def model_of(scanned, explicit):
    def layer(x, w):
        hidden = jax.nn.relu(x @ w["up"])
        added = jnp.matmul(hidden, w["down"], out_sharding=jax.typeof(x).sharding) if explicit else hidden @ w["down"]
        return x + added, None

    def model(w, x):
        stack = {name: w[name] for name in ("up", "down")}
        if scanned:
            x = lax.scan(layer, x, stack)[0]
        else:
            for i in range(LAYERS):
                x, _ = layer(x, {name: leaf[i] for name, leaf in stack.items()})
        return x @ w["head"]

    return model


def mesh_of(types):
    return devices.mesh_of(4, 2, types)


def placed(mesh, where, arrays):
    specs = SPECS[where]
    return {name: jax.device_put(a, NamedSharding(mesh, specs[name])) for name, a in arrays.items()}


def calibrated(model, w, xs, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hx.HireWarning)  # too few tokens for what is asked of heads
        return hx.calibrate(model, [(w, x) for x in xs], **settings)


def assert_same_calibration(got, want):
    """The same up to rounding: sums in another order move a score past another one here and there."""
    assert list(got.sites) == list(want.sites)
    for path, site in want.sites.items():
        here = got.sites[path]
        assert (here.kind, here.target, here.criterion) == (site.kind, site.target, site.criterion)
        np.testing.assert_array_equal(here.tokens, site.tokens)
        for a, b in zip(here.covariances, site.covariances, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert list(here.curves) == list(site.curves)
        for spec, curve in site.curves.items():
            both = here.curves[spec].wanted, curve.wanted
            ours, theirs = (np.cumsum(wanted, axis=-1) / wanted.sum(-1, keepdims=True) for wanted in both)
            np.testing.assert_allclose(ours, theirs, atol=0.05)
        if here.predictor == site.predictor:
            np.testing.assert_allclose(here.sizes, site.sizes, atol=0.1 * site.units)


def compare(name, types, where, scanned, set_here):
    """Calibrates on one device and on many, and runs what was found where the weights are."""
    settings, xs = SETTINGS[name], batches()
    want = calibrated(model_of(scanned, False), weights(), xs, settings)
    model, mesh = model_of(scanned, types == EXPLICIT), mesh_of(types)
    with jax.set_mesh(mesh) if set_here else contextlib.nullcontext():
        w = placed(mesh, where, weights())
        *there, few = [jax.device_put(x, NamedSharding(mesh, P())) for x in (*xs, xs[0][:4])]
        got = calibrated(model, w, there, settings)
        assert_same_calibration(got, want)
        step = hx.sparsify(model, config=settings["config"], calibration=got)
        traced = step.trace(w, few)
        assert kinds(traced.plan) == ["ffn"] * (1 if scanned else LAYERS) + ["vocab"], traced.explain()
        dense, sparse = model(w, few), step(traced.pack(w), few)
        assert sparse.sharding.is_equivalent_to(jax.jit(model)(w, few).sharding, 2)
        if name == "certified":
            np.testing.assert_array_equal(jnp.argmax(sparse, -1), jnp.argmax(dense, -1))


def check_plain_over_devices():
    compare("plain", AUTO, "over devices", True, False)
    compare("plain", EXPLICIT, "over both axes", False, True)


def check_fitted_to_inputs_over_devices():
    compare("fitted", AUTO, "over both axes", True, True)
    compare("fitted", EXPLICIT, "over devices", True, False)


def check_groups_of_units_over_devices():
    compare("groups", AUTO, "over devices", True, True)


def check_certified_over_devices():
    compare("certified", EXPLICIT, "over both axes", True, True)


def check_a_stated_divergence_over_devices():
    compare("divergence", EXPLICIT, "over devices", False, True)


def check_weights_that_each_device_has_whole():
    compare("groups", EXPLICIT, "on each", True, False)
    compare("certified", AUTO, "on each", True, True)


def check_what_is_packed_first_under_a_mesh_that_is_set():
    """Nothing has packed weights of this width before."""
    for number, (types, where) in enumerate((t, w) for t in (AUTO, EXPLICIT) for w in SPECS):
        mesh, width = mesh_of(types), D + 8 * (number + 1)
        rng = np.random.default_rng(0)
        for config in (full_width(), full_width(hx.LowRank(0.5, bits=8)), LOSSLESS):
            with jax.set_mesh(mesh):
                head = jnp.asarray(rng.normal(size=(width, V)), jnp.bfloat16)
                w = placed(mesh, where, {"head": head})
                x = jax.device_put(jnp.asarray(rng.normal(size=(2, width)), jnp.bfloat16), NamedSharding(mesh, P()))
                step = hx.sparsify(lambda w, x: x @ w["head"], config=config)
                got = step(step.trace(w, x).pack(w), x)
                want = jax.jit(lambda w, x: x @ w["head"])(w, x)
                assert got.sharding.is_equivalent_to(want.sharding, 2)
                if config.vocab.certify:
                    np.testing.assert_array_equal(jnp.argmax(got, -1), jnp.argmax(want, -1))
                else:
                    assert_same(got, want, 2e-2)


def check_what_stays_dense_is_not_calibrated():
    """A weight cut along its inputs is refused where it is, and said to be so by the calibrated step."""
    mesh = mesh_of(AUTO)
    w = placed(mesh, "over devices", weights()) | {
        "head": jax.device_put(weights()["head"], NamedSharding(mesh, P("model", None)))
    }
    xs = [jax.device_put(x, NamedSharding(mesh, P())) for x in batches()]
    model, config = model_of(True, False), PLAIN
    calibration = calibrated(model, w, xs, {"config": config})
    assert [site.kind for site in calibration.sites.values()] == ["ffn"]
    traced = hx.sparsify(model, config=config, calibration=calibration).trace(w, xs[0][:4])
    assert kinds(traced.plan) == ["ffn"]
    assert len(traced.plan.refusals) == 1


# Measured over devices as other checks are on every JAX, with other settings.
SETTINGS_VARY = ("fitted_to_inputs", "groups_of_units", "a_stated_divergence")
SAME = pytest.mark.any_jax("settings of what other checks measure over devices on every JAX")
NAMES = [pytest.param(n, marks=[SAME] if any(s in n for s in SETTINGS_VARY) else []) for n in devices.checks(__name__)]


@pytest.mark.parametrize("name", NAMES)
def test_on_devices(found, name):
    assert not found[name], found[name]
