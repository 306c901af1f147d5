from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hire_xform import cli, loading

ROOT = Path(__file__).parents[2]
SMALL = str(ROOT / "tests" / "goldens" / "small.py")
STEP, INPUTS = f"{SMALL}:decode_step", f"{SMALL}:inputs"

USER = """
import hire_xform as hx
import jax
import jax.numpy as jnp


def fine(w, x):
    return jax.nn.relu(x @ w) @ w.T


def branches(w, x):
    if x.sum() > 0:
        return x
    return x @ w


def wrong(w, x):
    y = x @ w
    raise RuntimeError("no such\\nluck")


def wrong_shapes(w, x):
    return w @ x


def inputs():
    return jax.ShapeDtypeStruct((8, 32), jnp.float32), jax.ShapeDtypeStruct((1, 8), jnp.float32)


ready = inputs()
own = hx.sparsify(fine, config=hx.Config(rules=(hx.Rule("*", skip=True),)))
weights_second = hx.sparsify(lambda x, w: fine(w, x), weights_argnums=1)


def second():
    return inputs()[::-1]


def a_list():
    return list(inputs())


def an_array():
    return inputs()[0]


def broken():
    raise KeyError("gone")


def leaves():
    raise SystemExit(3)


class Holder:
    step = staticmethod(fine)

    @property
    def ready(self):
        raise ValueError("not yet")

    @property
    def gone(self):
        return self.missing


holder = Holder()
loop = {}
loop["again"] = [loop, loop]
circular = (ready[0], loop)


def makes_circular():
    return circular


def named(x, *, w):
    return fine(w, x)


def by_name():
    return dict(zip("wx", inputs()))


def arrays():
    return jnp.ones((8, 32)), jnp.ones((1, 8))


def arrays_by_name():
    return dict(zip("wx", arrays()))
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A folder with a user's module, as the current one."""
    (tmp_path / "user_code.py").write_text(USER)
    (tmp_path / "raises.py").write_text("import os\nraise ValueError('on import')\n")
    (tmp_path / "unparsable.py").write_text("def f(:\n")
    (tmp_path / "needs.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("user_code", "raises", "unparsable", "needs"):
        sys.modules.pop(name, None)


def test_explain_says_what_the_trace_says(capsys):
    assert cli.main(["explain", STEP, "--inputs", INPUTS, "--force"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("2 sites rewritten")
    assert "scan[0]/jit:block[0]/dot_general[1]" in out
    assert err == ""


def test_without_force_toy_sizes_stay_dense(capsys):
    assert cli.main(["explain", STEP, "--inputs", INPUTS]) == 0
    assert capsys.readouterr().out.startswith("No site is rewritten")


@pytest.mark.parametrize("show", ["original", "sparse", "diff"])
def test_dump_shows_either_program_or_what_changed(capsys, show):
    assert cli.main(["dump", STEP, "--inputs", INPUTS, "--force", "--show", show]) == 0
    out = capsys.readouterr().out
    assert "2 sites rewritten" in out
    assert ("original:" in out, "sparse:" in out) == (show != "sparse", show != "original")


def test_dump_as_json_to_standard_output_is_nothing_but_json(capsys):
    assert cli.main(["dump", STEP, "--inputs", INPUTS, "--force", "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["plan"]["sites"]) == 2


def test_modules_of_the_current_folder_files_and_dotted_names_are_found(user, capsys):
    for target in ("user_code:fine", "user_code.py:fine", "./user_code.py:fine", "user_code:Holder.step"):
        assert cli.main(["explain", target, "--inputs", "user_code:inputs", "--force"]) == 0
        assert "1 site rewritten" in capsys.readouterr().out


def test_inputs_may_be_the_tuple_itself(user, capsys):
    assert cli.main(["explain", "user_code:fine", "--inputs", "user_code:ready", "--force"]) == 0
    assert "1 site rewritten" in capsys.readouterr().out


def test_sparsified_function_keeps_its_own_settings(user, capsys):
    assert cli.main(["explain", "user_code:own", "--inputs", "user_code:inputs"]) == 0
    assert "skip=True" in capsys.readouterr().out
    # Its own rules win over the one that --force adds.
    assert cli.main(["explain", "user_code:own", "--inputs", "user_code:inputs", "--force"]) == 0
    assert "skip=True" in capsys.readouterr().out
    assert cli.main(["explain", "user_code:weights_second", "--inputs", "user_code:second", "--force"]) == 0
    assert "1 site rewritten" in capsys.readouterr().out


def test_weights_argnums_say_where_the_weights_are(user, capsys):
    arguments = ["explain", "user_code:weights_second", "--inputs", "user_code:second", "--weights-argnums", "0"]
    assert cli.main(arguments) == 2
    assert "sparsified already" in capsys.readouterr().err
    arguments = ["explain", "user_code:fine", "--inputs", "user_code:inputs", "--force", "--weights-argnums", "1"]
    assert cli.main(arguments) == 0
    assert "No site" in capsys.readouterr().out


def test_weights_and_inputs_may_be_named(user, capsys):
    arguments = ["explain", "user_code:named", "--inputs", "user_code:by_name", "--force"]
    assert cli.main([*arguments, "--weights-argnames", "w"]) == 0
    assert "1 site rewritten" in capsys.readouterr().out


def test_compare_runs_both_and_says_how_far_results_are_apart(user, capsys):
    assert cli.main(["compare", "user_code:fine", "--inputs", "user_code:arrays", "--force", "--repeats", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("fine on cpu: sparse is ")
    assert "result  float32[1, 8]: largest difference" in out
    assert "1 site rewritten:" in out
    assert "2 calls are few" in out
    assert err == ""


def test_compare_as_json_to_a_file_with_what_each_site_gives(user, capsys):
    arguments = ["--inputs", "user_code:arrays_by_name", "--weights-argnames", "w", "--force", "--repeats", "1"]
    assert cli.main(["compare", "user_code:named", *arguments, "--sites", "--format", "json", "-o", "out.json"]) == 0
    assert capsys.readouterr().out == ""
    found = json.loads((user / "out.json").read_text())
    assert (found["name"], found["repeats"], len(found["sites"])) == ("named", 1, 1)
    assert isinstance(found["sites"][0]["saved"], float)


def test_compare_needs_arrays(user, capsys):
    assert cli.main(["compare", "user_code:fine", "--inputs", "user_code:inputs"]) == 2
    assert capsys.readouterr().err == (
        "hire-xform compare: w is a ShapeDtypeStruct; expected an array: the function is run\n"
    )


ERRORS = [
    (["dump", "user_code", "--inputs", "user_code:inputs"], ["'user_code' has no colon", "package.module:name"]),
    (["dump", "user_code:", "--inputs", "user_code:inputs"], ["'user_code:' has no name", "package.module:name"]),
    (["dump", ":fine", "--inputs", "user_code:inputs"], ["':fine' has no module or file", "package.module:name"]),
    (["dump", "user_code:fine.", "--inputs", "user_code:inputs"], ["'user_code:fine.' has no name"]),
    (
        ["dump", "user_code:holder.ready", "--inputs", "user_code:inputs"],
        ["'user_code:holder.ready': reading 'ready' raised ValueError: not yet", "user_code.py:60 in ready"],
    ),
    (["dump", "user_code:holder.gone", "--inputs", "user_code:inputs"], ["reading 'gone' raised AttributeError"]),
    (["dump", "user_code:holder.stp", "--inputs", "user_code:inputs"], ["has no 'stp'", "did you mean 'step'"]),
    (["dump", "user_code:fine", "--inputs", "user_code:circular"], ["is a tuple that holds itself"]),
    (["dump", "user_code:fine", "--inputs", "user_code:makes_circular"], ["returned a tuple that holds itself"]),
    (["explain", "user_code:named", "--inputs", "user_code:by_name", "--weights-argnames", "v"], ["has 'v'", "'w'"]),
    (["explain", "user_code:named", "--inputs", "user_code:by_name", "--weights-argnames", "a b"], ["expected names"]),
    (["dump", "nowhere.at.all:f", "--inputs", "user_code:inputs"], ["no module 'nowhere'"]),
    (["dump", "user_code.sub:f", "--inputs", "user_code:inputs"], ["no module 'user_code.sub'"]),
    (["dump", "nowhere.py:f", "--inputs", "user_code:inputs"], ["no file 'nowhere.py'"]),
    (["dump", "raises:f", "--inputs", "user_code:inputs"], ["ValueError: on import", "raises.py:2"]),
    (["dump", "raises.py:f", "--inputs", "user_code:inputs"], ["ValueError: on import", "raises.py:2"]),
    (["dump", "unparsable:f", "--inputs", "user_code:inputs"], ["SyntaxError", "unparsable.py:1"]),
    (["dump", "needs:f", "--inputs", "user_code:inputs"], ["ModuleNotFoundError", "not_installed", "needs.py:1"]),
    (["dump", "user_code:fin", "--inputs", "user_code:inputs"], ["has no 'fin'", "did you mean 'fine'"]),
    (["dump", "user_code:ready", "--inputs", "user_code:inputs"], ["is a tuple; expected a function"]),
    (["dump", "user_code:fine"], ["--inputs", "required"]),
    (["dump", "user_code:fine", "--inputs", "user_code:a_list"], ["returned a list; expected the tuple"]),
    (["dump", "user_code:fine", "--inputs", "user_code:an_array"], ["expected the tuple", "(x,)"]),
    (["dump", "user_code:fine", "--inputs", "user_code:broken"], ["KeyError: 'gone'", "user_code.py:48 in broken"]),
    (["dump", "user_code:fine", "--inputs", "user_code:leaves"], ["SystemExit: 3", "user_code.py:52 in leaves"]),
    (["dump", "user_code:branches", "--inputs", "user_code:inputs"], ["TracerBoolConversionError", "user_code.py:12"]),
    (["dump", "user_code:wrong", "--inputs", "user_code:inputs"], ["RuntimeError: no such (", "user_code.py:19"]),
    (
        ["explain", "user_code:wrong_shapes", "--inputs", "user_code:inputs"],
        ["TypeError: dot_general", "user_code.py:23"],
    ),
    (
        ["explain", "user_code:second", "--inputs", "user_code:inputs"],
        ["TypeError: second()", "user_code.py:3"],
    ),
    (["explain", "user_code:fine", "--inputs", "user_code:inputs", "--weights-argnums", "9"], ["weights_argnums=(9,)"]),
    (["explain", "user_code:fine", "--inputs", "user_code:inputs", "--weights-argnums", "x"], ["expected positions"]),
    (["dump", "user_code:fine", "--inputs", "user_code:inputs", "--show", "all"], ["--show", "'all'"]),
    (["dump", "user_code:fine", "--inputs", "user_code:inputs", "--format", "xml"], ["--format", "'xml'"]),
    (["dump", "user_code:fine", "--inputs", "user_code:inputs", "--bogus"], ["--bogus"]),
    (
        ["dump", "user_code:fine", "--inputs", "user_code:inputs", "-o", "no/such/folder"],
        ["can't write", "No such file"],
    ),
    (["dump", "user_code:fine", "--inputs", "user_code:inputs", "-o", "."], ["can't write '.'", "directory"]),
    (["compare", "user_code:second", "--inputs", "user_code:arrays"], ["too many positional", "sparsify(second)"]),
    (["compare", "user_code:wrong", "--inputs", "user_code:arrays"], ["RuntimeError: no such (", "user_code.py:19"]),
    (["compare", "user_code:fine", "--inputs", "user_code:arrays", "--repeats", "0"], ["'0'", "at least 1"]),
    (["compare", "user_code:fine", "--inputs", "user_code:arrays", "--format", "html"], ["--format", "'html'"]),
    ([], ["command", "required"]),
    (["bogus"], ["'bogus'"]),
    (["demo", "--tokens", "0"], ["'0'; expected an integer of at least 1"]),
]


@pytest.mark.parametrize(("arguments", "parts"), ERRORS, ids=[" ".join(a) or "none" for a, _ in ERRORS])
def test_mistakes_get_one_line_and_exit_code_two(user, capsys, arguments, parts):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("hire-xform")
    for part in parts:
        assert part in err


def test_output_goes_to_the_file_and_replaces_it(user, capsys):
    target = user / "page.html"
    target.write_text("old")
    os.chmod(target, 0o640)
    arguments = ["dump", "user_code:fine", "--inputs", "user_code:inputs", "--format", "html", "-o", "page.html"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == ""
    assert target.read_text().startswith("<!doctype html>")
    assert target.stat().st_mode & 0o777 == 0o640
    assert not [p for p in user.iterdir() if p.name.endswith(".partial")]


def test_failure_to_write_leaves_the_file_as_it_was(user, capsys, monkeypatch):
    target = user / "out.txt"
    target.write_text("old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cli.main(["dump", "user_code:fine", "--inputs", "user_code:inputs", "-o", "out.txt"]) == 2
    assert "can't write 'out.txt': No space left on device" in capsys.readouterr().err
    assert target.read_text() == "old"
    assert not [p for p in user.iterdir() if p.name.endswith(".partial")]


def test_output_through_a_link_keeps_the_link(user):
    (user / "real.txt").write_text("old")
    (user / "link.txt").symlink_to("real.txt")
    assert cli.main(["explain", "user_code:fine", "--inputs", "user_code:inputs", "-o", "link.txt"]) == 0
    assert (user / "link.txt").is_symlink()
    assert "stay" in (user / "real.txt").read_text()


def test_demo_outside_a_checkout_says_so(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "work"
    (folder / "examples").mkdir(parents=True)
    (folder / "examples" / "demo.py").write_text("raise AssertionError('another project ran')")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "lib" / "hire_xform" / "loading.py"))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == (
        f"hire-xform demo: there is no examples/tiny_lm in {folder}, above it or in {tmp_path / 'lib'}; run the demo "
        "in a checkout of the project\n"
    )


def test_demo_is_found_from_below_a_checkout(tmp_path, monkeypatch, capsys):
    """And without one above, beside the package, as of an editable installation."""
    examples = tmp_path / "tree" / "examples"
    (examples / "tiny_lm").mkdir(parents=True)
    (examples / "tiny_lm" / "model.py").touch()
    (examples / "demo.py").write_text("def run(**options): print(sorted(options), options['half'])")
    (tmp_path / "elsewhere").mkdir()
    for here, package in ((examples / "tiny_lm", tmp_path / "lib"), (tmp_path / "elsewhere", tmp_path / "tree")):
        monkeypatch.chdir(here)
        monkeypatch.setattr(loading, "__file__", str(package / "hire_xform" / "loading.py"))
        assert cli.main(["demo", "--half", "second"]) == 0
        assert capsys.readouterr().out == "['assets', 'half', 'positions', 'tokens'] second\n"


def test_a_file_finds_its_neighbours_where_the_current_folder_is_importable(tmp_path, monkeypatch, capsys):
    (tmp_path / "neighbour_of_step.py").write_text("def inputs(): return (1.0,)")
    (tmp_path / "step_of_file.py").write_text("from neighbour_of_step import inputs\ndef fun(x): return x + 1")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    target = tmp_path / "step_of_file.py"
    assert cli.main(["explain", f"{target}:fun", "--inputs", f"{target}:inputs"]) == 0, capsys.readouterr().err


def test_demo_without_weights_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(["demo", "--assets", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "lacks weights.safetensors" in err


def run(*arguments, folder=ROOT):
    program = [sys.executable, "-m", "hire_xform.cli", *arguments]
    return subprocess.run(program, capture_output=True, text=True, cwd=folder, timeout=300, check=False)


def test_program_takes_flags_of_absl_and_jax_and_exits_with_the_code():
    done = run("explain", STEP, "--inputs", INPUTS, "--jax_enable_x64", "--verbosity=-1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No site is rewritten")
    failed = run("explain", "no_colon", "--inputs", INPUTS)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1


def test_flags_of_jax_take_effect(tmp_path):
    (tmp_path / "doubles.py").write_text(
        textwrap.dedent("""
        import numpy as np

        def inputs():
            return (np.ones(3, np.float64),)

        def fun(x):
            return x + 1
        """)
    )
    done = run(
        "dump", "doubles:fun", "--inputs", "doubles:inputs", "--show=original", "--jax_enable_x64", folder=tmp_path
    )
    assert "float64[3]" in done.stdout, done.stderr


def test_reader_that_closes_early_is_no_error():
    command = f"{sys.executable} -m hire_xform.cli dump {STEP} --inputs {INPUTS} --force --format json | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.stderr == ""
    assert done.stdout == '{\n "functi'


@pytest.mark.slow
def test_demo_compares_dense_and_sparse(monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(ROOT)
    assert cli.main(["demo", "--tokens", "8", "--positions", "32", "--half", "first"]) == 0
    out = capsys.readouterr().out
    for part in (
        "loss, nats per token",
        "candidates",
        "weight bytes per token",
        "sites rewritten",
        "What it does not show",
    ):
        assert part in out
