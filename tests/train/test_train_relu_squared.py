"""The example that trains dense and with a top-k from one start: it stops and goes on, and notes what is lost."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from extras import why_missing

import hire_xform as hx

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
try:
    import train_relu_squared as example
except ImportError as error:
    pytest.skip(why_missing("optax", error), allow_module_level=True)

pytestmark = pytest.mark.slow

CORPUS = SimpleNamespace(
    train=np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint16),
    heldout=np.random.default_rng(1).integers(0, 50, 300).astype(np.uint16),
)


@pytest.fixture
def small(monkeypatch):
    """A model of a few thousand parameters."""
    for name, value in {"VOCABULARY": 50, "WIDTH": 16, "HIDDEN": 32, "LAYERS": 1, "HEADS": 2, "LENGTH": 8}.items():
        monkeypatch.setattr(example, name, value)
    caches = (example.stepper, example.loss_with, example.validator)
    for made in caches:
        made.cache_clear()
    yield
    for made in caches:
        made.cache_clear()


def settings(folder):
    return argparse.Namespace(trunk=4, branch=6, topk=[(0.25, 2)], turn=2, windows=8, checkpoints=folder)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(small, tmp_path, monkeypatch):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    example.train(settings(tmp_path / "whole"), CORPUS)
    saved, save = [], example.save

    def stopping(*args):
        save(*args)
        saved.append(args)
        if len(saved) in (2, 4):  # behind the trunk, and between two branches
            raise KeyboardInterrupt

    monkeypatch.setattr(example, "save", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            example.train(settings(tmp_path / "parts"), CORPUS)
    example.train(settings(tmp_path / "parts"), CORPUS)
    whole, parts = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "parts"))
    assert parts == whole
    assert list(whole) == ["4", "6", "8", "10", "end"]
    assert all(here.keys() == {"dense", "25%x2"} for here in whole.values())


def test_shares_kept_are_halved_in_the_first_third_of_a_branch(small, tmp_path):
    branch = example.Branch(argparse.Namespace(trunk=10, branch=90, checkpoints=tmp_path), "x", 0.1, 2)
    assert [branch.active_at(step) for step in (0, 10, 20, 21, 30, 39, 40, 99)] == [
        0.5,
        0.5,
        0.25,
        0.25,
        0.125,
        0.125,
    ] + [0.1] * 2


def test_the_step_that_decodes_is_the_model_and_is_found(small):
    params = example.init(jax.random.key(0))
    tokens = jnp.arange(5, dtype=jnp.int32)
    whole, _ = example.forward(params, example.empty_cache(1, 8), tokens[None])
    cache, step = example.empty_cache(1, 8), jax.jit(example.decode_step)
    for token, want in zip(tokens, whole[0], strict=True):
        logits, cache = step(params, cache, token)
        np.testing.assert_allclose(logits, want, atol=1e-5)
    plan = hx.sparsify(example.decode_step, config=hx.Config(rules=(hx.Rule("*", force=True),)))
    kinds = [site.kind for site in plan.trace(params, example.empty_cache(1, 8), tokens[0]).plan.sites]
    assert kinds.count("ffn") == example.LAYERS
