"""What was measured, for people: one table format, Markdown, JSON and a plot."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from rich.table import Table

MARK = "<!-- below: python -m benchmarks.speed -->"
COLUMNS = ("what is run", "MB read", "ms, and its quartiles", "times dense", "of memory", "")
GROUPS = {
    "heads": "Heads",
    "growth": "Smaller heads",
    "blocks": "Feed-forward blocks",
    "step": "Whole steps",
    "tokens": "Several tokens",
    "stored": "Stored in fewer bits",
}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    if "median" not in row:
        return row["name"], "", "", "", "", row["reason"]
    low, median, high = (f"{row[key] * 1e3:.3g}" for key in ("low", "median", "high"))
    ratio = "" if row["times_dense"] is None else f"{row['times_dense']:.2f}x"
    share = "" if row["of_memory"] is None else f"{row['of_memory']:.0%}"
    return row["name"], f"{row['read'] / 1e6:,.1f}", f"{median} ({low} to {high})", ratio, share, row["note"]


def _title(result: dict[str, Any]) -> str:
    memory = result["memory"]
    speed = f"; memory gives {memory['bytes_per_second'] / 1e9:.1f} GB/s to {memory['name']}" if memory else ""
    return f"{result['name']}{speed}{_busy(result)}"


def _busy(result: dict[str, Any]) -> str:
    """How much others disturbed."""
    share = result.get("others")
    return "" if share is None else f"; others took {share:.0%} of the processors"


def _shown(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["family"] != "memory"]


def table(result: dict[str, Any]) -> Table:
    """A case, for the terminal."""
    made = Table(title=_title(result), title_justify="left")
    for i, column in enumerate(COLUMNS):
        made.add_column(column, justify="right" if 0 < i < 5 else "left")
    for row in _shown(result):
        style = "bold" if row["name"] == result["dense"] else "green" if row["family"] == "ours" else None
        made.add_row(*_cells(row), style=style)
    return made


def machine_words(results: dict[str, Any]) -> str:
    """What the figures are of, in a sentence."""
    m = results["machine"]
    return (
        f"{m['threads']} of {m['cores']} cores of {m['processor']}, {m['features']}, {m['system']}, JAX {m['jax']}, "
        f"kernels: {m['kernels']}; {m['when']}, load {m['load']:.1f} when it began; {m['rounds']} rounds."
    )


def markdown(results: dict[str, Any]) -> str:
    """All of it: ratios of each group, then every table."""
    lines = [machine_words(results), ""]
    for group, title in GROUPS.items():
        cases = [case for case in results["cases"] if case["case"]["group"] == group]
        if group == "tokens":
            shapes = {_shape(case) for case in cases}
            cases = [case for case in results["cases"] if _shape(case) in shapes]
            cases.sort(key=lambda case: (case["case"]["kind"], case["case"]["tokens"]))
        if cases:
            lines += [f"## {title}", "", *_ratios(cases), ""]
            if group == "tokens":
                lines += [*_stops(cases), ""]
    lines += ["## Every figure", ""]
    for result in results["cases"]:
        lines += [f"### {result['name'][0].upper()}{result['name'][1:]}", ""]
        memory = result["memory"]
        if memory:
            speed = memory["bytes_per_second"] / 1e9
            lines += [
                f"Memory gives {speed:.1f} GB/s to {memory['name']}; best dense: {result['dense']}{_busy(result)}.",
                "",
            ]
        lines += [*_grid(COLUMNS, [_cells(row) for row in _shown(result)]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _grid(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    line = ["---"] + ["---:"] * (len(header) - 2) + ["---" if header[-1] == "" else "---:"]
    return [f"| {' | '.join(cells)} |" for cells in (header, tuple(line), *rows)]


def _shape(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result["case"][key] for key in ("kind", "d", "vocab", "m", "layers", "gated", "activation", "stored"))


def _ratios(cases: list[dict[str, Any]]) -> list[str]:
    """Times dense of every kernel that was run, a column a case; the first line is dense in milliseconds."""
    header = ("times the best dense form", *(case["name"] for case in cases))
    rows = [row for case in cases for row in _shown(case) if "median" in row]
    families = list(dict.fromkeys(row["family"] for row in rows))
    names = dict.fromkeys(row["name"] for row in sorted(rows, key=lambda row: families.index(row["family"])))
    found = [{row["name"]: row for row in case["rows"] if "median" in row} for case in cases]
    best = [
        f"{rows[case['dense']]['median'] * 1e3:.3g} ms" if case["dense"] else ""
        for rows, case in zip(found, cases, strict=True)
    ]

    def cell(row: dict[str, Any] | None) -> str:
        if row is None or row["times_dense"] is None:
            return ""
        return f"{row['times_dense']:.2f}x" + (" (dense)" if row["note"] == "left dense" else "")

    cells = [(name, *(cell(of_case.get(name)) for of_case in found)) for name in names]
    return _grid(header, [("best dense form takes", *best), *cells])


def _stops(cases: list[dict[str, Any]]) -> Iterator[str]:
    """Up to how many tokens each of ours is faster than dense."""
    kinds: dict[str, dict[str, dict[int, float]]] = {}
    for case in cases:
        for row in case["rows"]:
            if row["family"] == "ours" and "median" in row and row["note"] != "left dense":
                at = kinds.setdefault(case["case"]["kind"], {}).setdefault(row["name"], {})
                at[case["case"]["tokens"]] = row["times_dense"]
    for kind, rows in kinds.items():
        for name, at in rows.items():
            if len(at) < 2:
                continue
            slower = [tokens for tokens, ratio in sorted(at.items()) if ratio < 1]
            words = f"slower than dense from {slower[0]} on" if slower else f"faster than dense up to {max(at)}"
            yield f"- {'Head' if kind == 'head' else 'Blocks'}, {name.removeprefix('ours: ')}: {words} tokens"


def cases_of(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The cases that a file has, by name: none where there is no file."""
    if not path.exists():
        return {}
    return {case["name"]: case for case in json.loads(path.read_text())["cases"]}


