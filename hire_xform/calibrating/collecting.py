"""Adds up what is recorded of each site over batches, and makes a ``Calibration`` of it; nothing is chosen yet."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hire_xform.calibrating.grouping import grouped_order
from hire_xform.calibration.calibration import Calibration
from hire_xform.calibration.curve import Curve
from hire_xform.calibration.site_calibration import SiteCalibration, proved_criterion
from hire_xform.call.folding import Marks, Totals
from hire_xform.call.stages import Traced
from hire_xform.lowering.primitives.records import record_p
from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.measure.capture import Measured
from hire_xform.passes.plan.cost import bytes_read
from hire_xform.passes.plan.decisions import Decision
from hire_xform.passes.plan.settings import Settings

# Sums over all batches, int64 or float64, by site path and name.
Sums = dict[tuple[str, str], np.ndarray]


class Collected:
    """Sums over the batches so far."""

    def __init__(self, sums: Sums | None = None, batches: int = 0) -> None:
        """Those of batches that were added up before, or of none."""
        self._held: tuple[Sums, int] = sums or {}, batches
        self._sites: dict[str, Measured] = {}

    @property
    def sums(self) -> Sums:
        """By site and name."""
        return self._held[0]

    @property
    def batches(self) -> int:
        """How many there were."""
        return self._held[1]

    def joined(self, other: Collected) -> Collected:
        """The sums over the batches of both."""
        sums = {**self.sums, **other.sums}
        sums.update({k: np.asarray(v + other.sums[k]) for k, v in self.sums.items() if k in other.sums})
        both = Collected(sums, self.batches + other.batches)
        both._sites = {**other._sites, **self._sites}
        return both

    def add(self, found: Mapping[tuple[str, str], Any], number: int) -> None:
        """Adds what was recorded of a batch whose sites were noted: all of it, or nothing where it is interrupted."""
        sums = dict(self.sums)
        for key, value in jax.device_get(found).items():
            self._check(key, value, number)
            wide = np.asarray(value, np.int64 if value.dtype.kind == "i" else np.float64)
            sums[key] = np.asarray(sums[key] + wide) if key in sums else wide
        self._held = sums, self.batches + 1

    def note(self, traced: Traced, number: int) -> None:
        """Notes the sites of a batch.

        Raises:
          ValueError: one has other weights than in an earlier batch.
        """
        for decision in traced.plan.decisions:
            assert isinstance(decision, Measured)
            known = self._sites.setdefault(decision.site.path, decision)
            if known is not decision and _shape(known) != _shape(decision):
                raise ValueError(
                    f"calibrate: in batch {number} the site {decision.site.path} has other weights than in earlier ones"
                )

    def _check(self, key: tuple[str, str], value: np.ndarray, number: int) -> None:
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            names = ", ".join(self._sites[key[0]].site.weights)
            raise ValueError(
                f"calibrate: batch {number}: what goes into {key[0]} ({names}), or comes out, holds NaN or infinity"
            )

    def calibration(self, known: Calibration | None) -> Calibration:
        """What was measured; covariances are those known already, if any are. Nothing is chosen yet."""
        if not self.batches:
            raise ValueError("calibrate: batches is empty; expected at least one tuple of arguments")
        sites = {path: self._site(path, d, known) for path, d in self._sites.items()}
        return Calibration(sites, "", self.batches)

    def _site(self, path: str, decision: Measured, known: Calibration | None) -> SiteCalibration:
        match, settings, site = decision.match, decision.settings, decision.site
        own = {name: value for (p, name), value in self.sums.items() if p == path}
        numbers = match.input_numbers
        firsts = list(dict.fromkeys(numbers))
        criterion = kind_of(match).criterion(match, settings)
        if settings.certify:
            criterion = proved_criterion(settings)
        group_size = settings.group_size
        ways = [_as_measured(way.settings, own, i) for i, way in enumerate(decision.ways)]
        predicted = [bytes_read(match, way, group_size) for way in ways]
        curves = {
            way.spec: Curve(
                wanted=own[f"wanted{i}"],
                wanted_energy=own.get(f"wanted_energy{i}"),
                kl=own.get(f"kl{i}"),
                predictor_bytes=predicted[i][0],
                static={
                    count: (
                        own[f"static{count}_{i}"],
                        bytes_read(match, way, 1 + count, static=count)[0],
                    )
                    for count in decision.static_sets
                },
            )
            for i, way in enumerate(ways)
            if f"wanted{i}" in own
        }
        fired, energy, order, touched = own.get("fired"), own.get("energy"), None, None
        if known is not None and path not in known.sites:
            raise ValueError(f"calibrate: fitted={known!r} has no site {path}; expected a calibration of this function")
        before = None if known is None else known.sites[path]
        if before is not None and before.order is not None:
            order, touched = before.order, before.touched
            if fired is not None and energy is not None and decision.ways[0].forms.order is not None:
                # These were summed in the order that units are grouped by.
                back = np.argsort(order, axis=-1)
                fired, energy = np.take_along_axis(fired, back, axis=-1), np.take_along_axis(energy, back, axis=-1)
        if "touched" in own and group_size > 1:
            groups = np.maximum(own["tokens"], 1) * (site.units // group_size)
            share = own["touched"] / groups
            touched = np.stack([share if touched is None else touched[..., 0], share], axis=-1)
        if "together" in own:
            order = np.zeros((*match.stack, site.units), np.int32)
            for layer in np.ndindex(*match.stack):
                order[layer] = grouped_order(own["together"][layer], group_size)
        if before is None:
            covariances = tuple(self._mean(own["tokens"], own[f"covariance{i}"]) for i in firsts)
        else:
            covariances = before.covariances
        return SiteCalibration(
            kind=site.kind,
            path=path,
            weights=site.weights,
            width=site.inputs,
            units=site.units,
            stack=match.stack,
            group_size=group_size,
            criterion=criterion,
            tokens=own["tokens"],
            fired=fired,
            energy=energy,
            touched=touched,
            order=order,
            often=before.by_rate if before is not None and decision.static_sets else None,
            covariances=covariances,
            input_numbers=tuple(firsts.index(i) for i in numbers),
            curves=curves,
            row_bytes=predicted[0][1],
            predictor=ways[0].spec,
            sizes=np.ones(match.stack, np.int64),
            target="",
            recall=None,
            fill=settings.fill,
        )

    @staticmethod
    def _mean(tokens: np.ndarray, total: np.ndarray) -> np.ndarray:
        """The mean for each layer; where its weight is stacked otherwise, up to its scale, which does not matter."""
        count = np.maximum(tokens, 1)
        if total.shape[:-2] != count.shape:
            count = np.full(total.shape[:-2], max(1, math.ceil(count.mean())))
        return (total / count[..., None, None]).astype(np.float32)


def _as_measured(settings: Settings, own: dict[str, np.ndarray], number: int) -> Settings:
    """Settings whose predictor knows what its stages left open, where that was measured."""
    if f"opened{number}" not in own:
        return settings
    opened = own[f"opened{number}"].reshape(-1, own[f"opened{number}"].shape[-1]).sum(axis=0)
    measured = settings.spec.measured(opened / max(1, own["tokens"].sum()))
    return dataclasses.replace(settings, predictor=measured)


def _shape(decision: Decision) -> tuple[Any, ...]:
    return decision.site.kind, decision.site.inputs, decision.site.units, decision.match.stack


def _shapes(eqn: Any) -> dict[tuple[str, str], jax.ShapeDtypeStruct]:
    stack = eqn.params["stack"]
    avals = [atom.aval for atom in eqn.invars[len(stack) :]]
    return {
        (eqn.params["path"], name): jax.ShapeDtypeStruct((*stack, *aval.shape), aval.dtype)
        for name, aval in zip(eqn.params["names"], avals, strict=True)
    }


def _add(eqn: Any, given: Sequence[Any], totals: Totals) -> Totals:
    depth = len(eqn.params["stack"])
    added = dict(totals)
    for name, value in zip(eqn.params["names"], given[depth:], strict=True):
        key = eqn.params["path"], name
        added[key] = totals[key].at[tuple(given[:depth])].add(value) if depth else totals[key] + value
    return added


RECORDED = Marks(record_p, _shapes, _add)
