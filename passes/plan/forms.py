"""The packed forms of a weight that are not its rows, and which of them each site reads, in the subgraphs' order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hire_xform.lowering.predict.predictors import PredictorSpec
from hire_xform.passes.match.region import Region
from hire_xform.passes.match.zeros import gate_of
from hire_xform.passes.plan.settings import Ffn, Vocab


@dataclass(frozen=True)
class Proving:
    """A packed form: what a proof with a predictor reads, of the rows and of how far off it can be."""

    spec: PredictorSpec


def vocab_forms(settings: Vocab) -> list[Any]:
    """Of a vocabulary projection: its rows, and its predictor or what a proof reads."""
    return ["rows", Proving(settings.spec) if settings.certify else settings.spec]


def up_forms(region: Region, settings: Ffn) -> list[list[Any]]:
    """Of each product into the units: its rows, its predictor if it is scored, what a proof or a threshold takes."""
    spec = settings.spec
    if settings.certify and region.own is not None:
        return [
            ["rows", Proving(spec) if scored else "largest", *(["bounded_moments"] if totalled else [])]
            for scored, totalled in zip(region.scored, region.totalled, strict=True)
        ]
    if settings.certify:
        gate = gate_of(region)
        proved = ["rows", Proving(spec)]
        return [proved if gate is not None and i == gate.up else ["rows", "largest"] for i in range(len(region.ups))]
    return [
        ["rows", *([spec] if scored else []), *(["moments"] if totalled else [])]
        for scored, totalled in zip(region.scored, region.totalled, strict=True)
    ]


def down_forms(region: Region, settings: Ffn) -> list[Any]:
    """Of the contracting product: its rows; their largest norm for a proof, all norms if units are scored by them."""
    if settings.certify:
        return ["rows", "largest"]
    return ["rows"] if region.own is not None else ["rows", "norms"]
