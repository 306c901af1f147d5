"""What a decode step would read, send and take on a mesh of devices that are not here: ``plan_mesh``.

Bytes are counted as the planner counts them, for one device's share of every block and of the head. Times are bytes
over bandwidth, and no more: they say where sparse decoding stops paying, not what a device will measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hire_xform.explain import size
from hire_xform.lowering.engine.bytes_read import ffn_bytes, vocab_bytes
from hire_xform.lowering.engine.selection import selection_of
from hire_xform.lowering.predict.predictors import predictor_bytes
from hire_xform.passes.plan.accelerators import SHEETS, accelerator
from hire_xform.passes.plan.machine import CPU_MEMORY, FIXED_BYTES, PLATFORMS, ROW
from hire_xform.passes.plan.profile import Profile
from hire_xform.passes.plan.settings import Ffn, Vocab, refuse

# A value and an id: what each device sends of a token for an arg max.
ARG_MAX_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """The shapes of a decoder.

    Raises:
      ValueError: a value is out of range; the message names it.
    """

    # Columns of the residual stream, d.
    inputs: int
    # Hidden units of a block.
    hidden: int
    # Entries of the vocabulary.
    vocab: int
    # Layers, each with one block.
    layers: int
    # True for two products into the hidden units (a gate and a value); False for one.
    gated: bool = True
    # Bytes of all other weights that a token reads, over all devices: attention, mostly. Read dense either way.
    other_bytes: int = 0
    # dtype of weights and of what is summed over devices.
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("inputs", "hidden", "vocab", "layers"):
            _check_count("ModelShapes", name, getattr(self, name), 1)
        _check_count("ModelShapes", "other_bytes", self.other_bytes, 0)
        if self.dtype not in ("float32", "bfloat16", "float16"):
            refuse("ModelShapes", "dtype", self.dtype, "'float32', 'bfloat16' or 'float16'")

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2

    @property
    def ups(self) -> int:
        """Products into the hidden units of a block."""
        return 2 if self.gated else 1


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one device can do.

    Raises:
      ValueError: a value is out of range; the message names it.
    """

    # Bytes a second from its memory.
    bandwidth: float
    # Bytes a second to the other devices.
    link: float
    # Bytes of its memory.
    memory: float
    # Seconds that every collective takes at least.
    latency: float = 1e-6
    # "cpu", "gpu" or "tpu": what rows out of order, and selecting, cost besides.
    platform: str = "tpu"

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("bandwidth", "link", "memory", "latency"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name != "latency"):
                refuse("Device", name, value, "a positive number")
        if self.platform not in PLATFORMS:
            refuse("Device", "platform", self.platform, f"one of {sorted(PLATFORMS)}")

    @classmethod
    def named(cls, chip: str, **changed: Any) -> Device:
        """A device by its data sheet: "h100", "h200", "a100", "v4", "v5e", "v5p" or "v6e".

        Args:
          chip: its name.
          **changed: fields that are to be others than the sheet's.

        Raises:
          ValueError: no such device is known.
        """
        if chip not in SHEETS:
            refuse("Device", "chip", chip, f"one of {', '.join(sorted(SHEETS))}")
        sheet = SHEETS[chip]
        own = {"bandwidth": sheet.memory, "link": sheet.link, "memory": sheet.size, "platform": sheet.platform}
        return cls(**{**own, **changed})


@dataclass(frozen=True)
class MeshRow:
    """One mesh size; bytes and seconds are of one device and one step.

    Attributes:
      devices: over how many hidden units and vocabulary are split.
      block: bytes of all blocks, dense and sparse.
      head: bytes of the head, dense and sparse.
      total: bytes of the whole step, dense and sparse.
      sent: bytes a device puts into collectives, the same dense and sparse: two sums a layer (attention's and the
        block's), and the arg max.
      seconds: of the whole step, dense and sparse.
      block_recall: expected share of the wanted units that sharded selection keeps, were they placed at random.
      head_recall: the same of the wanted logits.
      held: bytes of memory that weights and their packed forms take.
      fits: whether the memory holds them.
    """

    devices: int
    block: tuple[int, int]
    head: tuple[int, int]
    total: tuple[int, int]
    sent: int
    seconds: tuple[float, float]
    block_recall: float
    head_recall: float
    held: int
    fits: bool

    @property
    def speedup(self) -> float:
        """Dense time over sparse time."""
        return self.seconds[0] / self.seconds[1]


@dataclass(frozen=True)
class MeshPlan:
    """``plan_mesh``'s answer; its ``str`` is a table.

    Attributes:
      rows: one for each mesh size asked for.
      blocks_until: the most devices, of the powers of two up to 4,096, over which sparse blocks are faster than dense
        ones; 0 for none.
      head_until: the same of the head.
    """

    rows: tuple[MeshRow, ...]
    blocks_until: int
    head_until: int

    def __str__(self) -> str:
        """The table."""
        lines = [
            "devices   read dense  read sparse         sent   time dense  time sparse  times  recall: blocks    head"
            "  memory"
        ]
        for row in self.rows:
            dense, sparse = (f"{seconds * 1e6:,.0f} us" for seconds in row.seconds)
            held = size(row.held) + ("" if row.fits else ", too much")
            lines.append(
                f"{row.devices:7d} {size(row.total[0]):>12s} {size(row.total[1]):>12s} {size(row.sent):>12s} "
                f"{dense:>12s} {sparse:>12s} {row.speedup:6.2f} {row.block_recall:15.4f} {row.head_recall:7.4f}  {held}"
            )
        lines.append(_until("blocks", self.blocks_until))
        lines.append(_until("head", self.head_until))
        lines.append("bytes and times are of one device and one step; recall is what is kept of an exact selection's")
        return "\n".join(lines)


