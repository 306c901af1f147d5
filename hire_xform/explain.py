"""A plan as text for people: what is rewritten, what stays dense, and why."""

from __future__ import annotations

from hire_xform.lowering.prove.goals import Nucleus, TopSet
from hire_xform.passes.plan.decisions import Plan, Refusal, Site
from hire_xform.passes.plan.profile import Profile, seconds_text
from hire_xform.passes.plan.settings import Settings


def size(count: float) -> str:
    """Bytes for people: ``1.2 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def explain(plan: Plan) -> str:
    """The plan as text, a site or a group of like refusals to a paragraph."""
    lines: list[str] = []
    if plan.sites:
        share = plan.sparse_bytes / plan.dense_bytes
        count = f"{len(plan.sites)} site" + ("s" if len(plan.sites) > 1 else "")
        lines.append(
            f"{count} rewritten for {plan.platform}: {size(plan.dense_bytes)} of weights read dense, "
            f"{size(plan.sparse_bytes)} sparse ({share:.0%})"
        )
        if plan.profile is not None:
            lines.append(_predicted(plan.dense_seconds, plan.sparse_seconds))
        for sites in _grouped(plan.sites, _site_key):
            lines += _site(sites)
        predicted = sum(not site.computed for site in plan.sites)
        if predicted and any(site.settings.certify for site in plan.sites):
            what = "1 product" if predicted == 1 else f"{predicted} products"
            lines.append(f"  What is proved is so of what sites are given; {what} read compressed may change that.")
    else:
        lines.append(f"No site is rewritten for {plan.platform}: the function runs as jax.jit would run it.")
    if plan.profile is not None:
        lines.insert(2 if plan.sites else 1, _machine(plan.profile))
    lines += _refusals(plan)
    if plan.unmatched_rules:
        lines.append("")
        lines.append(f"Rules that match nothing here: {', '.join(map(repr, plan.unmatched_rules))}")
    return "\n".join(lines)


def _predicted(dense: float, sparse: float) -> str:
    return f"{seconds_text(dense)} predicted dense, {seconds_text(sparse)} sparse"


def _machine(profile: Profile) -> str:
    """What times are predicted from, and what would make them better."""
    better = "" if profile.source == "measured" else "; `hire-xform tune` measures this machine"
    return f"times are those of the profile {profile.in_words}{better}"


def describe(settings: Settings) -> str:
    """Settings in a few words."""
    return settings.in_words


def _proved(site: Site) -> str:
    """What a certified site proves, and what the bytes stand for."""
    goal = site.settings.certify
    if isinstance(goal, TopSet):
        what = f"the {goal.k:,} largest logits are the dense ones"
    elif isinstance(goal, Nucleus):
        what = f"the candidates hold all but {goal.eps:g} of the dense softmax"
    elif site.kind == "vocab":
        several = "are those" if len(site.proved) > 1 or any("largest" in p for p in site.proved) else "is that"
        what = f"{' and '.join(site.proved) or 'the arg max of its logits'} {several} of the dense logits"
    else:
        what = "the units chosen are the dense ones" if site.own else "every unit left out is zero"
    counted = (
        "" if site.rungs and site.rungs[-1].share is not None else "; the bytes are those of calls that are proved"
    )
    return f"proved for every call: {what}; a call that is not proved runs dense{counted}"


def exactly(site: Site, what: str = "") -> str:
    """How many rows of how many a site computes, where it may take several sizes at most; ``what`` they are."""
    if not site.computed:
        return f"{site.units:,} outputs as predicted, none exact"
    most = "at most " if len(site.sizes) > 2 else ""
    return f"{most}{site.computed:,} of {site.units:,} {what}exact"


def _site_key(site: Site) -> tuple:
    same = (site.kind, site.source, site.tokens, site.dense_bytes, site.sparse_bytes, site.settings, site.inputs)
    return (
        *same,
        site.units,
        site.computed,
        site.activation,
        site.own,
        site.forced,
        site.calibrated,
        site.placed,
        site.rows,
        site.rungs,
        site.derivative,
        site.evidence,
        site.proved,
        site.unproved,
        site.widened,
        site.stages,
        site.stored,
    )


def _grouped(items: tuple, key) -> list[list]:  # type: ignore[no-untyped-def]
    groups: dict = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _paths(items: list) -> str:
    first = items[0].path
    if len(items) == 1:
        return first
    return f"{first} .. {items[-1].path} ({len(items)} alike)"


def _site(sites: list[Site]) -> list[str]:
    site = sites[0]
    dense, sparse = (sum(getattr(s, f"{kind}_bytes") for s in sites) for kind in ("dense", "sparse"))
    what = {"vocab": "logits ", "ffn": "hidden units "}.get(site.kind, "rows ")
    for_whom = f"{site.tokens} token" + ("s" if site.tokens > 1 else "")
    shared = ", one set shared by all" if site.shared and site.tokens > 1 else ""
    expected = " expected" if site.rungs and site.rungs[-1].share is not None else ""
    lines = [
        f"  {site.kind:5s}  {_paths(sites)}",
        f"         {site.source}",
        f"         {size(dense)} -> {size(sparse)} ({sparse / dense:.0%}){expected}; {for_whom}: "
        f"{exactly(site, what)}{shared}",
        f"         {_predicted(*(sum(getattr(s, f'{kind}_seconds') for s in sites) for kind in ('dense', 'sparse')))}",
        f"         {describe(site.settings)}" + (f"; activation: {site.activation}" if site.activation else ""),
        f"         weights: {', '.join(site.weights)}" + (" and alike" if len(sites) > 1 else ""),
    ]
    if site.stored:
        lines.append(f"         stored as {site.stored}")
    if site.evidence:
        lines.append(f"         its outputs are logits: {site.evidence}")
    if site.widened:
        lines.append(
            "         stored narrower; all of it is widened before the dense product, which its bytes leave out"
        )
    if site.settings.certify:
        lines.append(f"         {_proved(site)}")
    if site.stages:
        lines.append(f"         in stages: {site.stages}")
    lines += [f"         not proved: {what}" for what in site.unproved]
    if expected:
        lines.append(f"         as many as are needed, with the share of calls expected: {_rungs(site)}")
    if site.placed:
        share = "its own share" if site.shards > 1 else "all of it, for the tokens that it has"
        lines.append(f"         each of {site.placed} {share}" + (f"; {site.rows}" if site.rows else ""))
    if site.calibrated:
        lines.append(f"         {site.calibrated}")
    if site.own:
        lines.append(f"         the model's own choice: {site.own}")
    if site.derivative:
        lines.append(f"         derivative: {site.derivative}")
    if site.forced:
        lines.append("         forced by a rule, whatever the cost model says")
    return lines


def _rungs(site: Site) -> str:
    """A certified site's sizes and how often each is expected to be taken."""
    *rungs, dense = site.sizes
    told = [f"{r.computed:,} ({r.share:.2%})" for r in rungs]
    return f"{', '.join(told)}, dense ({dense.share:.2%})"


