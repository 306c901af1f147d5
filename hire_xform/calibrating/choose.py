"""Chooses predictors and sizes for all sites together, for what a model's results may lose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hire_xform.calibrating.rehearsing import Rehearsal
from hire_xform.calibration.calibration import Calibration
from hire_xform.calibration.site_calibration import SiteCalibration

# Sizes found, which are verified, and how often at most: on batches of so many tokens, and then on all.
ROUNDS, SEARCHED_TOKENS, LAST_ROUNDS = 8, 2048, 4
# A block's share of energy lost at which its effect on the results is measured.
PROBED_LOSS = 0.02
# Batches that this is measured on: enough for this many tokens.
PROBED_TOKENS = 512

# Per site, the cost of one unit of what its curves say is lost, ``[*stack]``.
Weights = Mapping[str, np.ndarray]


def chosen_for_cost(measured: Calibration, rehearsal: Rehearsal, limit: float, target: str) -> Calibration:
    """The fewest bytes found whose cost, measured end to end on the batches, is within a limit.

    A small error in what a block adds changes the logits in proportion, and the KL divergence by its square: so a block
    costs in proportion to the energy it loses, and independent errors add. The factor of each block is measured once,
    by running it alone at a known loss; a head's cost is its own KL curve. With that, the fewest bytes within a budget
    are those that minimise ``bytes + price * cost`` at each site for one price (Lagrange). What is so found is then
    measured with all sites sparse together, and the budget moved until it is within the limit, and not far below.

    Args:
      measured: curves of all sites.
      rehearsal: measures costs on the batches.
      limit: what the cost may be, more than 0.
      target: its name, such as "max_kl 0.01".
    """
    weights = _weights(measured, rehearsal)
    few, budget = _batches_of(SEARCHED_TOKENS, measured), limit
    if few < measured.batches:
        _, _, budget = _searched(measured, weights, rehearsal, limit, limit, ROUNDS, few)
    best, cost, _ = _searched(measured, weights, rehearsal, limit, budget, ROUNDS if budget == limit else LAST_ROUNDS)
    if best is None:
        best = Calibration({p: _sized(s, _whole(s)) for p, s in measured.sites.items()}, "", measured.batches)
    sites = {p: dataclasses.replace(s, target=target, recall=None) for p, s in best.sites.items()}
    return Calibration(sites, f"{target} ({cost:.2g} measured)", measured.batches)


def _batches_of(tokens: int, measured: Calibration) -> int:
    """How many batches hold so many tokens, about; all of them if there are fewer."""
    there = max(1, max(int(s.tokens.max()) for s in measured.sites.values()))
    return math.ceil(min(1.0, tokens / there) * measured.batches)


def _searched(
    measured: Calibration,
    weights: Weights,
    rehearsal: Rehearsal,
    limit: float,
    budget: float,
    rounds: int,
    batches: int | None = None,
) -> tuple[Calibration | None, float, float]:
    """The fewest bytes found whose cost on some batches is within the limit, if any; its cost; and its budget."""
    best: Calibration | None = None
    best_cost, best_budget, cost = 0.0, budget, 0.0
    before: Any = None
    for _ in rehearsal.shown.each(range(rounds), "sizes", "rounds at most"):
        found = _within(measured, weights, budget)
        choice = {path: (s.predictor, tuple(s.sizes.ravel())) for path, s in found.sites.items()}
        if choice == before:
            budget *= 2.0 if cost <= limit else 0.5
            continue
        sizes = {path: s.sizes for path, s in found.sites.items()}
        cost, before = rehearsal.cost(found, sizes, batches), choice
        if cost <= limit:
            if best is None or _bytes(found) < _bytes(best):
                best, best_cost, best_budget = found, cost, budget
            if cost > 0.85 * limit or budget >= 8 * limit:
                break
            budget *= min(2.0, 0.95 * limit / max(cost, 1e-9 * limit))
        else:
            if best is not None and _bytes(found) >= _bytes(best):
                break
            budget *= max(0.25, 0.9 * limit / cost)
    return best, best_cost, budget if best is None else best_budget


def _weights(measured: Calibration, rehearsal: Rehearsal) -> Weights:
    """What one unit of each layer's loss costs; at least a little, since one that costs nothing was measured badly."""
    whole = {path: _whole(site) for path, site in measured.sites.items()}
    batches = _batches_of(PROBED_TOKENS, measured)
    weights: dict[str, np.ndarray] = {}
    layers = [(p, layer) for p, s in measured.sites.items() if s.kind != "vocab" for layer in np.ndindex(*s.stack)]
    probes = iter(rehearsal.shown.each(layers, "sizes", "layers tried alone"))
    for path, site in measured.sites.items():
        weights[path] = np.ones(site.stack)
        if site.kind == "vocab":
            continue
        lost = _lost(site, site.predictor)
        for layer in np.ndindex(*site.stack):
            next(probes)
            at = int(np.argmax(lost[layer] <= PROBED_LOSS))
            share = float(lost[layer][at])
            if share <= 0:
                at, share = 0, float(lost[layer][0])
            sizes = np.array(whole[path])
            sizes[layer] = at + 1
            cost = rehearsal.cost(measured, {**whole, path: sizes}, batches) if share > 0 else 0.0
            weights[path][layer] = cost / share if share > 0 else 0.0
    blocks = [weights[p] for p, s in measured.sites.items() if s.kind == "ffn"]
    if blocks:
        least = 1e-3 * max(1e-9, *(float(w.max()) for w in blocks))
        weights = {p: np.maximum(w, least) for p, w in weights.items()}
    return weights


