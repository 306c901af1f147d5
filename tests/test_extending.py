"""What users add from outside, by toys: nothing here touches a file of the package.

docs/extending/ says the same in words.
"""

import dataclasses
import doctest

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width, narrow

import hire_xform as hx

P = jax.sharding.PartitionSpec
D, M, HIDDEN, LAYERS = 16, 64, 8, 3


def block(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def layers(params, x):
    return jax.lax.scan(lambda x, layer: (x + block(layer, x), None), x, params)[0]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def block_params(*lead):
    return {"up": normal(0, *lead, D, M) / D**0.5, "down": normal(1, *lead, M, D) / M**0.5}


# --- a predictor


class Mlp(hx.Predictor):
    """A trained network of two layers, from a block's input to a score for each of its units."""

    def __init__(self, first, second, stack_axes=0):
        self.first, self.second, self.stack_axes = first, second, stack_axes

    @property
    def arrays(self):
        return {"first": self.first, "second": self.second}  # [d, r] and [m, r]

    def pack(self, rows, given):
        # Units that are always computed have no scores, and others may have been moved.
        return {"first": given.arrays["first"], "second": given.arrays["second"][given.numbers]}

    def scores(self, x, packed, n):
        return jax.nn.relu(x @ packed["first"]) @ packed["second"].T


def wants(units, *lead, stack_axes=0):
    """A network that wants these units, whatever the input."""
    second = np.full((*lead, M, 2 * HIDDEN), -1.0, np.float32)
    np.put_along_axis(second, np.asarray(units)[..., None], 1.0, axis=-2)
    first = normal(2, *lead, D, HIDDEN)
    return Mlp(jnp.concatenate([first, -first], axis=-1), second, stack_axes)


def of_units(params, x, units):
    return jax.nn.relu(x @ params["up"][:, units]) @ params["down"][units]


def test_a_predictor_of_the_users_own_chooses_the_units():
    params, x, units = block_params(), normal(3, 1, D), np.random.default_rng(4).permutation(M)[: M // 4]
    step = hx.sparsify(block, config=narrow(active=0.25, predictor=wants(units)))
    traced = step.trace(params, x)
    assert "Mlp(first [16, 16], second [64, 16])" in traced.explain()
    assert '"predictor": "Mlp(' in traced.plan.to_json()
    assert_same(step(params, x), of_units(params, x, units))
    packed = traced.pack(params)
    assert_same(jax.jit(step)(packed, x), of_units(params, x, units))
    others = np.setdiff1d(np.arange(M), units)[: M // 4]
    again = hx.sparsify(block, config=narrow(active=0.25, predictor=wants(others)))
    assert_same(again(params, x), of_units(params, x, others))


def test_it_has_arrays_of_its_own_in_each_layer():
    params, x = block_params(LAYERS), normal(3, 1, D)
    units = np.stack([np.random.default_rng(seed).permutation(M)[: M // 4] for seed in range(LAYERS)])
    predictor = wants(units, LAYERS, stack_axes=1)
    step = hx.sparsify(layers, config=narrow(active=0.25, predictor=predictor))
    want = x
    for layer in range(LAYERS):
        want = want + of_units(jax.tree.map(lambda a, at=layer: a[at], params), want, units[layer])
    assert_same(step(params, x), want)
    assert_same(step(step.trace(params, x).pack(params), x), want)


@pytest.mark.parametrize("lead", [(), (LAYERS,)], ids=["one block", "a scan"])
def test_at_full_width_it_does_not_matter_what_it_says(lead):
    fun, params, x = (layers if lead else block), block_params(*lead), normal(3, 4, D)
    predictor = Mlp(normal(5, *lead, D, HIDDEN), normal(6, *lead, M, HIDDEN), stack_axes=len(lead))
    step = hx.sparsify(fun, config=full_width(predictor))
    assert len(step.trace(params, x).plan.sites) == 1
    assert_same(step(params, x), fun(params, x))
    assert_same(jax.vmap(step, (None, 0))(step.trace(params, x).pack(params), x[:, None]), fun(params, x)[:, None])
    got = jax.grad(lambda x: jnp.sum(jnp.sin(step(params, x))))(x)
    assert_same(got, jax.grad(lambda x: jnp.sum(jnp.sin(fun(params, x))))(x))


@pytest.mark.parametrize("group_size", [1, 4])
def test_a_calibration_measures_it_and_its_arrays_follow_the_units(group_size):
    """Units that nearly always fire are always computed, and grouped ones are moved: arrays by unit go with them."""
    params = block_params()
    often = np.arange(3, M, 5)
    # A tenth of the units fires for every input: one column is what all inputs have in common.
    params["up"] = params["up"].at[0].set(-6.0).at[0, often].set(9.0)
    batches = [(params, normal(10 + s, 200, D).at[:, 0].set(1.0)) for s in range(3)]
    exact = Mlp(params["up"], np.eye(M, dtype=np.float32))
    config = hx.Config(ffn=hx.Ffn(predictor=exact, certify=False, group_size=group_size))
    calibration = hx.calibrate(block, batches, config=config, recall=0.999)
    (site,) = calibration.sites.values()
    assert site.predictor is exact
    assert site.static > 0 if group_size == 1 else site.order is not None
    step = hx.sparsify(block, config=dataclasses.replace(config, rules=narrow().rules), calibration=calibration)
    (planned,) = step.trace(params, batches[0][1][:1]).plan.sites
    assert planned.computed < M / 2 * (1 if group_size == 1 else 2)
    for t in range(8):
        x = batches[1][1][t : t + 1]
        assert_same(step(params, x), block(params, x), 1e-3)
    with pytest.raises(ValueError, match=r"Calibration.save: predictor Mlp\(.* is no dataclass; .*settings\(\)"):
        calibration.save("unwritten")


@dataclasses.dataclass(frozen=True)
class OfSigns(hx.Predictor):
    """The rows' signs, times their mean magnitude; made of the rows alone."""

    scale: float = 1.0

    def pack(self, rows, given):
        return {"signs": jnp.sign(rows).astype(jnp.int8), "size": self.scale * jnp.mean(jnp.abs(rows), axis=1)}

    def scores(self, x, packed, n):
        return (x @ packed["signs"].T.astype(x.dtype)) * packed["size"]


def test_it_may_be_made_of_the_rows_and_saved_by_its_settings(tmp_path):
    params = block_params()
    batches = [(params, normal(10 + s, 100, D)) for s in range(2)]
    predictors = [hx.Quantized(8), OfSigns(2.0)]
    calibration = hx.calibrate(block, batches, predictors=predictors, recall=0.9, config=hx.approximate())
    (site,) = calibration.sites.values()
    assert set(site.curves) == set(predictors)
    assert site.curves[OfSigns(2.0)].predictor_bytes < 4 * M * D
    calibration.save(tmp_path / "c")
    (again,) = hx.Calibration.load(tmp_path / "c").sites.values()
    assert again.predictor == site.predictor
    assert set(again.curves) == set(predictors)


def test_a_file_that_names_an_unknown_predictor_says_so(tmp_path):
    params = block_params()
    saved = tmp_path / "c"

    def save():
        @dataclasses.dataclass(frozen=True)
        class Gone(OfSigns):
            pass

        batches = [(params, normal(10, 100, D))]
        config = hx.Config(ffn=hx.Ffn(predictor=Gone(), certify=False))
        hx.calibrate(block, batches, recall=0.9, config=config).save(saved)
        Gone.__name__ = "Renamed"  # as where its module was not imported

    save()
    with pytest.raises(ValueError, match=r"names the predictor 'Gone', which is not defined here.* import the module"):
        hx.Calibration.load(saved)


class Exact(hx.Predictor):
    """The rows themselves, f32; what floating point makes of products is all that there is to bound."""

    proves = True

    def pack(self, rows, given):
        return {"rows": rows}

    def scores(self, x, packed, n):
        return x @ packed["rows"].T

    def pack_proof(self, rows, given):
        return {"rows": rows, "norms": jnp.linalg.norm(rows, axis=1) * (1 + 1e-5)}

    def bounds(self, x, proof, input_bits):
        x = x.astype(jnp.float32)
        scores = x @ proof["rows"].T
        # Twice what Higham has for a sum of D products, in f32 inputs as a CPU keeps them.
        assert input_bits == 24
        error = 4e-7 * D * jnp.linalg.norm(x, axis=1, keepdims=True) * proof["norms"] + 1e-30
        return scores, scores + error, 2 * error


def test_one_that_proves_may_be_certified():
    params, x = block_params(), normal(3, 1, D)
    params["up"] = params["up"].at[0].set(-4.0)  # most units are zero, for inputs that begin with a one
    x = x.at[0, 0].set(1.0)
    config = hx.Config(ffn=hx.Ffn(active=0.5, certify=True, predictor=Exact()), rules=(hx.Rule("*", force=True),))
    step = hx.sparsify(block, config=config)
    (site,) = step.trace(params, x).plan.sites
    assert site.settings.certify
    assert_same(step(params, x), block(params, x))
    counts = step.with_rungs(params, x)[1][site.path]
    assert counts.tolist() == [1, 0]  # proved, not run dense


def refusals(predictor, params=None, fun=block, **ffn):
    params = block_params() if params is None else params
    config = hx.Config(ffn=hx.Ffn(predictor=predictor, **ffn), rules=(hx.Rule("*", force=True),))
    plan = hx.sparsify(fun, config=config).trace(params, normal(3, 1, D)).plan
    assert not plan.sites
    return plan.refusals[0].reason


def test_what_it_can_not_do_is_refused_by_its_name():
    predictor = wants(np.arange(8))
    assert "predictor=Mlp(first [16, 16], second [64, 16]) proves nothing" in refusals(predictor)
    assert "should be those of the weight, which is stacked [3]" in refusals(
        predictor, block_params(LAYERS), layers, active=0.5
    )

    class Needy(OfSigns):
        needs_inputs = "second moments"

    assert "needs the second moments of this site's inputs; pass calibration=" in refusals(Needy(), active=0.5)


def check_over_devices_each_packs_its_rows_and_arrays_of_whole_weights_are_refused():
    mesh = devices.mesh_of(4)
    specs = {"up": P(None, "model"), "down": P("model", None)}
    placed = {n: jax.device_put(a, jax.sharding.NamedSharding(mesh, specs[n])) for n, a in block_params().items()}
    x = normal(3, 1, D)
    step = hx.sparsify(block, config=full_width(OfSigns()))
    assert step.trace(placed, x).plan.sites[0].shards == 4
    assert_same(step(placed, x), block(placed, x))
    reason = "holds arrays of whole weights, and the rows of these are over several devices"
    assert reason in refusals(wants(np.arange(8)), placed, active=0.5)


def test_over_devices():
    for name, raised in devices.outcomes(__name__).items():
        assert not raised, f"{name}: {raised}"


def test_wrong_predictors_are_told_what_is_wrong():
    with pytest.raises(ValueError, match=r"Ffn\(predictor=.*a subclass of hx.Predictor"):
        hx.Ffn(predictor=Mlp)

    @dataclasses.dataclass(frozen=True)
    class Held(OfSigns):
        held: object = None

    with pytest.raises(ValueError, match=r"hashable, such as a frozen dataclass .*unhashable type"):
        hx.Ffn(predictor=Held(held=[1]))

    class Short(OfSigns):
        def scores(self, x, packed, n):
            return super().scores(x, packed, n)[:, 1:]

    params, x = block_params(), normal(3, 1, D)
    with pytest.raises(ValueError, match=r"Short.*scores have shape \(1, 63\); expected \(1, 64\)"):
        hx.sparsify(block, config=narrow(predictor=Short()))(params, x)
    with pytest.raises(NotImplementedError, match=r"Predictor: expected a method pack\(rows, given\)"):
        hx.sparsify(block, config=narrow(predictor=hx.Predictor()))(params, x)


# --- a kernel for one step


@pytest.fixture
def kernel(portable_forms):
    """`kernel(step, rule, **more)` registers a kernel for CPUs, for this test."""
    removed = []

    def register(step, rule, **more):
        removed.append(hx.register_kernel(step, "cpu", rule, **more))

    yield register
    for remove in removed:
        remove()
    jax.clear_caches()


def gathered(h, rows, index, *, group_size, out_dtype):
    """Sums of chosen rows as one would write them at first, and doubled, so that one sees them."""
    assert group_size == 1
    return (2 * h @ rows[index]).astype(out_dtype)


def test_a_kernel_of_the_users_own_runs_a_step(kernel):
    params, x = block_params(), normal(3, 1, D)
    config = full_width()
    assert_same(hx.sparsify(block, config=config)(params, x), block(params, x))
    assert hx.backends()["hire_combine_rows"]["cpu"] == "portable"
    kernel("hire_combine_rows", gathered)
    assert hx.backends()["hire_combine_rows"] == dict.fromkeys(("cuda", "rocm", "tpu"), "portable") | {
        "cpu": "gathered"
    }
    step = hx.sparsify(block, config=config)
    assert_same(step(params, x), 2 * block(params, x))
    packed = step.trace(params, x).pack(params)
    assert_same(jax.vmap(step, (None, 0))(packed, x[None]), 2 * block(params, x)[None])
    stacked = hx.sparsify(layers, config=config)
    want = x
    for layer in range(LAYERS):
        want = want + 2 * block(jax.tree.map(lambda a, at=layer: a[at], block_params(LAYERS)), want)
    assert_same(stacked(block_params(LAYERS), x), want)


def test_where_a_kernel_does_not_serve_the_portable_form_runs(kernel):
    seen = []

    def serves(h, rows, index, *, group_size, out_dtype):
        seen.append((h.shape, rows.shape, index.shape))
        return h.shape[0] == 1

    kernel("hire_combine_rows", gathered, serves=serves)
    params, x = block_params(), normal(3, 2, D)
    step = hx.sparsify(block, config=full_width())
    assert_same(step(params, x), block(params, x))
    assert_same(step(params, x[:1]), 2 * block(params, x[:1]))
    assert seen == [((2, M), (M, D), (M,)), ((1, M), (M, D), (M,))]


def test_da_top_k_is_public_and_its_example_runs():
    found = doctest.DocTestFinder().find(hx.da_top_k, "da_top_k", globs={"hx": hx, "jnp": jnp})
    assert found[0].examples
    assert doctest.DocTestRunner().run(found[0]).failed == 0
    with pytest.raises(TypeError, match=r"da_top_k: k=2.5; expected an integer"):
        hx.da_top_k(jnp.ones(4), 2.5)
    with pytest.raises(TypeError, match=r"da_top_k: shards=True; expected an integer"):
        hx.da_top_k(jnp.ones(4), 2, shards=True)
