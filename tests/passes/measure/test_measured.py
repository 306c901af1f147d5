"""Sites that are measured with several predictors, and rehearsed with sizes that come as operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planned import W, X, planned, stated, views

import hire_xform as hx
from hire_xform.passes.measure.capture import Measured, MeasuredSite, numbered
from hire_xform.passes.measure.rehearse import Rehearsed, RehearsedSite
from hire_xform.passes.plan.settings import Choice, Ffn
from hire_xform.passes.rewrite.action import Context
from hire_xform.passes.rewrite.environment import PackedView


def test_a_measured_site_is_one_of_all_its_ways():
    _, plan = planned()
    _, narrower = planned(
        lambda kind, path, names: Choice(settings=Ffn(active=0.5, certify=False, predictor=hx.LowRank(2)), force=True)
        if kind == "ffn"
        else stated(kind, path)
    )
    one, other = plan.decisions[0], narrower.decisions[0]
    both = Measured.of([one, other, one], inputs=True, ranks=True)
    assert both.ways == (one, other)
    assert both.match is one.match
    assert both.forms.ways == (one.forms, other.forms)
    assert set(both.needs) >= {*one.needs, *other.needs}
    # Calls are not shared: what is recorded in them carries the path.
    first, second = (MeasuredSite(Measured.of([d], inputs=True, ranks=True)) for d in plan.decisions[:2])
    assert first.key != second.key
    assert both.with_static_sets(None) is both
    assert both.sampled(None) is both
    assert numbered({"wanted": X}, 3) == {"wanted3": X}


def test_a_rehearsed_site_takes_its_sizes_when_it_runs():
    _, plan = planned()
    rehearsed = [Rehearsed.of(d) for d in plan.decisions]
    paths = [r.forms.sizes.key.form.path for r in rehearsed]
    assert paths == [site.path for site in plan.sites]
    assert all(
        r.levels is None and r.forms.site.up == d.forms.up for r, d in zip(rehearsed, plan.decisions, strict=True)
    )
    keys = {RehearsedSite(r).key for r in rehearsed}
    assert len(keys) == 3


@pytest.mark.parametrize("number", [0, 2])
def test_a_measured_and_a_rehearsed_site_compute_the_dense_value(number):
    found, plan = planned()
    args, decision = [*jax.tree.leaves(W), X], plan.decisions[number]
    want = found.value(decision.node.outputs[0], args)
    measured = MeasuredSite(Measured.of([decision], inputs=True, ranks=True))
    given, known = {v: found.value(v, args) for v in measured.operands}, views(decision, args)
    (value,) = measured.emit(Context(given, known.__getitem__, {}))
    np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-5)
    rehearsed = RehearsedSite(Rehearsed.of(decision))
    for size, same in ((decision.match.units, True), (1, False)):
        known = views(decision, args) | {rehearsed.decision.forms.sizes: PackedView(jnp.int32(size))}
        (value,) = rehearsed.emit(Context(given, known.__getitem__, {}))
        assert bool(jnp.allclose(value, want, rtol=1e-4, atol=1e-5)) is same
