"""Prints docs/stacks.md's table: every decode function of the stacks that are installed, put through the library."""

from __future__ import annotations

from importlib import metadata

import conftest  # noqa: F401 - XLA as the suite has it: every program is run once
import jax
from checked import Checked, checked
from stack import STACKS, Stack, lines_of, stacks_of

HEADER = (
    "stack",
    "function",
    "model",
    "lines added",
    "sites found",
    "gap at full width",
    "sites rewritten losslessly",
    "tokens",
)


def main() -> None:
    """Checks every case and prints the table, and the lines that a user adds."""
    rows = [checked(case) for name in STACKS for case in installed(name)]
    print(f"JAX {jax.__version__}, CPU. {versions()}.\n")
    print("| " + " | ".join(HEADER) + " |")
    print("|" + " --- |" * len(HEADER))
    for row in rows:
        print("| " + " | ".join(cells(row)) + " |")
    for name in dict.fromkeys(row.case.stack for row in rows):
        print(f"\n## {name}\n")
        for lines in dict.fromkeys(lines_of(row.run.sparse) for row in rows if row.case.stack == name):
            print(f"```text\n{lines}\n```")


def installed(name: str) -> list[Stack]:
    """The decode functions of a stack; none where it is not installed."""
    try:
        return stacks_of(name)
    except ImportError:
        return []


PACKAGES = (
    *("google-tunix", "maxtext", "gemma", "keras-hub", "keras", "penzai"),
    *("tpu-inference", "vllm-tpu", "torch", "flax"),
)


def versions() -> str:
    """Those of the stacks that are installed."""
    found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()}
    return ", ".join(f"{package} {found[package]}" for package in PACKAGES if package in found)


def cells(row: Checked) -> list[str]:
    """One row."""
    case = row.case
    found = f"{row.ffn} of {case.ffn} blocks, {row.vocab} of {case.vocab} heads"
    tokens = "" if row.same_tokens is None else "the same" if row.same_tokens else "differ"
    return [
        *(case.stack, f"`{case.function}`", case.model, str(case.lines), found, f"{row.gap:.0e}"),
        str(row.proved),
        tokens,
    ]


if __name__ == "__main__":
    main()
