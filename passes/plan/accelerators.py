"""The profiles of GPUs and TPUs that are built in: by the kind of device, from data sheets and from compiled programs.

They are modelled: speeds of memory are those of public data sheets, of which a share is counted on; what steps move, of
what they have to, was read off programs that the devices' compilers made (``hire-xform dump --show compiled``), with
this library's kernels and without. Of GPUs the share, and what a site's small steps take, hold for what was measured on
an H200 (docs/gpu.md); no TPU was measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hire_xform.lowering.kernels import gpu, tpu
from hire_xform.passes.plan.profile import FORMS, ROWS, SCORES, SPELLINGS, ByTokens, Profile, RowTimes

__all__ = ["ACCELERATORS", "FIXED_SECONDS", "SHEETS", "Sheet", "accelerator", "of_device_kind"]

# Of the speed of memory that a data sheet says, what programs are counted on to reach.
SHEET_SHARE = 0.85
# Of a site on an accelerator, besides reading: ten kernels, one after the other. On an H200 a block's fifteen took 53
# us, 23 of these in choosing, which is faster now; it has eight by now, which were not measured.
FIXED_SECONDS = {"gpu": 30e-6, "tpu": 10e-6}
# Bytes that the times of rows are given for; they grow with them.
_SIZE = 8 << 20


@dataclass(frozen=True)
class Sheet:
    """What a public data sheet says of a device.

    Attributes:
      platform: "gpu" or "tpu".
      words: what JAX's name of its kind has in it, a regular expression.
      memory: bytes a second of its memory.
      link: bytes a second to a neighbour, one way: of one link of a TPU, of all of a GPU's.
      size: bytes of its memory.
    """

    platform: str
    words: str
    memory: float
    link: float
    size: float


# NVIDIA's and Google's. A name is looked for in this order.
SHEETS = {
    "h200": Sheet("gpu", "H200", 4.8e12, 450e9, 141e9),
    "h100": Sheet("gpu", "H100", 3.35e12, 450e9, 80e9),
    "a100": Sheet("gpu", "A100", 2.0e12, 300e9, 80e9),
    "v6e": Sheet("tpu", "TPU v6", 1.64e12, 90e9, 32e9),
    "v5e": Sheet("tpu", "TPU v5 lite|TPU v5e", 0.819e12, 45e9, 16e9),
    "v5p": Sheet("tpu", "TPU v5", 2.765e12, 90e9, 95e9),
    "v4": Sheet("tpu", "TPU v4", 1.2e12, 45e9, 32e9),
}


@dataclass(frozen=True)
class Moved:
    """Bytes that steps move over bytes that they have to.

    Attributes:
      bits4: products with all rows in 4 bits.
      dot, total: products with chosen rows, and sums of them.
      single: how many times as much rows of 16 bits are that do not come in pairs.
    """

    bits4: float = 1.0
    dot: float = 1.0
    total: float = 1.0
    single: float = 1.0


# By platform, and whether the library's kernels run there. On GPUs of an H100's programs, two tokens: XLA gathers rows
# first, or writes down their products; a kernel's sums are of parts. On TPUs of a v5e's: rows of 16 bits lie in pairs,
# so that a single one comes with its neighbour, and XLA's gather reads as much.
MOVED: Mapping[tuple[str, bool], Moved] = {
    ("gpu", True): Moved(total=1.5),
    ("gpu", False): Moved(bits4=5.5, dot=3.1, total=5.0),
    ("tpu", True): Moved(single=2.0),
    ("tpu", False): Moved(single=2.0),
}


def accelerator(name: str, platform: str, memory: float, kernels: bool | None = None) -> Profile:
    """A GPU or TPU whose memory gives so many bytes a second; by default with the kernels that are here."""
    kernels = _has_kernels(platform) if kernels is None else kernels
    moved, second = MOVED[platform, kernels], 1.0 / memory

    def always(times: float) -> ByTokens:
        return ((1, times * second),)

    def rows(step: str) -> RowTimes:
        times = moved.dot if step.startswith("dot") else moved.total
        single = moved.single if step.endswith("16 bits") else 1.0
        return RowTimes(points=((_SIZE, times * _SIZE * second),), each=0.0, further=0.0, single=single)

    return Profile(
        name=name,
        platform=platform,
        source="modelled",
        kernels=kernels,
        dense={form: dict.fromkeys(SPELLINGS, always(1.0)) for form in FORMS},
        scores={kind: always(moved.bits4 if kind.startswith("int4") else 1.0) for kind in SCORES},
        score_rows=((1, 0.0),),
        rows={step: rows(step) for step in ROWS},
        fixed=FIXED_SECONDS[platform],
        choosing=0.0,
        bounding=0.0,
        picking=0.0,
    )


def _has_kernels(platform: str) -> bool:
    return (gpu if platform == "gpu" else tpu).install() is None


ACCELERATORS = {name: accelerator(name, sheet.platform, SHEET_SHARE * sheet.memory) for name, sheet in SHEETS.items()}
# Of a kind that is not known: memory that is fast, so that dense programs are.
_UNKNOWN = {
    "gpu": accelerator("unknown GPU", "gpu", SHEET_SHARE * 3.35e12),
    "tpu": accelerator("unknown TPU", "tpu", SHEET_SHARE * 1.64e12),
}


def of_device_kind(platform: str, kind: str) -> Profile:
    """The profile of an accelerator by what JAX calls its kind."""
    for name, sheet in SHEETS.items():
        if sheet.platform == platform and re.search(sheet.words, kind, re.IGNORECASE):
            return ACCELERATORS[name]
    return _UNKNOWN[platform]
