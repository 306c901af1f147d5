"""A rewritten program exported, written down, read again and called: as in a process that has no hire_xform."""

from functools import partial

import devices
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, named
from jax import lax
from test_sharded import D, decode, mesh_of, narrow, placed, tokens, weights

import hire_xform as hx
from hire_xform.lowering.primitives.da_top_k import da_top_k

PLATFORMS = ("cpu", "cuda", "tpu")
LOSSLESS = hx.lossless(rules=named(hx.Vocab(certify=True)))


@pytest.fixture(scope="module")
def found():
    return devices.outcomes(__name__)


def written_and_read(jitted, *operands, platforms=PLATFORMS):
    exported = jax.export.export(jitted, platforms=platforms)(*operands)
    assert exported.platforms == platforms
    return jax.export.deserialize(exported.serialize())


@pytest.mark.parametrize("predictor", [hx.Quantized(8), hx.Quantized(4), hx.LowRank(0.5)], ids=str)
def test_a_step_with_packed_and_with_plain_weights(predictor):
    config = hx.Config(
        ffn=hx.Ffn(predictor=predictor, certify=False), rules=named(hx.Vocab(candidates=16, predictor=predictor))
    )
    step, w, x = hx.sparsify(decode, config=config), weights(), tokens(1)
    for given in (step.trace(w, x).pack(w), w):
        jitted, operands = step.program(given, x)
        again = written_and_read(jitted, *operands)
        assert_same(again.call(*operands), step(w, x))
    _, operands = step.program(given, tokens(2)[1:])
    assert_same(again.call(*operands), step(w, tokens(2)[1:]))


def test_a_packed_argument_is_exported_as_it_is_if_nothing_is_written():
    step, w, x = hx.sparsify(decode, config=narrow()), weights(), tokens(1)
    packed = step.trace(w, x).pack(w)
    exported = jax.export.export(jax.jit(step), platforms=PLATFORMS)(packed, x)
    assert_same(exported.call(packed, x), step(packed, x))
    with pytest.raises(ValueError, match="unregistered type"):
        exported.serialize()


def test_one_traced_function_is_lowered_for_several_platforms_together():
    """Kernels of each stand in the branch of it; here those of CPUs, which a program for others alone has none of."""
    step, w, x = hx.sparsify(decode, config=narrow()), weights(), tokens(1)
    traced = step.trace(w, x)
    assert traced.platforms == ("cpu", "cuda", "rocm", "tpu")
    together, *alone = (traced.lower(lowering_platforms=p).as_text() for p in (PLATFORMS, ("cuda",), ("tpu",)))
    assert "_platform_index" in together
    assert not any("_platform_index" in text for text in alone)


def test_a_program_that_is_called_where_it_is_not_for_says_what_it_is_for():
    step, w, x = hx.sparsify(decode, config=narrow()), weights(), tokens(1)
    jitted, operands = step.program(w, x)
    again = written_and_read(jitted, *operands, platforms=("cuda", "tpu"))
    assert again.platforms == ("cuda", "tpu")
    with pytest.raises(ValueError, match=r"exported for platforms .*cuda.*tpu.* used on .*cpu"):
        again.call(*operands)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("cpu", "gpu"), "'gpu'.; expected a sequence of cpu, cuda, rocm, tpu; NVIDIA's GPUs are cuda"),
        ("cuda", "lowering_platforms='cuda'; expected a sequence of cpu"),
        (("metal",), "'metal',.; expected a sequence of cpu"),
    ],
)
def test_platforms_that_are_none_are_refused(asked, message):
    traced = hx.sparsify(decode, config=narrow()).trace(weights(), tokens(1))
    with pytest.raises(ValueError, match=message):
        traced.lower(lowering_platforms=asked)


def test_the_step_itself_is_not_exported_and_says_what_is():
    with pytest.raises(TypeError, match=r"expected jax.export.export\(jitted\).*step.program"):
        jax.export.export(hx.sparsify(decode, config=narrow()))(weights(), tokens(1))


