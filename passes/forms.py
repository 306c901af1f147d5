"""Which packed forms a site reads of each of its weights, in the order they are handed to its subgraph."""

from __future__ import annotations

from typing import Any

from hire_xform.passes.region import Region
from hire_xform.passes.settings import Ffn, Vocab
from hire_xform.passes.zeros import gate_of


def vocab_forms(settings: Vocab) -> list[Any]:
    """Of a vocabulary projection: its rows, its predictor, and if certified its bounds."""
    spec = settings.spec
    return ["rows", spec, *([("bounds", spec)] if settings.certify else [])]


def up_forms(region: Region, settings: Ffn) -> list[list[Any]]:
    """Of each product into the units: its rows, its predictor if it is scored, what a proof or a threshold takes."""
    spec = settings.spec
    if settings.certify:
        gate = gate_of(region)
        proved = ["rows", spec, ("bounds", spec)]
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