def write(results: dict[str, Any], json_at: Any, docs: Any, plot_at: Any) -> None:
    """Whatever was asked for, after every case, so that a run that ends early leaves what it has."""
    if json_at:
        json_at.write_text(json.dumps(results, indent=1))
    if docs:
        head, mark, _ = (docs.read_text() if docs.exists() else "").partition(MARK)
        docs.write_text(f"{head}{mark or MARK}\n\n{markdown(results)}")
    if plot_at:
        plot(results, plot_at)


# Series of the plot: a word that names begin with, a mark and a colour.
SERIES = (
    ("ours: default", "*", "#d62728"),
    ("ours: int8", "o", "#d62728"),
    ("ours: hx.approximate", "o", "#d62728"),
    ("ours: int4", "v", "#e377c2"),
    ("ours: low rank d/4 in 8 bits", "s", "#ff7f0e"),
    ("ours: low rank d/8 in 8 bits", "D", "#bc6c00"),
    ("ours: low rank d/8 f32", "^", "#8c564b"),
    ("dense f32", "o", "#1f77b4"),
    ("dense bf16", "s", "#6baed6"),
    ("XLA int8", "P", "#17becf"),
    ("naive HiRE", "x", "#7f7f7f"),
    ("Qwix", "1", "#9467bd"),
    ("PyTorch", "+", "#2ca02c"),
    ("llama.cpp", "X", "#000000"),
)


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
    """Share of memory speed over the bytes that a kernel reads: a head, a step, a block of a stack."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hire_xform"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6))
    for begin, mark, colour in SERIES:
        points = [
            (row["read"] / case["places"] / 1e6, row["of_memory"] * 100)
            for case in results["cases"]
            for row in case["rows"]
            if row["name"].startswith(begin) and row.get("of_memory") and row["note"] != "left dense"
        ]
        points = [point for point in points if point[0] >= 1]
        if points:
            label = None if begin == "ours: hx.approximate" else begin
            axes.scatter(*zip(*points, strict=True), marker=mark, color=colour, label=label, s=32, alpha=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_ylim(0, 115)
    axes.axhline(100, color="#444444", linewidth=0.8)
    axes.axhline(75, color="#aaaaaa", linewidth=0.8, linestyle=":")
    axes.set_xlabel("MB of weights that it reads: a head, a step, one block of a stack")
    axes.set_ylabel("% of the speed of memory in the same run")
    axes.grid(alpha=0.2)
    if axes.collections:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