def test_the_models_own_top_k():
    def own(w, x):
        hidden = jax.nn.relu(x @ w["up"][0])
        kept, _ = lax.top_k(hidden, 8)
        return jnp.where(hidden >= kept[:, -1:], hidden, 0.0) @ w["down"][0]

    step, w, x = hx.sparsify(own, config=narrow()), weights(), tokens(1)
    assert step.trace(w, x).plan.sites
    jitted, operands = step.program(w, x)
    assert_same(written_and_read(jitted, *operands).call(*operands), step(w, x))


def block_and_head(w, x, precision=None):
    hidden = jax.nn.relu(jnp.dot(x, w["up"][0], precision=precision))
    return jnp.dot(hidden @ w["down"][0], w["head"], precision=precision)


def test_a_certified_step_is_lowered_only_where_it_is_proved():
    config, w, x = LOSSLESS, weights(), tokens(1)
    step = hx.sparsify(block_and_head, config=config)
    jitted, operands = step.program(w, x)
    assert step.trace(w, x).platforms == ("cpu",)
    assert_same(written_and_read(jitted, *operands, platforms=("cpu",)).call(*operands), step(w, x))
    for platform in ("cuda", "tpu"):
        with pytest.raises(ValueError, match=f"is certified for cpu, and is now lowered for {platform}"):
            jax.export.export(jitted, platforms=("cpu", platform))(*operands)
        with pytest.raises(ValueError, match=f"is now lowered for {platform}"):
            step.trace(w, x).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(("precision", "dtype"), [(lax.Precision.HIGHEST, jnp.float32), (None, jnp.bfloat16)])
def test_a_certified_step_whose_products_round_nothing_is_lowered_everywhere(precision, dtype):
    w, x = jax.tree.map(lambda a: a.astype(dtype), (weights(), tokens(1)))
    step = hx.sparsify(partial(block_and_head, precision=precision), config=LOSSLESS)
    assert len(step.trace(w, x).plan.sites) == 2
    assert step.trace(w, x).platforms == ("cpu", "cuda", "rocm", "tpu")
    jitted, operands = step.program(w, x)
    assert_same(written_and_read(jitted, *operands).call(*operands), step(w, x))


def test_a_batch_of_any_size_is_one_program():
    step, w = hx.sparsify(decode, config=narrow()), weights()
    (batch,) = jax.export.symbolic_shape("b")
    each = jax.jit(jax.vmap(lambda x: decode_one(step, w, x)))
    exported = jax.export.export(each)(jax.ShapeDtypeStruct((batch, D), jnp.float32))
    again = jax.export.deserialize(exported.serialize())
    for count in (1, 3):
        assert_same(again.call(tokens(count)), each(tokens(count)))


def decode_one(step, w, x):
    return step(w, x[None])[0]


def check_a_step_over_four_devices():
    w, x = placed(mesh_of(4))
    step = hx.sparsify(decode, config=narrow())
    jitted, operands = step.program(w, x)
    again = written_and_read(jitted, *operands)
    assert again.nr_devices == 4
    assert_same(again.call(*operands), step(w, x))


def check_da_top_k_over_devices_is_not_written_down():
    """Where it is split by a rule it calls back into this process: better refused than read in another."""
    w, x = placed(mesh_of(4))
    logits = jax.jit(lambda w, x: x @ w["head"])(w, x)
    with pytest.raises(NotImplementedError, match="host_callbacks"):
        jax.export.export(jax.jit(lambda s: da_top_k(s, 8, 4)))(logits)


def test_da_top_k():
    scores = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    for shards in (1, 4, 5):
        again = written_and_read(jax.jit(lambda s, shards=shards: da_top_k(s, 8, shards)), scores)
        assert_same(again.call(scores), da_top_k(scores, 8, shards))


@pytest.mark.parametrize("name", devices.checks(__name__))
def test_on_devices(found, name):
    assert not found[name], found[name]
