"""The Python of README.md and of every page in ``docs/`` runs, and files that are named there exist.

A page is one program: its blocks run in order and share their names. What a reader takes for granted (a model, batches)
comes from a comment at its head that starts with ``setup``; one that starts with ``check`` looks at what came out.
README's block is a program of its own, and prints what stands below it.
"""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hire_xform import cli
from hire_xform.calibrating import run
from hire_xform.config import Config

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [*PAGES, *(ROOT / f"{name}.md" for name in ("README", "BUILD", "CHANGELOG", "CONTRIBUTING"))]
# Pages that begin by splitting the CPU into devices, which JAX does only before it starts.
OWN_PROCESS = {"sharded.md"}
# Blocks that can't run, by page: none.
NOT_RUN: dict[str, int] = {}


def blocks(path: Path, kind: str) -> list[tuple[int, str]]:
    """The fenced blocks of a kind, each with the number of its first line; comments are Python."""
    found = []
    for match in re.finditer(
        rf"^```({kind})\n(.*?)^```$|^<!-- (?:setup|check)\n(.*?)^-->$", path.read_text(), re.M | re.S
    ):
        text = match[2] or (match[3] if kind == "python" else None)
        if text:
            found.append((path.read_text().count("\n", 0, match.start()) + 2, text))
    return found


def program(path: Path) -> str:
    """A page's Python, each line at its place in the page, so that errors name the page's line."""
    lines: list[str] = []
    for number, text in blocks(path, "python"):
        lines += [""] * (number - 1 - len(lines)) + text.splitlines()
    return "\n".join(lines) + "\n"


WITH_PYTHON = [path for path in PAGES if blocks(path, "python")]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_blocks_that_are_not_run_are_counted():
    marked = {path.name: len(re.findall(r"^```python .+$", path.read_text(), re.MULTILINE)) for path in TEXTS}
    assert {name: count for name, count in marked.items() if count} == NOT_RUN
    assert len(WITH_PYTHON) >= 6


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder as the current one, every site forced, since the model is too small for any to pay, and few
    predictors to measure, each of which takes a second."""
    choose = Config.choose
    monkeypatch.setattr(Config, "choose", lambda *given: dataclasses.replace(choose(*given), force=True))
    monkeypatch.setattr(run, "PREDICTORS", run.PREDICTORS[:1])
    monkeypatch.setattr(run, "CERTIFIED_PREDICTORS", run.CERTIFIED_PREDICTORS[:1])
    monkeypatch.setattr(sys, "path", [*sys.path, str(TESTS)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.any_jax("pages call what other tests call on every JAX", every=2)
@pytest.mark.parametrize("path", WITH_PYTHON, ids=named)
def test_a_page_runs(path, elsewhere, untaught):
    if path.name in OWN_PROCESS:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        (elsewhere / path.name).write_text(program(path))
        run_file(elsewhere / path.name, XLA_FLAGS=flags)
        return
    exec(compile(program(path), str(path), "exec"), {"__name__": "page"})


def run_file(path: Path, **environment: str) -> str:
    """What a Python file prints."""
    paths = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, path.name],
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_readme_s_example_prints_what_stands_below_it(tmp_path):
    ((_, code),), ((_, expected),) = blocks(ROOT / "README.md", "python"), blocks(ROOT / "README.md", "text")
    file = tmp_path / "example.py"
    file.write_text(code)
    # With XLA as a user has it, planned for the machine that is named above what is printed.
    printed = run_file(file, XLA_FLAGS="", HIRE_TUNE="native_avx512_vnni")
    assert printed.replace(str(file), file.name) == expected


def test_command_lines_run(elsewhere, monkeypatch, capsys):
    (elsewhere / "pkg").mkdir()
    (elsewhere / "pkg" / "mod.py").write_text(
        "import jax, jax.numpy as jnp\nfrom goldens.small import decode_step, inputs\n"
        "def example_inputs():\n    return jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), inputs())\n"
    )
    text = "".join(text for _, text in blocks(ROOT / "docs" / "command_line.md", "sh")).replace("\\\n", "")
    commands = [shlex.split(line)[1:] for line in text.splitlines() if line != "hire-xform demo"]
    assert {command[0] for command in commands} == {"explain", "dump", "compare", "tune", "plan-mesh"}
    for command in commands:
        assert cli.main(command) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "2 sites rewritten" in out
    assert "decode_step on cpu: sparse is" in out
    assert (elsewhere / "out.html").read_text().startswith("<!doctype html>")


NAMED = re.compile(r"(?<![\w/.])((?:[\w.-]+/)+[\w.-]+\.(?:py|md|toml|txt|json|safetensors)|\w+\.md)\b")
# What stands for a file of the reader's.
ANY_FILE = {"path/to/file.py"}


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_files_that_are_named_exist(path):
    """From the root, or from the page's own folder."""
    found = set(NAMED.findall(path.read_text())) - ANY_FILE
    assert not [name for name in sorted(found) if not (ROOT / name).exists() and not (path.parent / name).exists()]


def test_hooks_before_a_commit_are_the_commands_of_the_makefile():
    recipes = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    entries = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(entries) == 3
    assert not [entry for entry in entries if f"\t{entry}" not in recipes]
