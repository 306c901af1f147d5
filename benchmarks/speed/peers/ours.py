"""This library through its public face: ``hx.sparsify`` with the settings of the row, packed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import hire_xform as hx
from benchmarks.speed.cases import Case, Weights
from benchmarks.speed.peers import BF16, EXACT, INT4, INT8, LOSSY, NARROW, Kernel, Left, Settings
from benchmarks.speed.peers.on_jax import copies, kernel, nbytes, placed, plain, program, scanned, stacked

EIGHT, QUARTER, EIGHTH = hx.Quantized(8), hx.LowRank(0.25, bits=8), hx.LowRank(0.125, bits=8)
# Of the units of a ReLU block fewer fire than this. SiLU's are never zero: what is left out there is lost.
FIRING = 0.1
WORDS = {
    EIGHT: "int8",
    hx.Quantized(4): "int4",
    QUARTER: "low rank d/4 in 8 bits",
    EIGHTH: "low rank d/8 in 8 bits",
    hx.LowRank(0.125): "low rank d/8 f32",
}


def missing() -> str | None:
    """Nothing: it is what is measured."""
    return None


def _approximate(case: Case, predictor: Any, active: float = 0.25, **more: Any) -> hx.Config:
    """Forced, so that a row says what it says even where the cost model would leave the site dense."""
    most = max(8, case.tokens)
    activations = "zeroing" if case.activation == "relu" else "any"
    return hx.Config(
        vocab=hx.Vocab(predictor=predictor, certify=False, max_tokens=most),
        ffn=hx.Ffn(predictor=predictor, active=active, certify=False, activations=activations, max_tokens=most),
        rules=(hx.Rule("*", force=True),),
        **more,
    )


def _lossless(case: Case) -> hx.Config:
    """A head of low rank: an eighth of the columns of all rows in 8 bits, then int8 of those that are open."""
    predictor = hx.Staged((EIGHTH, EIGHT))
    vocab = hx.Vocab(predictor=predictor, certify=True, max_tokens=max(8, case.tokens))
    return hx.Config(vocab=vocab, ffn=None, rules=(hx.Rule("*", force=True),))


def _certified(config: hx.Config | None) -> bool:
    return config is None or (config.vocab is not None and bool(config.vocab.certify))


def _share(active: float) -> str:
    return f"{active * 100:g} % of units"


def settings_of(case: Case) -> list[dict[str, hx.Config | None]]:
    """Rows and their settings; those of a dictionary share what is packed."""
    lossless: dict[str, hx.Config | None] = {"ours: default, lossless": None}
    if case.kind == "head":
        chosen = [predictor for predictor in WORDS if _taken(case, predictor)]
        rows = {f"ours: {WORDS[predictor]}": _approximate(case, predictor) for predictor in chosen}
        staged = {"ours: lossless in stages, low rank d/8 first": _lossless(case)} if EIGHTH in chosen else {}
        groups = [lossless, staged, {"ours: hx.approximate() (int8)": hx.approximate()} | rows]
        return [group for group in groups if group]
    groups = [lossless, {}, {}]
    if case.activation == "relu":
        groups[1] = {"ours: hx.approximate() (int8, 25 % of units)": hx.approximate()}
    for group, predictor in zip(groups[1:], (EIGHT, EIGHTH), strict=True):
        for active in case.active if _taken(case, predictor) else ():
            group[f"ours: {WORDS[predictor]}, {_share(active)}"] = _approximate(case, predictor, active)
    if case.kind == "step" and case.activation == "relu":
        for group, predictor, active in ((groups[1], EIGHT, max(case.active)), (groups[2], EIGHTH, min(case.active))):
            name = f"ours: {WORDS[predictor]}, {_share(active)}, attention int8"
            group[name] = _approximate(case, predictor, active, dense=hx.Dense(predictor=EIGHT))
    if case.kind == "step":
        # What int8 peers do: every product in 8 bits, attention's too, and none computed exactly.
        compressed = hx.Dense(predictor=EIGHT, max_tokens=max(8, case.tokens))
        everything = hx.Config(vocab=None, ffn=None, dense=compressed, rules=(hx.Rule("*", force=True),))
        groups.append({"ours: int8 everywhere (hx.Dense)": everything})
    return [group for group in groups if group]


def _taken(case: Case, predictor: Any) -> bool:
    """Whether a predictor is worth its decompositions, which take most of a run: seconds to a minute each."""
    if case.kind != "head":
        # Of SiLU's units too many are needed for a small predictor to matter.
        return predictor == EIGHT or case.activation == "relu"
    few = case.tokens > 1 or case.d > 2048 or case.stored != "float32"
    return predictor in (EIGHT, EIGHTH) or (not few and (predictor != hx.LowRank(0.125) or case.d <= 1152))


def _tolerance(case: Case, config: hx.Config | None) -> float:
    """Of a lossless default dense's; of the others what is lost by few bits, and by leaving out units that fire."""
    if case.stored.startswith("float8"):
        return NARROW
    if config is None or _certified(config):
        return EXACT if case.stored == "float32" else BF16
    if config.ffn is None:
        return INT8
    predictor, active = config.ffn.predictor, config.ffn.active or 0.25
    if case.kind != "head" and (active < FIRING or case.activation == "silu"):
        return LOSSY
    return INT4 if predictor == hx.Quantized(4) else INT8


