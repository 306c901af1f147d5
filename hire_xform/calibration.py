"""What was measured of a model on real inputs: ``Calibration``, by site."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hire_xform.lowering import PredictorSpec
from hire_xform.passes.detect import FfnMatch, VocabMatch
from hire_xform.passes.measured import Inputs, Measure, site_stack
from hire_xform.passes.settings import Ffn, Vocab


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SiteCalibration:
    """What was measured of one site. Sums over tokens; where weights are stacked, one for each layer in front.

    Attributes:
      kind: "ffn" or "vocab".
      path: the site's path in the program that was measured.
      weights: names of its weights.
      width: columns of the (first) weight, d.
      units: the vocabulary V or the hidden width m.
      stack: lengths of the stack axes, layers mostly; ``()`` for a weight of its own.
      group_size: units that were ranked together, g.
      predictor: what ranked them.
      criterion: what recall counts. "argmax": tokens whose dense arg max is among the candidates. "units": units that
        are not zero and are chosen. "energy": the share of energy of the units chosen.
      tokens: int64 ``[*stack]``.
      wanted: int64 ``[*stack, units / g]``, by position in the predictor's order, what stands there of what is counted:
        arg maxes, or units that are not zero.
      fired: int64 ``[*stack, m]``, tokens at which a unit is not zero; None for a vocabulary.
      energy: f64 ``[*stack, m]``, sum of the squares of activation times norm of the down row; None for a vocabulary.
      wanted_energy: f64 ``[*stack, units / g]``, energy by position; None for a vocabulary.
      covariances: mean of ``x x'``, f32 ``[*stack, d, d]`` each.
      input_numbers: which of ``covariances`` each product into the units has.
      recall: what was asked for.
    """

    kind: str
    path: str
    weights: tuple[str, ...]
    width: int
    units: int
    stack: tuple[int, ...]
    group_size: int
    predictor: PredictorSpec
    criterion: str
    tokens: np.ndarray
    wanted: np.ndarray
    fired: np.ndarray | None
    energy: np.ndarray | None
    wanted_energy: np.ndarray | None
    covariances: tuple[np.ndarray, ...]
    input_numbers: tuple[int, ...]
    recall: float

    @cached_property
    def inputs(self) -> tuple[Inputs, ...]:
        """The inputs of each product into the units."""
        made = [Inputs(_digest(c), c) for c in self.covariances]
        return tuple(made[i] for i in self.input_numbers)

    @cached_property
    def _curve(self) -> np.ndarray:
        """Recall of the first k positions, ``[*stack, units / g]``; one where there is nothing to find."""
        counted = self.wanted_energy if self.criterion == "energy" else self.wanted
        assert counted is not None
        sums = np.cumsum(counted.astype(np.float64), axis=-1)
        total = sums[..., -1:]
        return np.where(total > 0, sums / np.where(total > 0, total, 1), 1.0)

    def recall_at(self, size: int) -> np.ndarray:
        """Measured recall of so many candidates (or groups of units), ``[*stack]``."""
        return self._curve[..., min(size, self._curve.shape[-1]) - 1]

    def energy_at(self, size: int) -> np.ndarray:
        """Share of a block's energy in the units chosen, were so many groups chosen, ``[*stack]``."""
        if self.wanted_energy is None:
            raise ValueError(f"{self.path} is a vocabulary projection; energy is that of feed-forward blocks")
        total = self.wanted_energy.sum(axis=-1)
        found = self.wanted_energy[..., :size].sum(axis=-1)
        return np.where(total > 0, found / np.where(total > 0, total, 1), 1.0)

    @property
    def firing_rate(self) -> np.ndarray | None:
        """Share of tokens at which each unit is not zero, ``[*stack, m]``; None for a vocabulary."""
        return None if self.fired is None else self.fired / np.maximum(self.tokens, 1)[..., None]

    @property
    def sizes(self) -> np.ndarray:
        """For each layer the fewest candidates (or groups) whose recall was the one asked for, int ``[*stack]``."""
        return 1 + np.argmax(self._curve >= self.recall - 1e-12, axis=-1)

    def size(self, settings: Vocab | Ffn) -> tuple[int | None, str]:
        """The size these settings should have: the largest of all layers; None if they were not measured, and why."""
        if settings.predictor != self.predictor:
            return None, f"not calibrated with this predictor but with {self.predictor}; its size is the default"
        if isinstance(settings, Ffn) and settings.group_size != self.group_size:
            return None, f"not calibrated with these groups but with groups of {self.group_size}; its size is default"
        tokens = int(self.tokens.min())
        if not tokens:
            return None, "no token of the calibration reached it; its size is the default"
        size = int(self.sizes.max())
        what = "candidate" if self.kind == "vocab" else "unit" if self.group_size == 1 else "group"
        sized = f"{size:,} {what}{'s' * (size > 1)}"
        return size, f"calibrated: {sized} for recall {self.recall:g} ({self.criterion}), {tokens:,} tokens"


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """What ``hx.calibrate`` measured. Pass it to ``hx.sparsify(fun, calibration=...)``.

    Attributes:
      sites: what was measured of each site, by path.
      recall: what was asked for.
      batches: batches that were measured.
    """

    sites: Mapping[str, SiteCalibration]
    recall: float
    batches: int

    def __repr__(self) -> str:
        """A one-line summary."""
        tokens = max((int(s.tokens.max()) for s in self.sites.values()), default=0)
        return f"Calibration({len(self.sites)} sites, recall {self.recall:g}, {tokens:,} tokens)"

    def __str__(self) -> str:
        """The table."""
        return self.table()

    def table(self) -> str:
        """Each site, and each layer of it, as a line of text."""
        head = ("site", "kind", "layer", "tokens", "size", "of", "recall", "fires", "predictor")
        lines = [head]
        for site in self.sites.values():
            rate = site.firing_rate
            for layer in np.ndindex(*site.stack):
                size = int(site.sizes[layer])
                fires = "" if rate is None else f"{rate[layer].mean():.1%}"
                numbers = f"{int(site.tokens[layer]):,}", f"{size:,}", f"{site.units // site.group_size:,}"
                name = ".".join(map(str, layer)) or "-"
                recall = f"{float(site.recall_at(size)[layer]):.4f}"
                lines.append((site.path, site.kind, name, *numbers, recall, fires, repr(site.predictor)))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as one safetensors file; one of that name is replaced in one move."""
        from hire_xform.calibration_file import write

        write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Reads what ``save`` wrote.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is no calibration, is damaged, or of another version; the message says which.
        """
        from hire_xform.calibration_file import read

        return read(path)

    def measure(self, matches: Sequence[VocabMatch | FfnMatch], name_of: Callable[[Any], str]) -> Measure:
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


def _shape(match: VocabMatch | FfnMatch) -> tuple[Any, ...]:
    if isinstance(match, VocabMatch):
        return "vocab", match.product.contracted, match.product.width, site_stack(match)
    return "ffn", match.region.ups[0].product.contracted, match.units, site_stack(match)


def _shape_of(site: SiteCalibration) -> tuple[Any, ...]:
    return site.kind, site.width, site.units, site.stack


def _told(shape: tuple[Any, ...]) -> str:
    stack = f", stacked {'x'.join(map(str, shape[3]))}" if shape[3] else ""
    return f"{shape[1]} inputs and {shape[2]} {'rows' if shape[0] == 'vocab' else 'units'}{stack}"


def _bare(names: Sequence[str]) -> tuple[str, ...]:
    """Names of weights without that of the argument, which another function may call otherwise."""
    starts = [min((n.index(c) for c in "[." if c in n), default=len(n)) for n in names]
    return tuple(n if n.startswith("closed-over") else n[at:] for n, at in zip(names, starts, strict=True))


def _digest(array: np.ndarray) -> str:
    content = hashlib.sha256(np.ascontiguousarray(array).tobytes())
    content.update(repr((array.shape, array.dtype.name)).encode())
    return content.hexdigest()[:32]
