"""Decides by bytes which matches are rewritten, and says why the others stay dense."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hire_xform.lowering import choose, ffn_bytes, moments_bytes, predictor_bytes, proof_bytes, vocab_bytes
from hire_xform.passes.certify import ALL_BITS, input_bits, not_certifiable
from hire_xform.passes.detect import Detection, FfnMatch, VocabMatch, up_rows, vocab_rows
from hire_xform.passes.forms import Proving, down_forms, up_forms, vocab_forms
from hire_xform.passes.levels import WORTH, Levels, levels_of, told
from hire_xform.passes.measured import (
    Chosen,
    Fitted,
    Inputs,
    Measure,
    Measurement,
    Order,
    Regrouped,
    takes_inputs,
    unmeasured,
    with_choices,
)
from hire_xform.passes.parts import is_cut, parts_of_rows
from hire_xform.passes.provenance import Origin, Recipe, Ref, Root, Stack
from hire_xform.passes.settings import Choice, Ffn, Vocab
from hire_xform.passes.shards import Placement, in_parts
from hire_xform.passes.walk import Node

# A row read out of order costs this many times what it costs in a streamed product. Measured by
# `benchmarks/kernels.py` on a CPU; accelerators read rows of a kilobyte or more about as fast as anything else.
ROW_COST = {"cpu": 1.5}
# What predicting and selecting costs besides reading, as the bytes a dense product would read in that time.
FIXED_BYTES = {"cpu": 1 << 20, "gpu": 4 << 20, "tpu": 4 << 20}


@dataclass(frozen=True)
class Site:
    """A place that is rewritten.

    Attributes:
      kind: "ffn" or "vocab".
      path: the equation whose result is replaced, such as ``scan[0]/dot_general[3]``.
      source: the user's ``file:line (function)``.
      tokens: rows of the activation, T.
      dense_bytes: weight bytes the dense form reads per call; inside a scan, over all its iterations.
      sparse_bytes: weight bytes the rewritten form reads per call.
      settings: the ``Vocab`` or ``Ffn`` that was used.
      weights: names of the weights, in the order of the products.
      inputs: columns of the (first) weight, d.
      units: rows to choose from: the vocabulary V or the hidden width m.
      computed: rows computed exactly per call: for one shared set its size, else the sum over tokens.
      shared: True when all tokens share one set of rows.
      activation: the pointwise operations between the products of an FFN.
      own: the model's own choice of units, such as "top 512"; empty when it makes none.
      forced: True when a rule overrode the cost model.
      calibrated: what a calibration says of its size; empty without one.
      shards: over how many devices its units are split; each reads, and picks from, its own.
      placed: the mesh axes of those devices, for reports; empty without any.
    """

    kind: str
    path: str
    source: str
    tokens: int
    dense_bytes: int
    sparse_bytes: int
    settings: Vocab | Ffn
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
    """One packed form of one weight.

    ``"rows"``, the ``"norms"`` of its rows, the ``"largest"`` of them, their ``"moments"``, for a predictor spec its
    arrays, for ``Proving`` also how far they can be from the rows, and for ``Fitted`` either, fitted to its inputs.
    ``Regrouped`` is any of these in another order. ``Levels`` is of no weight, but has an entry for each layer of it.
    """

    recipe: Recipe
    form: Any


@dataclass(frozen=True, eq=False, repr=False)
class Need:
    """A packed form as one site reads it: the key, and what resolves its stack axes at run time."""

    key: PackKey
    refs: tuple[Ref, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Decision:
    """A match that is rewritten, with all it takes.

    Attributes:
      match: the match.
      site: its public description.
      settings: its settings.
      count: rows (vocabulary) or groups (FFN) each token may have; of a sharded site, on each device.
      needs: packed forms, as ``passes/forms.py`` orders them: of each product into the units, then of the contracting
        one; of a vocabulary projection those of its one.
      input_bits: significant bits that a certified product's dense form keeps of its inputs.
      placement: where it runs, when its weights are over several devices.
      levels: the counts of layers that have their own; the last of ``needs`` says which. ``count`` is the largest.
    """

    match: VocabMatch | FfnMatch
    site: Site
    settings: Vocab | Ffn
    count: int
    needs: tuple[Need, ...]
    input_bits: int = 24
    placement: Placement | None = None
    levels: Levels | None = None

    @property
    def node(self) -> Node:
        """The equation whose result is replaced."""
        return self.match.node


@dataclass(frozen=True)
class Plan:
    """What is rewritten (``sites``) and what is not (``refusals``), each in program order.

    ``unmatched_rules`` are the path patterns of rules that match no block and no vocabulary projection.
    """

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    platform: str
    decisions: tuple[Decision, ...] = field(default=(), repr=False, compare=False)
    unmatched_rules: tuple[str, ...] = ()

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
        """The plan as JSON: ``{"platform", "sites": [...], "refusals": [...], "unmatched_rules": [...]}``."""
        sites = []
        for site in self.sites:
            entry = {k: v for k, v in asdict(site).items() if k != "settings"}
            entry["settings"] = {**asdict(site.settings), "predictor": repr(site.settings.spec)}
            sites.append(entry)
        found = {"platform": self.platform, "sites": sites, "refusals": [asdict(r) for r in self.refusals]}
        found["unmatched_rules"] = list(self.unmatched_rules)
        return json.dumps(found, indent=indent)


def make_plan(
    detection: Detection,
    choose_settings: Callable[[str, str], Choice],
    platform: str,
    name_of: Callable[[Root], str],
    measure: Measure = lambda match, names: None,
    placed: Callable[[VocabMatch | FfnMatch], Placement | str | None] = lambda match: None,
) -> Plan:
    """Turns matches into decisions or refusals.

    Args:
      detection: what was found.
      choose_settings: for a kind ("ffn", "vocab") and a path, the user's settings.
      platform: where it will run: "cpu", "gpu" or "tpu".
      name_of: the name of a weight, for reports.
      measure: what a calibration says of a match.
      placed: where a match runs; see ``place``.
    """
    decisions: list[Decision] = []
    refusals: list[tuple[Node, Refusal]] = []
    for match in detection.matches:
        kind = "vocab" if isinstance(match, VocabMatch) else "ffn"
        choice = choose_settings(kind, match.node.path)
        names = tuple(name_of(p.origin.recipe.root) for p in match.products)
        dense = sum(p.nbytes for p in match.products) * match.node.scope.iterations
        found = _decide(match, kind, choice, platform, names, dense, measure(match, names), placed(match))
        if isinstance(found, Decision):
            decisions.append(found)
            continue
        for product, name in zip(match.products, names, strict=True):
            size = product.nbytes * product.node.scope.iterations
            source = product.node.source
            refusals.append((product.node, Refusal(product.path, source, found, kind, size, (name,))))
    for rejection in detection.rejections:
        node, rejected = rejection.node, rejection.product
        size = rejected.nbytes * node.scope.iterations if rejected is not None else 0
        weights = (name_of(rejected.origin.recipe.root),) if rejected is not None else ()
        source = node.source
        refusals.append((node, Refusal(node.path, source, rejection.reason, "", size, weights)))
    refusals.sort(key=lambda pair: detection.order[pair[0]])
    return Plan(tuple(d.site for d in decisions), tuple(r for _, r in refusals), platform, tuple(decisions))


def _decide(
    match: VocabMatch | FfnMatch,
    kind: str,
    choice: Choice,
    platform: str,
    names: tuple[str, ...],
    dense: int,
    measurement: Measurement | None,
    placement: Placement | str | None,
) -> Decision | str:
    """A decision, or the reason to stay dense. Checks of meaning come first; the cost model is last."""
    settings = choice.settings
    if settings is None:
        return choice.reason
    settings, chosen = with_choices(settings, measurement, _units(match))
    if (why := unmeasured(settings, measurement)) is not None:
        return why
    if not match.node.scope.iterations:
        return "the loop around it has no iterations"
    dtypes = {np.dtype(p.weight.aval.dtype).name for p in match.products}
    if not dtypes <= {"float32", "bfloat16", "float16", "float64"}:
        return f"its weights are {', '.join(sorted(dtypes))}; only floating-point weights are predicted"
    if settings.certify and (why := not_certifiable(match, platform)) is not None:
        return why
    if isinstance(placement, str):
        return placement
    shards = 1 if placement is None else placement.shards
    if placement is not None and settings.certify:
        return f"its weights are sharded over {placement}, and certification is for one device in this version"
    if isinstance(match, VocabMatch):
        assert isinstance(settings, Vocab)
        product = match.product
        tokens, units, inputs = product.tokens, product.width, product.contracted
        # Each device of a shard_map that cuts the vocabulary takes its share.
        parts = parts_of_rows(vocab_rows(match), product.origin.refs)
        count, computed_each, activation = -(-settings.candidates_of(units * parts) // parts), 1, ""
    else:
        assert isinstance(settings, Ffn)
        tokens, units, inputs = match.tokens, match.units, match.region.ups[0].product.contracted
        activation = match.region.activation
        if settings.activations == "zeroing" and not match.region.zeroing:
            return (
                f"its activation ({activation}) does not leave exact zeros, so units left out would change the result; "
                'allow it with activations="any"'
            )
        own = match.region.own
        if own is not None and own.group > 1 and settings.group_size == 1:
            # The model keeps whole groups; so do we.
            settings = dataclasses.replace(settings, group_size=own.group)
        if own is not None and settings.group_size % own.group:
            return (
                f"group_size={settings.group_size} is no multiple of the {own.group} units that the model itself keeps "
                "or leaves out together"
            )
        if units % settings.group_size:
            return f"group_size={settings.group_size} does not divide its {units} hidden units"
        computed_each = settings.group_size
        count = settings.groups_of(units, own.share if own is not None else None)
    if tokens > settings.max_tokens:
        return f"{tokens} tokens in one call, more than max_tokens={settings.max_tokens}; a prefill runs dense"
    if isinstance(match, FfnMatch) and shards > 1 and match.region.own is not None:
        return f"the model itself chooses among all its units, which are sharded over {placement}"
    if units // shards % computed_each:
        return f"group_size={computed_each} does not divide the {units // shards} hidden units of each device"
    # From here on of one device, which has its share of the units, and of the tokens where data is sharded too.
    here = tokens if placement is None else tokens // placement.size(placement.tokens)
    count = -(-count // shards)
    selection = choose(here, units // shards // computed_each, count)
    computed = selection.rows_read(here) * computed_each
    iterations = match.node.scope.iterations
    predicted, exact = bytes_read(match, settings, count, here, computed, shards)
    order = None if placement is not None else _order(match, settings, measurement)
    levels: Levels | None = None
    told_more = "" if order is None else f"; {order.how}"
    if placement is None:
        levels, exact, own_sizes = _own_sizes(match, settings, chosen, tokens, computed_each, predicted, exact)
        told_more += own_sizes
    sparse = (predicted + exact) * iterations * shards
    cost = (predicted + exact * ROW_COST.get(platform, 1.0) + FIXED_BYTES.get(platform, 1 << 20)) * iterations
    if cost * shards >= dense and not choice.force:
        return (
            f"it reads {dense:,} bytes dense and {sparse:,} sparse{_over(placement)}, which would not be faster on "
            f"{platform}; a Rule with force=True overrides this"
        )
    site = Site(
        kind=kind,
        path=match.node.path,
        source=match.node.source,
        tokens=tokens,
        dense_bytes=dense,
        sparse_bytes=sparse,
        settings=settings,
        weights=names,
        inputs=inputs,
        units=units,
        computed=computed * shards,
        shared=selection.mode == "shared",
        activation=activation,
        own=match.region.own.name if isinstance(match, FfnMatch) and match.region.own is not None else "",
        forced=choice.force,
        calibrated=chosen.how + told_more,
        shards=shards,
        placed="" if placement is None else str(placement),
    )
    needs = _needs(match, settings, None if measurement is None else measurement.inputs, shards, order)
    if levels is not None:
        needs = (*needs, stack_need(match, levels))
    return Decision(match, site, settings, count, needs, input_bits(match, platform) or ALL_BITS, placement, levels)


def _over(placement: Placement | None) -> str:
    return "" if placement is None else f", over {placement}"


def _own_sizes(
    match: VocabMatch | FfnMatch,
    settings: Vocab | Ffn,
    chosen: Chosen,
    tokens: int,
    computed_each: int,
    predicted: int,
    exact: int,
) -> tuple[Levels | None, int, str]:
    """Sizes of their own for the layers of a loop where that is worth it, what is then read exactly, what to tell."""
    sizes = chosen.sizes
    if sizes is None or len(set(sizes.ravel().tolist())) < 2 or is_cut(stack_need(match, None).refs):
        return None, exact, ""
    levels = levels_of(sizes)
    units = _units(match) // computed_each
    rows = [choose(tokens, units, c).rows_read(tokens) * computed_each for c in levels.counts]
    own = [bytes_read(match, settings, c, tokens, r)[1] for c, r in zip(levels.counts, rows, strict=True)]
    mean = math.ceil(sum(own[n] for n in levels.numbers) / sizes.size)
    saved = (exact - mean) / (predicted + exact)
    if saved < WORTH:
        own_sizes = told(sizes.ravel().tolist())
        return None, exact, f"; the layers share it, as sizes of their own ({own_sizes}) save {saved:.1%}"
    counts = [levels.counts[n] for n in levels.numbers]
    return levels, mean, f"; each layer has its own in a branch ({told(counts)}), which saves {saved:.1%}"


def stack_need(match: VocabMatch | FfnMatch, form: Any) -> Need:
    """A form that has an entry for each layer of a site's (first) weight, whatever the weight."""
    if isinstance(match, VocabMatch):
        return Need(PackKey(vocab_rows(match), form), match.product.origin.refs)
    up = match.region.ups[0]
    return Need(PackKey(up_rows(up), form), up.product.origin.refs)


