"""One process of one framework: makes kernels of a case, holds each to NumPy's result, and times rounds of calls.

    python -m benchmarks.speed.worker

Requests come as lines of JSON on standard input, answers go as lines of JSON to standard output.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.speed.cases import Case, Weights, disagreement, make_weights, reference
from benchmarks.speed.peers import EXACT, Kernel, Left, Settings, load
from benchmarks.speed.timing import Turn

# What few bits lose adds up over the layers of a step.
DEEP = 3


class Session:
    """A case in this process."""

    def __init__(self, case: Case, families: Sequence[str], settings: Settings) -> None:
        self.case, self.families, self.settings = case, families, settings
        self.turns: list[Turn] = []

    def prepare(self) -> list[dict[str, Any]]:
        """Every kernel made and checked: what is known of it besides its time, and why it has none."""
        reason = self.settings.short_of(4.5 * self.case.elements)
        peers, entries = {family: load(family) for family in self.families}, []
        for family, peer in list(peers.items()):
            missing = peer.missing() or reason
            if missing:
                entries.append({"family": family, "name": family, "reason": f"not run: {missing}"})
                del peers[family]
        if not peers:
            return entries
        weights = make_weights(self.case)
        _as_stored(weights)
        expected = reference(weights, weights.inputs[0])
        for family, peer in peers.items():
            try:
                for made in peer.kernels(weights, self.settings):
                    entries.append(self._entry(family, made, expected))
            except Exception as error:  # a peer of another version may fail in any way; the others go on
                entries.append({"family": family, "name": family, "reason": f"failed: {type(error).__name__}: {error}"})
        return entries

    def _entry(
        self, family: str, made: Kernel | Left, expected: tuple[np.ndarray, np.ndarray | None]
    ) -> dict[str, Any]:
        if isinstance(made, Left):
            return {"family": family, "name": made.name, "reason": f"not run: {made.reason}"}
        entry = {"family": family, "reason": "", **_without_call(made)}
        if made.tolerance < float("inf"):
            entry["disagreement"] = found = disagreement(made.call(0), *expected)
            allowed = made.tolerance * (DEEP if self.case.kind == "step" and made.tolerance > EXACT else 1)
            if not found <= allowed:
                return entry | {"reason": f"wrong: {found:.2g} from NumPy's result, and {allowed:g} is allowed"}
        turn = Turn(made.call)
        turn.warm_up()
        entry["turn"] = len(self.turns)
        self.turns.append(turn)
        return entry

    def round(self) -> list[list[float]]:
        """Seconds of the timed calls of each kernel."""
        seconds = [turn.round() for turn in self.turns]
        for family in self.families:
            getattr(load(family), "idle", lambda: None)()
        return seconds


def _without_call(made: Kernel) -> dict[str, Any]:
    fields = (field.name for field in dataclasses.fields(made))
    return {name: getattr(made, name) for name in fields if name not in ("call", "tolerance")}


def _as_stored(weights: Weights) -> None:
    """Rounds weights to what they are stored in, so that NumPy multiplies what everybody does."""
    if weights.case.stored != "float32":
        import ml_dtypes

        dtype = getattr(ml_dtypes, weights.case.stored, weights.case.stored)
        for name, array in weights.arrays.items():
            weights.arrays[name] = array.astype(dtype).astype(np.float32)


def main() -> None:
    """Answers requests until there are no more."""
    # Whatever a framework prints goes to the log, not among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session: Session | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            case = Case(**request["case"] | {"active": tuple(request["case"]["active"])})
            session = Session(case, request["families"], Settings(**request["settings"]))
            answer: Any = session.prepare()
        elif session is not None:
            answer = session.round()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