def _lost(site: SiteCalibration, predictor: Any) -> np.ndarray:
    """What each size loses, ``[*stack, sizes]``: of the energy, or in nats; by index, one more is the size."""
    curve = site.curve(predictor)
    if curve.kl is None:
        return np.maximum(1.0 - curve.found_energy, 0.0)
    lost = np.minimum.accumulate(curve.kl, axis=-1) / np.maximum(site.tokens, 1)[..., None]
    if curve.kl.shape[-1] == site.units:
        lost[..., -1] = 0.0
    return np.asarray(lost)


def _within(measured: Calibration, weights: Weights, budget: float) -> Calibration:
    """The fewest bytes whose cost, by the curves, is within a budget."""
    low, high = -40.0, 80.0
    found = _at_price(measured, weights, math.exp(high))[0]
    for _ in range(50):
        middle = (low + high) / 2
        tried, cost = _at_price(measured, weights, math.exp(middle))
        if cost <= budget:
            found, high = tried, middle
        else:
            low = middle
    return Calibration(_spent(measured, weights, budget, found), "", measured.batches)


def _spent(
    measured: Calibration, weights: Weights, budget: float, found: dict[str, SiteCalibration]
) -> dict[str, SiteCalibration]:
    """With what one price for all leaves of the budget spent at single sites, those that save most by it first.

    Between two predictors there may be no price at which neither is best, and so a jump.
    """
    costs = {p: _cost(s, s.predictor, s.sizes, weights[p]) for p, s in found.items()}
    left = budget - sum(costs.values())

    def cheaper(path: str) -> SiteCalibration:
        return _cheapest(measured.sites[path], weights[path], costs[path] + left)

    def saving(path: str) -> float:
        return _read(found[path]) - _read(cheaper(path))

    for path in sorted(found, key=saving, reverse=True):
        site = cheaper(path)
        if _read(site) < _read(found[path]):
            cost = _cost(site, site.predictor, site.sizes, weights[path])
            left += costs[path] - cost
            costs[path], found = cost, {**found, path: site}
    return found


def _cheapest(site: SiteCalibration, weight: np.ndarray, limit: float) -> SiteCalibration:
    """The fewest bytes of one site whose cost is within a limit; everything exact if there are none."""
    best = _sized(site, _whole(site))
    for predictor in site.curves:
        low, high = -40.0, 80.0
        for _ in range(50):
            middle = (low + high) / 2
            sizes = _priced(site, predictor, weight, math.exp(middle))
            if _cost(site, predictor, sizes, weight) <= limit:
                high = middle
                tried = _sized(dataclasses.replace(site, predictor=predictor), sizes)
                best = tried if _read(tried) < _read(best) else best
            else:
                low = middle
    return best


def _at_price(measured: Calibration, weights: Weights, price: float) -> tuple[dict[str, SiteCalibration], float]:
    found: dict[str, SiteCalibration] = {}
    total = 0.0
    for path, site in measured.sites.items():
        best: tuple[float, float, Any, np.ndarray] | None = None
        for predictor in site.curves:
            sizes = _priced(site, predictor, weights[path], price)
            cost = _cost(site, predictor, sizes, weights[path])
            priced = _read(_sized(dataclasses.replace(site, predictor=predictor), sizes)) + price * cost
            if best is None or priced < best[0]:
                best = priced, cost, predictor, sizes
        assert best is not None
        total += best[1]
        found[path] = _sized(dataclasses.replace(site, predictor=best[2]), best[3])
    return found, total


def _priced(site: SiteCalibration, predictor: Any, weight: np.ndarray, price: float) -> np.ndarray:
    """Of each layer the size of least ``bytes + price * cost``."""
    cost = weight[..., None] * _lost(site, predictor)
    read = site.row_bytes * np.arange(1, cost.shape[-1] + 1, dtype=np.float64)
    return np.asarray(1 + np.argmin(read + price * cost, axis=-1))


def _cost(site: SiteCalibration, predictor: Any, sizes: np.ndarray, weight: np.ndarray) -> float:
    lost = _lost(site, predictor)
    at = np.minimum(sizes, lost.shape[-1]) - 1
    return float((weight * np.take_along_axis(lost, np.asarray(at)[..., None], axis=-1)[..., 0]).sum())


def _whole(site: SiteCalibration) -> np.ndarray:
    """Everything exact."""
    return np.full(site.stack, site.units // site.group_size, np.int64)


def _sized(site: SiteCalibration, sizes: np.ndarray) -> SiteCalibration:
    return dataclasses.replace(site, sizes=np.asarray(sizes, np.int64))


def _bytes(calibration: Calibration) -> float:
    """Bytes that one token reads, each layer at its own size."""
    return sum(_read(site) for site in calibration.sites.values())


def _read(site: SiteCalibration) -> float:
    return site.curve().predictor_bytes * site.sizes.size + site.row_bytes * float(site.sizes.sum())
