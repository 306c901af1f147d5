"""Which vocabularies get their rows distributed cyclically over devices, so that each has its share of frequent ids.

Logits then come out in that order. Where only an arg max, a top-k or a reduction reads them, each device reads its own,
and the ids of what it finds are known: nothing is moved. Minus infinity outside the candidates, only these are sent
back. Whatever else reads logits needs all of them where their ids are, so there rows stay contiguous blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal

from hire_xform.passes.ir.graph import Frame, Node
from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.match.matches import Match
from hire_xform.passes.match.whole_axis import cuts_end, is_uniform, joined_by, reads_of, selects
from hire_xform.passes.plan.decisions import Decision, PackKey, Plan, with_keys
from hire_xform.passes.weights.recipe import Cyclic, Recipe, Root


def readers(match: Match) -> list[Node] | str:
    """The arg maxes and top-ks that logits go into, if nothing that reads them minds their order; else what does."""
    product = match.last
    if tuple(product.out_w_dims) != (len(product.out.shape) - 1,):
        return "the vocabulary is not the last axis of its logits"
    around = _derivatives(product.node)
    carried, kept, found = {product.out}, [], []
    for value, reads in reads_of(product.out):
        if value.is_output:
            return "its logits are returned" if value.scope.node is None else f"its logits leave a {value.scope.kind}"
        for node, results in reads.items():
            if _derivatives(node) != around:
                return f"its logits go into a derivative rule of its own at {node.source}"
            if selects(node, value):
                found.append(node)
            elif cuts_end(node):
                (short,) = node.outputs
                if short.is_output or not all(selects(n, short) and _derivatives(n) == around for n in short.consumers):
                    return f"slice at {node.source} cuts its logits, and not only an arg max or a top-k reads the rest"
                found += short.consumers
            elif results is None:
                return f"{node.primitive} at {node.source} reads its logits by their place"
            else:
                kept += [(node, result) for result in results]
                carried.update(results)
    for node, result in kept:
        if not all(operand in carried or is_uniform(operand, axis) for operand, axis in joined_by(node, result)):
            return f"{node.primitive} at {node.source} joins its logits with what differs along the vocabulary"
    return list(dict.fromkeys(found))


def _derivatives(node: Node) -> set[Frame]:
    """The calls with a derivative of their own around an equation: that rule would see logits in the other order."""
    return {frame for frame in node.frame.ancestors() if frame.kind == "custom"}


def as_cyclic(decision: Decision, how: Literal["kept", "candidates", "logits"]) -> Decision:
    """A decision of contiguous rows with cyclic ones."""
    assert decision.placement is not None
    step = Cyclic(decision.placement.shards)

    def key(key: PackKey) -> PackKey:
        # Rows are one matrix; all else is made of a stack of parts, the last two steps.
        at = len(key.recipe.steps) - (0 if key.is_rows else 2)
        steps = (*key.recipe.steps[:at], step, *key.recipe.steps[at:])
        return PackKey(Recipe(key.recipe.root, steps), key.form)

    return dataclasses.replace(decision, cyclic=how, forms=with_keys(decision.forms, key))


def as_contiguous(decision: Decision) -> Decision:
    """A decision of cyclic rows with contiguous ones."""

    def key(key: PackKey) -> PackKey:
        steps = tuple(step for step in key.recipe.steps if not isinstance(step, Cyclic))
        return PackKey(Recipe(key.recipe.root, steps), key.form)

    return dataclasses.replace(decision, cyclic="", forms=with_keys(decision.forms, key))


def other_rows(decision: Decision) -> Decision | None:
    """The same decision for packed forms that were made for another program: of rows that lie otherwise."""
    if not may_be_cyclic(decision):
        return None
    if decision.cyclic:
        return as_contiguous(decision)
    return as_cyclic(decision, "candidates" if _drops_others(decision) else "logits")


def may_be_cyclic(decision: Decision) -> bool:
    """True for a vocabulary whose rows are over several devices, and beside which nothing else lies in their order."""
    placement, kind = decision.placement, kind_of(decision.match)
    if not all(chain.keeps_order for chain in decision.reads.chains):
        return False
    return kind.chooses and kind.splits_result(decision.match) and placement is not None and placement.shards > 1


def _drops_others(decision: Decision) -> bool:
    # Where nothing is proved a certified site has all logits, not only the candidates'.
    return getattr(decision.settings, "fill", "") == "-inf" and not decision.settings.certify


def distribute_rows(plan: Plan, read_elsewhere: Callable[[Plan], Iterable[Root]]) -> Plan:
    """Decides of each sharded vocabulary how its rows lie.

    Args:
      plan: with all rows as contiguous blocks.
      read_elsewhere: the weights that the program of a plan reads as they are.
    """
    told: dict[Decision, str] = {}
    chosen: dict[Decision, Decision] = {}
    for decision in plan.decisions:
        if not may_be_cyclic(decision):
            continue
        found = readers(decision.match)
        if isinstance(found, str) and not _drops_others(decision):
            told[decision] = found
        else:
            chosen[decision] = as_cyclic(decision, "candidates" if isinstance(found, str) else "kept")
    while chosen:
        now = _with(plan, chosen)
        held = set(read_elsewhere(now)) | {
            need.key.recipe.root for d in now.decisions if not d.cyclic for need in d.needs if need.key.is_rows
        }
        back = [old for old, new in chosen.items() if new.rows.recipe.root in held]
        if not back:
            break
        for decision in back:
            del chosen[decision]
            told[decision] = "its weight is read elsewhere as well, other than by id, and would be held twice"
    return _with(plan, chosen, told)


def _with(plan: Plan, chosen: dict[Decision, Decision], told: dict[Decision, str] | None = None) -> Plan:
    """The plan with some decisions replaced, and what to tell of others."""
    decisions = []
    for decision in plan.decisions:
        new = chosen.get(decision, decision)
        text = _text(new) if new.cyclic else (told or {}).get(decision, "")
        if text and not new.cyclic:
            text = f"rows in contiguous blocks: {text}"
        decisions.append(dataclasses.replace(new, site=dataclasses.replace(new.site, rows=text)))
    return dataclasses.replace(plan, decisions=tuple(decisions), sites=tuple(d.site for d in decisions))


def _text(decision: Decision) -> str:
    shards = decision.site.shards
    text = f"rows distributed cyclically: row i on device i % {shards}"
    return text if decision.cyclic == "kept" else f"{text}; its candidates are sent back to where they belong"
