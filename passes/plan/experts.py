"""Which blocks of experts are left as they are: those of which no expert's block is rewritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hire_xform.passes.match.experts import Experts
from hire_xform.passes.plan.decisions import Plan, Refusal

# Tokens times the experts of each that a loop goes over one by one: of as many tokens as a block has by default, eight.
MOST_ROUTED = 64
_NO_SITE = "nor is the block of one expert a site: "


def dense_experts(experts: Sequence[Experts], plan: Plan, measures: bool) -> dict[Experts, str]:
    """The blocks of experts that a loop was made of for nothing, no block in it being rewritten, and why it is not.

    Args:
      experts: the blocks that a loop was made of.
      plan: what is done in the program with these loops.
      measures: whether sites are only measured, of as many tokens as there are.
    """
    rewritten = {(end.origin.recipe.root, end.node.source) for d in plan.decisions for end in d.match.ends}
    found: dict[Experts, str] = {}
    for one in experts:
        down = one.match.down
        if one.routed and one.count > MOST_ROUTED and not measures:
            many = f"a call has {one.count:,} experts of tokens; expected {MOST_ROUTED} at most, one after the other"
            found[one] = _NO_SITE + many
        elif (down.origin.recipe.root, down.node.source) not in rewritten:
            refused = (r for r in plan.refusals if r.source == down.node.source)
            found[one] = _NO_SITE + next((r.reason for r in refused), "it is not rewritten")
    return found


def with_reasons(plan: Plan, reasons: Mapping[str, str]) -> Plan:
    """The plan with what else is known of blocks of experts in its refusals.

    Args:
      plan: the plan.
      reasons: by the source line of the product that ends such a block.
    """

    def told(refusal: Refusal) -> Refusal:
        reason = reasons.get(refusal.source)
        return refusal if reason is None else replace(refusal, reason=f"{refusal.reason}; {reason}")

    return replace(plan, refusals=tuple(map(told, plan.refusals)))
