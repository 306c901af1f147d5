"""tpu-inference: one ``Packed`` for its model and its head, and the attention that stands in for its kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checked import gap
from checks import full_width, kinds
from stack import why_missing

import hire_xform as hx

try:
    import tpu_inference_stack as tpu
except ImportError as error:
    pytest.skip(why_missing("tpu-inference", error), allow_module_level=True)

pytestmark = [pytest.mark.any_jax("a stack asks for a JAX of its own"), pytest.mark.slow]


def test_the_attention_that_stands_in_is_the_reference_of_the_package():
    rng, cache = np.random.default_rng(0), tpu.caches()[0]
    want = cache
    for length in range(1, 7):
        q, k, v = (jnp.asarray(rng.normal(size=(2, heads, tpu.H)), jnp.float32) for heads in (4, 1, 1))
        given = tpu.attended(length)
        order = given.seq_lens, given.block_tables, given.query_start_loc, given.request_distribution
        expected, want = tpu.paged.ref_ragged_paged_attention(q, k, v, want, *order, sm_scale=0.3)
        got, cache = jax.jit(tpu.one_token_attention)(q, k, v, cache, *order, sm_scale=0.3)
        np.testing.assert_allclose(got, expected, atol=1e-6)
        np.testing.assert_array_equal(cache, want)


def test_model_and_head_share_one_packed():
    runner = tpu.loaded()
    model = hx.sparsify(
        runner.model.step_fn_no_options, static_argnums=(6, 9, 10), donate_argnums=1, config=full_width(stated=False)
    )
    head = hx.sparsify(runner.compute_logits_fn, config=full_width())
    leaves = runner.state_leaves
    want = runner.model_fn(*tpu.model_arguments(leaves)), runner.compute_logits_fn(*tpu.head_arguments(leaves))
    traced = [model.trace(*tpu.model_arguments(leaves)), head.trace(*tpu.head_arguments(leaves))]
    assert [kinds(one.plan) for one in traced] == [["ffn"] * tpu.L, ["vocab"]]
    packed = hx.pack(leaves, traced)
    assert gap(model(*tpu.model_arguments(packed)), want[0]) < 5e-5
    assert gap(head(*tpu.head_arguments(packed)), want[1]) < 5e-5
