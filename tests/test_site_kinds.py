"""A kind of site added from outside, by a toy: nothing here touches a file of the package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same

import hire_xform as hx
from hire_xform.lowering.engine.head import vocab_logits
from hire_xform.passes.match.matches import OneProduct
from hire_xform.passes.plan.forms import ROWS, PackedPredictor
from hire_xform.passes.plan.slots import ProductForms, SiteForms
from hire_xform.passes.rewrite.canonical import flat_activation, product_key

D, WIDE, LAYERS = 16, 48, 3


class Mixed(OneProduct):
    """A product whose results are summed up: the largest are computed exactly, the others predicted."""

    kind = "mixed"


class MixedKind(hx.SiteKind):
    name = "mixed"
    settings = hx.Vocab(candidates=WIDE, certify=False)

    def find(self, product, reason):
        return Mixed(product) if "cumsum" in reason else None

    def forms(self, match, settings):
        return SiteForms((ProductForms(ROWS, PackedPredictor(settings.spec)),))

    def count(self, case):
        return case.settings.candidates_of(case.match.units)

    def operands(self, decision):
        return [decision.match.product.x]

    def signature(self, decision):
        return product_key(decision.match.product)

    def canonical(self, decision, values):
        return [flat_activation(decision.match.product, values[0])]

    def subgraph(self, decision, given, views, placement):
        rows, first_row = views.head.rows.rows()
        logits = vocab_logits(
            given[0],
            rows,
            views.head.predictor.whole(),
            decision.settings.spec,
            candidates=decision.count,
            vocab=decision.match.units,
            first_row=first_row,
            out_dtype=decision.match.product.out.aval.dtype,
        )
        return views.head.rows.filled(logits), None


@pytest.fixture
def mixed():
    kind = MixedKind()
    remove = hx.register_site_kind(kind)
    yield kind
    remove()


def program(params, x):
    return jax.lax.scan(lambda x, w: (jnp.cumsum(x @ w, axis=-1)[:, :D], None), x, params["w"])[0]


PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(LAYERS, D, WIDE)) / D, jnp.float32)}
X = jnp.asarray(np.random.default_rng(1).normal(size=(1, D)), jnp.float32)
FORCED = hx.Config(rules=(hx.Rule("*", force=True),))


def test_without_it_the_product_is_refused():
    def check():
        plan = hx.sparsify(program, config=FORCED).trace(PARAMS, X).plan
        assert not plan.sites
        assert "cumsum" in plan.refusals[0].reason

    check()
    first, second = hx.register_site_kind(MixedKind()), hx.register_site_kind(MixedKind())
    first()  # another has taken its place
    assert hx.sparsify(program, config=FORCED).trace(PARAMS, X).plan.sites
    second()
    assert hx.sparsify(program, config=FORCED).trace(PARAMS, X).plan.sites
    first()
    check()


def test_it_is_planned_packed_and_rewritten(mixed):
    step = hx.sparsify(program, config=FORCED)
    traced = step.trace(PARAMS, X)
    (site,) = traced.plan.sites
    assert (site.kind, site.units, site.computed) == ("mixed", WIDE, WIDE)
    assert "48 of 48 rows exact" in traced.explain()
    packed = traced.pack(PARAMS)
    assert_same(step(packed, X), program(PARAMS, X))
    assert_same(step(PARAMS, X), program(PARAMS, X))
    assert f"hire/{site.path}" in traced.lower().compile().as_text()


def test_its_settings_say_how_much_is_computed(mixed):
    mixed.settings = hx.Vocab(candidates=4, certify=False)
    step = hx.sparsify(program, config=FORCED)
    (site,) = step.trace(PARAMS, X).plan.sites
    assert site.computed == 4
    assert site.sparse_bytes == LAYERS * (WIDE * D + 4 * WIDE + 4 * D * 4)
    np.testing.assert_allclose(step(PARAMS, X), program(PARAMS, X), rtol=0.1, atol=0.1)


def test_rules_and_the_cost_model_hold_for_it(mixed):
    (refusal,) = hx.sparsify(program).trace(PARAMS, X).plan.refusals
    assert refusal.kind == "mixed"
    assert "would not be faster" in refusal.reason
    config = hx.Config(rules=(hx.Rule("*", skip=True),))
    (refusal,) = hx.sparsify(program, config=config).trace(PARAMS, X).plan.refusals
    assert refusal.reason == "Rule('*', skip=True) leaves it dense"
