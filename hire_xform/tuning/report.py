"""A profile as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hire_xform.passes.plan.profile import ByTokens, Profile


def table(profile: Profile) -> str:
    """What a machine takes for what: bytes a second where something is read, seconds where it is done."""
    lines = [f"{profile.in_words}; plans for {profile.platform}", ""]
    dense = {f"{form}: {how}": by for form, own in profile.dense.items() for how, by in own.items()}
    lines += _speeds("dense products as XLA runs them, GB/s of weights as they are stored", dense)
    lines += ["", *_speeds("products of a predictor, GB/s", profile.scores)]
    counts = _counts([profile.score_rows])
    each = "".join(f"{dict(profile.score_rows)[n] * 1e9:12.3g}" for n in counts)
    lines += [f"  {'each row that is scored, ns':32}{each}", ""]
    lines.append(f"{'rows that are chosen, GB/s':34}{'few':>12}{'many':>12}{'a row, ns':>12}{'a token':>12}")
    for step, times in profile.rows.items():
        ends = (times.points[0], times.points[-1])
        speeds = "".join(f"{size / seconds / 1e9:12.3g}" for size, seconds in ends)
        lines.append(f"  {step:32}{speeds}{times.each * 1e9:12.3g}{times.further:+12.0%}")
    lines += ["", "a site, besides what it reads"]
    for name, value, unit in (
        ("fixed", profile.fixed * 1e6, "us"),
        ("choosing, each row and token", profile.choosing * 1e9, "ns"),
        ("bounding, each row and token", profile.bounding * 1e9, "ns"),
        ("picking, each row that is chosen", profile.picking * 1e9, "ns"),
    ):
        lines.append(f"  {name:32}{value:12.3g} {unit}")
    return "\n".join(lines) + "\n"


def key_text(key: Mapping[str, Any]) -> str:
    """What a profile was measured on, in a line."""
    told = []
    for name, value in key.items():
        if isinstance(value, Mapping):
            value = ", ".join(sorted(set(value.values()))) or "none"
        elif isinstance(value, (list, tuple)):
            value = " ".join(value) or "none"
        told.append(f"{name} {value}")
    return "; ".join(told)


def _speeds(title: str, rows: Mapping[str, ByTokens]) -> list[str]:
    counts = _counts(rows.values())
    heads = "".join(f"{f'{n} token' + 's' * (n > 1):>12}" for n in counts)
    lines = [title, " " * 34 + heads] if len(title) > 32 else [f"{title:34}{heads}"]
    for name, by_tokens in rows.items():
        known = dict(by_tokens)
        lines.append(f"  {name:32}" + "".join(f"{1e-9 / known[n]:12.3g}" if n in known else f"{'':12}" for n in counts))
    return lines


def _counts(rows: Iterable[ByTokens]) -> list[int]:
    return sorted({count for by_tokens in rows for count, _ in by_tokens})
