"""Has frameworks take turns: a process for each, and rounds that go from one to the next: drift hits all alike."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.cases import Case
from benchmarks.speed.noise import others, reading
from benchmarks.speed.peers import PROCESSES, Settings
from benchmarks.speed.timing import Spread
from benchmarks.speed.worker import Session

ROOT = pathlib.Path(__file__).resolve().parents[2]
# A framework's threads may spin for a while after a call: they are left to fall asleep before another's turn.
PAUSE = 0.05


@dataclass(frozen=True)
class Options:
    """Of a run."""

    families: tuple[str, ...]
    rounds: int
    threads: int
    apart: int
    ggml: str
    torch_python: str
    # All in this process: for tests.
    in_process: bool = False

    @property
    def pinned(self) -> list[int]:
        """The processors that every framework runs on."""
        allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        return allowed[: self.threads]


class Process:
    """A worker in a process of its own, on processors of the run."""

    def __init__(self, name: str, options: Options) -> None:
        python = options.torch_python if name == "torch" else sys.executable
        threads = str(options.threads)
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
        }
        if name == "portable":
            environment["HIRE_KERNELS"] = "off"
        if python != sys.executable:
            # What is on the path of this interpreter is of its version.
            environment["PYTHONPATH"] = str(ROOT)

        def pin() -> None:
            if options.pinned:
                os.sched_setaffinity(0, options.pinned)

        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the worker
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.speed.worker"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            preexec_fn=pin,
        )
        self.pid = self._process.pid

    def ask(self, request: dict[str, Any]) -> Any:
        """An answer, or a RuntimeError with the end of what the worker printed."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            end = self._log.read().strip().splitlines()[-1:] or ["it printed nothing"]
            raise RuntimeError(f"the worker ended with {self._process.wait()}: {end[0]}")
        return json.loads(line)

    def prepare(self, case: Case, families: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
        """See ``Session.prepare``."""
        request = {"case": dataclasses.asdict(case), "families": families, "settings": dataclasses.asdict(settings)}
        return self.ask(request)

    def round(self) -> list[list[float]]:
        """See ``Session.round``."""
        return self.ask({"round": 1})

    def close(self) -> None:
        """Ends the process, and with it its memory."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._log.close()


class Here:
    """A worker in this process."""

    def __init__(self, name: str, options: Options) -> None:
        self._session: Session | None = None
        self.pid = os.getpid()

    def prepare(self, case: Case, families: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
        """See ``Session.prepare``."""
        self._session = Session(case, families, settings)
        return self._session.prepare()

    def round(self) -> list[list[float]]:
        """See ``Session.round``."""
        assert self._session
        return self._session.round()

    def close(self) -> None:
        """Lets go of all."""
        self._session = None


def run_case(case: Case, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything measured of a case: as data, times in seconds."""
    workers, entries = [], []
    wanted = {name: [f for f in families if f in options.families] for name, families in PROCESSES.items()}
    # What is stored in fewer bits is of dtypes that frameworks of JAX share.
    foreign = ("ggml", "torch") if case.stored != "float32" else ()
    wanted = {name: families for name, families in wanted.items() if families and name not in foreign}
    try:
        for name, families in wanted.items():
            say(f"{case.name}: {name} prepares")
            settings = Settings(options.threads, options.apart, _reserve(case, name, wanted), options.ggml)
            try:
                worker = (Here if options.in_process else Process)(name, options)
                workers.append(worker)
                found = worker.prepare(case, families, settings)
            except (RuntimeError, OSError) as error:
                found = [{"family": family, "name": family, "reason": f"failed: {error}"} for family in families]
            entries += [entry | {"worker": len(workers) - 1, "seconds": []} for entry in found]
        running = sorted({entry["worker"] for entry in entries if "turn" in entry})
        pids = {os.getpid(), *(worker.pid for worker in workers)}
        begin = reading(pids)
        for i in range(options.rounds):
            say(f"{case.name}: round {i + 1} of {options.rounds}")
            for number in sorted(running, key=lambda number: (number - i) % len(workers)):
                time.sleep(PAUSE)
                try:
                    seconds = workers[number].round()
                except (RuntimeError, OSError) as error:
                    # What ended, for want of memory for example, is told, and the others go on.
                    running.remove(number)
                    for entry in entries:
                        if entry["worker"] == number and "turn" in entry:
                            entry |= {"reason": f"failed: {error}", "seconds": []}
                            del entry["turn"]
                    continue
                for entry in entries:
                    if entry["worker"] == number and "turn" in entry:
                        entry["seconds"] += seconds[entry["turn"]]
        busy = others(begin, reading(pids))
    finally:
        for worker in workers:
            worker.close()
    return _figures(case, entries) | {"others": busy}


def _reserve(case: Case, name: str, wanted: dict[str, list[str]]) -> int:
    """Bytes that the workers after this one are to find free: for weights in NumPy, and in what they make of them."""
    needs = {"portable": 8.0, "ggml": 6.0, "torch": 7.5}
    later = list(wanted)[list(wanted).index(name) + 1 :]
    return int(case.elements * max((needs[other] for other in later), default=0.0)) + (1 << 30)


def _figures(case: Case, entries: list[dict[str, Any]]) -> dict[str, Any]:
    rows = []
    for entry in entries:
        row = {key: entry[key] for key in ("family", "name", "reason")}
        if entry["seconds"]:
            spread = Spread.of(entry["seconds"])
            row |= {key: entry[key] for key in ("read", "held", "dense", "note")}
            row |= {"disagreement": entry.get("disagreement"), "calls": len(entry["seconds"])}
            row |= {"low": spread.low, "median": spread.median, "high": spread.high}
            row["bytes_per_second"] = entry["read"] / spread.median
        rows.append(row)
    timed = [row for row in rows if "median" in row]
    probes = [row for row in timed if row["family"] == "memory"]
    memory = max(probes, key=lambda row: row["bytes_per_second"], default=None)
    best = min((row for row in timed if row["dense"]), key=lambda row: row["median"], default=None)
    for row in timed:
        row["times_dense"] = best["median"] / row["median"] if best else None
        row["of_memory"] = row["bytes_per_second"] / memory["bytes_per_second"] if memory else None
    return {
        "name": case.name,
        "case": dataclasses.asdict(case),
        "places": case.places,
        "memory": memory and {"name": memory["name"], "bytes_per_second": memory["bytes_per_second"]},
        "dense": best and best["name"],
        "rows": rows,
    }


def machine() -> dict[str, Any]:
    """What the figures are of."""
    import jax

    import hire_xform as hx

    found = {"processor": platform.processor() or platform.machine(), "features": ""}
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if known:
        found["processor"] = f"{known.get('model name', '?')} (family {known.get('cpu family', '?')})"
        flags = known.get("flags", "").split()
        words = {"avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx512_bf16": "BF16", "avx2": "AVX2"}
        found["features"] = ", ".join(word for flag, word in words.items() if flag in flags)
    return {
        **found,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "jax": jax.__version__,
        "kernels": hx.backends()["hire_quantized_scores"]["cpu"],
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "when": time.strftime("%Y-%m-%d"),
    }