def kernels(weights: Weights, settings: Settings) -> Iterator[Kernel | Left]:
    """The default, ``hx.approximate()``, and predictors and sizes of one's own."""
    case, base = weights.case, placed(weights)
    yield from _made(weights, settings, base, program(case, plain), settings_of(case))
    if case.scanned:
        least = min(case.active)
        named = f"ours: {WORDS[EIGHTH]}, {_share(least)}, a scan over layers"
        configs = [{named: _approximate(case, EIGHTH, least)}]
        yield from _made(weights, settings, stacked(case, base), scanned(case, plain), configs)


def _made(
    weights: Weights,
    settings: Settings,
    base: dict[str, jax.Array],
    function: Callable[..., jax.Array],
    groups: Sequence[dict[str, hx.Config | None]],
) -> Iterator[Kernel | Left]:
    case = weights.case
    rest = jax.tree.map(jnp.asarray, {**weights.biases, **weights.cache})
    inputs = [jnp.asarray(x) for x in weights.inputs]
    for configs in groups:
        reason = settings.short_of(case.elements * 1.5)
        if reason:
            yield from (Left(name, reason) for name in configs)
            continue
        steps = {name: hx.sparsify(function, config=config) for name, config in configs.items()}
        traced = {name: step.trace(base, rest, inputs[0]) for name, step in steps.items()}
        packed = hx.pack(base, list(traced.values()))
        reads = {name: nbytes(base) - one.plan.dense_bytes + one.plan.sparse_bytes for name, one in traced.items()}
        sets = copies(packed, min(reads.values()), settings, share=base.values())
        for name, step in steps.items():
            plan, config = traced[name].plan, configs[name]
            read, note = reads[name], "" if plan.sites else "left dense"
            if _certified(config) and plan.sites:
                read, note = _truly_read(step, plan, packed, rest, inputs, read - plan.sparse_bytes)
            yield kernel(name, step, sets, weights, read, _tolerance(case, config), note=note)


def _truly_read(step: Any, plan: Any, packed: Any, rest: Any, inputs: list[Any], others: int) -> tuple[int, str]:
    """Mean bytes of a call over the inputs, and in words how often nothing had to run dense."""
    paths = {site.path: site for site in plan.sites}
    total, dense, runs = 0, 0, 0
    for x in inputs:
        _, counts = step.with_rungs(packed, rest, x)
        for path, count in counts.items():
            total += sum(int(n) * rung.bytes for n, rung in zip(count, paths[path].rungs, strict=True))
            dense += int(count[-1])
            runs += int(count[-len(paths[path].sizes) :].sum())
        total += sum(site.sparse_bytes for path, site in paths.items() if path not in counts)
    return others + total // len(inputs), f"proved {1 - dense / max(runs, 1):.0%}"
