"""Runs batches through a function whose sites are measured: their inputs first, then predictors fitted to these."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from hire_xform.api import Sparsified
from hire_xform.calibrating.checkpoint import Kept
from hire_xform.calibrating.collecting import RECORDED, Collected
from hire_xform.calibrating.offered import Offered
from hire_xform.calibrating.programs import program, taken_apart
from hire_xform.calibrating.progress import Shown
from hire_xform.calibration.calibration import Calibration
from hire_xform.call.memory import PackMemory
from hire_xform.call.signature import Weights
from hire_xform.call.stages import Traced
from hire_xform.config import Config
from hire_xform.passes.measure.capture import FirstRanked, Measured, MeasuredSite
from hire_xform.passes.plan.decisions import Decision, PackKey, Plan
from hire_xform.passes.plan.measurement import MeasurementOf
from hire_xform.passes.plan.placement import CutRows
from hire_xform.passes.plan.settings import PREDICTOR
from hire_xform.passes.weights.recipe import Root

# Of how many parts of the way from a batch's first sampled token to the next is that of the next batch: by the golden
# section, so that few batches or many have their samples spread evenly over all positions.
_GOLDEN = 0.6180339887498949


class Calibrator:
    """Measures the sites of one function."""

    def __init__(
        self, fun: Callable, weights: Weights, jit_options: dict[str, Any], shown: Shown, kept: Kept | None = None
    ):
        """For ``calibrate``'s arguments; ``kept`` is what goes on from a file, if anything does."""
        self._function, self.shown, self._kept = (fun, weights, jit_options), shown, kept
        self._programs: dict[Any, Callable] = {}
        self._memory = PackMemory()

    def step(self, kind: Callable[..., Traced], config: Config, known: Calibration | None) -> Sparsified:
        """The function, traced in a way of its own."""
        fun, weights, jit_options = self._function
        step = Sparsified(fun, config, weights, jit_options, known)
        step.traced_class = kind
        step.memory = self._memory  # rows, and what is fitted to nothing, are those of all
        return step

    def inputs(self, batches: Iterable[Any], config: Config) -> tuple[Calibration, ...]:
        """What is known of sites without a predictor: covariances of inputs, which units fire.

        Returns:
          That of all batches; that with the covariances of every second batch from the second on, and of the others.
          The last two are the first where there is one batch.
        """
        usual = Offered((PREDICTOR,), (PREDICTOR,))
        kind = functools.partial(_CaptureTrace, usual, inputs=True, ranks=False)
        step = self.step(kind, config, None)
        halves = self._run("inputs", batches, [step, step], 2)
        known = halves[0].joined(halves[1]).calibration(None)
        if not halves[1].batches:
            return known, known, known
        return known, *(_with_covariances(known, half.calibration(None)) for half in halves[::-1])

    def predictors(
        self,
        batches: Iterable[Any],
        config: Config,
        predictors: Offered,
        known: Sequence[Calibration | None],
        counted: bool,
    ) -> Calibration:
        """The curves of predictors where the settings state none.

        Args:
          batches: what to measure on.
          config: settings.
          predictors: where they state none.
          known: what predictors will be fitted to, and what they are fitted to here: for every second batch from the
            first on, and for the others, so that none is measured on the inputs that it was fitted to.
          counted: whether what is known is of these batches, so that a sample of their tokens can be taken.
        """
        whole, *folds = known
        kind = functools.partial(_CaptureTrace, predictors, inputs=whole is None, ranks=True, sampled=counted)
        steps = [self.step(kind, config, fold) for fold in folds]
        if folds[0] is folds[1]:
            steps[1] = steps[0]
        (collected,) = self._run("predictors", batches, steps, 1)
        return collected.calibration(whole)

    def _run(self, phase: str, batches: Iterable[Any], steps: Sequence[Sparsified], parts: int) -> list[Collected]:
        """Every second batch through one step, the others through the other, added up in so many parts in turn."""
        kept = self._kept
        found = [Collected() for _ in range(parts)] if kept is None else kept.phase(phase, parts)
        done = sum(part.batches for part in found)
        number = -1
        for number, batch in enumerate(self.shown.each(batches, phase)):
            step, part = steps[number % 2], found[number % parts]
            traced, data, plain = taken_apart(step, number, batch)
            part.note(traced, number)
            if kept is not None:
                kept.check(number, data, plain)
            if number >= done:
                part.add(self._recorded(phase, step, traced, number, data, plain), number)
                if kept is not None:
                    kept.write_in_time()
        if kept is not None:
            kept.check_number(number + 1)
        return found

    def _recorded(
        self, phase: str, step: Sparsified, traced: Traced, number: int, data: list[Any], plain: dict[Root, Any]
    ) -> dict[Any, Any]:
        """What is recorded of one batch."""
        keys = traced.needed_keys()
        packed = [k for k in keys if not isinstance(k.form, FirstRanked)]
        made = step.memory.forms(packed, plain, traced, self.shown.packing)

        def form(key: PackKey) -> Any:
            return _first_ranked(key.form, number) if isinstance(key.form, FirstRanked) else made[key]

        # Programs of both halves are the same, what their predictors are fitted to being operands.
        alike = phase, traced.call, tuple((k.recipe, k.form.bare) for k in keys)
        if alike not in self._programs:
            self._programs[alike] = program(traced, RECORDED, results=False)
        run = self._programs[alike]
        recorded: dict[Any, Any] = run(data, list(plain.values()), [form(key) for key in keys])[1]
        return recorded


def _first_ranked(form: FirstRanked, number: int) -> jnp.ndarray:
    """Of a batch, the first of the tokens that are ranked."""
    return jnp.full(form.stack, int(form.every * (number * _GOLDEN % 1.0)), jnp.int32)


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

    def __init__(self, predictors: Offered, *args: Any, inputs: bool, ranks: bool, sampled: bool = False):
        self._predictors, self._sampled = predictors, sampled
        self._recorded = {"inputs": inputs, "ranks": ranks}
        super().__init__(*args)

    def action_of(self, decision: Decision, has_leaf: Any) -> MeasuredSite:
        """A site that is measured."""
        assert isinstance(decision, Measured)
        return MeasuredSite(decision)

    def _plan(self, config: Config, platform: str, *measured: MeasurementOf) -> Plan:
        plan_of = super()._plan
        plans = [plan_of(stating, platform, *measured) for stating in self._predictors.stated_in(config)]
        ways = zip(*(plan.decisions for plan in plans), strict=True)
        measure: MeasurementOf = measured[0] if measured else lambda match, names: None
        made = [Measured.of(own, **self._recorded) for own in ways]
        known = [measure(one.match, one.site.weights) for one in made]
        if self._recorded["ranks"]:
            made = [one.with_static_sets(own) for one, own in zip(made, known, strict=True)]
        if self._sampled:
            made = [one.sampled(own) for one, own in zip(made, known, strict=True)]
        return dataclasses.replace(plans[0], decisions=tuple(made))


def _with_covariances(known: Calibration, half: Calibration) -> Calibration:
    """The one with the covariances of the other, where that saw tokens."""
    sites = dict(known.sites)
    for path, site in half.sites.items():
        if site.tokens.min() > 0:
            sites[path] = dataclasses.replace(sites[path], covariances=site.covariances)
    return dataclasses.replace(known, sites=sites)
