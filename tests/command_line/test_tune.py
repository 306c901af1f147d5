"""``hire-xform tune``."""

import json

import pytest

from hire_xform import cli
from hire_xform.passes.plan.machine import BUILT_IN
from hire_xform.tuning import keeping


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(keeping.VARIABLE)
    monkeypatch.setattr(cli, "measure", lambda platform: BUILT_IN["native_avx2"])
    yield tmp_path / "hire_xform"
    keeping._kept.cache_clear()


def run(capsys, *arguments):
    code = cli.main(["tune", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_it_measures_keeps_and_shows(capsys, folder):
    code, out, _ = run(capsys, "--show")
    assert code == 0
    assert "none is kept in" in out
    assert not folder.exists()
    code, out, _ = run(capsys)
    assert code == 0
    (path,) = folder.iterdir()
    for part in (
        "AVX2, native kernels",
        "16 bits to f32: x @ w.T",
        "int8 fine",
        "GB/s",
        "measured on platform cpu; jax ",
    ):
        assert part in out
    assert out.endswith(f"kept in {path}\n")
    assert keeping.read(path)[0] == BUILT_IN["native_avx2"]
    code, out, _ = run(capsys, "--show")
    assert f"kept in {path}; HIRE_TUNE is not set" in out


def test_a_file_is_written_instead(capsys, folder, tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    code, out, _ = run(capsys, "-o", str(path))
    assert code == 0
    assert f"kept in {path}" in out
    assert not folder.exists()
    assert json.loads(path.read_text())["key"]["platform"] == "cpu"
    monkeypatch.setenv(keeping.VARIABLE, str(path))
    assert f"it is that of the file {path}" in run(capsys, "--show")[1]


def test_what_is_wrong_is_said_in_a_line(capsys, tmp_path, monkeypatch):
    code, _, err = run(capsys, "-o", str(tmp_path / "nowhere" / "file"))
    assert code == 2
    assert "can't write" in err
    monkeypatch.setenv(keeping.VARIABLE, "sse9")
    code, _, err = run(capsys, "--show")
    assert code == 2
    assert err.startswith("hire-xform tune: HIRE_TUNE='sse9': expected off, auto,")
