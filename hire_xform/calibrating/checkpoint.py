"""What a calibration has measured so far, in a file: one that was interrupted goes on from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from hire_xform.calibrating.collecting import Collected
from hire_xform.calibration.calibration_file import checksum
from hire_xform.files import write_whole

FORMAT, VERSION = "hire_xform.calibrating", 1
# Seconds between two writes while nothing goes wrong.
EVERY = 60.0


class Kept:
    """The sums of each phase, and what batches they are of.

    A file is of one function, settings, weights and list of batches. What it was made of is in it as texts and digests,
    so that no other calibration goes on from it. It is written every minute, when something goes wrong, an interrupt by
    the keyboard say, and removed at the end.
    """

    def __init__(self, path: str | os.PathLike[str], made_of: Mapping[str, str]):
        """Reads the file, where there is one.

        Args:
          path: its name.
          made_of: what a calibration has to have in common with what is in it, by name: function, settings, ...

        Raises:
          ValueError: it is no such file, is damaged, or is of another calibration; the message says how they differ.
        """
        self._path, self._made_of = Path(path), dict(made_of)
        if not self._path.name:
            raise ValueError(f"calibrate: checkpoint={os.fspath(path)!r}; expected the name of a file")
        self._phases: dict[str, list[Collected]] = {}
        self._batches: list[str] = []
        # Of weights that were met, by their identity, for as long as they are there.
        self._weights: dict[int, tuple[Any, str]] = {}
        self._written = time.monotonic()
        if self._path.is_file():
            self._read()

    def __enter__(self) -> Kept:
        """Begins."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        """Writes what there is when it ends early; removes the file at the end."""
        if kind is None:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
        elif any(part.batches for parts in self._phases.values() for part in parts):
            self._write()

    def phase(self, name: str, parts: int) -> list[Collected]:
        """The sums of a phase, so far, which are added to: of so many parts, of batches in turn."""
        return self._phases.setdefault(name, [Collected() for _ in range(parts)])

    def check(self, number: int, data: Sequence[Any], weights: Mapping[Any, Any]) -> None:
        """Makes sure that a batch is what it was when it was measured, or notes what it is.

        Raises:
          ValueError: it is another one.
        """
        content = hashlib.sha256()
        for leaf in data:
            content.update(_digest(leaf).encode())
        for root, leaf in weights.items():
            known = self._weights.get(id(leaf))
            if known is None or known[0] is not leaf:
                known = self._weights[id(leaf)] = leaf, _digest(leaf)
            content.update(f"{root}{known[1]}".encode())
        found = content.hexdigest()[:32]
        if number == len(self._batches):
            self._batches.append(found)
        elif self._batches[number] != found:
            raise ValueError(
                f"calibrate: batch {number}, or its weights, is not what {self._path} was measured on: it has digest "
                f"{found}, expected {self._batches[number]}. Pass the same batches in the same order and the same "
                "weights, or another checkpoint"
            )

    def check_number(self, batches: int) -> None:
        """Makes sure that no batch is missing that was measured.

        Raises:
          ValueError: there are fewer.
        """
        if batches < len(self._batches):
            raise ValueError(
                f"calibrate: there are {batches} batches, where {self._path} was measured on {len(self._batches)} or "
                "more. Pass the same batches in the same order, or another checkpoint"
            )

    def write_in_time(self) -> None:
        """Writes, when it has been a while."""
        if time.monotonic() - self._written >= EVERY:
            self._write()

    def _write(self) -> None:
        phases: dict[str, list[int]] = {}
        names: list[tuple[str, int, str, str]] = []
        arrays: dict[str, np.ndarray] = {}
        for phase, parts in self._phases.items():
            phases[phase] = [part.batches for part in parts]
            for i, part in enumerate(parts):
                for (path, name), array in part.sums.items():
                    arrays[str(len(names))] = np.asarray(array, order="C")
                    names.append((phase, i, path, name))
        told = {"made_of": self._made_of, "batches": self._batches, "phases": phases, "names": names}
        header = {"format": FORMAT, "version": str(VERSION), "state": json.dumps(told)}
        write_whole(self._path, save(arrays, metadata={**header, "checksum": checksum(header, arrays)}))
        self._written = time.monotonic()

    def _read(self) -> None:
        try:
            with safe_open(str(self._path), framework="numpy") as file:
                header = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            wrong = (header.get("format"), header.get("version")) != (FORMAT, str(VERSION))
            if wrong or header.get("checksum") != checksum(header, arrays):
                raise ValueError("its format, version or checksum is not what it should be")
            told = json.loads(header["state"])
        except OSError:
            raise
        except Exception as error:
            raise ValueError(
                f"calibrate: checkpoint={os.fspath(self._path)!r} is no checkpoint of a calibration, or is damaged "
                f"({error}); expected one of this version, or the name of a new file"
            ) from None
        for name, own in self._made_of.items():
            if told["made_of"].get(name) != own:
                raise ValueError(
                    f"calibrate: checkpoint={os.fspath(self._path)!r} is of another calibration: its {name} is "
                    f"{told['made_of'].get(name)}; expected {own}, as in this call. Pass what it was begun with, or "
                    "another file"
                )
        sums: dict[tuple[str, int], dict[tuple[str, str], np.ndarray]] = {}
        for number, (phase, i, path, name) in enumerate(told["names"]):
            sums.setdefault((phase, i), {})[path, name] = arrays[str(number)]
        self._batches = told["batches"]
        for phase, counts in told["phases"].items():
            self._phases[phase] = [Collected(sums.get((phase, i)), count) for i, count in enumerate(counts)]


def _digest(leaf: Any) -> str:
    """Of what an array holds, its shape and its dtype."""
    array = np.ascontiguousarray(jax.device_get(leaf))
    content = hashlib.sha256(repr((array.shape, str(array.dtype))).encode())
    content.update(array.tobytes())
    return content.hexdigest()[:32]
