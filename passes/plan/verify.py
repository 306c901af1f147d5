"""States what a ``Plan`` is: checked where ``HIRE_DEBUG`` is on."""

from __future__ import annotations

from collections import Counter

from hire_xform.passes.ir.verify import require
from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.match.matches import Detection
from hire_xform.passes.plan.decisions import Plan


def verify_plan(detection: Detection, plan: Plan) -> None:
    """Checks that a plan says of everything that was found what becomes of it, once.

    Raises:
      InvariantError: something does not hold; the message has the path and the rule.
    """
    decided = [decision.match for decision in plan.decisions]
    within = Counter(product.path for match in decided for product in match.products)
    refused = Counter(refusal.path for refusal in plan.refusals)
    for match in detection.matches:
        for product in match.products:
            told = within[product.path] + refused[product.path]
            require(told == 1, product.path, "a match is one site, or each of its products is one, or is refused once")
    for rejection in detection.rejections:
        path = rejection.node.path
        require(within[path] + refused[path] == 1, path, "a rejection is one refusal, or one site")
    count = len(detection.rejections) + sum(len(match.products) for match in detection.matches) - within.total()
    require(len(plan.refusals) == count, "", "nothing is refused that was not found")
    for match in decided:
        alone = match.products == [match.last] and match.last in detection.products
        require(
            match in detection.matches or alone, match.node.path, "a site is a match that was found, or one product"
        )
    require(plan.sites == tuple(d.site for d in plan.decisions), "", "a plan's sites are those that it decided on")
    for decision in plan.decisions:
        site, path = decision.site, decision.node.path
        require(site.path == path, path, "a site goes by the path of the equation that is replaced")
        chooses = kind_of(decision.match).chooses
        require((site.computed > 0) == chooses, path, "a site computes rows, if its kind chooses any")
        require(list(decision.rungs) == sorted(decision.rungs) or decision.levels is not None, path, "sizes ascend")
        require(bool(decision.needs), path, "a site reads packed forms")
    for refusal in plan.refusals:
        require(bool(refusal.reason), refusal.path, "a refusal has a reason")
