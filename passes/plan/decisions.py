"""What a plan says: sites, refusals, and what the rewriting of each site takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import jax

from hire_xform.passes.ir.graph import Node
from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.match.matches import Match
from hire_xform.passes.plan.forms import ROWS, Form
from hire_xform.passes.plan.levels import Levels
from hire_xform.passes.plan.placement import Placement
from hire_xform.passes.plan.profile import Profile
from hire_xform.passes.plan.settings import Settings
from hire_xform.passes.plan.slots import SiteForms
from hire_xform.passes.prove.what_to_prove import NOTHING_READ, Reads
from hire_xform.passes.weights.origins import Ref
from hire_xform.passes.weights.recipe import Recipe, Root


@dataclass(frozen=True)
class Rung:
    """A size that a certified site may take, as each input needs; the last of a site's is its dense form.

    Those of a head in stages begin with a row of each stage after the first, of which each execution reads as many as
    are open.

    Attributes:
      computed: rows computed exactly per execution; of a stage none.
      bytes: weight bytes that one execution reads, of the predictor and of all that is tried before included, but not
        those of further stages; of such a stage what one row takes.
      share: of the executions, how many are expected to take it by the calibration, tokens of one execution taken as
        independent; None without a calibration. Of a stage how many rows an execution is expected to read.
      stage: the predictor, of a stage; else empty.
    """

    computed: int
    bytes: int
    share: float | None = None
    stage: str = ""


@dataclass(frozen=True)
class Site:
    """A place that is rewritten.

    Attributes:
      kind: "ffn", "vocab" or "dense".
      path: the equation whose result is replaced, such as ``scan[0]/dot_general[3]``.
      source: the user's ``file:line (function)``.
      tokens: rows of the activation, T.
      dense_bytes: weight bytes the dense form reads per call, as they are stored; inside a scan, over all its
        iterations.
      sparse_bytes: weight bytes the rewritten form reads per call. Of a certified site with a calibration what it is
        expected to, dense runs included; without one, what its largest size does.
      settings: the ``Vocab``, ``Ffn`` or ``Dense`` that was used.
      weights: names of the weights, in the order of the products.
      inputs: columns of the (first) weight, d.
      units: rows to choose from: the vocabulary V or the hidden width m; of kind "dense" the outputs.
      computed: rows computed exactly per call: for one shared set its size, else the sum over tokens; 0 of kind
        "dense", whose results are all predicted.
      shared: True when all tokens share one set of rows.
      activation: the pointwise operations between the products of an FFN.
      own: the model's own choice of units, such as "top 512"; empty when it makes none.
      forced: True when a rule overrode the cost model.
      calibrated: what a calibration says of its size; empty without one.
      shards: over how many devices its units are split; each reads, and picks from, its own.
      placed: the mesh axes of those devices, for reports; empty without any. Where ``shards`` is 1 those that its
        tokens are split over.
      rows: of a sharded vocabulary, how its rows are distributed over devices, and why.
      rungs: of a certified site the sizes that it may take, ``computed`` being the largest, and last its dense form; of
        layers with sizes of their own those of each, one after the other. Before them stand the further stages of a
        head that has some. ``Sparsified.with_rungs`` counts them.
      static: hidden units that are always computed and never predicted; ``computed`` has them.
      derivative: which derivative it has where a custom_jvp or custom_vjp is in or around it; empty where none is.
      evidence: of a vocabulary, why its outputs are taken for logits.
      proved: of a certified vocabulary, what is proved of its readers.
      unproved: its readers of which nothing is proved.
      widened: True where the dense product has weights that are stored narrower widened whole first, at every call, or
        takes as long.
      stages: of a certified vocabulary whose predictor has several, what each reads.
      stored: how its weights are stored, where that is in few bits, such as "int8 times float32 per row".
      dense_seconds: what the dense form is predicted to take per call, by the plan's profile; inside a scan, over all
        its iterations.
      sparse_seconds: the same of the rewritten form; of a certified site as ``sparse_bytes`` says.
    """

    kind: str
    path: str
    source: str
    tokens: int
    dense_bytes: int
    sparse_bytes: int
    settings: Settings
    weights: tuple[str, ...]
    inputs: int
    units: int
    computed: int
    shared: bool
    activation: str = ""
    own: str = ""
    forced: bool = False
    calibrated: str = ""
    shards: int = 1
    placed: str = ""
    rows: str = ""
    rungs: tuple[Rung, ...] = ()
    static: int = 0
    derivative: str = ""
    evidence: str = ""
    proved: tuple[str, ...] = ()
    unproved: tuple[str, ...] = ()
    widened: bool = False
    stages: str = ""
    stored: str = ""
    dense_seconds: float = 0.0
    sparse_seconds: float = 0.0

    @property
    def sizes(self) -> tuple[Rung, ...]:
        """Its ``rungs`` that are sizes, and last the dense form: without the stages before them."""
        return tuple(rung for rung in self.rungs if not rung.stage)


@dataclass(frozen=True)
class Refusal:
    """A weight product that stays dense, and why.

    Attributes:
      path: the equation's path.
      source: the user's ``file:line (function)``.
      reason: one sentence.
      kind: "ffn" or "vocab" when it is one; "" when it is neither.
      dense_bytes: weight bytes read per call.
      weights: names of its weights.
    """

    path: str
    source: str
    reason: str
    kind: str = ""
    dense_bytes: int = 0
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class PackKey:
    """One packed form of one weight. One of no rows has an entry for each layer of the weight, if for anything."""

    recipe: Recipe
    form: Form

    @property
    def is_rows(self) -> bool:
        """Whether it is the weight's rows as they are."""
        return self.form == ROWS

    @property
    def is_leaf(self) -> bool:
        """Whether it is rows that lie in the leaf as they are: there is nothing to pack."""
        return self.is_rows and self.recipe.is_leaf

    @cached_property
    def anywhere(self) -> PackKey:
        """The same of a leaf of any argument: what is packed does not hang on where weights are passed."""
        return PackKey(self.recipe.from_roots(Root.anywhere), self.form)


