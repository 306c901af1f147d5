"""What the model is run as: dense in two layouts, in int8, and ours by a setting of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hire_xform as hx
from benchmarks.gpu.model import Product, columns_form, columns_of, int8_form, int8_of, rows_form

EIGHTH, EIGHT, FOUR = hx.LowRank(0.125, bits=8), hx.Quantized(8), hx.Quantized(4)


@dataclass(frozen=True)
class Plain:
    """A form that users write: how it multiplies, and the weights in its layout."""

    name: str
    product: Product
    layout: Callable[[Any], Any]


PLAIN = (
    Plain("dense bf16, rows", rows_form, lambda w: w),
    Plain("dense bf16, columns", columns_form, columns_of),
    Plain("XLA int8", int8_form, int8_of),
)


def configs(part: str, tokens: int) -> dict[str, hx.Config]:
    """Settings of ours by name. Forced, so that a line says what it says."""
    rules, most = (hx.Rule("*", force=True),), max(8, tokens)

    def approximate(predictor: Any, active: float) -> hx.Config:
        head = hx.Vocab(predictor=predictor, certify=False, max_tokens=most)
        block = hx.Ffn(predictor=predictor, active=active, certify=False, max_tokens=most)
        return hx.Config(vocab=head, ffn=block, rules=rules)

    if part == "head":
        certified = {"int8": EIGHT, "low rank d/8, then int8": hx.Staged((EIGHTH, EIGHT))}
        heads = {
            f"ours, certified, {name}": hx.Config(
                vocab=hx.Vocab(predictor=predictor, certify=True, max_tokens=most), ffn=None, rules=rules
            )
            for name, predictor in certified.items()
        }
        approximated = {"low rank d/8 in 8 bits": EIGHTH, "4 bits": FOUR}
        return heads | {f"ours, {name}": approximate(predictor, 0.25) for name, predictor in approximated.items()}
    return {
        "ours, low rank d/8, 6.25 % of units": approximate(EIGHTH, 0.0625),
        "ours, low rank d/8, 12.5 % of units": approximate(EIGHTH, 0.125),
        "ours, int8, 25 % of units": approximate(EIGHT, 0.25),
    }
