"""``calibrate``: runs a function on real inputs and measures every site, by the pass that rewrites them."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hire_xform.api import Sparsified, check_function
from hire_xform.calibration import Calibration, SiteCalibration
from hire_xform.calls import abstract_call
from hire_xform.config import Config, Ffn, Rule, Vocab
from hire_xform.folding import Marks, Totals, fold
from hire_xform.lowering import Quantized, record_p
from hire_xform.passes import compat
from hire_xform.passes.capture import Capture, CaptureInputs
from hire_xform.passes.detect import FfnMatch
from hire_xform.passes.measured import input_numbers, site_stack, takes_inputs
from hire_xform.passes.pack import Packed
from hire_xform.passes.plan import Decision
from hire_xform.stages import Traced, call_leaves

# Sums over all batches, int64 or float64, by site path and name.
Sums = dict[tuple[str, str], np.ndarray]
_ANY_NUMBER = 1 << 62


def calibrate(
    fun: Callable,
    batches: Iterable[Sequence[Any]],
    *,
    weights_argnums: int | Sequence[int] = 0,
    recall: float = 0.99,
    config: Config | None = None,
    progress: bool | None = None,
    **jit_options: Any,
) -> Calibration:
    """Runs a function on real inputs and measures, at every site, its inputs and how well its predictor ranks::

        calibration = hx.calibrate(decode_step, [(params, cache, token), ...], recall=0.99)
        step = hx.sparsify(decode_step, calibration=calibration)

    The function runs densely. Its results are dropped; state that it returns is not passed on, so let the batches hold
    it, or calibrate a prefill: sites are known again by their weights, in any function of the same model. Every token
    counts, padding too. Memory does not grow with the number of batches.

    Recall is, for a vocabulary projection, the share of tokens whose dense arg max is among the candidates; for a
    feed-forward block the share of its units that are not zero that are chosen, and where units are never exactly zero,
    of its energy: the square of activation times norm of the down row. Layers of one loop share the largest size.

    Args:
      fun: the function, as for ``sparsify``.
      batches: tuples of its arguments, plain weights included. Predictors that are fitted to the inputs (``LowRank``,
        ``Projected``) take two passes over them, so a list or the like; for others a generator will do.
      weights_argnums: positions of the arguments that hold weights.
      recall: what the sizes are to reach, 0 < recall <= 1.
      config: what is to be calibrated, and the predictors to measure; give ``sparsify`` the same. None is ``Config()``.
      progress: show a progress bar; None shows one on a terminal.
      **jit_options: options of ``jax.jit``, as for ``sparsify``.

    Raises:
      TypeError, ValueError: an argument is not usable, there are no batches or no sites, or inputs of a site are NaN or
        infinite; the message names what it is.
    """
    config = check_function("calibrate", fun, config, jit_options)
    if isinstance(recall, bool) or not isinstance(recall, (int, float)) or not 0 < recall <= 1:
        raise ValueError(f"calibrate: recall={recall!r}; expected a number, 0 < recall <= 1")
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"calibrate: progress={progress!r}; expected True, False or None")
    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, str, np.ndarray, jax.Array)):
        raise TypeError(f"calibrate: batches is a {type(batches).__name__}; expected an iterable of argument tuples")
    fitted = any(takes_inputs(s.predictor) for s in _all_settings(config))
    if fitted and iter(batches) is batches:
        raise ValueError(
            f"calibrate: batches is a {type(batches).__name__}, which can be read once, but LowRank and Projected are "
            "fitted in a first pass and measured in a second; expected a list, or the like"
        )
    show = sys.stderr.isatty() if progress is None else progress

    def measured(kind: type[Sparsified], config: Config, known: Calibration | None, label: str) -> Calibration:
        step = kind(fun, config, weights_argnums, jit_options, known)
        collected = _Collected()
        for number, batch in enumerate(_shown(batches, label, show)):
            collected.add(step, number, batch)
        return collected.calibration(float(recall), known)

    if not fitted:
        return measured(_Capturing, _everywhere(config, _plainly), None, "sites")
    first = measured(_CapturingInputs, _everywhere(config, _unfitted), None, "inputs")
    return measured(_Capturing, _everywhere(config, _plainly), first, "predictors")


class _CaptureTrace(Traced):
    """A trace whose program records statistics and is dense."""

    rewriter_class = Capture


class _Capturing(Sparsified):
    """Traces a function for calibration; not called."""

    traced_class = _CaptureTrace


class _InputTrace(Traced):
    """A trace whose program records what predictors are fitted to, and is dense."""

    rewriter_class = CaptureInputs


class _CapturingInputs(Sparsified):
    """Traces a function for the first pass; not called."""

    traced_class = _InputTrace


def _all_settings(config: Config) -> list[Vocab | Ffn]:
    held: list[Config | Rule] = [config, *config.rules]
    return [s for owner in held for s in (owner.vocab, owner.ffn) if s is not None]


def _everywhere(config: Config, change: Callable[[Any], Any]) -> Config:
    """The settings at every site whatever its size, each changed."""

    def changed(settings: Any) -> Any:
        return None if settings is None else change(settings)

    rules = [dataclasses.replace(r, vocab=changed(r.vocab), ffn=changed(r.ffn)) for r in config.rules]
    return Config(vocab=changed(config.vocab), ffn=changed(config.ffn), rules=(Rule("*", force=True), *rules))


def _plainly(settings: Any) -> Any:
    return dataclasses.replace(settings, certify=False, max_tokens=_ANY_NUMBER)


def _unfitted(settings: Any) -> Any:
    """For the pass that only finds out what to fit predictors to."""
    predictor = Quantized(bits=8) if takes_inputs(settings.predictor) else settings.predictor
    return dataclasses.replace(_plainly(settings), predictor=predictor)


def _shown(batches: Iterable[Any], label: str, show: bool) -> Iterator[Any]:
    if not show:
        yield from batches
        return
    total = len(batches) if isinstance(batches, Sized) else None
    columns = (TextColumn(f"calibrating: {label}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(batches, total=total)


class _Collected:
    """Sums over the batches so far."""

    def __init__(self) -> None:
        self._sums: Sums = {}
        self._sites: dict[str, Decision] = {}
        self._programs: dict[Traced, Callable] = {}
        self._batches = 0

    def add(self, step: Sparsified, number: int, batch: Any) -> None:
        """Runs one batch."""
        if not isinstance(batch, (tuple, list)):
            raise TypeError(f"calibrate: batch {number} is a {type(batch).__name__}; expected a tuple of arguments")
        if any(isinstance(a, Packed) for a in batch):
            raise TypeError(f"calibrate: batch {number} has Packed weights; expected the plain ones")
        args, kwargs = step.signature.wrap_statics(tuple(batch), {})
        call = abstract_call(step.signature, args, kwargs)
        leaves = call_leaves(step.signature, args, kwargs)
        for leaf in leaves:
            if compat.is_tracer(leaf) or isinstance(leaf, (jax.ShapeDtypeStruct, jax.core.ShapedArray)):
                raise TypeError(f"calibrate: batch {number} holds a {type(leaf).__name__}; expected arrays")
        traced = step.traced(call)
        if not traced.plan.decisions:
            raise ValueError(f"calibrate: batch {number} reaches no site that could be calibrated.\n{traced.explain()}")
        self._note(traced, number)
        plain = {r: leaf for r, leaf in zip(call.roots, leaves, strict=True) if r is not None}
        data = [leaf for r, leaf in zip(call.roots, leaves, strict=True) if r is None]
        forms = step.memory.forms(traced.needed_keys(), plain, traced)
        if traced not in self._programs:
            self._programs[traced] = _program(traced)
        found = self._programs[traced](data, list(plain.values()), list(forms.values()))
        for key, value in jax.device_get(found).items():
            self._check(key, value, number)
            wide = np.asarray(value, np.int64 if value.dtype.kind == "i" else np.float64)
            self._sums[key] = np.asarray(self._sums[key] + wide) if key in self._sums else wide
        self._batches += 1

    def _note(self, traced: Traced, number: int) -> None:
        for decision in traced.plan.decisions:
            known = self._sites.setdefault(decision.site.path, decision)
            if known is not decision and _shape(known) != _shape(decision):
                raise ValueError(
                    f"calibrate: in batch {number} the site {decision.site.path} has other weights than in earlier ones"
                )

    def _check(self, key: tuple[str, str], value: np.ndarray, number: int) -> None:
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            names = ", ".join(self._sites[key[0]].site.weights)
            raise ValueError(f"calibrate: batch {number}: what goes into {key[0]} ({names}) holds NaN or infinity")

    def calibration(self, recall: float, known: Calibration | None) -> Calibration:
        """What was measured; covariances are those known already, if any are."""
        if not self._batches:
            raise ValueError("calibrate: batches is empty; expected at least one tuple of arguments")
        sites = {path: self._site(path, d, recall, known) for path, d in self._sites.items()}
        return Calibration(sites, recall, self._batches)

    def _site(self, path: str, decision: Decision, recall: float, known: Calibration | None) -> SiteCalibration:
        match, settings, site = decision.match, decision.settings, decision.site
        own = {name: value for (p, name), value in self._sums.items() if p == path}
        numbers = input_numbers(match)
        firsts = list(dict.fromkeys(numbers))
        criterion = "argmax"
        if isinstance(match, FfnMatch):
            criterion = "units" if match.region.zeroing else "energy"
        ranked = (*site_stack(match), site.units // (settings.group_size if isinstance(settings, Ffn) else 1))
        covariances = [self._mean(own["tokens"], own[f"covariance{i}"]) for i in firsts]
        return SiteCalibration(
            kind=site.kind,
            path=path,
            weights=site.weights,
            width=site.inputs,
            units=site.units,
            stack=site_stack(match),
            group_size=settings.group_size if isinstance(settings, Ffn) else 1,
            predictor=settings.predictor,
            criterion=criterion,
            tokens=own["tokens"],
            wanted=own.get("wanted", np.zeros(ranked, np.int64)),
            fired=own.get("fired"),
            energy=own.get("energy"),
            wanted_energy=own.get("wanted_energy"),
            covariances=tuple(covariances) if known is None else known.sites[path].covariances,
            input_numbers=tuple(firsts.index(i) for i in numbers),
            recall=recall,
        )

    @staticmethod
    def _mean(tokens: np.ndarray, total: np.ndarray) -> np.ndarray:
        """The mean for each layer; where its weight is stacked otherwise, up to its scale, which does not matter."""
        count = np.maximum(tokens, 1)
        if total.shape[:-2] != count.shape:
            count = np.full(total.shape[:-2], max(1, math.ceil(count.mean())))
        return (total / count[..., None, None]).astype(np.float32)


def _shape(decision: Decision) -> tuple[Any, ...]:
    return decision.site.kind, decision.site.inputs, decision.site.units, site_stack(decision.match)


def _program(traced: Traced) -> Callable:
    """The totals of one batch as a jitted function of its data, weights and packed forms."""
    roots = [r for r in traced.call.roots if r is not None]
    keys = traced.needed_keys()

    def program(data: list[Any], plain: list[Any], forms: list[Any]) -> Any:
        rest = iter(data)
        leaves = [None if root is not None else next(rest) for root in traced.call.roots]
        given = dict(zip(roots, plain, strict=True))
        return traced.evaluate(leaves, traced.supply({}, given, dict(zip(keys, forms, strict=True))))

    @jax.jit
    def totals(*operands: Any) -> Totals:
        return fold(jax.make_jaxpr(program)(*operands), jax.tree.leaves(operands), _RECORDED)[1]

    return totals


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
