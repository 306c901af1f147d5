"""What sizes do to a function's results: KL divergence and loss, measured end to end on batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_xform.calibrating.measuring import Calibrator, DenseTrace
from hire_xform.calibrating.programs import program, taken_apart
from hire_xform.calibrating.progress import Shown
from hire_xform.calibration.calibration import Calibration
from hire_xform.call.folding import Marks, Totals
from hire_xform.call.signature import arguments_of
from hire_xform.call.stages import Traced
from hire_xform.config import Config
from hire_xform.lowering.primitives.records import record_p
from hire_xform.passes.measure.rehearse import Rehearsed, RehearsedSite, RehearsedSizes
from hire_xform.passes.plan.decisions import Decision, PackKey, Plan
from hire_xform.passes.plan.measurement import MeasurementOf

# Bytes of logits of dense runs that are kept, at most.
KEPT_LOGITS = 256 << 20
# Of a batch's result and its arguments, the loss.
Loss = Callable[..., Any]


class _RehearsalTrace(DenseTrace):
    """A trace whose program is dense, with what the sparse form leaves out left out."""

    def action_of(self, decision: Decision, has_leaf: Any) -> RehearsedSite:
        """A site that is rehearsed."""
        return RehearsedSite(decision)

    def _plan(self, config: Config, platform: str, *measured: MeasurementOf) -> Plan:
        plan = super()._plan(config, platform, *measured)
        return dataclasses.replace(plan, decisions=tuple(Rehearsed.of(d) for d in plan.decisions))


class Rehearsal:
    """Measures what a calibration's predictors and sizes do on some batches.

    Every batch is run twice, dense and not. Of the dense run its loss is kept, or the logits of the first batches, for
    the next time. The sparse form of a call is that of one token at a time, which is what decoding reads.
    """

    def __init__(self, measuring: Calibrator, config: Config, batches: Sequence[Any], loss: Loss | None):
        """For a function and its batches; ``loss`` is None where the KL divergence is measured."""
        self._measuring, self._config, self._batches, self._loss = measuring, config, batches, loss
        self._steps: dict[Any, Any] = {}
        # Of dense runs, by the numbers of their batches, and bytes of logits that may still be kept.
        self._dense: dict[int, Any] = {}
        self._room = KEPT_LOGITS
        self._programs: dict[Traced, Callable] = {}

    @property
    def shown(self) -> Shown:
        """What it is at."""
        return self._measuring.shown

    def cost(self, calibration: Calibration, sizes: Mapping[str, np.ndarray], batches: int | None = None) -> float:
        """Mean KL divergence of the vocabularies, nats a token (the largest of several), or the mean increase of loss.

        Args:
          calibration: its predictors are used.
          sizes: candidates or groups of units of each site, ``[*stack]``.
          batches: how many to run; None runs all.

        Raises:
          ValueError: there is no vocabulary projection, or no loss.
        """
        chosen = tuple((path, site.predictor) for path, site in calibration.sites.items())
        if chosen not in self._steps:
            self._steps[chosen] = self._measuring.step(_RehearsalTrace, self._config, calibration)
        step = self._steps[chosen]
        totals: dict[str, list[float]] = {}
        for number, batch in enumerate(self._batches[:batches]):
            traced, data, plain = taken_apart(step, number, batch)
            if traced not in self._programs:
                self._programs[traced] = program(traced, _kept(traced), results=self._loss is not None)
            dense = self._dense.get(number)
            if dense is None:
                whole = {d.site.path: np.full(s.shape, d.site.units) for d, s in _sized(traced, sizes)}
                dense = self._measured(self._run(step, traced, data, plain, whole), traced, batch, number)
                self._keep(number, dense)
            sparse = self._measured(self._run(step, traced, data, plain, sizes), traced, batch, number)
            if self._loss is not None:
                totals.setdefault("", []).append(sparse - dense)
                continue
            for path in sorted(p for p, name in dense if name == "logits"):
                count = int(dense[path, "count"])
                if count > dense[path, "logits"].shape[0]:
                    raise ValueError(
                        f"calibrate: max_kl: the vocabulary projection {path} is in a loop whose turns are not known "
                        "beforehand; calibrate a function without it, a prefill or one step"
                    )
                told = float(_divergence(dense[path, "logits"], sparse[path, "logits"]))
                totals.setdefault(path, []).append(told)
                totals.setdefault(f"{path} tokens", []).append(count)
        if self._loss is not None:
            return float(np.mean(totals[""]))
        means = [sum(own) / max(1, sum(totals[f"{p} tokens"])) for p, own in totals.items() if f"{p} tokens" in totals]
        return max(means)

    def _measured(self, run: tuple[list[Any], Totals], traced: Traced, batch: Any, number: int) -> Any:
        """Of a run the loss, or its logits."""
        results, totals = run
        return totals if self._loss is None else self._loss_of(traced, results, batch, number)

    def _keep(self, number: int, dense: Any) -> None:
        """Keeps what a dense run gave, of logits as much as there is room for."""
        self._room -= sum(leaf.nbytes for leaf in jax.tree.leaves(dense) if isinstance(leaf, jax.Array))
        if self._room >= 0:
            self._dense[number] = dense

    def _run(
        self, step: Any, traced: Traced, data: list[Any], plain: dict[Any, Any], sizes: Mapping[str, np.ndarray]
    ) -> tuple[list[Any], Totals]:
        keys = traced.needed_keys()
        told = [k for k in keys if not isinstance(k.form, RehearsedSizes)]
        made = step.memory.forms(told, plain, traced, self.shown.packing)

        def form(key: PackKey) -> Any:
            return jnp.asarray(sizes[key.form.path], jnp.int32) if isinstance(key.form, RehearsedSizes) else made[key]

        return self._programs[traced](data, list(plain.values()), [form(k) for k in keys])

    def _loss_of(self, traced: Traced, results: list[Any], batch: Any, number: int) -> float:
        assert self._loss is not None
        args, kwargs = arguments_of(batch)
        value = np.asarray(self._loss(jax.tree.unflatten(traced.out_tree, results), *args, **kwargs))
        if value.ndim or not jnp.issubdtype(value.dtype, jnp.floating) or not math.isfinite(float(value)):
            raise ValueError(
                f"calibrate: the loss of batch {number} is {value!r}; expected a finite number. fun has to return the "
                "loss, or loss=... to make it of what fun returns and the batch"
            )
        return float(value)


def _sized(traced: Traced, sizes: Mapping[str, np.ndarray]) -> list[tuple[Any, np.ndarray]]:
    return [(d, sizes[d.site.path]) for d in traced.plan.decisions]


@jax.jit
def _divergence(dense: jax.Array, sparse: jax.Array) -> jax.Array:
    """The sum over tokens ``[N, V]`` of the KL divergence; rows that were never filled add nothing."""
    p, q = jax.nn.log_softmax(dense), jax.nn.log_softmax(sparse)
    return jnp.sum(jnp.exp(p) * (p - q))


def _kept(traced: Traced) -> Marks:
    """Marks whose totals are all logits, one after the other, and how many there are."""
    turns = {d.site.path: d.match.node.scope.iterations for d in traced.plan.decisions}

    def shapes(eqn: Any) -> dict[tuple[str, str], jax.ShapeDtypeStruct]:
        tokens, vocab = eqn.invars[0].aval.shape
        path = eqn.params["path"]
        return {
            (path, "logits"): jax.ShapeDtypeStruct((tokens * turns[path], vocab), jnp.float32),
            (path, "count"): jax.ShapeDtypeStruct((), jnp.int32),
        }

    def add(eqn: Any, given: Sequence[Any], totals: Totals) -> Totals:
        path, (logits,) = eqn.params["path"], given
        count = totals[path, "count"]
        kept = jax.lax.dynamic_update_slice(totals[path, "logits"], logits, (count, jnp.int32(0)))
        return {**totals, (path, "logits"): kept, (path, "count"): count + logits.shape[0]}

    return Marks(record_p, shapes, add)
