"""What a user relies on: packing once, never stale weights, ``Packed`` everywhere, and the options of ``jax.jit``."""

import functools
import gc
import json
import threading
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import FORCE, assert_same, full_width, kinds, narrow, primitives_of

import hire_xform as hx
from hire_xform import packing
from hire_xform.lowering import da_top_k_p

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


@pytest.fixture
def packs(monkeypatch) -> list:
    """The leaves that are packed, one entry for each packed form."""
    calls = []
    original = packing.pack_array

    def counted(key, leaf):
        calls.append(leaf)
        return original(key, leaf)

    monkeypatch.setattr(packing, "pack_array", counted)
    return calls


# Plain weights: packed once, never stale.


def test_plain_weights_are_packed_once(packs):
    step, params = hx.sparsify(net, config=FULL), make_weights()
    first = step(params, inputs())
    count = len(packs)
    assert count > 0
    for seed in range(3):
        step(params, inputs(seed=seed))
    step({**params}, inputs())  # another dictionary, the same arrays
    assert len(packs) == count
    assert_same(first, net(params, inputs()))


def test_another_number_of_tokens_packs_nothing_again(packs):
    step, params = hx.sparsify(net, config=FULL), make_weights()
    step(params, inputs(1))
    count = len(packs)
    assert_same(step(params, inputs(3)), net(params, inputs(3)))
    assert len(packs) == count


@pytest.mark.filterwarnings("ignore::hire_xform.HireWarning")
def test_new_weights_are_packed_again(packs):
    step = hx.sparsify(net, config=FULL)
    old, new = make_weights(0), make_weights(1)
    for params in (old, new):
        assert_same(step(params, inputs()), net(params, inputs()))
    mixed = {**new, "w2": old["w2"]}
    assert_same(step(mixed, inputs()), net(mixed, inputs()))


def test_only_the_changed_weight_is_packed_again(packs):
    step, params = hx.sparsify(net, config=FULL), make_weights()
    step(params, inputs())
    count, changed = len(packs), {**params, "w1": params["w1"] + 1}
    assert_same(step(changed, inputs()), net(changed, inputs()))
    assert packs[count:]
    assert all(leaf is changed["w1"] for leaf in packs[count:])


def test_weights_that_died_are_not_mistaken_for_new_ones_at_their_address():
    step = hx.sparsify(net, config=FULL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hx.HireWarning)
        for seed in range(8):
            params = make_weights(seed)
            assert_same(step(params, inputs()), net(params, inputs()))
            del params
            gc.collect()


def test_the_memory_does_not_keep_weights_alive():
    import weakref

    step, params = hx.sparsify(net, config=FULL), make_weights()
    step(params, inputs())
    watched = weakref.ref(params["w1"])
    del params
    gc.collect()
    assert watched() is None


def test_numpy_weights_changed_in_place_are_noticed():
    step = hx.sparsify(net, config=FULL)
    params = {name: np.array(value) for name, value in make_weights().items()}
    assert_same(step(params, inputs()), net(params, inputs()))
    for name in ("w1", "b1", "w2", "embed"):
        params[name][3:] *= -1.5
        assert_same(step(params, inputs()), net(params, inputs()))


def test_numpy_weights_left_alone_are_packed_once(packs):
    step = hx.sparsify(net, config=FULL)
    params = {name: np.array(value) for name, value in make_weights().items()}
    step(params, inputs())
    count = len(packs)
    step(params, inputs(seed=4))
    assert len(packs) == count


def test_weights_new_at_every_call_warn_once_by_name():
    step = hx.sparsify(net, config=FULL)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for seed in range(6):
            step(make_weights(seed), inputs())
    seen = [w for w in seen if issubclass(w.category, hx.HireWarning)]
    assert len(seen) == 1
    assert "params['" in str(seen[0].message)
    assert "The result is right" in str(seen[0].message)


def test_weights_of_other_sizes_are_another_plan():
    def wide(params, x):
        u = jnp.einsum("td,dhk->thk", x, params["w1"])
        return jnp.einsum("thk,hkd->td", jax.nn.relu(u), params["w2"])

    step = hx.sparsify(wide, config=FULL)
    for heads in (4, 6, 4):
        w = make_weights(heads)
        params = {"w1": w["w1"][:, : heads * 8].reshape(D, heads, 8), "w2": w["w2"][: heads * 8].reshape(heads, 8, D)}
        assert_same(step(params, inputs()), wide(params, inputs()))


