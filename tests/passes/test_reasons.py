"""Why a product is no part of a block: what detection knew of it reaches the refusal, with the source line."""

import jax.numpy as jnp
import pytest
from checks import full_width
from jax import lax
from test_near_misses import T, between, own_top_k_of_pairs, relu, tokens, weights

import hire_xform as hx
from hire_xform.call import trial
from hire_xform.passes.match import probe


def many(u):
    for _ in range(100):
        u = jnp.sin(u)
    return u


def residual(p, x):
    x = x + x @ p["square"]
    return x + x @ p["square"]


def two_blocks(p, x):
    """The output of the first goes on a residual stream, to the second's product."""
    u = relu(x @ p["w1"])
    x = x + (u / u.sum(-1, keepdims=True)) @ p["back"]
    return relu(x @ p["wg"]) @ p["w2"]


# Per case: the program, what a refusal says, and how many do: the product that ends no block, and the one before it.
REASONS = {
    "mixed": (between(lambda u: jnp.cumsum(u, axis=-1)), "not followed back to a product (cumsum at ", 1),
    "sliced_and_reshaped": (
        lambda p, x: relu(x @ p["w1"]).reshape(T, 4, 10)[:, :, 1:6].reshape(T, 20) @ p["half"],
        "a slice of the hidden axis is then reshaped (reshape at ",
        2,
    ),
    "units_among_tokens": (
        lambda p, x: jnp.einsum("thk,kn->thn", relu(x @ p["w1"]).reshape(T, 4, 10), p["w2"][:10]),
        "the units that it contracts are not those of the product that makes them (dot_general at ",
        2,
    ),
    "too_long": (between(many), "more than 96 equations make what it contracts", 2),
    "indices": (
        between(lambda u: u.at[jnp.arange(T)[:, None], lax.top_k(u, 8)[1]].set(0)),
        "not followed back to a product (scatter at ",
        1,
    ),
    "argument": (lambda p, x: x @ p["square"], "made of what enters the program", 1),
    "residual_stream": (
        residual,
        "through sums only, as on a residual stream, and what it contracts is also read by add at ",
        1,
    ),
    "normed_by_a_sum": (
        between(lambda u: u / u.sum(-1, keepdims=True)),
        "nor is that the model's own choice of units: the sum over its units (reduce_sum at ",
        1,
    ),
    "cubes": (
        between(lambda u: jnp.where(u > (u * u * u).sum(-1, keepdims=True), u, 0)),
        "is of no polynomial of second degree in one product: max makes no polynomial",
        1,
    ),
    "above_second_degree": (
        lambda p, x: (lambda u: jnp.where(u > (u * u * u).sum(-1, keepdims=True), u, 0))(x @ p["w1"]) @ p["w2"],
        "in one product: its degree is above two",
        1,
    ),
    "smallest_kept": (
        between(lambda u: jnp.where(u > jnp.sort(u, -1)[:, 3:4], 0, u)),
        "the units it keeps are not those of the largest scores",
        1,
    ),
    "kept_by_a_neighbour": (own_top_k_of_pairs, "it does not keep some units and leave others zero", 1),
    "two_choices": (
        lambda p, x: (
            lambda u: (jnp.where(u >= lax.top_k(u, 8)[0][:, -1:], u, 0) * (u * u >= lax.top_k(u * u, 8)[0][:, -1:]))
        )(x @ p["w1"])
        @ p["w2"],
        "2 of its values are ranked or summed over all units; a choice has one",
        1,
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_reason_that_detection_knew_is_told(name):
    program, words, count = REASONS[name]
    plan = hx.sparsify(program, config=full_width()).trace(weights(), tokens()).plan
    assert not plan.sites
    reasons = [refusal.reason for refusal in plan.refusals]
    assert sum(words in reason for reason in reasons) == count, reasons
    if words.endswith("at "):
        assert all(f"{words}{__file__}" in r or "test_near_misses.py" in r for r in reasons if words in r)


def test_why_a_product_nearly_ends_a_block_is_told_whatever_product_comes_later():
    plan = hx.sparsify(two_blocks, config=full_width()).trace(weights(), tokens()).plan
    (down,) = [refusal for refusal in plan.refusals if refusal.path == "dot_general[1]"]
    assert "an activation on the way to it is also read by reduce_sum at " in down.reason
    assert [site.path for site in plan.sites] == ["dot_general[3]"]


def block(p, x):
    return relu(x @ p["w1"]) @ p["w2"]


@pytest.fixture
def failing(monkeypatch):
    """Trials fail, as where an equation takes no other numbers than those it was written for."""

    def fail(*_):
        raise ZeroDivisionError("no such number\nand more")

    monkeypatch.setattr(probe, "_run", fail)


def shifted(p, x):
    return relu(x @ p["w1"] + 0.5) @ p["w2"]


def test_a_trial_that_fails_is_told_as_such(failing, monkeypatch):
    monkeypatch.delenv("HIRE_DEBUG", raising=False)
    config = hx.Config(ffn=hx.Ffn(active=0.5, certify=False), rules=(hx.Rule("*", force=True),))
    first, second = hx.sparsify(shifted, config=config).trace(weights(), tokens()).plan.refusals
    assert first.reason == second.reason
    assert "is not known to leave exact zeros (tried on numbers, it raises ZeroDivisionError: no such number)" in (
        first.reason
    )
    assert 'allow it with activations="any"' in first.reason


def test_a_failed_trial_of_a_choice_is_told(failing, monkeypatch):
    monkeypatch.delenv("HIRE_DEBUG", raising=False)
    choice = between(lambda u: jnp.where(u >= lax.top_k(u, 8)[0][:, -1:], u, 0))
    reasons = [r.reason for r in hx.sparsify(choice, config=full_width()).trace(weights(), tokens()).plan.refusals]
    assert any("own choice of units: tried on numbers, it raises ZeroDivisionError" in reason for reason in reasons)


def test_debugging_raises_what_a_trial_raises(failing, monkeypatch):
    monkeypatch.setenv("HIRE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError, match="no such number"):
        hx.sparsify(shifted, config=full_width()).trace(weights(), tokens())


def test_debugging_raises_what_counting_raises(monkeypatch):
    def fail(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(trial, "count_last", fail)
    config = hx.Config(ffn=hx.Ffn(active=0.1, certify=False), rules=(hx.Rule("*", force=True),))
    p, x = weights(), tokens()
    monkeypatch.setenv("HIRE_DEBUG", "0")
    assert hx.sparsify(block, config=config)(p, x).shape == block(p, x).shape
    monkeypatch.setenv("HIRE_DEBUG", "1")
    with pytest.raises(KeyError, match="a bug"):
        hx.sparsify(block, config=config)(p, x)
