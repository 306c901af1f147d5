"""Each check that a match goes through: where it finds no fault, and what it says of one."""

from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from laid_out import laid_out

import hire_xform as hx
from hire_xform.lowering.predict.predictors import Predictor
from hire_xform.passes.match.detect import detect
from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.match.region import OwnSparsity
from hire_xform.passes.plan import checks
from hire_xform.passes.plan.checks import Case
from hire_xform.passes.plan.forms import ROWS, Leaf, Norms, Order, PackedPredictor, UnitOrder
from hire_xform.passes.plan.measurement import Chosen, unpredicted, with_choices
from hire_xform.passes.plan.needs import leaf_needs, needs_of, order_of, stack_need
from hire_xform.passes.plan.placement import Placement
from hire_xform.passes.plan.settings import Choice, Dense, Ffn, Vocab
from hire_xform.passes.weights.recipe import Stack, Transpose

D, M, V, L = 4, 24, 64, 3
W = {"up": jnp.ones((L, D, M)), "down": jnp.ones((L, M, D)), "head": jnp.ones((D, V))}
INT8 = hx.Quantized(8)


def block(w, x, length=L):
    def layer(x, w):
        return jnp.maximum(x @ w["up"], 0) @ w["down"], None

    layers = {name: w[name] for name in ("up", "down")}
    return lax.scan(layer, x, layers)[0]


def head(w, x):
    return jnp.argmax(x @ w["head"], -1)


def match_of(fun, weights=W, tokens=1):
    found = laid_out(fun, weights, jnp.ones((tokens, D), weights["head"].dtype))
    (match,) = detect(found.graph, found.provenance).matches
    return match


BLOCK, HEAD = match_of(block), match_of(head)
OWN = OwnSparsity(0, 0.1, "top 2", (), 4)
OWNED = match_of(block)
OWNED.region.own = OWN
CPU = SimpleNamespace(platform="cpu")


def case(match=BLOCK, settings=None, own=None, measurement=None, placed=None, **choice):
    kind = kind_of(match)
    if settings is None:
        settings = Ffn(active=0.5, predictor=INT8) if match.kind == "ffn" else Vocab(candidates=8, predictor=INT8)
    match = OWNED if own is not None else match
    return Case(match, kind, Choice(settings=settings, **choice), CPU, ("w",), measurement, placed, False)


def placement(shards):
    mesh = SimpleNamespace(shape={"model": shards}, axis_types=())
    return Placement(mesh, ("model",), ())


class Fitted(Predictor):
    """Needs a calibration, and proves nothing."""

    needs_inputs = "covariance"


class Held(Predictor):
    """Holds arrays of its own."""

    stack_axes = 1

    def __init__(self, layers):
        self.layers = layers

    @property
    def arrays(self):
        return {"a": np.zeros((self.layers, 2))}