def test_threads_share_a_function():
    step, found = hx.sparsify(net, config=FULL), {}
    weights = [make_weights(seed) for seed in range(2)]

    def work(number):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[number] = [step(weights[number % 2], inputs(seed=i)) for i in range(3)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results in found.items():
        for i, result in enumerate(results):
            assert_same(result, net(weights[number % 2], inputs(seed=i)))
    assert len(found) == 4


def test_a_closed_over_weight_is_packed_once(packs):
    params = make_weights()
    step = hx.sparsify(lambda x: net(params, x), config=FULL)
    assert kinds(step.trace(inputs()).plan) == ["ffn", "vocab"]
    assert_same(step(inputs()), net(params, inputs()))
    count = len(packs)
    assert_same(step(inputs(seed=5)), net(params, inputs(seed=5)))
    assert len(packs) == count > 0


def test_data_first_and_weights_closed_over_needs_no_option():
    params = make_weights()
    step = hx.sparsify(lambda x, scale: net(params, x) * scale, config=FULL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(6):
            assert_same(step(inputs(seed=seed), 2.0), net(params, inputs(seed=seed)) * 2.0)


# Packed.


def test_packed_stands_where_the_weights_stood():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    packed = step.trace(params, inputs()).pack(params)
    assert isinstance(packed, hx.Packed)
    assert_same(step(packed, inputs()), net(params, inputs()))
    assert_same(step(packed, inputs(3)), net(params, inputs(3)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_the_original_weights_may_be_deleted(dtype):
    step, params = hx.sparsify(net, config=FULL), make_weights(dtype=dtype)
    x = inputs().astype(dtype)
    want = jax.jit(net)(params, x)
    packed = step.trace(params, x).pack(params)
    leaves = jax.tree.leaves(params)
    dropped = [i for i in range(len(leaves)) if i not in packed.layout.kept]
    assert dropped
    for i in dropped:
        leaves[i].delete()
    assert_same(step(packed, x), want, 2e-2 if dtype == jnp.bfloat16 else 2e-5)


def test_a_tied_weight_is_held_once():
    step, params = hx.sparsify(net, config=full_width(hx.Quantized(4))), make_weights()
    packed = step.trace(params, inputs()).pack(params)
    whole = [a for a in jax.tree.leaves(packed) if a.dtype == jnp.float32 and sorted(a.shape) == sorted((V, D))]
    assert len(whole) == 1
    plain = sum(a.nbytes for a in params.values())
    assert packed.nbytes < 1.3 * plain


def test_a_weight_used_by_two_blocks_is_held_once():
    def twice(params, x):
        for _ in range(2):
            x = x + jax.nn.relu(x @ params["w1"]) @ params["w2"]
        return x

    step, params = hx.sparsify(twice, config=FULL), make_weights()
    traced = step.trace(params, inputs())
    assert kinds(traced.plan) == ["ffn", "ffn"]
    packed = traced.pack(params)
    assert len([a for a in jax.tree.leaves(packed) if a.dtype == jnp.float32 and a.size == D * M]) == 2
    assert_same(step(packed, inputs()), twice(params, inputs()))


def test_a_weight_transposed_in_one_use_is_held_once():
    def both(params, x):
        y = jax.nn.relu(x @ params["w1"]) @ params["w2"]
        return y, x @ params["w1"] @ jnp.ones((M, 2)) * 1.0

    step, params = hx.sparsify(both, config=FULL), make_weights()
    traced = step.trace(params, inputs())
    packed = traced.pack(params)
    assert kinds(traced.plan) == ["ffn"]
    assert len([a for a in jax.tree.leaves(packed) if a.dtype == jnp.float32 and a.size == D * M]) == 2
    assert_same(step(packed, inputs()), both(params, inputs()))


def test_packed_is_a_pytree_of_arrays():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    packed = step.trace(params, inputs()).pack(params)
    leaves, tree = jax.tree.flatten(packed)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = jax.tree.unflatten(tree, [jnp.array(leaf) for leaf in leaves])
    assert_same(step(again, inputs()), net(params, inputs()))
    assert sum(leaf.nbytes for leaf in leaves) == packed.nbytes
    named = jax.tree_util.tree_flatten_with_path(packed)[0]
    assert len({jax.tree_util.keystr(path) for path, _ in named}) == len(leaves)


def test_packed_goes_through_jit_as_argument_and_constant():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    packed, want = step.trace(params, inputs()).pack(params), net(params, inputs())
    assert_same(jax.jit(step)(packed, inputs()), want)
    assert_same(jax.jit(partial(step, packed))(inputs()), want)
    assert_same(step(jax.jit(lambda p: p)(packed), inputs()), want)


def test_packed_can_be_traced_again():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    packed = step.trace(params, inputs()).pack(params)
    assert kinds(step.trace(packed, inputs(2)).plan) == ["ffn", "vocab"]


def test_prefill_and_decode_share_one_packed():
    config = hx.Config(vocab=hx.Vocab(candidates=V, max_tokens=4), ffn=hx.Ffn(active=1.0, max_tokens=4), rules=FORCE)
    step, params = hx.sparsify(net, config=config), make_weights()
    packed = step.trace(params, inputs(1)).pack(params)
    assert not step.trace(params, inputs(9)).plan.sites
    assert_same(step(packed, inputs(9)), net(params, inputs(9)))
    assert_same(step(packed, inputs(2)), net(params, inputs(2)))


def test_packed_of_a_prefill_serves_no_decode_but_is_right():
    config = hx.Config(vocab=hx.Vocab(candidates=V, max_tokens=4), ffn=hx.Ffn(active=1.0, max_tokens=4), rules=FORCE)
    step, params = hx.sparsify(net, config=config), make_weights()
    packed = step.trace(params, inputs(9)).pack(params)
    assert_same(step(packed, inputs(1)), net(params, inputs(1)))


# Transformations.


def test_traced_plain_weights_ask_for_packed():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    with pytest.raises(hx.TracedWeightsError, match=r"params\['\w+'\] is a tracer.*pack"):
        jax.jit(step)(params, inputs())
    with pytest.raises(hx.TracedWeightsError, match="pack"):
        jax.grad(lambda p: step(p, inputs()).sum())(params)


def test_concrete_weights_under_an_outer_trace_are_packed_outside(packs):
    step, params = hx.sparsify(net, config=FULL), make_weights()
    want = net(params, inputs())
    assert_same(jax.jit(lambda x: step(params, x))(inputs()), want)
    assert_same(jax.vmap(lambda x: step(params, x))(inputs(3)[:, None]), net(params, inputs(3))[:, None])
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in packs)


def test_the_gradient_by_the_inputs_is_dense():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    packed = step.trace(params, inputs()).pack(params)
    want = jax.grad(lambda x: jnp.sin(net(params, x)).sum())(inputs())
    assert_same(jax.grad(lambda x: jnp.sin(step(packed, x)).sum())(inputs()), want, 1e-4)
    assert_same(jax.grad(lambda x: jnp.sin(step(params, x)).sum())(inputs()), want, 1e-4)


def test_a_function_called_in_a_scan_packs_nothing_inside(packs):
    step, params = hx.sparsify(net, config=FULL), make_weights()
    packed = step.trace(params, inputs()).pack(params)
    count = len(packs)

    def run(packed):
        return jax.lax.scan(lambda x, _: (jnp.tanh(step(packed, x)[:, :D]), None), inputs(), None, length=3)[0]

    got = jax.jit(run)(packed)
    assert len(packs) == count
    x = inputs()
    for _ in range(3):
        x = jnp.tanh(net(params, x)[:, :D])
    assert_same(got, x)


# Arguments.


def test_weights_may_come_by_keyword():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    want = net(params, inputs())
    assert_same(step(params=params, x=inputs()), want)
    assert_same(step(x=inputs(), params=params), want)
    traced = step.trace(params=params, x=inputs())
    assert kinds(traced.plan) == ["ffn", "vocab"]
    assert_same(step(params=traced.pack(params), x=inputs()), want)
    assert_same(step(traced.pack(params), x=inputs()), want)


def test_two_weights_arguments_are_packed_apart():
    def two(body, x, head):
        return jax.nn.relu(x @ body["w1"]) @ body["w2"] @ head.T

    params = make_weights()
    step = hx.sparsify(two, config=FULL, weights_argnums=(0, 2))
    traced = step.trace(params, inputs(), params["embed"])
    assert kinds(traced.plan) == ["ffn", "vocab"]
    assert [site.weights for site in traced.plan.sites] == [("body['w1']", "body['w2']"), ("head",)]
    body, head = traced.pack(params, params["embed"])
    want = two(params, inputs(), params["embed"])
    assert_same(step(body, inputs(), head), want)
    assert_same(step(params, inputs(), head), want)
    assert_same(step(body, inputs(), params["embed"]), want)


def test_static_arguments_by_number_and_name():
    def scaled(params, x, how, *, times=1):
        y = net(params, x) * times
        return jnp.tanh(y) if how == "tanh" else y

    params = make_weights()
    step = hx.sparsify(scaled, config=FULL, static_argnums=2, static_argnames="times")
    for how, times in (("tanh", 1), ("none", 1), ("none", 3), ("tanh", 1)):
        assert_same(step(params, inputs(), how, times=times), scaled(params, inputs(), how, times=times))
        packed = step.trace(params, inputs(), how, times=times).pack(params)
        assert_same(step(packed, inputs(), how, times=times), scaled(params, inputs(), how, times=times))
    assert_same(step(params, inputs(), how="tanh"), scaled(params, inputs(), "tanh"))


def test_static_values_of_other_types_are_other_values():
    step = hx.sparsify(lambda x, how: x + 1 if isinstance(how, float) else x, weights_argnums=(), static_argnums=1)
    assert_same(step(inputs(), 1), inputs())
    assert_same(step(inputs(), 1.0), inputs() + 1)
    assert_same(step(inputs(), True), inputs())


def test_the_cache_is_donated():
    def decode(params, cache, x):
        return net(params, x), cache.at[0].add(x[0])

    params = make_weights()
    step = hx.sparsify(decode, config=FULL, donate_argnums=1)
    for weights in (params, step.trace(params, jnp.zeros((4, D)), inputs()).pack(params)):
        cache = jnp.zeros((4, D))
        want = decode(params, jnp.zeros((4, D)), inputs())
        assert_same(step(weights, cache, inputs()), want)
        assert cache.is_deleted()
    assert not any(a.is_deleted() for a in params.values())


def test_the_cache_is_donated_by_name():
    def decode(params, x, cache):
        return net(params, x), cache + 1

    step, params = hx.sparsify(decode, config=FULL, donate_argnames="cache"), make_weights()
    cache = jnp.zeros(8)
    step(params, inputs(), cache=cache)
    assert cache.is_deleted()


@pytest.mark.parametrize(
    "options",
    [
        {"keep_unused": True},
        {"out_shardings": jax.sharding.SingleDeviceSharding(jax.devices()[0])},
        {"inline": True},
        {"compiler_options": {"xla_cpu_enable_fast_math": False}},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_of_jit_are_passed_on(options):
    step, params = hx.sparsify(net, config=FULL, **options), make_weights()
    assert_same(step(params, inputs()), net(params, inputs()))
    traced = step.trace(params, inputs())
    assert_same(traced.lower().compile()(traced.pack(params), inputs()), net(params, inputs()))


@jax.tree_util.register_pytree_node_class
class Module:
    """A module as Equinox makes them: arrays and functions among the leaves."""

    def __init__(self, weights, act):
        self.weights, self.act = weights, act

    def tree_flatten(self):
        return (self.weights["w1"], self.act, self.weights["w2"], "a name", None), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls({"w1": children[0], "w2": children[2]}, children[1])

    def __call__(self, x):
        return self.act(x @ self.weights["w1"]) @ self.weights["w2"]


@pytest.mark.filterwarnings("ignore::hire_xform.HireWarning")
def test_leaves_that_are_not_arrays_are_static():
    step = hx.sparsify(lambda module, x: module(x), config=FULL)
    for act in (jax.nn.relu, jnp.tanh, jax.nn.relu):
        module = Module(make_weights(), act)
        traced = step.trace(module, inputs())
        assert kinds(traced.plan) == ["ffn"]
        assert_same(step(module, inputs()), module(inputs()))
        assert_same(step(traced.pack(module), inputs()), module(inputs()))


@pytest.mark.filterwarnings("ignore::hire_xform.HireWarning")
def test_numbers_inside_weights_are_settings_that_a_model_may_branch_on():
    def fun(params, x):
        if not params["inference"] or not isinstance(params["rate"], float):
            raise ValueError("dropout needs a key")
        return net(params["weights"], x) * params["times"]

    step, weights = hx.sparsify(fun, config=FULL), make_weights()
    for times in (1, 2, True, 1.0):
        params = {"weights": weights, "inference": True, "rate": 0.1, "times": times}
        traced = step.trace(params, inputs())
        packed = traced.pack(params)
        want = fun(params, inputs())
        assert_same(step(params, inputs()), want)
        assert_same(step(packed, inputs()), want)
        assert_same(jax.jit(step)(packed, inputs()), want)
        assert_same(traced.lower().compile()(packed, inputs()), want)
        assert jax.tree.leaves(packed) == packed.leaves
        with pytest.raises(TypeError, match=r"inference.*expected True as traced"):
            traced.pack({**params, "inference": False})
    # By itself a number is data: a token id, or the argument of a function that closes over its weights.
    alone = hx.sparsify(lambda x: x * 2)
    assert alone.trace(3).call.avals == alone.trace(4).call.avals
    assert len(alone.trace(3).call.avals) == 1


def test_python_numbers_are_data():
    step, params = hx.sparsify(lambda p, x, s: net(p, x) * s, config=FULL), make_weights()
    for scale in (2, 2.5, np.float32(3), True):
        assert_same(step(params, inputs(), scale), jax.jit(lambda p, x, s: net(p, x) * s)(params, inputs(), scale))


def test_a_method_and_a_partial_can_be_sparsified():
    class Model:
        def step(self, params, x):
            return net(params, x)

    params = make_weights()
    want = net(params, inputs())
    assert_same(hx.sparsify(Model().step, config=FULL)(params, inputs()), want)
    assert_same(hx.sparsify(partial(net, params), config=FULL)(inputs()), want)
    assert_same(hx.sparsify(partial(net, x=inputs()), config=FULL)(params), want)
    assert_same(hx.sparsify(jax.jit(net), config=FULL)(params, inputs()), want)


def test_a_method_is_decorated_like_a_function():
    class Model(Module):
        @hx.sparsify(config=FULL)
        def step(self, x):
            return self(x)

    jax.tree_util.register_pytree_node(Model, Model.tree_flatten, Model.tree_unflatten)
    model = Model(make_weights(), jax.nn.relu)
    assert_same(model.step(inputs()), model(inputs()))
    assert kinds(Model.step.trace(model, inputs()).plan) == ["ffn"]


def test_weights_changed_in_place_are_told_when_the_change_is_lost():
    def fun(params, x, returns):
        params["count"] = params["count"] + 1
        params["stack"] = jax.lax.scan(lambda carry, w: (carry, w), 0, params["stack"])[1]
        params["cache"] = params["cache"] + x
        logits = jax.jit(net)(params, x)
        return (logits, params["cache"]) if returns else logits

    params = {**make_weights(), "cache": inputs(), "count": jnp.int32(0), "stack": jnp.ones((2, D))}
    step = hx.sparsify(fun, config=FULL, static_argnums=2)
    with pytest.warns(hx.HireWarning, match=r"params\['cache'\] changed in place but not returned"):
        logits = step(params, inputs(), False)
    assert_same(logits, net(params, inputs()))
    assert kinds(step.trace(params, inputs(), False).plan) == ["ffn", "vocab"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(step(params, inputs(), True), (logits, 2 * inputs()))


def test_empty_and_none_arguments_pass():
    def fun(params, x, extra, nothing):
        assert nothing is None
        return net(params, x), extra

    step, params = hx.sparsify(fun, config=FULL), make_weights()
    assert_same(step(params, inputs(), (), None), fun(params, inputs(), (), None))


def test_outputs_keep_structure_none_and_python_values():
    def fun(params, x):
        return {"logits": net(params, x), "none": None, "x": x, "one": 1.0, "again": (x, x)}

    step, params = hx.sparsify(fun, config=FULL), make_weights()
    assert_same(step(params, inputs()), jax.jit(fun)(params, inputs()))


def test_both_decorator_forms():
    @hx.sparsify
    def plain(params, x):
        """Says something."""
        return net(params, x)

    @hx.sparsify(config=FULL, weights_argnums=1)
    def configured(x, params):
        return net(params, x)

    params = make_weights()
    assert plain.__doc__ == "Says something."
    assert plain.__name__ == "plain"
    assert "plain" in repr(plain)
    assert_same(plain(params, inputs()), net(params, inputs()))
    assert kinds(configured.trace(inputs(), params).plan) == ["ffn", "vocab"]
    assert_same(configured(inputs(), params), net(params, inputs()))


# Tracing and reports.


def test_tracing_shapes_computes_nothing(packs):
    struct = jax.ShapeDtypeStruct
    shapes = {
        "w1": struct((4096, 1 << 20), jnp.bfloat16),
        "b1": struct((1 << 20,), jnp.bfloat16),
        "w2": struct((1 << 20, 4096), jnp.bfloat16),
        "embed": struct((1 << 20, 4096), jnp.bfloat16),
    }
    traced = hx.sparsify(net).trace(shapes, struct((1, 4096), jnp.bfloat16))
    assert kinds(traced.plan) == ["ffn", "vocab"]
    assert da_top_k_p in primitives_of(traced.sparse_jaxpr)
    assert "module" in traced.lower().as_text()
    assert not packs


def test_a_trace_is_made_once():
    count = []

    def counted(params, x):
        count.append(1)
        return net(params, x)

    step, params = hx.sparsify(counted, config=FULL), make_weights()
    assert step.trace(params, inputs()) is step.trace(params, inputs(seed=4))
    for seed in range(3):
        step(params, inputs(seed=seed))
    assert len(count) == 1


def test_lower_gives_what_jax_gives():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    traced = step.trace(params, inputs())
    compiled = traced.lower().compile()
    assert_same(compiled(traced.pack(params), inputs()), net(params, inputs()))
    assert "stablehlo" in step.lower(params, inputs()).as_text()
    assert "stablehlo" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_without_sites_it_is_the_function_jax_runs():
    step, params = hx.sparsify(net), make_weights()
    traced = step.trace(params, inputs())
    assert not traced.plan.sites
    assert str(traced.sparse_jaxpr).count("dot_general") == str(traced.jaxpr).count("dot_general") == 3
    got, want = step(params, inputs()), jax.jit(net)(params, inputs())
    np.testing.assert_array_equal(got, want)
    assert_same(jax.jit(step)(params, inputs()), want)  # nothing is packed, so tracers may come
    assert_same(jax.grad(lambda p: step(p, inputs()).sum())(params), jax.grad(lambda p: net(p, inputs()).sum())(params))


def test_a_function_without_weights_or_products_passes():
    step = hx.sparsify(lambda x: jnp.sin(x) + 1)
    assert_same(step(inputs()), jnp.sin(inputs()) + 1)
    assert hx.sparsify(lambda: jnp.ones(3))().shape == (3,)


def test_explain_says_where_weights_were_looked_for():
    step = hx.sparsify(lambda graph, params, x: net(params, x))
    assert "in weights_argnums=(0,) and those that are closed over: none here" in (
        step.trace((), make_weights(), inputs()).explain()
    )


def test_explain_names_paths_weights_sources_and_reasons():
    def named(params, x):
        x = jax.nn.silu(x @ params["w1"]) @ params["w2"]
        return x @ params["embed"].T

    config = hx.Config(rules=FORCE)
    traced = hx.sparsify(named, config=config).trace(make_weights(), inputs())
    text = traced.explain()
    for part in (
        "dot_general[2]",
        "params['embed']",
        "test_api.py",
        "vocab",
        "dot_general[0]",
        "exact zeros",
        "forced",
    ):
        assert part in text, text
    for refusal in traced.plan.refusals:
        assert refusal.reason in text


def test_every_weight_product_is_a_site_or_a_refusal():
    def many(params, x):
        a = jax.nn.relu(x @ params["w1"]) @ params["w2"]
        b = jax.nn.softmax(a @ params["w1"]) @ params["w2"]
        return b @ params["embed"].T, jnp.cumsum(b @ params["w1"], -1)

    traced = hx.sparsify(many, config=FULL).trace(make_weights(), inputs())
    products = sum(len(site.weights) for site in traced.plan.sites) + len(traced.plan.refusals)
    assert products == str(traced.jaxpr).count("dot_general[") == 6
    assert all(r.source != "unknown" for r in traced.plan.refusals)


def test_the_plan_is_json():
    traced = hx.sparsify(net, config=narrow()).trace(make_weights(), inputs())
    found = json.loads(traced.plan.to_json())
    assert [s["kind"] for s in found["sites"]] == ["ffn", "vocab"]
    assert found["platform"] == jax.default_backend()
    assert found["sites"][0]["path"] == traced.plan.sites[0].path
    assert found["sites"][0]["settings"]["active"] == 0.1
    assert found["sites"][0]["sparse_bytes"] < found["sites"][0]["dense_bytes"] * 2


def test_sites_are_in_program_order_and_scans_count_iterations():
    def stacked(params, x):
        def body(x, w):
            return x + jax.nn.relu(x @ w["w1"]) @ w["w2"], None

        x, _ = jax.lax.scan(body, x, params["stack"])
        return x @ params["embed"].T

    params = make_weights()
    params["stack"] = {name: jnp.stack([params[name]] * 3) for name in ("w1", "w2")}
    plan = hx.sparsify(stacked, config=FULL).trace(params, inputs()).plan
    assert kinds(plan) == ["ffn", "vocab"]
    assert plan.sites[0].path.startswith("scan[0]/")
    assert plan.sites[0].dense_bytes == 3 * 2 * D * M * 4


def test_later_rules_win():
    rules = (hx.Rule("*", force=True), hx.Rule("*", skip=True), hx.Rule("dot_general[2]", force=True))
    plan = hx.sparsify(net, config=hx.Config(rules=rules)).trace(make_weights(), inputs()).plan
    assert kinds(plan) == ["vocab"]
    assert any("skip=True" in r.reason for r in plan.refusals)


def test_settings_of_a_rule_apply_where_it_matches():
    rules = (*FORCE, hx.Rule("dot_general[1]", ffn=hx.Ffn(active=0.5)))
    plan = hx.sparsify(net, config=hx.Config(rules=rules)).trace(make_weights(), inputs()).plan
    assert plan.sites[0].computed == M // 2
    assert plan.sites[1].computed == V  # candidates=256 are more than there are


def test_rules_that_match_nothing_are_told_once_and_listed():
    rules = (*FORCE, hx.Rule("scan[7]/*", skip=True), hx.Rule("dot_general[1]"), hx.Rule("jit:mlp*"))
    step = hx.sparsify(models.relu_ffn, config=hx.Config(rules=rules))
    w, x = models.list_params()["layers"][0], jnp.ones((1, models.D))
    where = r"'scan\[7\]/\*', 'jit:mlp\*'\. .*Paths there are: dot_general\[1\]"

    def run():
        step(w, x)
        step.trace(w, jnp.ones((2, models.D)))
        return step.trace(w, x)

    with pytest.warns(hx.HireWarning, match=where) as told:
        traced = run()
    assert len(told) == 1
    assert traced.plan.unmatched_rules == ("scan[7]/*", "jit:mlp*")
    assert "Rules that match nothing here: 'scan[7]/*', 'jit:mlp*'" in traced.explain()
    assert '"unmatched_rules"' in traced.plan.to_json()


def test_a_rule_for_everything_need_not_match(recwarn):
    step = hx.sparsify(lambda w, x: x, config=hx.Config(rules=FORCE))
    step(jnp.ones(2), jnp.ones(2))
    assert not recwarn


def test_debug_callbacks_run_once_a_call():
    seen = []

    def loud(params, x):
        jax.debug.callback(lambda v: seen.append(float(v)), x.sum())
        return net(params, x)

    step, params = hx.sparsify(loud, config=FULL), make_weights()
    step(params, inputs())
    step(params, inputs())
    jax.effects_barrier()
    assert len(seen) == 2


def test_x64_inputs_keep_their_dtypes():
    with jax.enable_x64(True):
        params = {name: jnp.asarray(np.asarray(value), jnp.float64) for name, value in make_weights().items()}
        x = jnp.asarray(np.asarray(inputs()), jnp.float64)
        step = hx.sparsify(net, config=FULL)
        got = step(params, x)
        assert got.dtype == jnp.float64
        assert_same(got, net(params, x), 1e-12)


def test_matmul_precision_is_part_of_the_trace():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    step(params, inputs())
    with jax.default_matmul_precision("highest"):
        assert_same(step(params, inputs()), net(params, inputs()))


def test_functools_wraps_around_it():
    step, params = hx.sparsify(net, config=FULL), make_weights()

    @functools.wraps(step)
    def wrapped(*args):
        return step(*args)

    assert_same(wrapped(params, inputs()), net(params, inputs()))
