"""Times a decode step and its parts: ours, dense, and everybody else's, in one run.

    python -m benchmarks.speed                        # all that ``make bench`` has
    python -m benchmarks.speed --quick                # a minute
    python -m benchmarks.speed --only heads,step --peers ours,dense,ggml

Weights come from memory at every call, inputs change, times are medians of rounds that go from one framework to the
next, each in a process of its own on the same processors. What is not installed is a line that says how to install it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence

from rich.console import Console

from benchmarks.speed import report
from benchmarks.speed.cases import SIZES, Case
from benchmarks.speed.driver import Options, machine, run_case
from benchmarks.speed.peers import MODULES, OPTIONAL
from benchmarks.speed.timing import APART


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="groups, kinds or parts of names: heads,step,d 2048")
    parser.add_argument(
        "--peers",
        default=",".join(family for family in MODULES if family not in OPTIONAL),
        help=f"families, of {','.join(MODULES)}; all but {','.join(OPTIONAL)} if not said",
    )
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full")
    parser.add_argument("--billion", dest="size", action="store_const", const="billion", help="a 1B step alone")
    parser.add_argument("--toy", dest="size", action="store_const", const="toy", help="seconds; for tests")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of every framework")
    parser.add_argument("--ggml", default=os.environ.get("HIRE_GGML", ""), help="folder of libggml-base.so and others")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has PyTorch")
    parser.add_argument("--json", type=pathlib.Path, help="write all figures there")
    parser.add_argument("--update", action="store_true", help="keep the other cases that --json's file has")
    parser.add_argument("--plot", type=pathlib.Path, help="draw share of memory speed over bytes there: .svg or .png")
    parser.add_argument("--docs", type=pathlib.Path, help="put Markdown there, below the line " + report.MARK)
    parser.add_argument("--in-process", action="store_true", help="no process for each framework; for tests")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, prints and writes; 1 where a peer failed or was wrong."""
    parser = _parser()
    given = parser.parse_args(argv)
    families = tuple(given.peers.split(","))
    if unknown := set(families) - set(MODULES):
        parser.error(f"--peers knows {', '.join(MODULES)}, not {', '.join(sorted(unknown))}")
    only = set(filter(None, given.only.split(",")))
    cases = [case for case in SIZES[given.size]() if not only or any(_asked(case, word) for word in only)]
    if not cases or given.rounds < 1 or given.threads < 1:
        parser.error("--only must leave a case; --rounds and --threads must be at least 1")
    if given.update and not given.json:
        parser.error("--update keeps figures of a file, so name it with --json")
    if given.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install 'hire-xform[plots]'")
    options = Options(
        # Shares of memory speed need memory's, ratios need dense.
        families=tuple(f for f in MODULES if f in {*families, "memory", "dense"}),
        rounds=given.rounds,
        threads=given.threads,
        apart=1 << 16 if given.size == "toy" else APART,
        ggml=given.ggml,
        torch_python=given.torch_python,
        in_process=given.in_process,
    )
    console = Console(width=None if sys.stdout.isatty() else 150)
    results = {"machine": machine() | {"threads": options.threads, "rounds": options.rounds}, "cases": []}
    kept = report.cases_of(given.json) if given.update else {}
    order = [case.name for case in SIZES[given.size]()]
    console.print(report.machine_words(results))
    for case in cases:
        with console.status(case.name) as status:
            kept[case.name] = run_case(case, options, status.update)
        console.print(report.table(kept[case.name]))
        results["cases"] = sorted(kept.values(), key=lambda found: [*order, found["name"]].index(found["name"]))
        report.write(results, given.json, given.docs, given.plot)
    bad = [(c["name"], r) for c in results["cases"] for r in c["rows"] if r["reason"].startswith(("wrong", "failed"))]
    for name, row in bad:
        console.print(f"[red]{name}: {row['name']} {row['reason']}")
    return 1 if bad else 0


def _asked(case: Case, word: str) -> bool:
    return word in (case.group, case.kind) or word in case.name


if __name__ == "__main__":
    sys.exit(main())
