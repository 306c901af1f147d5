"""A small decode step, for dumps: two scanned layers, a jitted block, a refused product, a vocabulary projection."""

import jax
import jax.numpy as jnp

D, M, V, LAYERS = 16, 64, 96, 2


@jax.jit
def block(layer, x):
    hidden = jax.nn.relu(x @ layer["w<in>"] + layer["bias"])
    return x + hidden @ layer["w&out"]


def decode_step(params, state, token):
    x = params["embed"][token] + state @ params["mix"]

    def one_layer(x, layer):
        return block(layer, x), None

    x, _ = jax.lax.scan(one_layer, x, params["layers"])
    return x @ params["embed"].T, jnp.tanh(x)


def inputs():
    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    layers = {"w<in>": array(LAYERS, D, M), "bias": array(LAYERS, M), "w&out": array(LAYERS, M, D)}
    params = {"embed": array(V, D), "mix": array(D, D), "layers": layers}
    return params, array(1, D), array(1, dtype=jnp.int32)
