"""What was measured of one site, and what was chosen for it: ``SiteCalibration``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from hire_xform.calibration.curve import Curve, share_by
from hire_xform.lowering.predict.predictors import Predictor
from hire_xform.passes.plan.forms import Inputs, Order
from hire_xform.passes.plan.ladder import ladder_of
from hire_xform.passes.plan.measurement import Chosen
from hire_xform.passes.plan.settings import Settings, SizedSettings

# Share of the tokens that a certified site's largest size is to prove, at least. What it does not prove reads all rows,
# and few tokens take it. Text unlike that of the calibration needs more of a head, several times as often.
PROVED = {"ffn": 0.999, "vocab": 0.9999}


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
      criterion: what recall counts. "argmax": tokens whose dense arg max is among the candidates. "units": units that
        are not zero and are chosen. "energy": the share of energy of the units chosen.
        "proved" and of what, of a certified site: tokens that so many candidates, or units, prove.
      tokens: int64 ``[*stack]``.
      fired: int64 ``[*stack, m]``, tokens at which a unit is not zero; None for a vocabulary.
      energy: f64 ``[*stack, m]``, sum of the squares of activation times norm of the down row; None for a vocabulary.
      covariances: mean of ``x x'``, f32 ``[*stack, d, d]`` each.
      input_numbers: which of ``covariances`` each product into the units has.
      touched: share of groups of units that hold one that fires, ``[*stack, 2]``: of neighbours as they are, and of
        groups of units that fire together; None where units are not grouped.
      order: int32 ``[*stack, m]``, for each place the unit, in which these are neighbours; None likewise.
      often: int32 ``[*stack, m]``, the units by how often they fire, those that do most first; None where none may be
        always computed.
      curves: what was measured of each predictor.
      row_bytes: bytes that one token reads of one candidate (or group of units) that is computed exactly.
      predictor: the one that was chosen.
      sizes: candidates (or groups of units) of each layer that were chosen, int64 ``[*stack]``; of a certified site the
        largest of several, of which the others follow from its curve.
      static: how many of a block's units, among ``sizes``, are always computed: the first of ``often``.
      target: what they were chosen for, such as "recall 0.99"; with recall, any predictor measured has a size.
      recall: the recall that was asked for; None where it was something else.
      head_kl: with a recall, the largest KL divergence, in nats a token, of the logits of an uncertified head; None
        for any.
      fill: of a head, what stood for the logits of no candidate when it was measured; empty for a block.
    """

    kind: str
    path: str
    weights: tuple[str, ...]
    width: int
    units: int
    stack: tuple[int, ...]
    group_size: int
    criterion: str
    tokens: np.ndarray
    fired: np.ndarray | None
    energy: np.ndarray | None
    covariances: tuple[np.ndarray, ...]
    input_numbers: tuple[int, ...]
    touched: np.ndarray | None
    order: np.ndarray | None
    often: np.ndarray | None
    curves: Mapping[Predictor, Curve]
    row_bytes: int
    predictor: Predictor
    sizes: np.ndarray
    target: str
    recall: float | None
    head_kl: float | None = None
    fill: str = ""
    static: int = 0

    @cached_property
    def inputs(self) -> tuple[Inputs, ...]:
        """The inputs of each product into the units."""
        made = [Inputs(_digest(c), c) for c in self.covariances]
        return tuple(made[i] for i in self.input_numbers)

    @cached_property
    def _order(self) -> Order | None:
        if self.order is None or self.touched is None:
            return None
        before, after = np.reshape(self.touched, (-1, 2)).mean(axis=0)
        how = (
            f"units that fire together are neighbours, so that a token touches {after:.1%} of groups, not {before:.1%}"
        )
        return Order(_digest(self.order), self.order, how)

    def order_for(self, settings: Settings) -> Order | None:
        """The order in which the units of groups of this size are neighbours; None for that they have."""
        return self._order if settings.group_size == self.group_size else None

    @property
    def by_rate(self) -> np.ndarray | None:
        """The units by how often they fire, as they were measured or will be; None for a vocabulary."""
        if self.often is not None or self.fired is None:
            return self.often
        return np.argsort(-self.fired, axis=-1, kind="stable").astype(np.int32)

    def static_sets(self) -> tuple[Order | None, tuple[int, ...]]:
        """The order of a block's units by how often they fire, and how many of the first may be always computed.

        So many fire at each of a few rates at least, in every layer.
        """
        rate, often = self.firing_rate, self.by_rate
        if rate is None or often is None or not self.tokens.min():
            return None, ()
        most = [int(np.sum(rate >= at, axis=-1).min()) for at in STATIC_RATES]
        counts = {c for c in most if self.units * STATIC_SHARE <= c < self.units}
        how = f"besides, the {self.static:,} units that fire most are always computed and never predicted"
        return Order(_digest(often), often, how), tuple(sorted(counts))

    def curve(self, predictor: Predictor | None = None) -> Curve:
        """What was measured of a predictor; None is the one that was chosen.

        Raises:
          ValueError: it was not measured.
        """
        predictor = self.predictor if predictor is None else predictor
        if predictor not in self.curves:
            raise ValueError(f"{self.path}: {predictor} was not measured; expected one of {list(self.curves)}")
        return self.curves[predictor]

    def _recall(self, predictor: Predictor | None) -> np.ndarray:
        curve = self.curve(predictor)
        if self.static in curve.static:
            return share_by(curve.static[self.static][0])
        return curve.found_energy if self.criterion == "energy" else curve.found

    def recall_at(self, size: int, predictor: Predictor | None = None) -> np.ndarray:
        """Measured recall of so many candidates (or groups of units), ``[*stack]``."""
        recall = self._recall(predictor)
        return recall[..., min(size, recall.shape[-1]) - 1]

    def energy_at(self, size: int, predictor: Predictor | None = None) -> np.ndarray:
        """Share of a block's energy in the units chosen, were so many groups chosen, ``[*stack]``."""
        if self.kind == "vocab":
            raise ValueError(f"{self.path} is a vocabulary projection; energy is that of feed-forward blocks")
        found = self.curve(predictor).found_energy
        return found[..., min(size, found.shape[-1]) - 1]

    def kl_at(self, size: int, predictor: Predictor | None = None) -> np.ndarray:
        """KL divergence of so many candidates and predicted others from the dense logits, nats a token, ``[*stack]``.

        Beyond the sizes it was measured for, that of the largest of them, which is more.
        """
        kl = self.curve(predictor).kl
        if kl is None:
            raise ValueError(
                f"{self.path} is a feed-forward block; the KL divergence is that of vocabulary projections"
            )
        total = kl[..., min(size, kl.shape[-1]) - 1] if size < self.units else np.zeros(self.stack)
        return np.asarray(total / np.maximum(self.tokens, 1))

    def bytes_at(self, size: int, predictor: Predictor | None = None) -> int:
        """Weight bytes that one token reads of one layer with so many candidates (or groups of units)."""
        curve = self.curve(predictor)
        read = curve.static[self.static][1] if self.static in curve.static else curve.predictor_bytes
        return read + size * self.row_bytes

    @property
    def firing_rate(self) -> np.ndarray | None:
        """Share of tokens at which each unit is not zero, ``[*stack, m]``; None for a vocabulary."""
        return None if self.fired is None else self.fired / np.maximum(self.tokens, 1)[..., None]

    def sizes_for(self, recall: float, predictor: Predictor | None = None) -> np.ndarray:
        """For each layer the fewest candidates (or groups) that reach a recall, int ``[*stack]``.

        Of a certified block a recall of the tokens that fewer than all of them prove: the others run dense whatever the
        size.
        """
        found = self._recall(predictor)
        wanted = np.full((*found.shape[:-1], 1), recall)
        if self._proved and self.kind == "ffn" and found.shape[-1] > 1:
            provable = found[..., -2:-1]
            wanted = np.where(provable > 0, recall * provable, 1.0)
        return 1 + np.argmax(found >= wanted - 1e-12, axis=-1)

    def chosen_for(self, recall: float, head_kl: float | None = None, static: bool = True) -> SiteCalibration:
        """With the predictor and sizes that reach a recall at the fewest bytes; of equals the first measured.

        Args:
          recall: the recall.
          head_kl: the largest KL divergence, in nats a token, of the logits of an uncertified head; None for any. Where
            no predictor measured is within it, recall alone decides, and ``beyond_head_kl`` is true of the result.
          static: whether some units may be always computed.
        """
        if self.static:
            return replace(self, static=0).chosen_for(recall, head_kl, static)
        if self._proved:
            recall = max(recall, PROVED[self.kind])
        limit = None if self.kind == "ffn" or self._proved else head_kl
        asked = replace(self, recall=recall, head_kl=limit)
        return asked._chosen(static)

    def _chosen(self, static: bool) -> SiteCalibration:
        """With the predictor and sizes of fewest bytes for what is asked for."""
        recall = self.recall
        assert recall is not None
        found: dict[tuple[Predictor, int], tuple[np.ndarray, float]] = {}
        for predictor, curve in self.curves.items():
            sizes, rows = self._sized_for(predictor)
            found[predictor, 0] = sizes, curve.predictor_bytes + rows
            for count, (wanted, predicted) in curve.static.items() if static else ():
                # At least one of the others.
                sizes = np.maximum(1 + np.argmax(share_by(wanted) >= recall - 1e-12, axis=-1), count + 1)
                found[predictor, count] = sizes, predicted + self.row_bytes * float(sizes.mean())

        def cost(way: tuple[Predictor, int]) -> tuple[bool, float]:
            sizes, read = found[way]
            return self._beyond(sizes, way[0]), read

        plain = min((way for way in found if not way[1]), key=cost)
        best = min(found, key=cost)
        if found[best][1] > (1.0 - STATIC_WORTH) * found[plain][1]:
            best = plain
        limit = "" if self.head_kl is None else f", at most {self.head_kl:g} nats"
        target = f"recall {recall:g} ({self.criterion}{limit})"
        return replace(self, predictor=best[0], sizes=found[best][0], target=target, static=best[1])

    @property
    def beyond_head_kl(self) -> bool:
        """True of a head whose logits, at the sizes chosen, are further from the dense ones than was asked for."""
        return self._beyond(self.sizes, self.predictor)

    def _beyond(self, sizes: np.ndarray, predictor: Predictor) -> bool:
        if self.head_kl is None:
            return False
        return any(self.kl_at(int(sizes[i]), predictor)[i] > self.head_kl for i in np.ndindex(*self.stack))

    def _within_head_kl(self, sizes: np.ndarray, predictor: Predictor) -> np.ndarray:
        """The least sizes from these on whose logits are within ``head_kl``; these where none that was measured is."""
        kl = self.curve(predictor).kl
        if self.head_kl is None or kl is None:
            return sizes
        enough = kl <= self.head_kl * np.maximum(self.tokens, 1)[..., None]
        enough &= np.arange(1, kl.shape[-1] + 1) >= sizes[..., None]
        return np.where(enough.any(axis=-1), 1 + np.argmax(enough, axis=-1), sizes)

    def _sized_for(self, predictor: Predictor) -> tuple[np.ndarray, float]:
        """For each layer the size that is asked for, and the mean bytes of rows that one token reads.

        Of a certified site the largest of its sizes, which is that at least, and what it is expected to read.
        """
        assert self.recall is not None
        sizes = self._within_head_kl(np.asarray(self.sizes_for(self.recall, predictor), np.int64), predictor)
        if not self._proved or not self.tokens.min():
            return sizes, self.row_bytes * float(sizes.mean())
        curve, read = self.curves[predictor], np.zeros(self.stack)
        for layer in np.ndindex(*self.stack):
            ladder = ladder_of(
                curve.wanted[layer],
                lambda count: count * self.row_bytes,
                self.units // self.group_size * self.row_bytes,
                tried=self.kind == "vocab",
                fixed=curve.predictor_bytes,
                least=int(sizes[layer]),
            )
            sizes[layer], read[layer] = ladder.counts[-1], ladder.read
        return sizes, float(read.mean())

    def advise(self, settings: SizedSettings, static: bool) -> Chosen:
        """What these settings should have where they state nothing; the size is the largest of all layers'.

        Args:
          settings: what is stated.
          static: whether some units may be always computed.
        """
        stated = getattr(settings, settings.size_name)
        own = stated is None and settings.predictor in (None, self.predictor)
        if self.static and not (static and own):
            return replace(self, static=0)._chosen(static=False).advise(settings, False)
        if settings.group_size != self.group_size:
            how = f"not calibrated with these groups but with groups of {self.group_size}; its size is the default"
            return Chosen(None, None, how)
        if (proved_criterion(settings) if settings.certify else "") != self._proved:
            how = (
                f"calibrated {self._proved or 'uncertified'}, which is not what was asked for; its size is the default"
            )
            return Chosen(None, None, how)
        tokens = int(self.tokens.min())
        if not tokens:
            return Chosen(None, None, "no token of the calibration reached it; its size is the default")
        if stated is not None:
            predictor = settings.predictor or self._best_at(settings.size_in(self.units))
            # A block is the same with fewer units where they will do; logits that are asked for are computed.
            needs = self._needs(predictor) if self.kind == "ffn" else None
            return Chosen(predictor, None, f"calibrated, but {settings.size_name}={stated} is given", needs=needs)
        predictor = settings.predictor or self.predictor
        # One that was measured knows what its stages read.
        predictor = next((known for known in self.curves if known == predictor), predictor)
        if predictor == self.predictor:
            sizes = self.sizes - self.static
        elif predictor in self.curves and self.recall is not None:
            sizes = self._sized_for(predictor)[0]
        else:
            for_that = f" for {self.target}" if predictor in self.curves else ""
            how = f"not calibrated with this predictor{for_that} but with {self.predictor}; its size is the default"
            return Chosen(None, None, how)
        size = int(sizes.max())
        what = "candidate" if self.kind == "vocab" else "unit" if self.group_size == 1 else "group"
        sized = f"{size:,} {what}{'s' * (size > 1)}"
        how = f"calibrated: {sized} for {self.target}, {tokens:,} tokens"
        if settings.fill != self.fill and self.head_kl is not None:
            how += f"; nats of fill={self.fill!r}, with which it was measured"
        if self._beyond(sizes, predictor):
            how += f"; its logits are {self.kl_at(size, predictor).max():.2g} nats a token from the dense ones"
        return Chosen(predictor, size, how, sizes if self.stack else None, self._needs(predictor), self.static)

    def alternatives(self, settings: SizedSettings) -> Sequence[Predictor]:
        """The predictors that do what was asked for at some size, of which the planner takes the fastest.

        None where only the one that was chosen has a size: those found for a cost were weighed all together.

        Args:
          settings: what is stated, without a predictor.
        """
        criterion = proved_criterion(settings) if settings.certify else ""
        if settings.group_size != self.group_size or criterion != self._proved or not self.tokens.min():
            return ()
        stated = getattr(settings, settings.size_name)
        if stated is not None:
            return self._enough_at(settings.size_in(self.units))
        if self.recall is None:
            return ()
        within = [p for p in self.curves if not self._beyond(self._sized_for(p)[0], p)]
        return within or (self.predictor,)

    def _needs(self, predictor: Predictor) -> np.ndarray | None:
        """How many tokens need 1, 2, ... rows (or groups) of a certified site, ``[*stack, n]``, where that is known."""
        return self.curves[predictor].wanted if self._proved and predictor in self.curves else None

    @property
    def least_tokens(self) -> int:
        """Tokens that reached it; of several layers the fewest."""
        return int(self.tokens.min())

    @property
    def certified(self) -> bool:
        """Whether it was measured as a certified site."""
        return bool(self._proved)

    @property
    def _proved(self) -> str:
        return self.criterion if self.criterion.startswith("proved") else ""

    def _best_at(self, size: int) -> Predictor:
        """For a size that is given: the fewest bytes of those that do what is asked for, or else the highest recall."""
        enough = self._enough_at(size)
        if enough:
            return min(enough, key=lambda p: self.curves[p].predictor_bytes)
        return max(self.curves, key=lambda p: float(self.recall_at(size, p).min()))

    def _enough_at(self, size: int) -> list[Predictor]:
        """The predictors that do what is asked for with a size that is given."""
        if self.recall is None:
            return []
        enough = [p for p in self.curves if float(self.recall_at(size, p).min()) >= self.recall]
        return [p for p in enough if not self._beyond(np.full(self.stack, size), p)] or enough


# Rates of firing at which units are tried as always computed, the share of the units that they must be at least, and of
# what a token reads that they must save.
STATIC_RATES, STATIC_SHARE, STATIC_WORTH = (0.99, 0.95, 0.9, 0.8), 1 / 32, 0.02


def proved_criterion(settings: Settings) -> str:
    """What is counted of a certified site."""
    within = getattr(settings, "logprobs", None)
    if within is not None:
        return f"proved, logprobs={within:g}"
    return "proved" if settings.certify is True else f"proved {settings.certify!r}"


def _digest(array: np.ndarray) -> str:
    content = hashlib.sha256(np.ascontiguousarray(array).tobytes())
    content.update(repr((array.shape, array.dtype.name)).encode())
    return content.hexdigest()[:32]
