"""The harness of the benchmarks, at sizes that take no time: what is in its table, not how fast anything is."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.speed import __main__, cases, driver, peers, report, timing

    yield {"main": __main__, "cases": cases, "driver": driver, "peers": peers, "report": report, "timing": timing}
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_every_peer_has_a_row(speed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed["peers"].Settings, "short_of", lambda self, nbytes: None)
    page = tmp_path / "page.md"
    page.write_text(f"# By hand\n\n{speed['report'].MARK}\nold figures\n")
    arguments = ["--toy", "--in-process", "--rounds=1", "--only=heads,blocks", f"--json={tmp_path / 'all.json'}"]
    arguments += [f"--docs={page}", "--peers=dense,ours,naive,int8,ggml", "--ggml="]
    assert speed["main"].main(arguments) == 0
    found = json.loads((tmp_path / "all.json").read_text())
    head, blocks = found["cases"]
    rows = {row["name"]: row for row in head["rows"]}
    assert {
        "dense f32, rows",
        "dense f32, columns",
        "dense f32, as XLA allocates",
        "dense bf16, rows",
        "dense bf16, columns",
        "ours: default, lossless",
        "ours: lossless in stages, low rank d/8 first",
        "ours: hx.approximate() (int8)",
        "ours: int8",
        "ours: int4",
        "ours: low rank d/8 in 8 bits",
        "naive HiRE, low rank d/8 f32, 256 rows",
        "XLA int8 x int8",
    } <= set(rows)
    matrix = 512 * 64
    assert rows["dense f32, rows"]["read"] == 4 * matrix
    assert rows["dense bf16, columns"]["read"] == 2 * matrix
    assert rows["XLA int8 x int8"]["read"] == matrix + 4 * 512
    # A byte a number, scales, norms of errors, and 256 exact rows.
    assert matrix < rows["ours: int8"]["read"] < matrix + 3 * 4 * 512 + 4 * 256 * 64 + 1
    assert rows["ours: int4"]["read"] < rows["ours: int8"]["read"]
    for row in (row for case in found["cases"] for row in case["rows"] if "median" in row):
        assert row["low"] <= row["median"] <= row["high"]
        assert row["family"] == "memory" or row["disagreement"] is not None
        assert row["times_dense"] is not None
    best = [row for row in head["rows"] if row.get("dense") and row["times_dense"] == 1]
    assert [row["name"] for row in best] == [head["dense"]]
    assert rows["llama.cpp Q8_0, Q4_0"]["reason"].startswith("not run: npm install")
    # On the terminal and on the page, below what was written by hand.
    printed, written = capsys.readouterr().out, page.read_text()
    assert "head 512 x 64" in printed
    assert written.startswith("# By hand\n")
    assert "old figures" not in written
    for row in blocks["rows"]:
        assert row["family"] == "memory" or row["name"] in written


def test_what_is_wrong_is_no_figure(speed, monkeypatch, capsys, tmp_path):
    import jax.numpy as jnp

    from benchmarks.speed.peers import int8

    monkeypatch.setattr(int8, "_product", lambda x, weight, name: jnp.zeros((len(x), len(weight[0]))))
    # The only case of that run; the figures of another are kept.
    figures = tmp_path / "all.json"
    figures.write_text(json.dumps({"cases": [{"name": "step, 1 layers, d 128, m 256, head 512, ReLU", "rows": []}]}))
    arguments = ["--toy", "--in-process", "--rounds=1", "--only=heads", "--peers=int8", f"--json={figures}", "--update"]
    assert speed["main"].main(arguments) == 1
    assert "from NumPy's result" in capsys.readouterr().out
    assert [case["name"][:4] for case in json.loads(figures.read_text())["cases"]] == ["head", "step"]


def test_no_byte_is_read_twice_out_of_a_cache(speed):
    sets_for = speed["timing"].sets_for
    assert sets_for(512 << 20) == 1
    assert sets_for(19 << 20) * (19 << 20) >= speed["timing"].APART
    assert sets_for(100) == speed["timing"].MOST_SETS


def test_a_peer_or_case_that_is_not_there_is_refused(speed, capsys):
    wrong = {"--peers=tensorflow": "not tensorflow", "--only=tails": "--only must leave a case"}
    for argument, words in wrong.items():
        with pytest.raises(SystemExit):
            speed["main"].main([argument])
        assert words in capsys.readouterr().err
