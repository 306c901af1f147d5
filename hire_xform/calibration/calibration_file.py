"""Calibrations as files: arrays in safetensors, the rest as JSON in its header."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from hire_xform.calibration.calibration import Calibration
from hire_xform.calibration.curve import Curve
from hire_xform.calibration.site_calibration import SiteCalibration
from hire_xform.files import write_whole
from hire_xform.lowering.predict.predictors import Predictor, predictor_named

FORMAT, VERSION = "hire_xform.calibration", 6
_TEXTS = (
    *("kind", "path", "width", "units", "group_size", "criterion"),
    *("row_bytes", "target", "recall", "head_kl", "fill", "static"),
)
_LISTS = ("weights", "stack", "input_numbers")
_ARRAYS = ("tokens", "fired", "energy", "sizes", "touched", "order", "often")
_CURVES = ("wanted", "wanted_energy", "kl")


def write(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Writes a calibration; a file of that name is replaced in one move.

    Raises:
      ValueError: the path names no file, or a predictor can't be written.
      OSError: the file can't be written.
    """
    if not Path(path).name:
        raise ValueError(f"Calibration.save: path={os.fspath(path)!r}; expected the name of a file")
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
    write_whole(path, save(arrays, metadata={**header, "checksum": checksum(header, arrays)}))


