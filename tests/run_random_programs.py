"""Draws many random programs and checks each: `make random N=20000 JOBS=2 SEED=0`.

Programs are spread over processes in lots, each lot with a seed of its own, so that a lot that fails can be run again
alone. All lots are run, whatever fails; the exit status is 1 if one did.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LOT = 500


def run_lot(seed: int, examples: int, evaluate: int) -> None:
    """One lot, in this process; prints its tally as the last line."""
    sys.path.append(str(Path(__file__).parent / "end_to_end"))
    import conftest  # noqa: F401 - XLA compiles quickly
    import jax
    import test_random_programs as tests
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded

    failures: list[str] = []

    @seeded(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[p for p in tests.PHASES if p.name == "generate"],
        suppress_health_check=list(HealthCheck),
    )
    @given(*tests.drawn)
    def lot(statements, tokens, how, number):
        # All failures are told: the next program is drawn whatever this one does.
        try:
            tests.check(statements, tokens, how, number, run_it=tests.TALLY["programs"] % evaluate == 0)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".split("\n")[0]
            failures.append(f"check({statements!r}, {tokens}, {how!r}, {number})\n    {text}")

    lot()
    print(json.dumps({"jax": jax.__version__, "tally": tests.TALLY, "failures": failures}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000, help="how many programs in all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many processes at a time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first lot; the others count from it")
    parser.add_argument("--evaluate", type=int, default=1, help="evaluate every nth program; rewrite the others only")
    parser.add_argument("--lot", type=int, help="run this one lot, by its seed, in this process")
    options = parser.parse_args()
    if options.lot is not None:
        run_lot(options.lot, min(options.examples, LOT), options.evaluate)
        return 0
    began, tally, failures, broken, versions = time.time(), Counter(), [], [], set()
    seeds = range(options.seed, options.seed + -(-options.examples // LOT))

    def lot(seed: int) -> None:
        # The last lot has what is left over. One thread each: the programs are tiny.
        examples = min(LOT, options.examples - (seed - options.seed) * LOT)
        command = [sys.executable, __file__, "--lot", str(seed), "--examples", str(examples)]
        command += ["--evaluate", str(options.evaluate)]
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, env={**os.environ, "XLA_FLAGS": flags}
        )
        if done.returncode:
            broken.append(f"lot {seed} ended with {done.returncode}:\n{done.stderr[-2000:]}")
            return
        told = json.loads(done.stdout.strip().splitlines()[-1])
        versions.add(told["jax"])
        tally.update(told["tally"])
        for text in told["failures"]:
            failures.append(f"lot {seed}: {text}")
            print(failures[-1], flush=True)
        print(f"{time.time() - began:7.0f} s  {tally['programs']:>6} programs  {len(failures)} failures", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lot, seeds))
    print(f"\nJAX {', '.join(versions)}; lots {seeds.start} to {seeds.stop - 1} of {LOT}; {time.time() - began:.0f} s")
    for name, count in sorted(tally.items()):
        print(f"{count:>9,}  {name}")
    print(f"{len(failures):>9,}  failures")
    for text in broken:
        print(text)
    return int(bool(failures or broken))


if __name__ == "__main__":
    sys.exit(main())
