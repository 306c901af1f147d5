"""What dense products are assumed to do on each platform: everything that a proof takes for granted of its arithmetic.

A proof holds for every order of the sums, but not for any arithmetic. This is what is assumed, and where it is from.

- *CPU* (XLA's own loops, Eigen, oneDNN): inputs whole; sums in f32, each addition to nearest.
- *GPU*: products of f32 are TF32 unless they ask for ``HIGHEST``: what is behind 11 bits is cut off, so 10 are sure.
  Products of 16 bits are exact. Sums in f32, which may be cut off, in blocks of four products or more.
- *TPU*: products of f32 are one pass of bf16, at ``HIGH`` three, at ``HIGHEST`` six, which hold all 24 bits of an input
  and each product to 2 u. Rounding to bf16 may cut off, so that 7 bits are sure, and of three passes 15. Products of
  bf16 are exact, those of f16 are one pass of bf16. Sums in f32, which may be cut off.
- *Denormals* are flushed, in inputs and products, or not.

Sums that are cut off: tensor cores align at least four products and what was added up before to the largest of them,
drop what does not fit into 24 bits, and cut the result off, too. Fasi, Higham, Mikaitis and Pranesh, Numerical behavior
of NVIDIA tensor cores, PeerJ Computer Science 7:e330, 2021, found that of V100 (blocks of 4), T4 and A100 (of 4 or 8,
with a bit more). With M the largest partial sum or product, a block of k products loses at most ``(k + 1) 2^-23 M`` by
alignment and ``2^-23 M`` by its result. All ``d / k`` of them lose at most ``d (1 + 2 / k) 2^-23 M``, which is ``3 d u
M`` for k of 4 and more, with u = 2^-24: three times what sums lose that round to nearest. ``sum_units`` is that factor.
Sums that are rounded one by one towards zero lose ``2 d u M``, which is less.

Inputs: one of which b bits are kept is off by ``2^-b`` of itself where it is rounded, and by ``2^(1 - b)`` where it is
cut off, so that one bit less is sure. A product of two is off by 2.1 times that. Three passes of bf16 leave out the
product of two low parts and what is below these: ``3 * 2^-16``, less than ``2.1 * 2^-15``.

Denormals: less than ``2^-126`` is lost in each input and product. Beside an input above ``2^18`` that is more than
``tiny`` allows; the engine adds it for tokens. It is assumed that no weight is above ``2^18`` where a token has
denormal entries.

Results in 16 bits are rounded once, or not at all, from sums in f32. On GPU that is XLA's default, of sums that are
split as well (``xla_gpu_triton_gemm_disable_reduced_precision_reduction``).

Elsewhere f32 is rounded to nearest, and exponentials, logarithms and quotients to within what ``intervals.py`` and
``reductions.py`` say. Products of FP8 are not certified at all.

Products of int8 with int8 into int32 are exact on all of them; scores of ``Quantized``, and of ``LowRank`` and
``Projected`` with bits, are made of such, so that what is off in them is known. Where a dense product of f32 is one
pass of a few bits, hardly a token is proved, whatever the predictor: ask for ``precision=HIGHEST``, or have weights
and activations in bf16.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ALL_BITS", "WHOLE_BITS", "kept_bits", "sum_units"]

# All of an f32 input, in sums that round to nearest.
ALL_BITS = 24
# All of an input, in sums that may be cut off: what a program that serves several platforms takes for granted.
WHOLE_BITS = 23
# Of each way of multiplying the bits that are sure to be kept of inputs.
TABLE: Mapping[str, Mapping[str, int]] = {
    "f32": {"cpu": ALL_BITS, "gpu": 10, "tpu": 7},
    "f32, HIGH": {"cpu": ALL_BITS, "gpu": 10, "tpu": 15},
    "f32, HIGHEST": {"cpu": WHOLE_BITS, "gpu": WHOLE_BITS, "tpu": WHOLE_BITS},
    "bf16": {"cpu": WHOLE_BITS, "gpu": WHOLE_BITS, "tpu": WHOLE_BITS},
    "f16": {"cpu": ALL_BITS, "gpu": WHOLE_BITS, "tpu": 7},
}


def kept_bits(way: str, platform: str) -> int | None:
    """Significant bits that are sure to be kept of inputs: below 24 of sums that may be cut off; None: not known.

    Args:
      way: "f32", "f32, HIGH", "f32, HIGHEST", "bf16" or "f16", of both inputs.
      platform: "cpu", "gpu" or "tpu".
    """
    return TABLE[way].get(platform)


def sum_units(input_bits: int) -> float:
    """How many units of 2^-24 an addition may lose, of the largest partial sum: one where it rounds to nearest."""
    return 1.0 if input_bits >= ALL_BITS else 3.0
