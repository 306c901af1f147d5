"""Runs batches through a function whose sites are measured, and adds up what is recorded of each."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from hire_xform.api import Sparsified
from hire_xform.calibrating.grouping import grouped_order
from hire_xform.calibration.calibration import Calibration
from hire_xform.calibration.curve import Curve
from hire_xform.calibration.site_calibration import SiteCalibration, proved_criterion
from hire_xform.call.calls import abstract_call, call_leaves
from hire_xform.call.folding import Marks, Totals, fold
from hire_xform.call.signature import Weights, arguments_of
from hire_xform.call.stages import Traced
from hire_xform.config import Config
from hire_xform.lowering.predict.predictors import Predictor
from hire_xform.lowering.primitives.records import record_p
from hire_xform.passes.ir import compat
from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.measure.capture import Measured, MeasuredInputs, MeasuredSite
from hire_xform.passes.pack.packed import Packed
from hire_xform.passes.plan.cost import bytes_read
from hire_xform.passes.plan.decisions import Decision, Plan
from hire_xform.passes.plan.measurement import MeasurementOf
from hire_xform.passes.plan.placement import CutRows
from hire_xform.passes.plan.settings import PREDICTOR, Settings
from hire_xform.passes.weights.recipe import Root

# Sums over all batches, int64 or float64, by site path and name.
Sums = dict[tuple[str, str], np.ndarray]


class Calibrator:
    """Measures the sites of one function."""

    def __init__(self, fun: Callable, weights: Weights, jit_options: dict[str, Any]):
        """For ``calibrate``'s arguments."""
        self._function = fun, weights, jit_options

    def step(self, kind: Callable[..., Traced], config: Config, known: Calibration | None) -> Sparsified:
        """The function, traced in a way of its own."""
        fun, weights, jit_options = self._function
        step = Sparsified(fun, config, weights, jit_options, known)
        step.traced_class = kind
        return step

    def inputs(self, batches: Iterable[Any], config: Config) -> tuple[Calibration, ...]:
        """What is known of sites without a predictor: covariances of inputs, which units fire.

        Returns:
          That of all batches; that with the covariances of every second batch from the second on, and of the others.
          The last two are the first where there is one batch.
        """
        step = self.step(functools.partial(_InputTrace, (PREDICTOR,)), config, None)
        halves = _Collected(), _Collected()
        for number, batch in enumerate(batches):
            halves[number % 2].add(step, number, batch)
        known = halves[0].joined(halves[1]).calibration(None)
        if halves[1].empty:
            return known, known, known
        return known, *(_with_covariances(known, half.calibration(None)) for half in halves[::-1])

    def predictors(
        self,
        batches: Iterable[Any],
        config: Config,
        predictors: Sequence[Predictor],
        known: Sequence[Calibration | None],
    ) -> Calibration:
        """The curves of predictors where the settings state none.

        Args:
          batches: what to measure on.
          config: settings.
          predictors: where they state none.
          known: what predictors will be fitted to, and what they are fitted to here: for every second batch from the
            first on, and for the others, so that none is measured on the inputs that it was fitted to.
        """
        whole, *folds = known
        traced = functools.partial(_CaptureTrace, tuple(predictors))
        steps = [self.step(traced, config, fold) for fold in folds]
        if folds[0] is folds[1]:
            steps[1] = steps[0]
        steps[1].memory = steps[0].memory
        collected = _Collected()
        for number, batch in enumerate(batches):
            collected.add(steps[number % 2], number, batch)
        return collected.calibration(whole)


class DenseTrace(Traced):
    """A trace whose program is dense. Weights over several devices stay there; what is packed of them is whole."""

    runs_dense = True

    def _place(self, match: Any) -> Any:
        """The reason that a match stays dense where its weights are, if any: what does is not measured."""
        found = super()._place(match)
        reason = found.reason if isinstance(found, CutRows) else found
        return reason if isinstance(reason, str) else None


class _CaptureTrace(DenseTrace):
    """A trace whose program is dense and records statistics; of several predictors where none is stated."""

    site: type[MeasuredSite] = MeasuredSite

    def __init__(self, predictors: tuple[Predictor, ...], *args: Any):
        self._predictors = predictors
        super().__init__(*args)

    def action_of(self, decision: Decision, has_leaf: Any) -> MeasuredSite:
        """A site that is measured."""
        return self.site(decision)

    def _plan(self, config: Config, platform: str, *measured: MeasurementOf) -> Plan:
        plan_of = super()._plan
        plans = [plan_of(_stating(config, p), platform, *measured) for p in self._predictors]
        ways = zip(*(plan.decisions for plan in plans), strict=True)
        measure: MeasurementOf = measured[0] if measured else lambda match, names: None
        made = [Measured.of(own) for own in ways]
        if self.site.ranks:
            made = [one.with_static_sets(measure(one.match, one.site.weights)) for one in made]
        return dataclasses.replace(plans[0], decisions=tuple(made))


class _InputTrace(_CaptureTrace):
    """A trace whose program is dense and records what predictors are fitted to."""

    site = MeasuredInputs


