"""What is done at equations: one key for what is rewritten alike, and calls that are opened for one rewriting only."""

import jax
import jax.numpy as jnp
import pytest

import hire_xform as hx
from hire_xform.passes.rewrite.inlining import inlined_frames
from hire_xform.passes.rewrite.rewriter import Rewriter

D, M, V = 8, 32, 64
PARAMS = {"u0": (D, M), "d0": (M, D), "u1": (D, M), "d1": (M, D), "head": (D, V)}
PARAMS = {name: jnp.ones(shape) for name, shape in PARAMS.items()}
X = jnp.ones((1, D))


def into_units(x, w):
    return jax.nn.relu(x @ w)


def program(p, x):
    for i in ("0", "1"):
        x = x + jax.jit(into_units)(x, p[f"u{i}"]) @ p[f"d{i}"]
    return jnp.argmax(x @ p["head"], axis=-1)


def actions(traced):
    return traced._actions(lambda root: True, lambda key: True)


@pytest.fixture
def traced():
    return hx.sparsify(program, config=hx.approximate(rules=(hx.Rule("*", force=True),))).trace(PARAMS, X)


def test_like_sites_have_one_key_and_others_another(traced):
    first, second, head, taken = (action.key for action in actions(traced).values())
    assert first == second
    assert hash(first) == hash(second)
    assert len({first, head, taken}) == 3
    rules = (hx.Rule("*", force=True), hx.Rule("dot_general[1]", ffn=hx.Ffn(active=0.5, certify=False)))
    other = hx.sparsify(program, config=hx.approximate(rules=rules)).trace(PARAMS, X)
    keys = [action.key for action in actions(other).values()]
    assert keys[0] == first
    assert keys[1] != first


def test_a_call_is_opened_where_a_site_spans_its_boundary(traced):
    done = actions(traced)
    inside = ("", "custom[0]/", "custom[0]/jit:relu[0]/")
    expected = {f"jit:into_units[{i}]/{rest}" for i in (0, 1) for rest in inside}
    assert {frame.path for frame in inlined_frames(done.values())} == expected
    assert not inlined_frames([done[traced.plan.decisions[-1].node]])


def test_one_rewriting_leaves_no_mark_on_the_graph_for_another(traced):
    graph = traced._graph
    assert inlined_frames(actions(traced).values())
    Rewriter(graph, actions(traced))
    untouched = Rewriter(graph, {})
    text = str(jax.make_jaxpr(lambda *leaves: untouched.evaluate(leaves, None))(*traced.jaxpr.in_avals))
    assert text.count("name=into_units") == str(traced.jaxpr).count("name=into_units") > 0
