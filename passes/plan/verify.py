"""States what a ``Plan`` is: checked where ``HIRE_DEBUG`` is on."""

from __future__ import annotations

from collections import Counter

from hire_xform.passes.ir.verify import require
from hire_xform.passes.match.matches import Detection
from hire_xform.passes.plan.decisions import Plan


def verify_plan(detection: Detection, plan: Plan) -> None:
    """Checks that a plan says of everything that was found what becomes of it, once.

    Raises:
      InvariantError: something does not hold; the message has the path and the rule.
    """
    decided = [decision.match for decision in plan.decisions]
    refused = Counter(refusal.path for refusal in plan.refusals)
    for match in detection.matches:
        sites = decided.count(match)
        for product in match.products:
            told = sites + refused[product.path]
            require(told == 1, product.path, "a match is one site, or each of its products is refused once")
    for rejection in detection.rejections:
        require(refused[rejection.node.path] == 1, rejection.node.path, "a rejection is one refusal")
    count = len(detection.rejections) + sum(len(m.products) for m in detection.matches if m not in decided)
    require(len(plan.refusals) == count, "", "nothing is refused that was not found")
    require(all(match in detection.matches for match in decided), "", "a site is a match that was found")
    require(plan.sites == tuple(d.site for d in plan.decisions), "", "a plan's sites are those that it decided on")
    for decision in plan.decisions:
        site, path = decision.site, decision.node.path
        require(site.path == path, path, "a site goes by the path of the equation that is replaced")
        require(site.computed > 0, path, "a site computes rows")
        require(list(decision.rungs) == sorted(decision.rungs) or decision.levels is not None, path, "sizes ascend")
        require(bool(decision.needs), path, "a site reads packed forms")
    for refusal in plan.refusals:
        require(bool(refusal.reason), refusal.path, "a refusal has a reason")
