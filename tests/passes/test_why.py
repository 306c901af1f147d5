"""``HIRE_WHY``: every check that a product goes through, until it is a site or refused."""

import jax
import jax.numpy as jnp
import pytest

import hire_xform as hx
from hire_xform.passes.ir.debugging import path_matches
from hire_xform.passes.kinds import vocab
from hire_xform.passes.kinds.ffn import FfnKind
from hire_xform.passes.plan import checks

CHECKS = FfnKind.checks
FORCED = hx.Config(
    ffn=hx.Ffn(active=0.5, certify=False),
    vocab=hx.Vocab(candidates=8, certify=False),
    rules=(hx.Rule("*", force=True),),
)
SHAPES = {"up": (8, 32), "down": (32, 8), "mix": (8, 8), "head": (8, 64)}


def program(p, x):
    x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
    x = x + jnp.cumsum(x @ p["mix"], axis=-1)
    return jnp.argmax(x @ p["head"], axis=-1)


def told(monkeypatch, capsys, glob, config=FORCED, tokens=1):
    """The lines told of products that fit a pattern: (path, check, outcome)."""
    p = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    if glob is None:
        monkeypatch.delenv("HIRE_WHY", raising=False)
    else:
        monkeypatch.setenv("HIRE_WHY", glob)
    hx.sparsify(program, config=config).trace(p, jax.ShapeDtypeStruct((tokens, 8), jnp.float32))
    out, err = capsys.readouterr()
    assert not out
    lines = err.splitlines()
    assert all(line.startswith("hire_why ") for line in lines)
    return [tuple(line.removeprefix("hire_why ").split(": ", 2)) for line in lines]


@pytest.mark.parametrize("glob", [None, "", "scan*", "dot_general"])
def test_nothing_is_told_where_nothing_is_asked_for(monkeypatch, capsys, glob):
    assert not told(monkeypatch, capsys, glob)


def test_a_site_is_told_from_detection_to_the_plan_in_order(monkeypatch, capsys):
    lines = told(monkeypatch, capsys, "dot_general[1]")
    assert {path for path, *_ in lines} == {"dot_general[1]"}
    assert lines[0][1:] == ("ends a feed-forward block", "yes, that of dot_general[0]")
    checks = [check for _, check, _ in lines[1:]]
    names = [f"ffn {check.__name__.replace('_', ' ')}" for check in CHECKS]
    assert checks == [*names, "ffn is faster", "ffn site"]
    assert all(outcome == "yes" for *_, outcome in lines[1 : 1 + len(names)])
    assert lines[-1][2] == "16 of 32 exact"


def test_the_product_before_it_is_told_of_its_block(monkeypatch, capsys):
    lines = told(monkeypatch, capsys, "dot_general[0]")
    assert [path for path, *_ in lines[:2]] == ["dot_general[0]", "dot_general[1]"]
    assert lines[-1] == ("dot_general[1]", "ffn site", "16 of 32 exact")


def test_a_vocabulary_is_told_with_its_evidence(monkeypatch, capsys):
    lines = told(monkeypatch, capsys, "dot_general[3]")
    found = {check: outcome for _, check, outcome in lines}
    assert found["ends a feed-forward block"].startswith("no: ")
    assert found["is a vocabulary projection by its shape"] == "yes"
    assert found["has outputs that are logits"].startswith("argmax at ")
    assert found["vocab site"] == "8 of 64 exact"


def test_what_is_refused_by_detection_is_told_with_the_reason(monkeypatch, capsys):
    lines = told(monkeypatch, capsys, "dot_general[2]")
    assert [check for _, check, _ in lines] == [
        "ends a feed-forward block",
        "is a vocabulary projection by its shape",
        "refused",
    ]
    assert "too narrow for a vocabulary" in lines[-1][2] or "cumsum" in lines[-1][2]


def test_a_plan_s_checks_end_at_the_one_that_refuses(monkeypatch, capsys):
    lines = told(monkeypatch, capsys, "dot_general[1]", tokens=16)
    assert lines[-1][1] == "ffn has few tokens"
    assert "a prefill runs dense" in lines[-1][2]
    skipped = told(monkeypatch, capsys, "dot_general[1]", config=hx.Config(ffn=None))
    assert skipped[-1][1:] == ("ffn is wanted", "ffn=None in the Config leaves it dense")


def test_tokens_are_counted_before_anything_is_proved(monkeypatch):
    """A prefill's readers are not asked for, which takes long."""
    monkeypatch.setattr(vocab, "reads_of", lambda *_: pytest.fail("a prefill's readers were looked at"))
    monkeypatch.setattr(checks, "not_certifiable", lambda *_: pytest.fail("a prefill was to be certified"))
    p = {
        name: jnp.ones(shape)
        for name, shape in {"up": (8, 32), "down": (32, 8), "mix": (8, 8), "head": (8, 64)}.items()
    }
    plan = hx.sparsify(program).trace(p, jnp.ones((16, 8))).plan
    assert not plan.sites
    assert sum("a prefill runs dense" in refusal.reason for refusal in plan.refusals) == 3


def test_patterns_are_those_of_rules():
    assert path_matches("scan[0]/*", "scan[0]/dot_general[1]")
    assert path_matches("dot_general[?]", "dot_general[1]")
    assert not path_matches("dot_general[01]", "dot_general[1]")
    assert not path_matches("dot_general", "dot_general[1]")


def test_explain_says_why_outputs_are_logits():
    p = {
        name: jnp.ones(shape)
        for name, shape in {"up": (8, 32), "down": (32, 8), "mix": (8, 8), "head": (8, 64)}.items()
    }
    traced = hx.sparsify(program, config=FORCED).trace(p, jnp.ones((1, 8)))
    vocab = next(site for site in traced.plan.sites if site.kind == "vocab")
    assert vocab.evidence.startswith("argmax at ")
    assert vocab.evidence.endswith(" reads it")
    assert f"its outputs are logits: {vocab.evidence}" in traced.explain()
    ffn = next(site for site in traced.plan.sites if site.kind == "ffn")
    assert not ffn.evidence
    rule = hx.Rule("*", force=True, vocab=hx.Vocab(candidates=8))
    wide = hx.sparsify(lambda w, x: x @ w, config=hx.Config(rules=(rule,))).trace(jnp.ones((8, 64)), jnp.ones((1, 8)))
    assert "its outputs are logits: a rule says so" in wide.explain()
