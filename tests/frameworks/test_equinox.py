"""Equinox's own transformations around a sparsified step, and what modules hold besides arrays."""

import io
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from checks import assert_same, full_width, kinds
from extras import why_missing

import hire_xform as hx

try:
    import equinox as eqx
    import equinox_models as models
except ImportError as error:
    pytest.skip(why_missing("equinox", error), allow_module_level=True)

pytestmark = pytest.mark.slow

FOUND = ["ffn"] * models.L + ["vocab"]


def made(make=models.Decoder, **options):
    """The step, sparsified; its arguments; Packed weights."""
    fun, args = models.build(make, **options)
    step = hx.sparsify(fun, config=full_width())
    traced = step.trace(*args)
    assert kinds(traced.plan) == FOUND
    return fun, step, args, traced.pack(args[0])


def test_filter_jit_around_the_step_takes_packed_weights_and_says_so_for_plain_ones():
    fun, step, args, packed = made()
    assert_same(eqx.filter_jit(step)(packed, *args[1:]), fun(*args))
    with pytest.raises(hx.TracedWeightsError, match=r"model\.blocks"):
        eqx.filter_jit(step)(*args)


def test_filter_vmap_and_filter_grad_around_the_step():
    fun, step, args, packed = made()
    tokens, axes = jnp.arange(3), (None, 0, None, None)
    want = eqx.filter_vmap(fun, in_axes=axes)(args[0], tokens, *args[2:])
    for weights in (args[0], packed):
        assert_same(eqx.filter_vmap(step, in_axes=axes)(weights, tokens, *args[2:]), want)

    def loss(cache, call, weights):
        return jnp.sum(call(weights, args[1], cache, args[3])[0] ** 2)

    assert_same(eqx.filter_grad(loss)(args[2], step, packed), eqx.filter_grad(loss)(args[2], fun, args[0]), 2e-4)


def test_packed_weights_are_saved_and_loaded_as_a_module_is():
    fun, step, args, packed = made()
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, packed)
    file.seek(0)
    assert_same(step(eqx.tree_deserialise_leaves(file, packed), *args[1:]), fun(*args))


def test_shapes_of_a_module_trace_what_the_module_packs():
    fun, args = models.build(models.Decoder)
    shapes = eqx.filter_eval_shape(lambda key: models.Decoder(key=key), jax.random.key(0))
    step = hx.sparsify(fun, config=full_width())
    assert kinds(step.trace(shapes, *args[1:]).plan) == FOUND
    assert_same(step(step.trace(args[0], *args[1:]).pack(args[0]), *args[1:]), fun(*args))


@pytest.mark.parametrize("how", ["the module", "its method", "the class's method"])
def test_a_module_is_sparsified_as_a_function(how):
    model, *args = models.build(models.Decoder)[1]
    fun = {"the module": model, "its method": model.__call__, "the class's method": models.Decoder.__call__}[how]
    given = (model, *args) if how == "the class's method" else args
    step = hx.sparsify(fun, config=full_width(), weights_argnums=0 if how == "the class's method" else ())
    assert kinds(step.trace(*given).plan) == FOUND
    assert_same(step(*given), model(*args))
    assert len(repr(step)) < 60


@pytest.mark.filterwarnings("ignore::hire_xform.HireWarning")
def test_a_module_with_leaves_replaced_is_never_run_stale():
    fun, step, (model, *args), _ = made()
    for activation in (jax.nn.relu, jnp.tanh, jax.nn.relu):
        where = lambda model: [block.feed_forward.activation for block in model.blocks]  # noqa: E731
        model = eqx.tree_at(where, model, [activation] * models.L)
        assert_same(step(model, *args), fun(model, *args))
    for change in (lambda m: m.head.weight, lambda m: m.blocks[1].feed_forward.up.weight, lambda m: m.norm.weight):
        model = eqx.tree_at(change, model, replace_fn=lambda weight: 2 * weight)
        assert_same(step(model, *args), fun(model, *args))


def test_inference_mode_changes_what_is_traced():
    fun, step, (model, *args), _ = made()
    assert_same(step(model, *args), fun(model, *args))
    with pytest.raises(RuntimeError, match="Dropout"):
        step(eqx.nn.inference_mode(model, False), *args)


def test_an_activation_may_hold_arrays():
    class Leaky(eqx.Module):
        slope: jax.Array

        def __call__(self, x):
            return jnp.where(x > 0, x, self.slope * x)

    fun, step, args, packed = made(make_ffn=partial(models.FeedForward, Leaky(jnp.float32(0.1))))
    assert_same(step(packed, *args[1:]), fun(*args))


def test_a_random_key_among_the_weights_is_kept_and_used():
    class Sampler(eqx.Module):
        decoder: models.Decoder
        key: jax.Array
        greedy: bool
        name: str
        nothing: None = None

        def __call__(self, token, cache, position):
            logits, _ = self.decoder(token, cache, position)
            key = jax.random.fold_in(self.key, position)
            return jnp.argmax(logits) if self.greedy else jax.random.categorical(key, logits), key

    model, *args = models.build(models.Decoder)[1]
    sampler = Sampler(model, jax.random.key(7), False, "sampler")
    step = hx.sparsify(Sampler.__call__, config=full_width())
    packed = step.trace(sampler, *args).pack(sampler)
    assert packed.nbytes > 0
    assert "Packed" in repr(packed)
    token, key = sampler(*args)
    for got, got_key in (step(sampler, *args), step(packed, *args), jax.jit(step)(packed, *args)):
        assert got == token
        assert jax.random.key_data(got_key).tolist() == jax.random.key_data(key).tolist()