CHECKS = {
    "wanted": (checks.is_wanted, case(), None),
    "not wanted": (
        checks.is_wanted,
        Case(BLOCK, kind_of(BLOCK), Choice(settings=None, reason="a rule skips it"), CPU, (), None, None, False),
        "a rule skips it",
    ),
    "executed": (checks.is_executed, case(), None),
    "floats": (checks.has_float_weights, case(), None),
    "few tokens": (checks.has_few_tokens, case(settings=Ffn(max_tokens=1)), None),
    "many tokens": (
        checks.has_few_tokens,
        case(match_of(head, tokens=3), Vocab(max_tokens=2)),
        "3 tokens in one call, more than max_tokens=2; a prefill runs dense",
    ),
    "placed": (checks.is_placed, case(placed=None), None),
    "not placed": (checks.is_placed, case(placed="on different meshes"), "on different meshes"),
    "whole groups": (checks.has_whole_groups, case(settings=Ffn(group_size=8)), None),
    "parts of groups": (
        checks.has_whole_groups,
        case(settings=Ffn(group_size=5)),
        "group_size=5 does not divide its 24 hidden units",
    ),
    "whole groups of the model's own": (checks.has_whole_groups, case(own=OWN, settings=Ffn(group_size=8)), None),
    "parts of the model's own": (
        checks.has_whole_groups,
        case(own=OWN, settings=Ffn(group_size=6)),
        "group_size=6 is no multiple of the 4 units",
    ),
    "whole groups on each": (
        checks.has_whole_groups_on_each_device,
        case(settings=Ffn(group_size=6), placed=placement(4)),
        None,
    ),
    "parts of groups on each": (
        checks.has_whole_groups_on_each_device,
        case(settings=Ffn(group_size=4), placed=placement(4)),
        "group_size=4 does not divide the 6 hidden units of each device",
    ),
    "a choice on one device": (checks.chooses_on_one_device, case(own=OWN), None),
    "a choice on several": (
        checks.chooses_on_one_device,
        case(own=OWN, placed=placement(4)),
        "among all its units, which are sharded over 4 devices along 'model'",
    ),
    "a certified choice on a mesh": (
        checks.chooses_on_one_device,
        case(own=OWN, settings=Ffn(certify=True), placed=placement(1)),
        "which is certified without explicit axes only",
    ),
    "certified": (checks.can_be_certified, case(HEAD, Vocab(certify=True)), None),
    "not to be certified": (checks.can_be_certified, case(HEAD, Vocab(certify=False)), None),
    "a predictor": (checks.has_a_predictor, case(), None),
    "a predictor that needs inputs": (
        checks.has_a_predictor,
        case(settings=Ffn(predictor=Fitted(), active=0.5)),
        "needs the covariance of this site's inputs; pass calibration=",
    ),
    "a predictor that proves nothing": (
        checks.has_a_predictor,
        case(settings=Ffn(predictor=Held(L), certify=True)),
        "proves nothing of what it predicts, as certify=True asks",
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_checks(name):
    check, given, words = CHECKS[name]
    found = check(given)
    assert found is None if words is None else words in found


@pytest.mark.parametrize(
    ("weight", "x", "words"),
    [
        ("float16", "float16", None),
        ("int8", "float32", None),
        (
            "int8",
            "int8",
            "its weights are int8, multiplied by int8; only products of floating-point data are predicted",
        ),
        ("int32", "int32", "its weights are int32; only floating-point weights are predicted"),
    ],
)
def test_weights_that_are_predicted(weight, x, words):
    weight, x = (SimpleNamespace(aval=SimpleNamespace(dtype=jnp.dtype(d))) for d in (weight, x))
    found = replace(case(), match=SimpleNamespace(products=[SimpleNamespace(weight=weight, x=x)]))
    told = checks.has_float_weights(found)
    assert told is None if words is None else words in told


def test_a_body_that_never_runs():
    found = replace(case(), match=SimpleNamespace(node=SimpleNamespace(scope=SimpleNamespace(iterations=0))))
    assert checks.is_executed(found) == "the loop around it has no iterations"


def test_groups_are_the_models_own_where_none_are_stated():
    assert case(own=OWN, settings=Ffn()).group_size == 4
    assert case(own=OWN, settings=Ffn(group_size=2)).group_size == 2


# --- what a calibration says ---


def measured(chosen, certified=False, **more):
    return SimpleNamespace(certified=certified, advise=lambda settings, static: chosen, inputs=(), **more)


def test_what_is_stated_wins_over_what_was_measured():
    low = hx.LowRank(2)
    settings, chosen = with_choices(Ffn(), measured(Chosen(low, 6, "how", sizes=np.asarray([1, 6]))), M, False)
    assert (settings.predictor, settings.active) == (low, 6 / M)
    assert chosen.sizes is not None
    settings, chosen = with_choices(
        Ffn(active=0.5), measured(Chosen(low, 6, "how", sizes=np.asarray([1, 6]))), M, False
    )
    assert (settings.active, chosen.sizes) == (0.5, None)
    settings, chosen = with_choices(Ffn(), measured(Chosen(None, None, "nothing")), M, False)
    assert (settings.predictor, settings.active, chosen.how) == (INT8, None, "nothing")
    settings, chosen = with_choices(Vocab(), None, V, False)
    assert (settings.predictor, chosen) == (INT8, Chosen(None, None, ""))
    assert case(measurement=measured(Chosen(None, None, ""), certified=True), settings=Ffn()).settings.certify is True
    assert case(measurement=measured(Chosen(None, None, "")), settings=Ffn()).settings.certify is False


def test_arrays_of_a_predictor_fit_the_stack_of_the_weight():
    settings = Ffn(predictor=Held(L), certify=False)
    assert unpredicted(BLOCK, settings, None, False) is None
    assert "holds arrays of whole weights" in unpredicted(BLOCK, settings, None, True)
    wrong = unpredicted(BLOCK, Ffn(predictor=Held(2), certify=False), None, False)
    assert "stack_axes=1 axes should be those of the weight, which is stacked [3]" in wrong


# --- what a site reads ---


def test_a_blocks_forms():
    settings = Ffn(predictor=INT8, certify=False)
    forms = needs_of(BLOCK, settings, None, 1, None)
    (up,) = forms.up
    assert up.rows.key.form == forms.down.rows.key.form == ROWS
    assert up.rows.key.recipe.steps == (Stack(L), Transpose((1, 0)))
    assert forms.down.rows.key.recipe.steps == (Stack(L),)
    assert [ref.scope.kind for ref in up.rows.refs] == ["scan"]
    assert up.predictor.key.form == PackedPredictor(INT8)
    assert forms.order is None
    leaves = leaf_needs(BLOCK)
    assert all(need.key.form == Leaf() for need in leaves)


def test_all_but_rows_are_made_of_each_devices_part():
    forms = needs_of(HEAD, Vocab(predictor=INT8, certify=True), None, 4, None)
    one = forms.head
    assert not any(isinstance(step, Stack) for step in one.rows.key.recipe.steps)
    assert one.predictor.key.recipe.steps[-1] == Stack(4)
    assert one.predictor.key.form == PackedPredictor(INT8, True)
    (leaf,) = leaf_needs(HEAD)
    assert leaf.key.recipe.steps == ()


def test_units_in_an_order_of_their_own_are_so_in_every_form():
    order = Order("by firing", np.zeros((L, M), np.int32))
    forms = needs_of(BLOCK, Ffn(predictor=INT8, certify=False), None, 1, order, static=2)
    (up,) = forms.up
    assert up.rows.key.form.order == forms.down.rows.key.form.order == up.predictor.key.form.order == order
    assert up.predictor.key.form.static == 2
    assert forms.order.key.form == UnitOrder(order)
    assert stack_need(BLOCK, Norms()).key.recipe == BLOCK.matrices[0].rows
    assert order_of(BLOCK, Ffn(group_size=2, certify=False), None) is None
    measurement = measured(None, order_for=lambda settings: order)
    assert order_of(BLOCK, Ffn(group_size=2, certify=False), measurement) in (order, None)
    assert order_of(HEAD, Vocab(), measurement) is None
    assert Dense().decided(None) == Dense()
