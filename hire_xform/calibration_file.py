"""Calibrations as files: arrays in safetensors, the rest as JSON in its header."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hire_xform.calibration import Calibration, SiteCalibration
from hire_xform.lowering import LowRank, PredictorSpec, Projected, Quantized

FORMAT, VERSION = "hire_xform.calibration", 1
_SPECS: dict[str, Any] = {spec.__name__: spec for spec in (Quantized, LowRank, Projected)}
_TEXTS = ("kind", "path", "width", "units", "group_size", "criterion", "recall")
_LISTS = ("weights", "stack", "input_numbers")
_ARRAYS = ("tokens", "wanted", "fired", "energy", "wanted_energy")


def write(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Writes a calibration; a file of that name is replaced in one move."""
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    sites = []
    for number, site in enumerate(calibration.sites.values()):
        entry: dict[str, Any] = {name: getattr(site, name) for name in (*_TEXTS, *_LISTS)}
        entry["predictor"] = {"type": type(site.predictor).__name__, **vars(site.predictor)}
        entry["covariances"] = len(site.covariances)
        sites.append(entry)
        named = {name: getattr(site, name) for name in _ARRAYS}
        named.update({f"covariance{i}": c for i, c in enumerate(site.covariances)})
        arrays.update({f"{number}/{name}": np.asarray(a, order="C") for name, a in named.items() if a is not None})
    told = {"recall": calibration.recall, "batches": calibration.batches, "sites": sites}
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
        return Calibration({site.path: site for site in sites}, float(told["recall"]), int(told["batches"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"Calibration.load: {path} is damaged: {error}") from None


def _site(number: int, entry: dict[str, Any], arrays: dict[str, np.ndarray]) -> SiteCalibration:
    stack, units, width = tuple(entry["stack"]), entry["units"], entry["width"]
    made: dict[str, Any] = {name: entry[name] for name in _TEXTS} | {name: tuple(entry[name]) for name in _LISTS}
    found: dict[str, Any] = {name: arrays.get(f"{number}/{name}") for name in _ARRAYS}
    shapes = {"tokens": stack, "wanted": (*stack, units // entry["group_size"])}
    if entry["kind"] == "ffn":
        shapes |= {"fired": (*stack, units), "energy": (*stack, units), "wanted_energy": shapes["wanted"]}
    for name, shape in shapes.items():
        got = None if found[name] is None else found[name].shape
        if got != shape:
            raise ValueError(f"{name} of {entry['path']} has shape {got}; expected {shape}")
    covariances = tuple(arrays[f"{number}/covariance{i}"] for i in range(entry["covariances"]))
    if covariances[0].shape != (*stack, width, width):
        raise ValueError(f"covariance of {entry['path']} has shape {covariances[0].shape}")
    return SiteCalibration(**made, **found, predictor=_spec(entry["predictor"]), covariances=covariances)


def _spec(entry: dict[str, Any]) -> PredictorSpec:
    fields = dict(entry)
    return _SPECS[fields.pop("type")](**fields)
