"""``compare``: is it on, is it right, is it faster? One call, on arguments of the user's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from hire_xform.api import Sparsified
from hire_xform.call.stages import Traced
from hire_xform.comparing.agreement import agreements, logits_axes
from hire_xform.comparing.comparison import Comparison, Run, SiteComparison
from hire_xform.comparing.timing import Runnable, cache_bytes, memory_speed, seconds_in_turn, spread_of
from hire_xform.config import Config, Rule
from hire_xform.explain import size
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.trace_context import as_usual
from hire_xform.passes.pack.packed import Packed
from hire_xform.passes.plan.decisions import Decision, Site

# Refusals that are told of, the largest ones.
TOLD = 5
# Below so many calls, or above such a spread, times say little.
FEW_CALLS, WIDE_SPREAD = 5, 0.2
# Weights that are not so many times the last cache may stay in it.
CACHES = 2
# Weights that no accelerator's cache holds.
LARGE = 256 << 20
# Bytes read at so many times the speed of memory were not all read from it.
TOO_FAST = 1.2
_DENSE = Config(rules=(Rule("*", skip=True),))


def compare(step: Sparsified, *args: Any, repeats: int = 20, sites: bool = False, **kwargs: Any) -> Comparison:
    """Runs a function dense and sparse on the same arguments, and says what that gives::

        step = hx.sparsify(decode_step)
        print(hx.compare(step, params, cache, token))

    Dense is ``jax.jit`` of the function with the options that ``step`` has. Both are compiled and warmed up, then
    called in turn. Not in the times: packing, copies of what is donated, and the Python that a call of a step costs
    above that of its jitted program, tens of microseconds. The arguments live on unchanged, and so does the step.

    Args:
      step: from ``hx.sparsify``.
      *args, **kwargs: the arguments of a call: arrays, and plain weights. An argument of the function that is called
        ``repeats`` or ``sites`` is to be given by position.
      repeats: calls of each that are timed.
      sites: also measure what each site gives alone. It compiles and packs once more for each.

    Returns:
      A ``Comparison``: print it, or take its attributes or ``to_json()``.

    Raises:
      TypeError, ValueError: an argument is not usable; the message names it.
      Whatever the function raises.
    """
    return comparison_of(step, args, kwargs, repeats, sites)


def comparison_of(
    step: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], repeats: int = 20, sites: bool = False
) -> Comparison:
    """As ``compare``, the arguments of the call apart from the others."""
    if not isinstance(step, Sparsified):
        raise TypeError(f"compare: step={step!r}; expected what hx.sparsify returns")
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise ValueError(f"compare: repeats={repeats!r}; expected an integer of at least 1")
    if not isinstance(sites, bool):
        raise TypeError(f"compare: sites={sites!r}; expected True or False")
    devices = checked_devices(step, args, kwargs)

    own = _anew(step)
    traced = own.trace(*args, **kwargs)
    plan = traced.plan
    dense = Sparsified(step.fun, _DENSE, step.weights, step.jit_options)
    programs = [Runnable(one, args, kwargs) for one in (dense, own)]
    with as_usual():
        agreement = agreements(programs[0](), programs[1](), logits_axes(traced))
    counts = _counts(own, args, kwargs)
    if sites:
        programs += [Runnable(_alone(step, traced, decision), args, kwargs) for decision in plan.decisions]
    times = seconds_in_turn(programs, repeats)
    medians = [float(np.median(one)) for one in times]

    compared, read = [], plan.refused_bytes
    for number, decision in enumerate(plan.decisions):
        saved = medians[0] - medians[2 + number] if sites else None
        compared.append(_site(decision, counts.get(decision.site.path), saved))
        read += _bytes_read(decision, counts.get(decision.site.path))
    with as_usual():
        speed = memory_speed(devices[0]) if len(devices) == 1 else None
    read_dense = plan.dense_bytes + plan.refused_bytes
    runs = [
        _run(one, nbytes, None if traced.reads_in_while else speed)
        for one, nbytes in zip(times[:2], (read_dense, read), strict=True)
    ]
    refusals = sorted(plan.refusals, key=lambda refusal: -refusal.dense_bytes)
    return Comparison(
        name=getattr(step, "__name__", None) or repr(step),
        platform=plan.platform,
        repeats=repeats,
        dense=runs[0],
        sparse=runs[1],
        ratio=medians[0] / medians[1],
        memory_speed=speed,
        predicted=plan.dense_seconds - plan.sparse_seconds,
        profile="" if plan.profile is None else plan.profile.in_words,
        agreement=agreement,
        sites=tuple(compared),
        refused=len(refusals),
        refused_bytes=plan.refused_bytes,
        largest_refusals=tuple(refusals[:TOLD]),
        notes=tuple(_notes(traced, runs, compared, repeats, len(devices))),
    )


def checked_devices(step: Sparsified, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The devices that the arguments are on; raises where one of them is nothing to compute with."""
    wrong = step.signature.misfit(args, kwargs)
    if wrong:
        raise TypeError(f"compare: {wrong}; expected all arguments of a call of {step!r}")
    call = step.signature.wrap_statics(args, dict(kwargs))
    devices: dict[Any, None] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(call, is_leaf=lambda x: isinstance(x, Packed)):
        name = step.signature.name_of(path)
        if isinstance(leaf, Packed):
            raise TypeError(f"compare: {name} is Packed; expected the plain weights, which the dense function takes")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"compare: {name} is a ShapeDtypeStruct; expected an array: the function is run")
        if compat.is_tracer(leaf):
            raise TypeError(f"compare: {name} is traced; expected an array: times are of calls outside of any trace")
        if not isinstance(leaf, jax.Array):
            continue
        if leaf.is_deleted():
            raise ValueError(f"compare: {name} was donated or deleted; expected an array that is there")
        if not leaf.is_fully_addressable:
            raise ValueError(f"compare: {name} is on devices of other processes; expected arrays of this process")
        devices.update(dict.fromkeys(leaf.sharding.device_set))
    if devices:
        return list(devices)
    named = step.options.get("device") or compat.default_device()
    return [named if isinstance(named, jax.Device) else jax.devices(named or step.options.get("backend"))[0]]