def _stating(config: Config, predictor: Predictor) -> Config:
    """The settings with a predictor wherever they have none."""

    def stated(settings: Any, own: Predictor) -> Any:
        without = settings is None or settings.predictor is not None
        return settings if without else dataclasses.replace(settings, predictor=own)

    def both(owner: Any) -> Any:
        # Blocks are read at once, so that of a predictor in stages they have the first.
        return dataclasses.replace(
            owner, vocab=stated(owner.vocab, predictor), ffn=stated(owner.ffn, predictor.stages[0])
        )

    return dataclasses.replace(both(config), rules=tuple(both(rule) for rule in config.rules))


def _with_covariances(known: Calibration, half: Calibration) -> Calibration:
    """The one with the covariances of the other, where that saw tokens."""
    sites = dict(known.sites)
    for path, site in half.sites.items():
        if site.tokens.min() > 0:
            sites[path] = dataclasses.replace(sites[path], covariances=site.covariances)
    return dataclasses.replace(known, sites=sites)


class _Collected:
    """Sums over the batches so far."""

    def __init__(self) -> None:
        self._sums: Sums = {}
        self._sites: dict[str, Measured] = {}
        self._programs: dict[Traced, Callable] = {}
        self._batches = 0

    @property
    def empty(self) -> bool:
        """True before the first batch."""
        return not self._batches

    def joined(self, other: _Collected) -> _Collected:
        """The sums over the batches of both."""
        both = _Collected()
        both._sums = {**self._sums, **other._sums}
        both._sums.update({k: np.asarray(v + other._sums[k]) for k, v in self._sums.items() if k in other._sums})
        both._sites = {**other._sites, **self._sites}
        both._batches = self._batches + other._batches
        return both

    def add(self, step: Sparsified, number: int, batch: Any) -> None:
        """Runs one batch."""
        traced, data, plain = taken_apart(step, number, batch)
        self._note(traced, number)
        forms = step.memory.forms(traced.needed_keys(), plain, traced)
        if traced not in self._programs:
            self._programs[traced] = program(traced, _RECORDED)
        found = self._programs[traced](data, list(plain.values()), list(forms.values()))[1]
        for key, value in jax.device_get(found).items():
            self._check(key, value, number)
            wide = np.asarray(value, np.int64 if value.dtype.kind == "i" else np.float64)
            self._sums[key] = np.asarray(self._sums[key] + wide) if key in self._sums else wide
        self._batches += 1

    def _note(self, traced: Traced, number: int) -> None:
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
        if not self._batches:
            raise ValueError("calibrate: batches is empty; expected at least one tuple of arguments")
        sites = {path: self._site(path, d, known) for path, d in self._sites.items()}
        return Calibration(sites, "", self._batches)

    def _site(self, path: str, decision: Measured, known: Calibration | None) -> SiteCalibration:
        match, settings, site = decision.match, decision.settings, decision.site
        own = {name: value for (p, name), value in self._sums.items() if p == path}
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
        covariances = [self._mean(own["tokens"], own[f"covariance{i}"]) for i in firsts]
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
            covariances=tuple(covariances) if known is None else known.sites[path].covariances,
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


def taken_apart(step: Sparsified, number: int, batch: Any) -> tuple[Traced, list[Any], dict[Root, Any]]:
    """The trace of a batch, its data, and its weights by root.

    Raises:
      TypeError, ValueError: the batch is no tuple of arguments, or reaches no site; the message names its number.
    """
    named = isinstance(batch, dict) and not step.signature.misfit((), batch)
    if not isinstance(batch, (tuple, list)) and not named:
        raise TypeError(
            f"calibrate: batch {number} is a {type(batch).__name__}; expected a tuple of arguments, or a dictionary of "
            "arguments by name"
        )
    args, kwargs = arguments_of(batch)
    if any(isinstance(a, Packed) for a in (*args, *kwargs.values())):
        raise TypeError(f"calibrate: batch {number} has Packed weights; expected the plain ones")
    args, kwargs = step.signature.wrap_statics(args, kwargs)
    call = abstract_call(step.signature, args, kwargs)
    leaves = call_leaves(step.signature, args, kwargs)
    for leaf in leaves:
        if compat.is_tracer(leaf) or isinstance(leaf, (jax.ShapeDtypeStruct, jax.core.ShapedArray)):
            raise TypeError(f"calibrate: batch {number} holds a {type(leaf).__name__}; expected arrays")
    traced = step.traced(call)
    if not traced.plan.decisions:
        raise ValueError(f"calibrate: batch {number} reaches no site that could be calibrated.\n{traced.explain()}")
    plain = {r: leaf for r, leaf in zip(call.roots, leaves, strict=True) if r is not None}
    return traced, [leaf for r, leaf in zip(call.roots, leaves, strict=True) if r is None], plain


def program(traced: Traced, marks: Marks) -> Callable:
    """The flat results and the totals of one batch as a jitted function of its data, weights and packed forms."""
    roots = [r for r in traced.call.roots if r is not None]
    keys = traced.needed_keys()

    def whole(data: list[Any], plain: list[Any], forms: list[Any]) -> Any:
        rest = iter(data)
        leaves = [None if root is not None else next(rest) for root in traced.call.roots]
        given = dict(zip(roots, plain, strict=True))
        return traced.evaluate(leaves, traced.supply({}, given, dict(zip(keys, forms, strict=True))))

    @jax.jit
    def folded(*operands: Any) -> tuple[list[Any], Totals]:
        return fold(jax.make_jaxpr(whole)(*operands), jax.tree.leaves(operands), marks)

    return folded


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


_RECORDED = Marks(record_p, _shapes, _add)
