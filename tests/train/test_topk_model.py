"""The bundled model fine-tuned with a top-k, and the steps of its fine-tuning."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_xform as hx

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import finetune_tiny_lm as fine  # noqa: E402
from tiny_lm import model as lm  # noqa: E402

FOLDER = EXAMPLES / "tiny_lm"


def record():
    return json.loads((FOLDER / "topk_training.json").read_text())


def test_units_that_fire_together_become_neighbours():
    rng = np.random.default_rng(0)
    members = rng.permutation(32).reshape(4, 8)
    fired = np.zeros((400, 32))
    for token, group in enumerate(rng.integers(4, size=400)):
        fired[token, members[group]] = rng.uniform(0.5, 1, size=8)
    order = fine.neighbours(fired.T @ fired, 8)
    assert sorted(order) == list(range(32))
    assert {frozenset(g) for g in order.reshape(4, 8).tolist()} == {frozenset(g) for g in members.tolist()}


def test_contributions_are_activations_times_norms_and_their_order_is_a_symmetry():
    config = lm.Config(vocab_size=40, d_model=16, d_ff=32, num_layers=2, num_heads=2)
    params = lm.init(config, jax.random.key(0))
    windows = jax.random.randint(jax.random.key(1), (2, 7), 0, 40)
    ffn = params["layers"][0]["ffn"]
    found = fine.contributions(params, windows)
    assert [f.shape for f in found] == [(14, 32)] * 2
    assert (np.asarray(found[0]) >= 0).all()
    order = np.random.default_rng(0).permutation(32)
    moved = {"w_in": ffn["w_in"][:, order], "b_in": ffn["b_in"][order], "w_out": ffn["w_out"][order]}
    layers = [{**params["layers"][0], "ffn": {**ffn, **moved}}, params["layers"][1]]
    same = {**params, "layers": layers}
    np.testing.assert_allclose(lm.forward(same, windows), lm.forward(params, windows), atol=1e-5)
    np.testing.assert_allclose(fine.contributions(same, windows)[0], found[0][:, order], atol=1e-5)


def test_the_stored_model_is_as_its_record_says():
    said = record()
    params = lm.load(FOLDER / "topk_weights.safetensors")
    assert lm.config_of(params) == lm.config_of(lm.load(FOLDER / "weights.safetensors"))
    sites = fine.topk_forward(params, tuple(said["active"]), said["group_size"])
    plan = sites.trace(params, jnp.zeros((1, 4), jnp.int32)).plan
    assert [s.computed / s.units for s in plan.sites] == said["active"]
    assert said["validation_loss"] - said["validation_loss_of_the_dense_model"] < 0.01


@pytest.mark.slow
def test_the_stored_model_decodes_sparsely_as_it_was_trained():
    """Blocks with the trained sizes, units found by int8: the most likely tokens of the exact top-k model."""
    said, positions = record(), 192
    active, group = tuple(said["active"]), said["group_size"]
    params, dense = (lm.load(FOLDER / f"{name}.safetensors") for name in ("topk_weights", "weights"))
    tokens = jnp.asarray(np.load(FOLDER / "heldout.npy")[: positions + 1].astype(np.int32))

    def decode(params, cache, tokens):
        def body(cache, token):
            logits, cache = lm.decode_step(params, cache, token[None])
            return cache, logits[0]

        return jax.lax.scan(body, cache, tokens)[1]

    cache = lm.init_cache(lm.config_of(params), 1, positions)
    operands = (params, cache, tokens[:-1])
    force = hx.Rule("*", force=True)
    plan = hx.sparsify(decode, config=hx.Config(rules=(force,))).trace(*operands).plan
    config = fine.config_for([s.path for s in plan.sites if s.kind == "ffn"], active, group)
    step = hx.sparsify(decode, config=hx.Config(vocab=None, ffn=config.ffn, rules=(force, *config.rules)))
    assert step.trace(*operands).plan.sparse_bytes < 0.4 * step.trace(*operands).plan.dense_bytes
    sparse = step(*operands)
    exact = fine.topk_forward(params, active, group)(params, tokens[None, :-1])[0]
    assert np.mean(np.argmax(sparse, 1) == np.argmax(exact, 1)) > 0.97

    def loss(logits):
        return -float(jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=1)))

    assert loss(sparse) - loss(lm.forward(dense, tokens[None, :-1])[0]) < 0.05
