"""``shard_map``: a sparse step as its body, on one device and on eight; inside the function, it stays dense."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width, kinds, narrow
from jax import lax
from jax.sharding import Mesh, PartitionSpec

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


@pytest.mark.slow
def test_a_sparse_step_in_a_shard_map_on_eight_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", "import test_shard_map; test_shard_map.check(8)"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_shard_map_inside_the_function_stays_dense_and_says_so():
    w, x = weights(), state()
    mapped = jax.shard_map(decode, mesh=mesh_of(1), in_specs=(REPLICATED, SPLIT), out_specs=SPLIT)
    step = hx.sparsify(mapped, config=full_width())
    traced = step.trace(w, x)
    assert not traced.plan.sites
    assert len(traced.plan.refusals) == 1
    assert "shard_map is not entered" in traced.plan.refusals[0].reason
    assert_same(step(w, x), jax.jit(mapped)(w, x))
    assert_same(step(traced.pack(w), x), jax.jit(mapped)(w, x))
