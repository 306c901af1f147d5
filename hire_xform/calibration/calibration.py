"""What ``hx.calibrate`` measured of a model on real inputs, by site: ``Calibration``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hire_xform.calibration.site_calibration import SiteCalibration
from hire_xform.passes.match.matches import Match
from hire_xform.passes.plan.measurement import MeasurementOf


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """What ``hx.calibrate`` measured. Pass it to ``hx.sparsify(fun, calibration=...)``.

    Attributes:
      sites: what was measured of each site, by path.
      target: what was asked for, such as "recall 0.99".
      batches: batches that were measured.
    """

    sites: Mapping[str, SiteCalibration]
    target: str
    batches: int

    def __repr__(self) -> str:
        """A one-line summary."""
        tokens = max((int(s.tokens.max()) for s in self.sites.values()), default=0)
        return f"Calibration({len(self.sites)} sites, {self.target}, {tokens:,} tokens)"

    def __str__(self) -> str:
        """The table."""
        return self.table()

    def table(self) -> str:
        """Each site, and each layer of it, as a line of text.

        ``lost`` is the share of a block's energy that is in units not chosen, and for a head the KL divergence.
        """
        head = ("site", "kind", "layer", "tokens", "size", "of", "recall", "lost", "fires", "predictor")
        lines = [head]
        for site in self.sites.values():
            rate = site.firing_rate
            for layer in np.ndindex(*site.stack):
                size = int(site.sizes[layer])
                fires = "" if rate is None else f"{rate[layer].mean():.1%}"
                numbers = f"{int(site.tokens[layer]):,}", f"{size:,}", f"{site.units // site.group_size:,}"
                name = ".".join(map(str, layer)) or "-"
                recall = f"{float(site.recall_at(size)[layer]):.4f}"
                if site.kind == "vocab":
                    lost = f"{float(site.kl_at(size)[layer]):.1e} nats"
                else:
                    lost = f"{1 - float(site.energy_at(size)[layer]):.1e}"
                lines.append((site.path, site.kind, name, *numbers, recall, lost, fires, repr(site.predictor)))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as one safetensors file with a checksum; one of that name is replaced in one move.

        Raises:
          ValueError: the path names no file, or a predictor can't be written.
          OSError: the file can't be written.
        """
        from hire_xform.calibration.calibration_file import write

        write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Reads what ``save`` wrote.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is no calibration, is damaged, of another version, or names a predictor that is not defined;
            the message says which.
        """
        from hire_xform.calibration.calibration_file import read

        return read(path)

    def measurement_of(self, matches: Sequence[Match], name_of: Callable[[Any], str]) -> MeasurementOf:
        """What is known of the matches of a program: by weights and shapes, and by path among several alike.

        Raises:
          ValueError: the program is of another model.
        """
        found: dict[str, SiteCalibration] = {}
        for match in matches:
            path, shape = match.node.path, _shape(match)
            names = [name_of(p.origin.recipe.root) for p in match.products]
            known = self.sites.get(path)
            if known is not None and known.kind == shape[0] and _shape_of(known) != shape:
                raise ValueError(
                    f"calibration: {path} was measured with {_told(_shape_of(known))}; the program has {_told(shape)}. "
                    "It is of another model"
                )
            alike = [s for s in self.sites.values() if _shape_of(s) == shape and _bare(s.weights) == _bare(names)]
            if len(alike) > 1:
                alike = [s for s in alike if s.path == path]
            if alike:
                found[path] = alike[0]
        if matches and not found:
            there = "; ".join(f"{s.path} ({', '.join(s.weights)})" for s in list(self.sites.values())[:3])
            raise ValueError(
                f"calibration: none of the program's sites is among those measured, which are {there}. It is of "
                f"another model; the program has {', '.join(m.node.path for m in matches[:3])}"
            )
        return lambda match, names: found.get(match.node.path)


def _shape(match: Match) -> tuple[Any, ...]:
    return match.kind, match.inputs, match.units, match.stack


def _shape_of(site: SiteCalibration) -> tuple[Any, ...]:
    return site.kind, site.width, site.units, site.stack


def _told(shape: tuple[Any, ...]) -> str:
    stack = f", stacked {'x'.join(map(str, shape[3]))}" if shape[3] else ""
    return f"{shape[1]} inputs and {shape[2]} {'rows' if shape[0] == 'vocab' else 'units'}{stack}"


def _bare(names: Sequence[str]) -> tuple[str, ...]:
    """Names of weights without that of the argument, which another function may call otherwise."""
    starts = [min((n.index(c) for c in "[." if c in n), default=len(n)) for n in names]
    return tuple(n if n.startswith("closed-over") else n[at:] for n, at in zip(names, starts, strict=True))
