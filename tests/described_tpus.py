"""Chips that are described to the TPU's compiler, and programs that it compiled for them, on a machine without any."""

import re
from functools import cache

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from hire_xform.dump.targets import ALONE

ENVIRONMENT = {**ALONE, "XLA_FLAGS": ""}
# Of one chip its topology, how many chips a host then has, and what it calls itself.
ONE = {
    "v5e": ("v5e:1x1", (1, 1, 1), "TPU v5 lite"),
    "v6e": ("v6e:1x1", (1, 1, 1), "TPU v6 lite"),
    "v5p": ("v5p:2x2x1", None, "TPU v5"),
}


@cache
def chips(name="v5e:2x2", per_host=None):
    """The devices of a topology."""
    options = {} if per_host is None else {"chips_per_host_bounds": per_host}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def one_chip(kind="v5e"):
    """Where shapes have to be placed to be compiled for one chip."""
    name, per_host, _ = ONE[kind]
    return SingleDeviceSharding(chips(name, per_host)[0])


def on_one_chip(kind="v5e", dtype=jnp.bfloat16, **shapes):
    """Shapes by name, on one chip."""
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=one_chip(kind)) for name, shape in shapes.items()}


def compiled(lowered, kind="v5e"):
    """A program of a TPU, for sure: without a topology in its operands it is quietly compiled for this machine."""
    program = lowered.compile()
    kinds = {device.device_kind for s in jax.tree.leaves(program.input_shardings) for device in s.device_set}
    assert kinds == {ONE[kind][2]}, kinds
    assert re.search(r"\{[\d,]+:T\(", program.as_text()), "no tiled layout in it"
    return program
