"""Prints docs/models.md: every model the tests have, put through the library on this machine. `make models` runs it."""

from __future__ import annotations

import os
import platform
import re

import conftest  # noqa: F401 - XLA as the suite has it: every program is run once
import jax
from case import FRAMEWORKS, cases_of
from measure import Row, measure
from rich.console import Console
from rich.progress import track

HEADER = (
    "framework",
    "model",
    "nesting",
    "FFN sites of blocks",
    "vocabularies",
    "refused products: reason",
    "gap at full width",
    "functions, dense → sparse",
    "seconds to trace and lower, dense → sparse",
)


def main() -> None:
    """Measures every case and prints the page."""
    console = Console(stderr=True)
    cases = [case for framework in FRAMEWORKS for case in cases_of(framework)]
    rows = [measure(case) for case in track(cases, "models", console=console)]
    print(page(rows))


def page(rows: list[Row]) -> str:
    """The whole page as Markdown."""
    numbers: dict[str, int] = {}
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    lines += ["| " + " | ".join(cells(row, numbers)) + " |" for row in rows]
    found = sum(row.ffn + row.vocab for row in rows)
    there = sum(row.case.ffn + row.case.vocab for row in rows)
    missed = [(row.case, why) for row in rows for why in row.case.missed]
    text = [
        "# Models, frameworks and nestings",
        "",
        "Made by `make models`; not edited by hand. "
        f"JAX {jax.__version__}, Python {platform.python_version()}, {os.cpu_count()} CPU cores.",
        "",
        f"{len(rows)} models, {found} sites found of {there} there. Nothing in a model knows of the library. What is "
        'there is counted from the model\'s own description (`tests/frameworks/`), with `activations="any"` and every '
        "site forced, since the models are tiny. A block in a loop's body counts once. The gap is the largest "
        "difference from the dense function with every unit and logit exact, plain and packed weights, over the "
        "largest entry; all that is not a float is equal. Functions are those of the lowered module.",
        "",
        *lines,
        "",
        "## Reasons",
        "",
        *(f"{number}. {reason}" for reason, number in numbers.items()),
        "",
        "## Not rewritten",
        "",
        *([f"- {c.framework}, {c.model}, {c.nesting}: {why}" for c, why in missed] or ["Nothing that is there."]),
    ]
    return "\n".join(text)


def cells(row: Row, numbers: dict[str, int]) -> list[str]:
    """One line of the table; ``numbers`` collects the reasons."""
    counts: dict[int, int] = {}
    for reason, count in row.reasons.items():
        number = numbers.setdefault(without_places(reason), len(numbers) + 1)
        counts[number] = counts.get(number, 0) + count
    return [
        row.case.framework,
        row.case.model,
        row.case.nesting,
        f"{row.ffn} of {row.case.ffn}",
        f"{row.vocab} of {row.case.vocab}",
        ", ".join(f"{count}: ({number})" for number, count in sorted(counts.items())) or "none",
        f"{row.gap:.0e}" if row.same_rest else "DIFFERENT",
        f"{row.dense_functions} → {row.sparse_functions}",
        f"{row.dense_seconds:.2f} → {row.sparse_seconds:.2f}",
    ]


def without_places(reason: str) -> str:
    """A reason without the file, line and path that it names."""
    reason = re.sub(r" at \S+:\d+(:\d+)? \([^)]*\)", "", reason)
    reason = re.sub(r"the product it follows, \S+,", "the product it follows", reason)
    return re.sub(r"\d[\d,]* wide for [\d,]+ inputs", "N wide for D inputs", reason)


if __name__ == "__main__":
    main()
