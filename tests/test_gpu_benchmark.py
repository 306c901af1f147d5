"""The benchmark for GPUs, on a CPU at sizes that take no time: what it runs and tells, not how fast anything is."""

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--small", "--any-device", "--minutes=30"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu import __main__, checks, lines, pool, run, sizes, timing

    monkeypatch.setattr(timing, "REPEATS", 1)
    monkeypatch.setattr(lines, "SEEN", 2)
    rooms = {"checks": checks, "lines": lines, "pool": pool, "run": run, "sizes": sizes, "timing": timing}
    yield SimpleNamespace(main=__main__.main, module=__main__, **rooms)
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "check,nothing"], "--parts check,nothing; expected some of check,head,ffn,step"),
        (["--tokens", "1,0"], "--tokens 1,0; expected numbers from 1 to 64"),
        (["--compile", "cuda:z9"], "platform='cuda:z9'; expected one of cpu, cuda, cuda:h100"),
        (["--threads", "0"], "--threads 0; expected 1 or more"),
        (["--sizes", "2b"], "invalid choice: '2b'"),
        (["--forms", "int8", "float9"], "--forms float9; expected part of the name of a form or check, such as"),
    ],
)
def test_what_it_does_not_take(gpu, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(gpu, capsys):
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert "has no GPU here, but cpu; expected an NVIDIA GPU" in said.err
    assert not said.out


@pytest.mark.slow
def test_it_runs_through(gpu, capsys, tmp_path):
    """At sizes that take no time, on a CPU: every form, none of them wrong."""
    written = tmp_path / "found.json"
    assert gpu.main([*SMALL, "--tokens=1", f"--json={written}"]) == 0, capsys.readouterr().out
    found = json.loads(written.read_text())
    assert not found["wrong"]
    assert not found["left_out"]
    names = {part: {row["name"] for row in found["rows"] if row["part"] == part} for part in gpu.run.PARTS}
    assert {"scores, 4 bits", "sums, bfloat16, groups of 8", "products, int8, portable"} <= names["check"]
    assert {"fine scores, 8 bits", "da_top_k, 32 of 1024", "open_rows, 1024, portable"} <= names["check"]
    assert "ours, certified, low rank d/8, then int8" in names["head"]
    for part in ("ffn", "step"):
        assert {"dense bf16, rows", "dense bf16, columns", "XLA int8", "ours, int8, 25 % of units"} <= names[part]
    assert all(row["milliseconds"] > 0 and row["nbytes"] > 0 for row in found["rows"])
    assert "step, 1 tokens, of the best dense form: XLA int8" in capsys.readouterr().out


def test_forms_go_by_part_of_their_name(gpu, capsys, tmp_path):
    written = tmp_path / "found.json"
    chosen = ["--parts=head,ffn", "--tokens=2", "--forms", "columns", "4 bits"]
    assert gpu.main([*SMALL, f"--json={written}", *chosen]) == 0, capsys.readouterr().out
    rows = json.loads(written.read_text())["rows"]
    assert [(row["part"], row["name"]) for row in rows] == [
        ("head", "dense bf16, columns"),
        ("head", "ours, 4 bits"),
        ("ffn", "dense bf16, columns"),
    ]


def test_what_does_not_fit_into_the_minutes_is_named(gpu, capsys):
    arguments = ["--small", "--any-device", "--parts=ffn", "--tokens=1", "--minutes=0"]
    assert gpu.main(arguments) == 0
    assert "left out: ffn, ours, int8, 25 % of units, 1 tokens" in capsys.readouterr().out


def only(gpu, monkeypatch, name):
    every = gpu.checks.checks
    monkeypatch.setattr(gpu.lines, "checks", lambda sizes, t: [one for one in every(sizes, t) if one.name == name])


def test_what_was_not_compiled_in_time_is_named(gpu, capsys, monkeypatch):
    """It is lowered while there is time, and then that is up."""
    only(gpu, monkeypatch, "sums, int8")
    monkeypatch.setattr(gpu.module, "Pool", lambda threads, until: gpu.pool.Pool(threads, 0.0))
    assert gpu.main([*SMALL, "--parts=check", "--tokens=1"]) == 0
    assert "left out: sums, int8, 1 tokens: not compiled in time" in capsys.readouterr().out


@pytest.mark.parametrize("profiled", [False, True])
def test_what_is_wrong_ends_in_an_error(gpu, capsys, monkeypatch, tmp_path, profiled):
    """A kernel that says something else: the portable form is that, in programs that are compiled ahead, too."""
    import jax.numpy as jnp

    import hire_xform as hx

    only(gpu, monkeypatch, "sums, int8")
    if profiled:
        kernels = gpu.timing.Kernels(2.5, 40.0, "fusion_7", 30.0)
        monkeypatch.setattr(gpu.module, "profiles", lambda: True)
        monkeypatch.setattr(gpu.checks, "traced", lambda call, times: call() and kernels)
    remove = hx.register_kernel(
        "hire_combine_stored_rows", "cpu", lambda h, i, v, *others, **settings: jnp.ones((len(h), v.shape[1]))
    )
    written = tmp_path / "found.json"
    try:
        assert gpu.main([*SMALL, "--parts=check", "--tokens=1", f"--json={written}"]) == 1
    finally:
        remove()
    assert "WRONG: sums, int8, 1 tokens: differs by" in capsys.readouterr().out
    rows = json.loads(written.read_text())["rows"]
    assert [row["name"] for row in rows] == ["sums, int8", "sums, int8, portable"]
    assert "WRONG" in rows[0]["note"]
    for row in rows:
        assert ("largest fusion_7 30.0 us, 2.5 kernels a step, busy 40.0 us a step" in row["note"]) == profiled
        assert (row["kernels"], row["busy_us"]) == ((2.5, 40.0) if profiled else (None, None))
        assert (row["milliseconds"] == pytest.approx(0.04)) == profiled


def test_operands_are_in_no_cache_and_share_their_matrices(gpu):
    sizes = gpu.sizes.Sizes(rows=64, columns=32, chosen=16, uncached=10 * 16 * 32 * 4 - 1)
    check = next(one for one in gpu.checks.checks(sizes, 2) if one.name == "products, float32, groups of 1")
    sets = gpu.checks.CheckLine(gpu.run.Run(sizes, (2,), 0.0), check, 2).operands()
    assert len(sets) == 10  # rows of 16 x 32 f32 are read of each
    x, rows, index = zip(*sets, strict=True)
    assert len({id(one) for one in rows}) == gpu.checks.MATRICES
    assert len({one.tobytes() for one in map(gpu.checks.np.asarray, x)}) == len(sets)
    assert len({one.tobytes() for one in map(gpu.checks.np.asarray, index)}) == len(sets)


def test_few_of_the_scores_are_open(gpu):
    check = next(one for one in gpu.checks.checks(gpu.sizes.SIZES["small"], 1) if one.name.startswith("open_rows"))
    ((scores,), *_) = gpu.checks.CheckLine(gpu.run.Run(gpu.sizes.SIZES["small"], (1,), 0.0), check, 1).operands()
    assert 0 < int(check.step(scores)[1]) < scores.size // 20


def test_kernels_are_those_of_a_gpus_streams(gpu):
    def plane(name, **lines):
        events = {line: [SimpleNamespace(name=n, duration_ns=ns) for n, ns in own] for line, own in lines.items()}
        return SimpleNamespace(name=name, lines=[SimpleNamespace(name=n, events=own) for n, own in events.items()])

    planes = [
        plane("/device:GPU:0", **{"Stream #13": [("a", 1000), ("b", 3000), ("a", 1500)], "XLA Ops": [("a", 1000)]}),
        plane("/host:CPU", **{"Stream #1": [("c", 9000)]}),
        plane("/device:GPU:0 (2)", **{"Stream #14(MemcpyD2D)": [("copy", 500)]}),
    ]
    assert gpu.timing.kernels_in(planes, 2) == gpu.timing.Kernels(2.0, 3.0, "b", 1.5)
    assert gpu.timing.kernels_in(planes[1:2], 2) is None


def test_the_profiler_sees_no_kernels_of_a_cpu(gpu):
    """It is asked, its file is found, and there is nothing of a GPU in it."""
    import jax

    add = jax.jit(lambda x: x + 1)
    assert gpu.timing.traced(lambda: add(1.0), 1) is None
    assert not gpu.timing.profiles()


def test_the_largest_of_the_first_are_compiled_first(gpu):
    done, gate = [], threading.Event()
    pool = gpu.pool.Pool(1, time.monotonic() + 60)
    pool.add(-1, 0, gate.wait)
    for rank, size in [(1, 9), (0, 1), (0, 5), (1, 10)]:
        pool.add(rank, size, lambda rank=rank, size=size: done.append((rank, size)))
    failing = pool.add(2, 0, lambda: 1 / 0)
    gate.set()
    assert pool.close(time.monotonic() + 60)
    assert done == [(0, 5), (0, 1), (1, 10), (1, 9)]
    assert isinstance(failing.exception(), ZeroDivisionError)


def test_nothing_is_begun_when_the_time_is_up_and_what_runs_is_waited_for(gpu, monkeypatch):
    gate = threading.Event()
    pool = gpu.pool.Pool(1, time.monotonic() + 60)
    running = pool.add(0, 0, gate.wait)
    while not running.running():
        time.sleep(0.001)
    pool._until = 0.0
    waiting = pool.add(0, 0, lambda: None)
    monkeypatch.setattr(gpu.pool, "MOMENT", 0.01)
    assert not pool.close(time.monotonic())
    gate.set()
    assert pool.close(time.monotonic() + 60)
    assert running.done()
    assert waiting.cancelled()


def test_nothing_is_timed_while_something_compiles(gpu, capsys, monkeypatch):
    only(gpu, monkeypatch, "sums, int8")
    monkeypatch.setattr(gpu.pool.Pool, "close", lambda self, deadline: False)
    assert gpu.main([*SMALL, "--parts=check", "--tokens=1"]) == 0
    said = capsys.readouterr().out
    assert "left out: sums, int8, 1 tokens: something else was compiled until the time was up" in said
    assert "copy speed" not in said