def checksum(header: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    """Of all that a file says: the texts of its header, but for this one, and its arrays.

    Args:
      header: the texts, by name.
      arrays: the arrays, by name.
    """
    content = hashlib.sha256(json.dumps(sorted((k, v) for k, v in header.items() if k != "checksum")).encode())
    for name, array in sorted(arrays.items()):
        content.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()


def read(path: str | os.PathLike[str]) -> Calibration:
    """Reads a calibration.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no calibration, is damaged, of another version, or names a predictor that is not defined.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Calibration.load: no file at {path}")
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"Calibration.load: {path} is damaged: truncated, or no safetensors file ({error})") from None
    if header.get("format") != FORMAT:
        raise ValueError(
            f"Calibration.load: {path} is no calibration, or is damaged: its header has "
            f"format={header.get('format')!r}; expected {FORMAT!r}"
        )
    if header.get("version") != str(VERSION):
        raise ValueError(
            f"Calibration.load: {path} has format version {header.get('version')}, or is damaged; this version reads "
            f"{VERSION}. Calibrate again"
        )
    if header.get("checksum") != checksum(header, arrays):
        raise ValueError(
            f"Calibration.load: {path} is damaged: its content is not that of its checksum. Copy it again, or calibrate"
        )
    try:
        told = json.loads(header["calibration"])
        return _calibration(told, arrays)
    except _UnknownPredictorError as error:
        raise ValueError(
            f"Calibration.load: {path} names the predictor {error}, which is not defined here, or is damaged; import "
            "the module that defines this subclass of hx.Predictor first"
        ) from None
    except Exception as error:  # Whatever a file can make Python say: a bad index, a text in place of a number.
        raise ValueError(f"Calibration.load: {path} is damaged: {type(error).__name__}: {error}") from None


def _calibration(told: dict[str, Any], arrays: dict[str, np.ndarray]) -> Calibration:
    sites = {entry["path"]: _site(number, entry, arrays) for number, entry in enumerate(told["sites"])}
    _check(len(sites) == len(told["sites"]), "two sites have one path")
    _check(isinstance(told["target"], str) and _is_count(told["batches"]), "target or batches")
    return Calibration(sites, told["target"], told["batches"])


def _check(holds: object, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _is_count(value: Any, least: int = 0, most: float = 2**53) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_rate(value: Any, most: float) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most)


def _check_texts(entry: dict[str, Any]) -> None:
    """Checks what a site's entry says in its header.

    Raises:
      ValueError: something is not of its type, or out of range.
    """
    for name in ("kind", "path", "criterion", "target", "fill"):
        _check(isinstance(entry[name], str), f"{name}={entry[name]!r} is no text")
    _check(entry["kind"] in ("ffn", "vocab"), f"kind={entry['kind']!r}")
    for name in ("width", "units", "group_size", "covariances"):
        _check(_is_count(entry[name], 1), f"{name}={entry[name]!r} of {entry['path']}")
    units, of = entry["units"], entry["path"]
    _check(units % entry["group_size"] == 0, f"group_size={entry['group_size']} of {of} with units={units}")
    _check(_is_count(entry["row_bytes"]), f"row_bytes={entry['row_bytes']!r} of {of}")
    _check(_is_count(entry["static"], 0, units - 1), f"static={entry['static']!r} of {of}")
    _check(_is_rate(entry["recall"], 1), f"recall={entry['recall']!r} of {of}")
    _check(_is_rate(entry["head_kl"], float("inf")), f"head_kl={entry['head_kl']!r} of {of}")
    for name in (*_LISTS, "curves"):
        _check(isinstance(entry[name], list), f"{name}={entry[name]!r} of {of}")
    _check(all(isinstance(name, str) for name in entry["weights"]), f"weights of {of}")
    _check(all(_is_count(n, 1) for n in entry["stack"]), f"stack={entry['stack']} of {of}")
    _check(all(_is_count(i, 0, entry["covariances"] - 1) for i in entry["input_numbers"]), f"input_numbers of {of}")


def _site(number: int, entry: dict[str, Any], arrays: dict[str, np.ndarray]) -> SiteCalibration:
    _check_texts(entry)
    stack, units, width, of = tuple(entry["stack"]), entry["units"], entry["width"], entry["path"]
    made: dict[str, Any] = {name: entry[name] for name in _TEXTS} | {name: tuple(entry[name]) for name in _LISTS}
    block, ranked = entry["kind"] == "ffn", (*stack, units // entry["group_size"])

    def array(name: str, shape: tuple[int, ...] | None, kinds: str = "iuf") -> Any:
        """One array, checked; None is that it should not be there, and -1 any length."""
        found = arrays.get(f"{number}/{name}")
        got = None if found is None else found.shape
        if got != shape and not (got and shape and shape[-1] == -1 and got[-1] and got[:-1] == shape[:-1]):
            raise ValueError(f"{name} of {of} has shape {got}; expected {shape}")
        _check(found is None or found.dtype.kind in kinds, f"{name} of {of} is not of numbers as it should be")
        return found

    def order(name: str) -> Any:
        """For each layer all units, each once; None where that is not there."""
        if f"{number}/{name}" not in arrays:
            return None
        found = array(name, (*stack, units), "iu")
        _check((np.sort(found, axis=-1) == np.arange(units)).all(), f"{name} of {of} does not hold every unit once")
        return found

    of_units = (*stack, units) if block else None
    found: dict[str, Any] = {
        "tokens": array("tokens", stack, "iu"),
        "sizes": array("sizes", stack, "iu"),
        "fired": array("fired", of_units),
        "energy": array("energy", of_units),
        "covariances": tuple(array(f"covariance{i}", (*stack, width, width)) for i in range(entry["covariances"])),
        "order": order("order"),
        "often": order("often"),
    }
    found["touched"] = None if found["order"] is None else array("touched", (*stack, 2))
    _check((found["tokens"] >= 0).all(), f"tokens of {of} below zero")
    _check(((found["sizes"] >= 1) & (found["sizes"] <= ranked[-1])).all(), f"sizes of {of}: {found['sizes'].tolist()}")
    curves = {
        _spec(told): Curve(
            wanted=array(f"wanted{i}", ranked),
            wanted_energy=array(f"wanted_energy{i}", ranked if block else None),
            kl=array(f"kl{i}", None if block else (*stack, -1)),
            predictor_bytes=told["predictor_bytes"],
            static={count: (array(f"static{count}_{i}", ranked), read) for count, read in told["static"]},
        )
        for i, told in enumerate(entry["curves"])
    }
    for curve in curves.values():
        counts = (curve.predictor_bytes, *curve.static, *(read for _, read in curve.static.values()))
        _check(all(_is_count(n) for n in counts), f"bytes of a predictor of {of}: {counts}")
    predictor = _spec(entry["predictor"])
    _check(predictor in curves, f"predictor of {of} has no curve")
    return SiteCalibration(**made, **found, predictor=predictor, curves=curves)


def _told_curve(spec: Predictor, curve: Curve) -> dict[str, Any]:
    static = [(count, read) for count, (_, read) in curve.static.items()]
    return {**_told(spec), "predictor_bytes": curve.predictor_bytes, "static": static}


# What stands beside a predictor's settings in an entry.
_BESIDE = ("type", "predictor_bytes", "static")


def _told(spec: Predictor) -> dict[str, Any]:
    try:
        settings = json.loads(json.dumps(spec.settings()))
        if any(name in _BESIDE for name in settings) or predictor_named(type(spec).__name__) is not type(spec):
            raise ValueError(f"a name that is taken: of {type(spec).__name__}, or of {', '.join(settings)}")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Calibration.save: predictor {spec!r} can't be written: {error}; expected settings() of plain values that "
            "its constructor takes"
        ) from None
    return {"type": type(spec).__name__, **settings}


class _UnknownPredictorError(Exception):
    """A file names a predictor that is not defined here."""


def _spec(entry: dict[str, Any]) -> Predictor:
    kind = predictor_named(entry["type"])
    if kind is None:
        raise _UnknownPredictorError(repr(entry["type"]))
    return kind(**{name: value for name, value in entry.items() if name not in _BESIDE})
