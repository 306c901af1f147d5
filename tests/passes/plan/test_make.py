"""A plan: every match a decision or a refusal with its reason."""

from planned import D, M, V, planned, stated

from hire_xform.passes.plan.settings import Choice


def test_every_match_is_a_site_where_that_is_asked_for():
    _, plan = planned()
    assert [site.kind for site in plan.sites] == ["ffn", "ffn", "vocab"]
    first, _, head = plan.sites
    assert (first.weights, first.units, first.tokens) == (("up", "down"), M, 2)
    assert 0 < first.computed < M
    assert first.forced
    assert first.dense_bytes == 2 * M * D * 4
    assert (head.weights, head.units) == (("head",), V)
    assert "argmax" in head.evidence
    (refusal,) = plan.refusals
    assert refusal.weights == ("narrow",)
    assert "too narrow" in refusal.reason or "factors" in refusal.reason


def test_what_is_not_worth_it_stays_and_says_so():
    _, plan = planned(lambda kind, path, names: stated(kind, path, force=False))
    assert not plan.sites
    reasons = {r.kind: r.reason for r in plan.refusals if r.kind}
    assert set(reasons) == {"ffn", "vocab"}
    for reason in reasons.values():
        assert "which would not be faster on cpu" in reason
        assert "a Rule with force=True overrides this" in reason
    # Each product of a block is refused, and every one is there once.
    assert len(plan.refusals) == 6


def test_what_is_left_alone_is_told_by_whom():
    _, plan = planned(lambda kind, path, names: Choice(settings=None, reason="a rule leaves it alone"))
    assert {r.reason for r in plan.refusals if r.kind} == {"a rule leaves it alone"}


def test_nothing_found_is_nothing_planned():
    _, plan = planned(fun=lambda w, x: x + 1)
    assert not plan.sites
    assert not plan.refusals
    assert plan.dense_bytes == plan.sparse_bytes == plan.refused_bytes == 0
