"""Weights in arguments that are named, keyword-only ones too; what a step says of a call."""

import jax
import jax.numpy as jnp
import pytest
from checks import FORCE, assert_same, kinds
from tied import FULL, inputs, make_weights, net

import hire_xform as hx


def keyword_only(x, *, params):
    y = net(params, x)
    return jnp.argmax(y, -1), y


def variadic(x, **more):
    return keyword_only(x, **more)


def mixed(body, x, *, head):
    y = (x + jax.nn.relu(x @ body["w1"]) @ body["w2"]) @ head.T
    return jnp.argmax(y, -1), y


@pytest.mark.parametrize(("fun", "names"), [(keyword_only, "params"), (variadic, ("params",))])
def test_keyword_only_weights_are_found_packed_and_lowered(fun, names):
    step, params = hx.sparsify(fun, config=FULL, weights_argnames=names), make_weights()
    traced, want = step.trace(inputs(), params=params), keyword_only(inputs(), params=params)
    assert kinds(traced.plan) == ["ffn", "vocab"]
    assert traced.plan.sites[0].weights == ("params['w1']", "params['w2']")
    packed = traced.pack(params)
    assert_same(step(inputs(), params=params), want)
    assert_same(step(inputs(), params=packed), want)
    assert_same(traced.lower().compile()(inputs(), params=packed), want)
    assert len(traced.sparse_jaxpr.jaxpr.invars) == len(packed.leaves) + 1
    assert_same(jax.jit(step)(inputs(), params=packed), want)
    with pytest.raises(hx.TracedWeightsError, match="params"):
        jax.jit(step)(inputs(), params=params)
    with pytest.raises(TypeError, match=r"argument 0 is Packed, but it is not in weights_argnames=\('params',\)"):
        step(packed, params=params)


def test_plain_keyword_weights_are_packed_once(packs):
    step, params = hx.sparsify(keyword_only, config=FULL, weights_argnames="params"), make_weights()
    step(inputs(), params=params)
    count = len(packs)
    assert count > 0
    step(inputs(seed=4), params=params)
    assert len(packs) == count


def test_a_name_of_a_positional_argument_is_its_position():
    def second(x, params):
        return keyword_only(x, params=params)

    step, params = hx.sparsify(second, config=FULL, weights_argnames="params"), make_weights()
    packed = step.trace(inputs(), params).pack(params)
    want = keyword_only(inputs(), params=params)
    for weights in (params, packed):
        assert_same(step(inputs(), weights), want)
        assert_same(step(params=weights, x=inputs()), want)


def test_positions_come_before_names_and_keywords_in_any_order():
    step = hx.sparsify(mixed, config=FULL, weights_argnums=0, weights_argnames="head")
    params = make_weights()
    traced, want = step.trace(params, inputs(), head=params["embed"]), mixed(params, inputs(), head=params["embed"])
    assert kinds(traced.plan) == ["ffn", "vocab"]
    body, head = traced.pack(params, params["embed"])
    assert_same(step(body, inputs(), head=head), want)
    assert_same(step(head=head, x=inputs(), body=body), want)
    assert_same(step(x=inputs(), body=body, head=head), want)
    with pytest.raises(TypeError, match=r"got 1.*expected 2.*weights_argnums=\(0,\) and weights_argnames=\('head',\)"):
        traced.pack(params)


def test_two_packed_arguments_are_told_apart_whatever_their_order_in_the_call():
    """The first call of a shape fixes nothing but the names."""
    step = hx.sparsify(lambda x, *, a, b: x @ a["w1"] + 2 * (x @ b["w1"]), config=FULL, weights_argnames=("a", "b"))
    one, other = make_weights(0), make_weights(1)
    a, b = step.trace(inputs(), a=one, b=other).pack(one, other)
    want = inputs() @ one["w1"] + 2 * (inputs() @ other["w1"])
    assert_same(step(inputs(), a=a, b=b), want)
    assert_same(step(inputs(), b=b, a=a), want)


def test_calibrations_and_training_take_names():
    params = make_weights()
    batches = [{"x": inputs(5, seed), "params": params} for seed in range(2)]
    config = hx.Config(rules=FORCE, vocab=hx.Vocab(certify=False), ffn=hx.Ffn(certify=False))
    options = {"weights_argnames": "params", "predictors": [hx.Quantized(8)], "config": config}
    calibration = hx.calibrate(keyword_only, batches, **options)
    assert [site.kind for site in calibration.sites.values()] == ["ffn", "vocab"]
    step = hx.sparsify(keyword_only, config=config, calibration=calibration, weights_argnames="params")
    assert "calibrated" in step.explain(inputs(), params=params)
    trained = hx.topk_ffn(keyword_only, active=0.5, weights_argnames="params")
    assert kinds(trained.trace(inputs(), params=params).plan) == ["ffn"]


def test_a_calibration_on_one_token_warns():
    params = make_weights()
    config = hx.Config(rules=FORCE, vocab=hx.Vocab(certify=False), ffn=hx.Ffn(certify=False))
    options = {"weights_argnames": "params", "predictors": [hx.Quantized(8)], "config": config}
    with pytest.warns(hx.HireWarning, match=r"1 token.*expected.*batches"):
        hx.calibrate(keyword_only, [{"x": inputs(), "params": params}], **options)


def test_explain_names_arrays_that_came_by_keyword():
    step, params = hx.sparsify(keyword_only, config=FULL), make_weights()
    text = step.explain(inputs(), params=params)
    assert "No site is rewritten" in text
    assert "weights_argnames=('params',)" in text
    named = hx.sparsify(keyword_only, config=FULL, weights_argnames="params").explain(inputs(), params=params)
    assert "weights_argnames" not in named


def test_a_step_explains_and_packs_a_call():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    assert step.explain(params, inputs()) == step.trace(params, inputs()).explain()
    packed = step.pack(params, inputs())
    assert isinstance(packed, hx.Packed)
    assert packed.layout == step.trace(params, inputs()).pack(params).layout
    assert_same(step(packed, inputs()), net(params, inputs()))
    two = hx.sparsify(mixed, config=FULL, weights_argnums=0, weights_argnames="head")
    body, head = two.pack(params, x=inputs(), head=params["embed"])
    assert_same(two(body, inputs(), head=head), mixed(params, inputs(), head=params["embed"]))
    for name in ("pack", "explain"):
        with pytest.raises(TypeError, match=rf"sparsify\(net\).{name}: missing.*'x'; expected all arguments of a call"):
            getattr(step, name)(params)


WRONG = {
    "unknown": ({"weights_argnames": "weights"}, ValueError, r"weights_argnames has 'weights'.*\['params', 'x'\]"),
    "a_number": ({"weights_argnames": 1}, TypeError, r"weights_argnames=1.*name"),
    "static": ({"weights_argnames": "params", "static_argnames": "params"}, ValueError, "'params'.*static"),
    "donated": ({"weights_argnames": "params", "donate_argnames": "params"}, ValueError, "'params'.*donated"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_names_are_refused(name):
    options, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        hx.sparsify(keyword_only, **options)


def test_a_call_without_the_named_weights_says_so():
    step = hx.sparsify(lambda x, *, params=None: x, weights_argnames="params")
    with pytest.raises(TypeError, match=r"weights_argnames=\('params',\): the traced call has no such argument"):
        step.trace(inputs()).pack(make_weights())
