"""Calibrations as files: arrays in safetensors, the rest as JSON in its header."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hire_xform.calibration import Calibration
from hire_xform.curve import Curve
from hire_xform.lowering import LowRank, PredictorSpec, Projected, Quantized
from hire_xform.site_calibration import SiteCalibration

FORMAT, VERSION = "hire_xform.calibration", 5
_SPECS: dict[str, Any] = {spec.__name__: spec for spec in (Quantized, LowRank, Projected)}
_TEXTS = (
    *("kind", "path", "width", "units", "group_size", "criterion"),
    *("row_bytes", "target", "recall", "head_kl", "fill", "static"),
)
_LISTS = ("weights", "stack", "input_numbers")
_ARRAYS = ("tokens", "fired", "energy", "sizes", "touched", "order", "often")
_CURVES = ("wanted", "wanted_energy", "kl")


def write(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Writes a calibration; a file of that name is replaced in one move."""
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    sites = []
    for number, site in enumerate(calibration.sites.values()):
        entry: dict[str, Any] = {name: getattr(site, name) for name in (*_TEXTS, *_LISTS)}
        entry["predictor"] = _told(site.predictor)
        entry["covariances"] = len(site.covariances)
        entry["curves"] = [_told_curve(p, c) for p, c in site.curves.items()]
        sites.append(entry)
        named = {name: getattr(site, name) for name in _ARRAYS}
        named.update({f"covariance{i}": c for i, c in enumerate(site.covariances)})
        for i, curve in enumerate(site.curves.values()):
            named.update({f"{name}{i}": getattr(curve, name) for name in _CURVES})
            named.update({f"static{count}_{i}": wanted for count, (wanted, _) in curve.static.items()})
        arrays.update({f"{number}/{name}": np.asarray(a, order="C") for name, a in named.items() if a is not None})
    told = {"target": calibration.target, "batches": calibration.batches, "sites": sites}
    header = {"format": FORMAT, "version": str(VERSION), "calibration": json.dumps(told)}
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(save(arrays, metadata=header))
    os.replace(partial, path)


def read(path: str | os.PathLike[str]) -> Calibration:
    """Reads a calibration.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no calibration, is damaged, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Calibration.load: no file at {path}")
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except SafetensorError as error:
        raise ValueError(f"Calibration.load: {path} is truncated or no safetensors file ({error})") from None
    if header.get("format") != FORMAT:
        raise ValueError(f"Calibration.load: {path} is no calibration; its header has format={header.get('format')!r}")
    if header.get("version") != str(VERSION):
        raise ValueError(
            f"Calibration.load: {path} has format version {header.get('version')}; this version reads {VERSION}. "
            "Calibrate again"
        )
    try:
        told = json.loads(header["calibration"])
        sites = [_site(number, entry, arrays) for number, entry in enumerate(told["sites"])]
        return Calibration({site.path: site for site in sites}, str(told["target"]), int(told["batches"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"Calibration.load: {path} is damaged: {error}") from None


def _site(number: int, entry: dict[str, Any], arrays: dict[str, np.ndarray]) -> SiteCalibration:
    stack, units, width = tuple(entry["stack"]), entry["units"], entry["width"]
    made: dict[str, Any] = {name: entry[name] for name in _TEXTS} | {name: tuple(entry[name]) for name in _LISTS}
    block, ranked = entry["kind"] == "ffn", (*stack, units // entry["group_size"])

    def array(name: str, shape: tuple[int, ...] | None) -> Any:
        """One array, checked; None is that it should not be there, and -1 any length."""
        found = arrays.get(f"{number}/{name}")
        got = None if found is None else found.shape
        if got != shape and not (got and shape and shape[-1] == -1 and got[:-1] == shape[:-1]):
            raise ValueError(f"{name} of {entry['path']} has shape {got}; expected {shape}")
        return found

    of_units = (*stack, units) if block else None
    found = {
        "tokens": array("tokens", stack),
        "sizes": array("sizes", stack),
        "fired": array("fired", of_units),
        "energy": array("energy", of_units),
        "covariances": tuple(arrays[f"{number}/covariance{i}"] for i in range(entry["covariances"])),
    }
    if f"{number}/order" in arrays:
        found |= {"touched": array("touched", (*stack, 2)), "order": array("order", (*stack, units))}
    else:
        found |= {"touched": None, "order": None}
    found["often"] = array("often", (*stack, units)) if f"{number}/often" in arrays else None
    curves = {
        _spec(told): Curve(
            wanted=array(f"wanted{i}", ranked),
            wanted_energy=array(f"wanted_energy{i}", ranked if block else None),
            kl=array(f"kl{i}", None if block else (*stack, -1)),
            predictor_bytes=told["predictor_bytes"],
            static={c: (array(f"static{c}_{i}", ranked), read) for c, read in told["static"]},
        )
        for i, told in enumerate(entry["curves"])
    }
    if found["covariances"][0].shape != (*stack, width, width):
        raise ValueError(f"covariance of {entry['path']} has shape {found['covariances'][0].shape}")
    predictor = _spec(entry["predictor"])
    if predictor not in curves:
        raise ValueError(f"predictor of {entry['path']} has no curve")
    return SiteCalibration(**made, **found, predictor=predictor, curves=curves)


def _told_curve(spec: PredictorSpec, curve: Curve) -> dict[str, Any]:
    static = [(count, read) for count, (_, read) in curve.static.items()]
    return {**_told(spec), "predictor_bytes": curve.predictor_bytes, "static": static}


def _told(spec: PredictorSpec) -> dict[str, Any]:
    return {"type": type(spec).__name__, **vars(spec)}


def _spec(entry: dict[str, Any]) -> PredictorSpec:
    fields = {name: value for name, value in entry.items() if name not in ("type", "predictor_bytes", "static")}
    return _SPECS[entry["type"]](**fields)
