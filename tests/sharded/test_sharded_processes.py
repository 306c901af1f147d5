"""Weights placed over the devices of several processes, each of which has loaded only its own: the same as in one."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sharded as one
from checks import FORCE, full_width
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hire_xform as hx

PROCESSES = 4


def child(number, port, types):
    """In a process of its own."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, number)
    mesh = jax.make_mesh((PROCESSES,), ("model",), axis_types=(getattr(AxisType, types),))

    def load(array, spec):
        """As from a checkpoint: a process is asked for its own part only."""
        return jax.make_array_from_callback(
            array.shape, NamedSharding(mesh, spec), lambda index: np.asarray(array)[index]
        )

    w = {name: load(a, one.SPECS[name]) for name, a in one.weights().items()}
    x = load(one.tokens(), PartitionSpec())
    step = hx.sparsify(one.decode if types == "Auto" else one.explicit_decode, config=full_width())
    want = np.asarray(one.decode(one.weights(), one.tokens()))
    for logits in (step(w, x), step(step.trace(w, x).pack(w), x)):
        (own,) = logits.addressable_shards
        assert own.data.shape == (one.TOKENS, one.V // PROCESSES)
        np.testing.assert_allclose(np.asarray(own.data), want[own.index], rtol=1e-4, atol=1e-3)
    # Rows of the head go to other processes when they are packed, and what is proved is proved of all.
    head = np.asarray(one.tokens()) @ np.asarray(one.weights()["head"])
    for config in (full_width(), hx.lossless(rules=FORCE)):
        step = hx.sparsify(lambda w, x: jnp.argmax(x @ w["head"], axis=-1), config=config)
        traced = step.trace(w, x)
        assert "cyclically" in traced.explain()
        best = step(traced.pack(w), x)
        np.testing.assert_array_equal(np.asarray(best.addressable_data(0)), head.argmax(axis=-1))


@pytest.mark.slow
@pytest.mark.parametrize("types", ["Auto", "Explicit"])
def test_four_processes_with_their_own_shards(types):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", f"import test_sharded_processes as t; t.child({i}, {port}, {types!r})"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(PROCESSES)
    ]
    try:
        told = [process.communicate(timeout=400)[0] for process in children]
    finally:
        for process in children:
            process.kill()
    for process, text in zip(children, told, strict=True):
        assert process.returncode == 0, text[-3000:]