def _until(what: str, devices: int) -> str:
    if not devices:
        return f"sparse {what}: not faster on any number of devices"
    return f"sparse {what}: faster on up to {devices} devices" + (" (no more were tried)" if devices == _MOST else "")


_MOST = 4096


def da_top_k_recall(n: int, wanted: int, taken: int, shards: int) -> float:
    """The expected share of the ``wanted`` best of ``n`` that ``shards`` equal blocks find, ``taken`` in all.

    Every block takes its best ``q = ceil(taken / shards)``. With the wanted ones placed at random, r of them stand in
    a block with the hypergeometric probability of r marked ones among ``n / shards`` drawn, and the block finds
    ``min(r, q)``: ``(shards / wanted) * sum_r min(r, q) P(r)``. Derived; the paper's DA-TOP-k is this selection.

    Args:
      n: rows.
      wanted: how many are wanted, ``1 <= wanted <= n``.
      taken: how many are taken.
      shards: blocks, a divisor of ``n``.
    """
    if not 1 <= wanted <= n or shards < 1 or n % shards or taken < 1:
        raise ValueError(
            f"da_top_k_recall: n={n}, wanted={wanted}, taken={taken}, shards={shards}; expected 1 <= wanted <= n, "
            "taken >= 1 and shards a divisor of n"
        )
    own, block = -(-taken // shards), n // shards
    found = 0.0
    for r in range(max(0, block - (n - wanted)), min(wanted, block) + 1):
        log = _log_choose(wanted, r) + _log_choose(n - wanted, block - r) - _log_choose(n, block)
        found += min(r, own) * math.exp(log)
    return min(1.0, shards * found / wanted)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def plan_mesh(
    model: ModelShapes,
    device: Device,
    devices: int | Sequence[int],
    *,
    tokens: int = 1,
    vocab: Vocab | None = None,
    ffn: Ffn | None = None,
    wanted_units: float = 0.0625,
    wanted_logits: int = 32,
) -> MeshPlan:
    """What a decode step reads, sends and takes over some numbers of devices.

    Args:
      model: its shapes.
      device: what each device can do.
      devices: over how many hidden units and vocabulary are split; one number, or several to compare. Divisors of both.
      tokens: tokens a step, on each group of so many devices.
      vocab: settings of the head.
      ffn: settings of the blocks.
      wanted_units: share of a block's units that a token really wants, for the recall.
      wanted_logits: how many of the largest logits it wants.

    Raises:
      ValueError: a value does not fit; the message names it.
    """
    vocab, ffn = vocab or Vocab(), ffn or Ffn()
    counts = [devices] if isinstance(devices, int) else list(devices)
    for name, value in (("tokens", tokens), ("wanted_logits", wanted_logits)):
        _check_count("plan_mesh", name, value, 1)
    if not 0 < wanted_units <= 1:
        refuse("plan_mesh", "wanted_units", wanted_units, "a share of the units, 0 < wanted_units <= 1")
    for count in counts:
        _check_count("plan_mesh", "devices", count, 1)
        if (why := _indivisible(model, ffn, count)) is not None:
            refuse("plan_mesh", "devices", count, why)
    rows = tuple(_row(model, device, count, tokens, vocab, ffn, wanted_units, wanted_logits) for count in counts)
    tried = [1 << i for i in range(_MOST.bit_length())]
    tried = [count for count in tried if _indivisible(model, ffn, count) is None]
    costs = {count: _seconds(model, device, count, tokens, vocab, ffn) for count in tried}
    until = [
        max((count for count in tried if costs[count][part][1] < costs[count][part][0]), default=0) for part in (0, 1)
    ]
    return MeshPlan(rows, *until)


def _indivisible(model: ModelShapes, ffn: Ffn, count: int) -> str | None:
    for name in ("hidden", "vocab"):
        if getattr(model, name) % count:
            return f"a divisor of {name}={getattr(model, name)}"
    if model.hidden // count % ffn.group_size:
        return f"the {model.hidden // count} hidden units of each device to be whole groups of {ffn.group_size}"
    return None


def _block(model: ModelShapes, count: int, tokens: int, ffn: Ffn) -> tuple[int, int, int]:
    """Bytes of one block on one device: dense, predicted, exact."""
    units, d = model.hidden // count, model.inputs
    groups = -(-ffn.groups_of(model.hidden, None) // count)
    row = (model.ups + 1) * d * model.itemsize
    ups = [(d, model.dtype, ffn.spec)] * model.ups
    total = ffn_bytes(tokens, units, ups, d, model.dtype, active=groups, group_size=ffn.group_size)
    exact = selection_of(tokens, units // ffn.group_size, groups).rows_read(tokens) * ffn.group_size * row
    return units * row, total - exact, exact


def _head(model: ModelShapes, count: int, tokens: int, vocab: Vocab) -> tuple[int, int, int]:
    """Bytes of the head on one device: dense, predicted, exact."""
    rows, row = model.vocab // count, model.inputs * model.itemsize
    candidates = -(-vocab.candidates_of(model.vocab) // count)
    total = vocab_bytes(tokens, rows, model.inputs, model.dtype, vocab.spec, candidates=candidates)
    exact = selection_of(tokens, rows, candidates).rows_read(tokens) * row
    return rows * row, total - exact, exact


def _seconds(
    model: ModelShapes, device: Device, count: int, tokens: int, vocab: Vocab, ffn: Ffn
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Dense and sparse seconds of all blocks, and of the head."""
    costs = _costs(device)

    def pair(parts: tuple[int, int, int], times: int, spec: Any, rows: float) -> tuple[float, float]:
        dense, predicted, exact = parts
        sparse = (predicted * costs.scores(spec) + exact * rows) / device.bandwidth + costs.fixed
        return dense / device.bandwidth * times, sparse * times

    dot, total = costs.rows(model.itemsize, ffn.group_size)
    mixed = (model.ups * dot + total) / (model.ups + 1)
    blocks = pair(_block(model, count, tokens, ffn), model.layers, ffn.spec, mixed)
    return blocks, pair(_head(model, count, tokens, vocab), 1, vocab.spec, costs.rows(model.itemsize, 1)[0])


@dataclass(frozen=True)
class _Costs:
    """What bytes of a predictor and of chosen rows cost, as multiples of a dense product's; and a site's seconds."""

    profile: Profile | None
    fixed: float

    def scores(self, spec: Any) -> float:
        """Of a predictor."""
        kind = {8: "int8", 4: "int4"}.get(getattr(spec, "bits", None) or 0)
        return 1.0 if self.profile is None or kind is None else 1.0 / self.profile.speed(kind)

    def rows(self, itemsize: int, group: int) -> tuple[float, float]:
        """Of products with chosen rows, so many beside one another, and of sums of them."""
        if self.profile is None:
            return ROW, ROW
        wide, size = "f32" if itemsize == 4 else "16 bits", 1 << 20
        rows = (self.profile.rows[f"{step} {wide}"].seconds(1, size, group=group) for step in ("dot", "sum"))
        dot, total = (seconds * self.profile.memory / size for seconds in rows)
        return dot, total


def _costs(device: Device) -> _Costs:
    if device.platform == "cpu":
        return _Costs(None, FIXED_BYTES / CPU_MEMORY)
    profile = accelerator("", device.platform, device.bandwidth)
    return _Costs(profile, profile.fixed)


def _row(
    model: ModelShapes,
    device: Device,
    count: int,
    tokens: int,
    vocab: Vocab,
    ffn: Ffn,
    wanted_units: float,
    wanted_logits: int,
) -> MeshRow:
    block, head = _block(model, count, tokens, ffn), _head(model, count, tokens, vocab)
    other = model.other_bytes // count
    reads = [(block[0] * model.layers, head[0]), ((block[1] + block[2]) * model.layers, head[1] + head[2])]
    total = [sum(read) + other for read in reads]
    costs = _seconds(model, device, count, tokens, vocab, ffn)
    summed = tokens * model.inputs * model.itemsize
    sent = (2 * model.layers * summed + ARG_MAX_BYTES * tokens) if count > 1 else 0
    # A ring passes each sum around twice but for one part of it; an arg max is gathered from all.
    ring = 2 * (count - 1) / count * 2 * model.layers * summed + (count - 1) * ARG_MAX_BYTES * tokens
    collectives = 2 * model.layers + 1 if count > 1 else 0
    travel = ring / device.link + collectives * device.latency
    seconds = [costs[0][i] + costs[1][i] + other / device.bandwidth + travel for i in (0, 1)]
    predictors = model.layers * model.ups * predictor_bytes(model.hidden // count, model.inputs, ffn.spec, model.dtype)
    predictors += predictor_bytes(model.vocab // count, model.inputs, vocab.spec, model.dtype)
    held = total[0] + predictors
    groups = model.hidden // ffn.group_size
    return MeshRow(
        devices=count,
        block=(reads[0][0], reads[1][0]),
        head=(reads[0][1], reads[1][1]),
        total=(total[0], total[1]),
        sent=sent,
        seconds=(seconds[0], seconds[1]),
        block_recall=da_top_k_recall(
            groups, max(1, round(wanted_units * groups)), ffn.groups_of(model.hidden, None), count
        ),
        head_recall=da_top_k_recall(
            model.vocab, min(wanted_logits, model.vocab), vocab.candidates_of(model.vocab), count
        ),
        held=held,
        fits=held <= device.memory,
    )


def _check_count(owner: str, field: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        refuse(owner, field, value, f"an integer of at least {least}")
