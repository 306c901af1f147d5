"""What is said of products that stay dense: which weights they read, how many bytes, and what the cause is."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import hire_xform as hx

D, M, V, E, R, T, LAYERS = 16, 64, 128, 4, 2, 3, 3


def zeros(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def refusals_of(fun, p, x=None):
    plan = hx.sparsify(fun).trace(p, zeros(1, D) if x is None else x).plan
    return {r.path: r for r in plan.refusals}, plan


def dequantised(p, x):
    return x @ (p["q"].astype(jnp.float32) * p["s"])


def dequantised_twice(p, x):
    w = p["q"].astype(jnp.float32) * p["s"]
    return x @ (w + p["shift"] * w)


def in_a_scan(p, x):
    return lax.scan(lambda x, w: (x @ (w["q"] * w["s"]), None), x, p)[0]


def outside_a_scan(p, x):
    return lax.scan(lambda x, w: (x @ w, None), x, p["q"] * p["s"][:, None])[0]


def summed(p, x):
    return (x[:, :, None] * p["q"][None]).sum(1)


def convolved(p, x):
    return lax.conv_general_dilated(x[:, None], p["q"], (1,), "SAME")


Q8, S = zeros(D, V, dtype=jnp.int8), zeros(V)
STACK = {"q": zeros(LAYERS, D, D), "s": zeros(LAYERS, D)}
READ = {
    "dequantised": (dequantised, {"q": Q8, "s": S}, {"q", "s"}, D * V + 4 * V),
    "twice": (dequantised_twice, {"q": Q8, "s": S, "shift": S, "other": S}, {"q", "s", "shift"}, D * V + 8 * V),
    "in_a_scan": (in_a_scan, STACK, {"q", "s"}, 4 * LAYERS * D * (D + 1)),
    "outside_a_scan": (outside_a_scan, STACK, {"q", "s"}, 4 * LAYERS * D * (D + 1)),
    "summed": (summed, {"q": zeros(D, V)}, {"q"}, 4 * D * V),
    "convolution": (convolved, {"q": zeros(V, 1, 3)}, {"q"}, 12 * V),
}


@pytest.mark.parametrize("name", READ)
def test_weights_that_a_product_is_made_of_are_named_and_counted(name):
    fun, p, names, size = READ[name]
    found, plan = refusals_of(fun, p)
    (refusal,) = found.values()
    assert set(refusal.weights) == {f"p[{n!r}]" for n in names}
    assert refusal.dense_bytes == size == plan.refused_bytes


def test_experts_of_a_ragged_product_are_counted():
    p = {"e": zeros(E, D, V), "sizes": zeros(E, dtype=jnp.int32)}
    found, _ = refusals_of(lambda p, x: lax.ragged_dot(x, p["e"], p["sizes"]), p, zeros(T, D))
    (refusal,) = found.values()
    assert refusal.weights == ("p['e']",)
    assert refusal.dense_bytes == 4 * E * D * V


def test_what_nothing_uses_is_read_by_nobody():
    def fun(p, x):
        x @ p["w"]
        jax.nn.relu(x @ p["up"]) @ p["down"]
        x @ (p["w"] * 2)
        lax.scan(lambda x, w: (x + 1, x @ w), x, p["stack"])
        kept, _ = lax.scan(lambda x, w: (x + 1, x @ w), x, p["stack"])
        return jnp.argmax(x @ p["head"], -1), kept

    p = {"w": zeros(D, V), "up": zeros(D, M), "down": zeros(M, D), "stack": zeros(LAYERS, D, D), "head": zeros(D, V)}
    found, plan = refusals_of(fun, p)
    unused = [r for r in found.values() if "its output is not used" in r.reason]
    assert len(unused) == len(found) - 1 == 6
    assert {name for r in unused for name in r.weights} == {f"p[{n!r}]" for n in ("w", "up", "down", "stack")}
    assert not any(r.dense_bytes for r in unused)
    assert plan.refused_bytes == 4 * D * V


def lora_on_down(p, x):
    both = jnp.einsum("td,dim->tim", x, p["both"])
    h = jax.nn.relu(both[:, 0]) * both[:, 1]
    return h @ p["down"] + (h @ p["a"]) @ p["b"]


def test_lora_on_down_is_a_part_of_the_block():
    p = {"both": zeros(D, 2, M), "down": zeros(M, D), "a": zeros(M, R), "b": zeros(R, D)}
    found, plan = refusals_of(lora_on_down, p)
    own = {path: r.kind for path, r in found.items()}
    assert own == {"dot_general[0]": "ffn", "dot_general[1]": "ffn", "dot_general[2]": "ffn", "dot_general[3]": ""}
    assert plan.refused_bytes == sum(4 * a.size for a in p.values())


def test_the_cause_of_what_reads_the_units_differently_is_that():
    def fun(p, x):
        h = jax.nn.relu(x @ p["up"])
        return h @ p["down"] + (h[:, ::-1] @ p["a"]) @ p["b"]

    p = {"up": zeros(D, M), "down": zeros(M, D), "a": zeros(M, R), "b": zeros(R, D)}
    found, _ = refusals_of(fun, p)
    first, down = found["dot_general[0]"], found["dot_general[1]"]
    assert "what it contracts is also read by rev" in down.reason
    assert first.reason == f"it leads to dot_general[1], with which it makes no block: there, {down.reason}"


def test_the_cause_of_gate_and_up_of_experts_is_the_batch_dimension_of_what_follows():
    def fun(p, x):
        gate, up = (jnp.einsum("td,edm->tem", x, p[n]) for n in ("gate", "up"))
        return jnp.einsum("tem,emd->ted", jax.nn.relu(gate) * up, p["down"])

    p = {"gate": zeros(E, D, M), "up": zeros(E, D, M), "down": zeros(E, M, D)}
    found, _ = refusals_of(fun, p)
    for i in range(2):
        reason = found[f"dot_general[{i}]"].reason
        assert "contracted by dot_general[2]" in reason
        assert "whose weight has a batch dimension (experts" in reason


def quantised(x):
    scale = jnp.max(jnp.abs(x), -1, keepdims=True) / 127
    return jnp.round(x / scale).astype(jnp.int8), scale


def test_the_cause_of_int8_activations_is_their_quantisation():
    def product(x, q, s):
        x, scale = quantised(x)
        return jnp.matmul(x, q, preferred_element_type=jnp.int32).astype(jnp.float32) * scale * s

    def fun(p, x):
        return product(jax.nn.relu(product(x, p["q1"], p["s1"])), p["q2"], p["s2"])

    p = {"q1": zeros(D, M, dtype=jnp.int8), "s1": zeros(M), "q2": zeros(M, D, dtype=jnp.int8), "s2": zeros(D)}
    found, _ = refusals_of(fun, p)
    for refusal in found.values():
        assert "what it contracts is quantised at run time to int8" in refusal.reason
        assert refusal.dense_bytes == D * M