@dataclass(frozen=True, eq=False, repr=False)
class Need:
    """A packed form as one site reads it: the key, and what resolves its stack axes at run time."""

    key: PackKey
    refs: tuple[Ref, ...]


def with_keys(forms: SiteForms[Need], change: Callable[[PackKey], PackKey]) -> SiteForms[Need]:
    """The same forms with other keys."""
    changed: SiteForms[Need] = jax.tree.map(lambda need: Need(change(need.key), need.refs), forms)
    return changed


@dataclass(frozen=True, eq=False, repr=False)
class Decision:
    """A match that is rewritten, with all it takes.

    Attributes:
      match: the match.
      site: its public description.
      settings: its settings.
      count: rows (vocabulary) or groups (FFN) each token may have; of a sharded site, on each device. 0 of a site that
        chooses none.
      forms: the packed forms that it reads, by name.
      input_bits: significant bits that a certified product's dense form keeps of its inputs.
      placement: where it runs, when its weights are over several devices.
      levels: the counts of layers that have their own, of which ``forms.level`` says which. ``count`` is the largest.
      cyclic: of a sharded vocabulary, what becomes of its rows' cyclic distribution over devices. ``"kept"``: logits
        stay in it, and all that reads them minds it. ``"candidates"``, ``"logits"``: these are sent back to where their
        rows lay. Empty where rows are contiguous blocks.
      smaller: of a certified site, fewer than ``count``, ascending: the smallest that will do is taken.
      static: units that are always computed, the first that are packed; ``count`` is of the others.
      reads: of a vocabulary, what reads its logits: what is proved, or what candidates are chosen by.
    """

    match: Match
    site: Site
    settings: Settings
    count: int
    forms: SiteForms[Need]
    input_bits: int = 24
    placement: Placement | None = None
    levels: Levels | None = None
    cyclic: Literal["", "kept", "candidates", "logits"] = ""
    smaller: tuple[int, ...] = ()
    static: int = 0
    reads: Reads = NOTHING_READ

    @cached_property
    def needs(self) -> tuple[Need, ...]:
        """All packed forms that it reads, in the order of their slots."""
        return tuple(jax.tree.leaves(self.forms))

    @property
    def rows(self) -> PackKey:
        """The rows of its (first) product."""
        return self.forms.up[0].rows.key

    @property
    def rungs(self) -> tuple[int, ...]:
        """All sizes that a certified site may take, those of each level one after the other."""
        if self.levels is not None:
            return tuple(count for ladder in self.levels.ladders for count in ladder)
        return (*self.smaller, self.count)

    @property
    def may_be_short(self) -> bool:
        """Whether it is a block that may have more units that are not zero than it computes, which each call tells.

        Where its user wants units left out whatever they are, or its model itself chooses among them, none is missed.
        """
        return kind_of(self.match).may_be_short(self.match, self.settings)

    @property
    def marks(self) -> int:
        """How many outcomes a call of it tells besides the worst: 0 where it tells none.

        A certified site tells its size, or that it ran dense; a block that may be short whether it was.
        """
        return len(self.rungs) if self.settings.certify else int(self.may_be_short)

    @property
    def node(self) -> Node:
        """The equation whose result is replaced."""
        return self.match.node


@dataclass(frozen=True)
class Plan:
    """What is rewritten (``sites``) and what is not (``refusals``), each in program order.

    ``unmatched_rules`` are the path patterns of rules that match no block and no vocabulary projection. ``profile`` is
    that of the machine that times are predicted for; None where none are.
    """

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    platform: str
    decisions: tuple[Decision, ...] = field(default=(), repr=False, compare=False)
    unmatched_rules: tuple[str, ...] = ()
    profile: Profile | None = field(default=None, repr=False, compare=False)

    @property
    def dense_seconds(self) -> float:
        """What all sites are predicted to take in a call, dense."""
        return sum(s.dense_seconds for s in self.sites)

    @property
    def sparse_seconds(self) -> float:
        """What all sites are predicted to take in a call, rewritten."""
        return sum(s.sparse_seconds for s in self.sites)

    @property
    def dense_bytes(self) -> int:
        """Weight bytes of all sites, dense."""
        return sum(s.dense_bytes for s in self.sites)

    @property
    def sparse_bytes(self) -> int:
        """Weight bytes of all sites, rewritten."""
        return sum(s.sparse_bytes for s in self.sites)

    @property
    def refused_bytes(self) -> int:
        """Weight bytes of all products that stay dense."""
        return sum(r.dense_bytes for r in self.refusals)

    def to_json(self, indent: int | None = 2) -> str:
        """The plan as JSON: ``{"platform", "profile", "sites": [...], "refusals": [...], "unmatched_rules": [...]}``.

        The profile is that of the machine: its name, and whether it was measured.
        """
        sites = []
        for site in self.sites:
            entry = asdict(replace(site, settings=replace(site.settings, predictor=None)))
            entry["settings"] = {**entry.pop("settings"), "predictor": repr(site.settings.spec)}
            sites.append(entry)
        profile = None if self.profile is None else {"name": self.profile.name, "source": self.profile.source}
        found: dict[str, Any] = {"platform": self.platform, "profile": profile, "sites": sites}
        found["refusals"] = [asdict(r) for r in self.refusals]
        found["unmatched_rules"] = list(self.unmatched_rules)
        return json.dumps(found, indent=indent)