def _units(match: VocabMatch | FfnMatch) -> int:
    return match.product.width if isinstance(match, VocabMatch) else match.units


def bytes_read(
    match: VocabMatch | FfnMatch, settings: Vocab | Ffn, count: int, tokens: int, computed: int, shards: int = 1
) -> tuple[int, int]:
    """Bytes per execution on one device: of the predictor (and norms), and of the rows computed exactly."""
    spec = settings.spec
    if isinstance(match, VocabMatch):
        product = match.product
        dtype = product.weight.aval.dtype
        total = vocab_bytes(tokens, product.width // shards, product.contracted, dtype, spec, candidates=count)
        exact = computed * product.contracted * np.dtype(dtype).itemsize
        return total - exact + _proof_bytes(settings, product.width // shards, product.contracted, dtype), exact
    assert isinstance(settings, Ffn)
    region, down = match.region, match.down
    forms = up_forms(region, settings)
    ups = [
        (up.product.contracted, up.product.weight.aval.dtype, spec if spec in read or Proving(spec) in read else None)
        for up, read in zip(region.ups, forms, strict=True)
    ]
    total = ffn_bytes(
        tokens,
        match.units // shards,
        ups,
        down.width,
        down.weight.aval.dtype,
        active=count,
        group_size=settings.group_size,
        norms="norms" in down_forms(region, settings),
    )
    total += sum(moments_bytes(up[0]) for up, read in zip(ups, forms, strict=True) if "moments" in read)
    total += sum(
        _proof_bytes(settings, match.units // shards, d, dtype) for d, dtype, predicted in ups if predicted is not None
    )
    rows = sum(d * np.dtype(dtype).itemsize for d, dtype, _ in ups)
    rows += down.width * np.dtype(down.weight.aval.dtype).itemsize
    return total - computed * rows, computed * rows


def _proof_bytes(settings: Vocab | Ffn, n: int, d: int, dtype: Any) -> int:
    """What a proof reads more than its predictor alone; nothing where none is asked for."""
    if not settings.certify:
        return 0
    return proof_bytes(n, d, settings.spec, dtype) - predictor_bytes(n, d, settings.spec, dtype)


def _needs(
    match: VocabMatch | FfnMatch,
    settings: Vocab | Ffn,
    inputs: Sequence[Inputs] | None,
    shards: int,
    order: Order | None,
) -> tuple[Need, ...]:
    def needs(recipe: Recipe, forms: list[Any], origin: Origin, columns: int, number: int = 0) -> list[Need]:
        fitted = (settings.spec, Proving(settings.spec))
        if inputs is not None and takes_inputs(settings.spec):
            forms = [Fitted(form, inputs[number]) if form in fitted else form for form in forms]
        if order is not None:
            forms = [Regrouped(form, order) for form in forms]
        # Rows lie as they are, each device's part of them together; all else is made of each part by itself.
        parts = in_parts(recipe, _units(match), columns, shards)
        return [Need(PackKey(recipe if form == "rows" else parts, form), origin.refs) for form in forms]

    if isinstance(match, VocabMatch):
        assert isinstance(settings, Vocab)
        product = match.product
        return tuple(needs(vocab_rows(match), vocab_forms(settings), product.origin, product.contracted))
    assert isinstance(settings, Ffn)
    region = match.region
    found: list[Need] = []
    for number, (up, forms) in enumerate(zip(region.ups, up_forms(region, settings), strict=True)):
        found += needs(up_rows(up), forms, up.product.origin, up.product.contracted, number)
    found += needs(match.down_rows(), down_forms(region, settings), match.down.origin, match.down.width)
    if order is not None:
        found.append(stack_need(match, Regrouped("order", order)))
    return tuple(found)


def _order(match: VocabMatch | FfnMatch, settings: Vocab | Ffn, measurement: Measurement | None) -> Order | None:
    """The order that a block's units are packed in, where its groups are of units that fire together."""
    if isinstance(match, VocabMatch) or measurement is None or settings.certify or match.region.own is not None:
        return None
    weights = [(up_rows(up), up.product.origin) for up in match.region.ups] + [(match.down_rows(), match.down.origin)]
    stacks = {tuple(s.size for s in recipe.steps if isinstance(s, Stack)) for recipe, _ in weights}
    if len(stacks) > 1 or any(is_cut(origin.refs) for _, origin in weights):
        return None
    return measurement.order_for(settings)
