"""``shard_map``: a sparse step as its body, and a body inside the function, on one device and on eight."""

import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width, kinds, named, narrow
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import hire_xform as hx

D, M, V, TOKENS = 8, 64, 40, 8
REPLICATED, SPLIT = PartitionSpec(), PartitionSpec("d")


def weights():
    rng = np.random.default_rng(0)
    shapes = {"up": (2, D, M), "down": (2, M, D), "head": (D, V)}
    return {name: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32) for name, shape in shapes.items()}


def decode(w, x):
    def layer(x, slices):
        return x + jax.nn.relu(x @ slices["up"]) @ slices["down"], None

    x, _ = lax.scan(layer, x, {"up": w["up"], "down": w["down"]})
    return jax.nn.relu(x @ w["up"][0]) @ w["down"][0], x @ w["head"]


def state():
    return jnp.asarray(np.random.default_rng(1).normal(size=(TOKENS, D)), jnp.float32)


def mesh_of(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("d",))


def check(devices):
    """A sparse step as the body of a shard_map: weights passed in or closed over; its value and its derivative."""
    w, x = weights(), state()
    share = jax.ShapeDtypeStruct((TOKENS // devices, D), jnp.float32)
    mapped = partial(jax.shard_map, mesh=mesh_of(devices), out_specs=SPLIT)
    dense = mapped(decode, in_specs=(REPLICATED, SPLIT))

    def total(fun, x):
        return sum(jnp.sum(jnp.sin(r)) for r in jax.tree.leaves(fun(x)))

    step = hx.sparsify(decode, config=full_width())
    traced = step.trace(w, share)
    assert kinds(traced.plan) == ["ffn", "ffn", "vocab"]
    packed = traced.pack(w)
    passed = partial(mapped(step, in_specs=(REPLICATED, SPLIT)), packed)
    closed = mapped(partial(step, packed), in_specs=SPLIT)
    plain = mapped(partial(step, w), in_specs=SPLIT)
    for sparse in (passed, closed, plain):
        assert_same(jax.jit(sparse)(x), jax.jit(dense)(w, x))
    gradient = jax.jit(jax.grad(partial(total, passed)))(x)
    assert_same(gradient, jax.jit(jax.grad(partial(total, partial(dense, w))))(x), 1e-4)
    few = hx.sparsify(decode, config=narrow(0.4, 8))
    few_mapped = mapped(few, in_specs=(REPLICATED, SPLIT))
    results = jax.jit(few_mapped)(few.trace(w, share).pack(w), x)
    assert jax.tree.map(jnp.shape, results) == jax.tree.map(jnp.shape, decode(w, x))


def test_a_sparse_step_in_a_shard_map_on_one_device():
    check(1)


def run_with_eight_devices(call):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", f"import test_shard_map; test_shard_map.{call}"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_sparse_step_in_a_shard_map_on_eight_devices():
    run_with_eight_devices("check(8)")


# A shard_map inside the function: the hidden axis and the vocabulary are cut over "model", the tokens over "data".
CUT = {
    "up": PartitionSpec(None, None, "model"),
    "down": PartitionSpec(None, "model", None),
    "bias": PartitionSpec("model"),
    "head": PartitionSpec(None, "model"),
}
TOKENS_CUT = PartitionSpec("data")
BOTH_CUT = PartitionSpec("data", "model")


def cut_weights():
    return {**weights(), "bias": jnp.asarray(np.random.default_rng(2).normal(size=M) * 0.3, jnp.float32)}


def own_part(w, x):
    """What each device runs of the model: its hidden units and its logits."""

    def layer(x, slices):
        hidden = jax.nn.relu(x @ slices["up"] + w["bias"])
        return x + lax.psum(hidden @ slices["down"], "model"), None

    x, _ = lax.scan(layer, x, {"up": w["up"], "down": w["down"]})
    return x @ w["head"]


def gathered(w, x):
    return lax.all_gather(own_part(w, x), "model", axis=1, tiled=True)


def most_likely(w, x):
    logits = own_part(w, x)
    best = logits.max(-1)
    token = logits.argmax(-1) + lax.axis_index("model") * logits.shape[-1]
    return lax.pmin(jnp.where(best == lax.pmax(best, "model"), token, V), "model")


def two_axes(devices):
    return Mesh(np.array(jax.devices()[:devices]).reshape((2, 4) if devices == 8 else (1, 1)), ("data", "model"))


def forms(mesh):
    """Ways to write it."""
    cut = partial(jax.shard_map, mesh=mesh, in_specs=(CUT, TOKENS_CUT))

    block = jax.shard_map(
        lambda up, down, bias, x: lax.psum(jax.nn.relu(x @ up + bias) @ down, "model"),
        mesh=mesh,
        in_specs=(PartitionSpec(None, "model"), PartitionSpec("model", None), CUT["bias"], TOKENS_CUT),
        out_specs=TOKENS_CUT,
    )

    def in_a_fori_loop(w, x):
        def layer(i, x):
            return x + block(w["up"][i], lax.dynamic_index_in_dim(w["down"], i, keepdims=False), w["bias"], x)

        return lax.fori_loop(0, w["up"].shape[0], layer, x) @ w["head"]

    def in_a_scan(w, x):
        def layer(x, slices):
            return x + block(slices["up"], slices["down"], w["bias"], x), None

        x, _ = lax.scan(layer, x, {"up": w["up"], "down": w["down"]})
        return x @ w["head"]

    def nested(w, x):
        def inside(w, x):
            kept = {name: PartitionSpec(*("model" if n == "model" else None for n in s)) for name, s in CUT.items()}
            own = jax.shard_map(
                own_part,
                in_specs=(kept, PartitionSpec()),
                out_specs=PartitionSpec(None, "model"),
                axis_names={"model"},
            )
            return own(w, x)

        whole = jax.tree.map(lambda _: PartitionSpec(), w)
        return jax.shard_map(
            inside, mesh=mesh, in_specs=(whole, TOKENS_CUT), out_specs=TOKENS_CUT, axis_names={"data"}
        )(w, x)

    return {
        "logits": cut(own_part, out_specs=BOTH_CUT),
        "gathered": cut(gathered, out_specs=TOKENS_CUT, check_vma=False),
        "most likely": cut(most_likely, out_specs=TOKENS_CUT),
        "unchecked": cut(own_part, out_specs=BOTH_CUT, check_vma=False),
        "remat": cut(jax.checkpoint(own_part), out_specs=BOTH_CUT),
        "jit": cut(jax.jit(own_part), out_specs=BOTH_CUT),
        "in a scan": in_a_scan,
        "in a fori_loop": in_a_fori_loop,
        "nested": jax.jit(nested),
        "one manual axis": jax.jit(
            jax.shard_map(
                own_part,
                mesh=mesh,
                in_specs=(CUT, REPLICATED),
                out_specs=PartitionSpec(None, "model"),
                axis_names={"model"},
            )
        ),
        "whole weights": jax.shard_map(
            decode, mesh=mesh, in_specs=(REPLICATED, TOKENS_CUT), out_specs=TOKENS_CUT, check_vma=True
        ),
    }


FORMS = tuple(forms(two_axes(1)))
# A token has none, and JAX (0.10 to 0.12) can't lower the dense derivative of one shard_map in another.
WITHOUT_DERIVATIVE = ("most likely", "nested")


def check_inside(name, devices, evaluated=True):
    """Sites are found, whole they equal dense, and they are differentiated as the dense form is.

    Unless ``evaluated`` they are rewritten and differentiated, and neither compiled nor run.
    """
    w, x = cut_weights(), state()
    fun = forms(two_axes(devices))[name]
    step = hx.sparsify(fun, config=full_width())
    traced = step.trace(w, x)
    assert kinds(traced.plan) == (["ffn", "ffn", "vocab"] if name == "whole weights" else ["ffn", "vocab"])
    assert not traced.plan.refusals
    packed = traced.pack(w)

    def total(fun, x):
        return sum(jnp.sum(jnp.sin(r)) for r in jax.tree.leaves(fun(x)))

    def slope(step, w):
        return jax.jit(jax.grad(partial(total, partial(step, w))))

    if not evaluated:
        assert jax.eval_shape(step, packed, x) == jax.eval_shape(fun, w, x)
        if name not in WITHOUT_DERIVATIVE:
            assert jax.eval_shape(slope(step, packed), x) == jax.eval_shape(slope(fun, w), x)
        return
    dense = jax.jit(fun)(w, x)
    assert_same(step(w, x), dense)
    assert_same(step(packed, x), dense)
    few = hx.sparsify(fun, config=narrow(0.4, 8))
    few_packed = few.trace(w, x).pack(w)
    shapes = jax.tree.map(lambda r: (r.shape, r.dtype), dense)
    assert jax.tree.map(lambda r: (r.shape, r.dtype), few(few_packed, x)) == shapes
    if name not in WITHOUT_DERIVATIVE:
        assert_same(slope(step, packed)(x), slope(fun, w)(x), 1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_a_shard_map_inside_the_function_on_one_device(name, evaluated):
    check_inside(name, 1, evaluated)


def test_counts_are_had_in_nested_shard_maps():
    """Of a block in a scan that is not proved; a step's first calls have them, too."""
    w, x = cut_weights(), state()
    step = hx.sparsify(forms(two_axes(1))["nested"], config=narrow(0.05, 8))
    result, counts = step.with_fallbacks(w, x)
    assert_same(result, step(w, x), 0.0)
    ((path, count),) = counts.items()
    assert "shard_map[0]/shard_map[0]/scan[0]" in path
    assert int(count) > 0


def check_all_inside():
    for name in FORMS:
        check_inside(name, 8)


@pytest.mark.slow
def test_a_shard_map_inside_the_function_on_eight_devices():
    run_with_eight_devices("check_all_inside()")


def check_certified(devices):
    """Tokens are the dense ones, and every device's fallback is counted: of equal logits no one is proved the best."""
    w, x = cut_weights(), state()
    config = hx.Config(ffn=None, rules=named(hx.Vocab(candidates=4, certify=True)))
    fun = forms(two_axes(devices))["most likely"]
    step = hx.sparsify(fun, config=config)
    for weights in (w, {**w, "head": jnp.zeros_like(w["head"])}):
        traced = step.trace(weights, x)
        packed = traced.pack(weights)
        tokens, fallbacks = step.with_fallbacks(packed, x)
        np.testing.assert_array_equal(tokens, jax.jit(fun)(weights, x))
    assert list(fallbacks.values()) == [devices]
    # Which device has the best logit is decided by the program itself.
    assert "(most_likely) decides by what each device knows of its own logits" in traced.explain()


def test_a_certified_head_in_a_shard_map_on_one_device():
    check_certified(1)


@pytest.mark.slow
def test_a_certified_head_in_a_shard_map_on_eight_devices():
    run_with_eight_devices("check_certified(8)")


COLLECTIVE = r"= (\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\("


def check_communication():
    """Sparse as dense: one sum over devices in the layers' loop; packed arrays lie where they are read."""
    mesh = two_axes(8)
    w, x = cut_weights(), state()
    placed = {name: jax.device_put(a, NamedSharding(mesh, CUT[name])) for name, a in w.items()}
    x = jax.device_put(x, NamedSharding(mesh, TOKENS_CUT))
    fun = forms(mesh)["logits"]
    step = hx.sparsify(fun, config=narrow(0.4, 8))
    traced = step.trace(placed, x)
    # Each device has 10 of 40 logits and takes 2 of the 8 candidates for each of its 4 tokens, in one set.
    head = traced.plan.sites[1]
    assert (head.units, head.tokens, head.shared) == (V // 4, TOKENS // 2, True)
    assert head.computed < head.units
    packed = traced.pack(placed)
    for array in jax.tree.leaves(packed):
        assert array.addressable_shards[0].data.nbytes * 4 == array.nbytes
    jitted, operands = step.program(packed, x)
    compiled = jitted.lower(*operands).compile().as_text()
    dense = jax.jit(fun).lower(placed, x).compile().as_text()
    assert re.findall(COLLECTIVE, compiled) == re.findall(COLLECTIVE, dense)
    assert len(re.findall(COLLECTIVE, dense)) == 1


@pytest.mark.slow
def test_a_rewritten_shard_map_communicates_as_the_dense_one_does():
    run_with_eight_devices("check_communication()")


def test_each_device_takes_its_share_of_the_candidates():
    w, x = cut_weights(), state()[:1]
    mesh = jax.sharding.AbstractMesh((1, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    cut = jax.shard_map(own_part, mesh=mesh, in_specs=(CUT, TOKENS_CUT), out_specs=BOTH_CUT)
    block, head = hx.sparsify(cut, config=narrow(0.25, 7)).trace(w, x).plan.sites
    assert (block.units, block.computed) == (M // 4, M // 16)
    assert (head.units, head.computed) == (V // 4, 2)


def test_weights_cut_along_their_inputs_stay_dense():
    w, x = cut_weights(), state()
    mesh = two_axes(1)
    specs = {**dict.fromkeys(w, REPLICATED), "up": PartitionSpec(None, "model", None), "head": PartitionSpec("model")}

    def partial_sums(w, x):
        hidden = jax.nn.relu(lax.psum(x @ w["up"][0], "model"))
        return hidden @ w["down"][0], lax.psum(x @ w["head"], "model")

    cut = jax.shard_map(partial_sums, mesh=mesh, in_specs=(specs, BOTH_CUT), out_specs=TOKENS_CUT)
    step = hx.sparsify(cut, config=full_width())
    plan = step.trace(w, x).plan
    assert not plan.sites
    assert len(plan.refusals) == 3
    assert sum("goes into psum" in r.reason for r in plan.refusals) == 2
    assert_same(step(w, x), jax.jit(cut)(w, x), 0.0)