def _refusals(plan: Plan) -> list[str]:
    if not plan.refusals:
        return []
    count = f"{len(plan.refusals)} product" + ("s stay" if len(plan.refusals) > 1 else " stays")
    lines = ["", f"{count} dense ({size(plan.refused_bytes)} read):"]
    for refusals in _grouped(plan.refusals, lambda r: (r.reason, r.source, r.kind)):
        lines += _refusal(refusals)
    return lines


def _refusal(refusals: list[Refusal]) -> list[str]:
    refusal = refusals[0]
    read = sum(r.dense_bytes for r in refusals)
    names = ", ".join(refusal.weights)
    names = f" {names}" + (" and alike" if len(refusals) > 1 else "") if names else ""
    return [
        f"  {refusal.kind or 'dense':5s}  {_paths(refusals)}  {size(read)}{names}",
        f"         {refusal.source}",
        f"         {refusal.reason}",
    ]


def explain_top_groups(plan: Plan) -> str:
    """The plan of a training function as text: blocks that keep their top groups, then all other products."""
    count = f"{len(plan.sites)} feed-forward block" + ("" if len(plan.sites) == 1 else "s")
    lines = [f"{count} with a top-k of groups of hidden units for each token"]
    for sites in _grouped(plan.sites, _site_key):
        site = sites[0]
        group = site.settings.group_size
        lines += [
            f"  {site.kind:5s}  {_paths(sites)}",
            f"         {site.source}",
            f"         {site.computed // group:,} of {site.units // group:,} groups of {group} kept; activation: "
            f"{site.activation}",
            f"         weights: {', '.join(site.weights)}" + (" and alike" if len(sites) > 1 else ""),
        ]
    return "\n".join([*lines, *_refusals(plan)])
