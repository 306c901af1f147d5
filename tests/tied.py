"""A block and a head tied to an embedding, and their inputs."""

import jax
import jax.numpy as jnp
import numpy as np
from checks import full_width

D, M, V = 16, 48, 80
FULL = full_width()


def make_weights(seed=0, dtype=jnp.float32, d=D, m=M, v=V) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {"w1": (d, m), "b1": (m,), "w2": (m, d), "embed": (v, d)}
    return {name: jnp.asarray(rng.normal(size=shape) * 0.3, dtype) for name, shape in shapes.items()}


def net(params, x):
    """A block and a head tied to an embedding, which is also looked up."""
    x = x + params["embed"][0]
    x = x + jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"]
    return x @ params["embed"].T


def inputs(tokens=1, seed=1, d=D) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, d)), jnp.float32)