def _anew(step: Sparsified) -> Sparsified:
    """The same step, which remembers nothing but which sites it leaves dense: the user's own is not to change."""
    own = copy.copy(step)
    own.left_dense = step.left_dense
    return own


def _alone(step: Sparsified, traced: Traced, decision: Decision) -> Sparsified:
    """The step with one site sparse and all others dense."""
    own = _anew(step)
    others = [d.site for d in traced.plan.decisions if d is not decision]
    left = {(site.kind, site.path): "another site is measured alone" for site in others}
    own.left_dense = MappingProxyType({**own.left_dense, **left})
    return own


def _counts(step: Sparsified, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """How often each site took each of its sizes in a call, by path; none where they can't be added up."""
    try:
        counts = step.with_rungs(*args, **kwargs)[1]
    except NotImplementedError:
        return {}
    return {path: np.asarray(taken, np.int64) for path, taken in counts.items()}


def _site(decision: Decision, taken: np.ndarray | None, saved: float | None) -> SiteComparison:
    site = decision.site
    last = None if taken is None else int(taken[-1])
    return SiteComparison(
        kind=site.kind,
        path=site.path,
        source=site.source,
        dense_bytes=site.dense_bytes,
        sparse_bytes=site.sparse_bytes,
        dense_seconds=site.dense_seconds,
        sparse_seconds=site.sparse_seconds,
        predicted=site.dense_seconds / site.sparse_seconds,
        executions=None if taken is None else _executions(site, taken),
        ran_dense=last if site.settings.certify else None,
        short=None if site.settings.certify else last,
        saved=saved,
    )


def _executions(site: Site, taken: np.ndarray) -> int:
    """How often it was executed, by the sizes that it took; each took one."""
    return int(taken[len(site.rungs) - len(site.sizes) :].sum())


def _bytes_read(decision: Decision, taken: np.ndarray | None) -> int:
    """Weight bytes that a site read in a call: by the sizes that it took, where they were counted."""
    site = decision.site
    if taken is None or len(taken) != len(site.rungs) or not _executions(site, taken):
        return site.sparse_bytes
    each = float(np.dot(taken, [rung.bytes for rung in site.rungs]) / _executions(site, taken))
    return round(each * decision.node.scope.iterations)


def _run(seconds: np.ndarray, nbytes: int, memory: float | None) -> Run:
    median = float(np.median(seconds))
    speed = None if memory is None else nbytes / median
    share = None if memory is None or speed is None else speed / memory
    return Run(median, spread_of(seconds), nbytes, speed, share)


def _notes(traced: Traced, runs: list[Run], sites: list[SiteComparison], repeats: int, devices: int) -> list[str]:
    plan, notes = traced.plan, []
    if not sites:
        notes.append("no site is rewritten: both are the same program, and what differs in their times is chance")
    if repeats < FEW_CALLS:
        notes.append(f"{repeats} calls are few: medians of fewer than {FEW_CALLS} say little")
    named = list(zip(("dense", "sparse"), runs, strict=True))
    for name, run in named:
        if run.spread > WIDE_SPREAD:
            notes.append(f"{name} times spread by {run.spread:.0%}: they are not steady here")
    weights = plan.dense_bytes + plan.refused_bytes
    cache = cache_bytes() if plan.platform == "cpu" else None
    if cache is None and (plan.platform == "cpu" or weights < LARGE):
        notes.append("the size of the last cache is not known: times mean something where weights are far larger")
    elif cache is not None and weights < CACHES * cache:
        notes.append(
            f"the weights, {size(weights)}, are less than {CACHES} times the third-level cache, {size(cache)}, and may "
            "stay in it: times say little of a model that does not fit"
        )
    too_fast = [name for name, run in named if run.share is not None and run.share > TOO_FAST]
    if too_fast:
        notes.append(
            f"{' and '.join(too_fast)}: faster than memory gives, so not all of these bytes come from it: equal "
            "products are run once by XLA, and a cache may hold weights"
        )
    dense = [site.path for site in sites if site.ran_dense]
    if dense:
        notes.append(f"not proved for these arguments, and run dense as well, which is slower: {', '.join(dense)}")
    if any(site.short for site in sites):
        notes.append("blocks were short of units, so results are off: raise active, or calibrate")
    if traced.reads_in_while:
        notes.append("weights are read in a while loop: bytes are those of one iteration, so no speed is told")
    if devices > 1:
        notes.append(f"arguments are on {devices} devices: no speed is told, since that of memory is of one")
    return notes
