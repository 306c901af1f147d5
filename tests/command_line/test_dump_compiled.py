"""``dump --show stablehlo|compiled --platform ...``: lowered and compiled programs, here and for chips that are not."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from extras import why_missing

import hire_xform as hx
from hire_xform.cli import main
from hire_xform.dump import targets
from hire_xform.dump.dump import dump
from hire_xform.dump.targets import Target

ROOT = Path(__file__).parents[2]
D, M, LAYERS = 256, 1024, 3

MODEL = f"""
import jax, jax.numpy as jnp
import hire_xform as hx

def step(w, x):
    def layer(x, own):
        return x + jax.nn.relu(x @ own[0]) @ own[1], None
    return jax.lax.scan(layer, x, (w["up"], w["down"]))[0]

shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
inputs = {{"up": shape({LAYERS}, {D}, {M}), "down": shape({LAYERS}, {M}, {D})}}, shape(1, {D})
approx = hx.sparsify(step, config=hx.approximate())
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return ["model.py:approx", "--inputs", "model.py:inputs", "--force"]


def test_what_the_compiler_here_made_of_it(model, capsys):
    assert main(["dump", *model, "--show", "compiled", "--platform", "cpu", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    dense, sparse = found["dense"], found["sparse"]
    weights = LAYERS * 2 * D * M * 2
    assert found["planned_bytes"]["dense"] == weights
    assert dense["counts"]["read"] >= weights
    assert dense["counts"]["read"] > sparse["counts"]["read"] > found["planned_bytes"]["sparse"] / 2
    assert dense["memory"]["arguments"] >= weights
    assert "ENTRY" in sparse["text"]
    if hx.backends()["hire_combine_rows"]["cpu"].startswith("native"):
        assert sparse["counts"]["kernels"]["hire_combine_rows"] == LAYERS


def test_the_table_has_dense_beside_sparse(model, capsys):
    assert main(["dump", *model, "--show", "compiled"]) == 0
    text = capsys.readouterr().out
    assert "model.py:approx, compiled for cpu" in text
    lines = {line[:34].strip(): line[34:].split() for line in text.split("HloModule")[0].splitlines() if line}
    assert lines["weights, by the plan"][0] == "3.1"
    assert set(lines) >= {"moved, by the program", "memory of temporaries", "steps that are launched"}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_what_is_lowered_for_another_platform_needs_no_compiler(platform, model, capsys, monkeypatch):
    monkeypatch.setattr(targets, "_is_installed", lambda name: False)
    assert main(["dump", *model, "--show", "stablehlo", "--platform", platform]) == 0
    assert "module @jit_run" in capsys.readouterr().out


@pytest.mark.parametrize(("platform", "profile"), [("tpu", "v5e"), ("tpu:v6e", "v6e"), ("cuda:h200", "h200")])
def test_plans_are_made_for_the_platform_that_is_asked_for(platform, profile, model, capsys):
    assert main(["dump", *model, "--platform", platform, "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["platform"] == ("gpu" if "cuda" in platform else "tpu")
    assert plan["profile"]["name"] == profile


@pytest.mark.parametrize(
    ("platform", "install"), [("cuda:h100", "pip install 'hire-xform[gpu-aot]'"), ("tpu:v5e", "[tpu-aot]")]
)
def test_a_compiler_that_is_not_there_is_named_and_how_to_get_it(platform, install, model, capsys, monkeypatch):
    monkeypatch.setattr(targets, "_is_installed", lambda name: False)
    assert main(["dump", *model, "--show", "compiled", "--platform", platform]) == 2
    said = capsys.readouterr().err
    assert f"no compiler for {platform} is here" in said
    assert install in said


def test_a_compiler_that_does_not_start_says_why(model, capsys, monkeypatch):
    def fails(platform, chip):
        raise RuntimeError("of another JAX")

    monkeypatch.setattr(targets, "_is_installed", lambda name: True)
    monkeypatch.setattr(targets, "_described", fails)
    assert main(["dump", *model, "--show", "compiled", "--platform", "tpu:v5p"]) == 2
    assert "the compiler for tpu:v5p can't be started: of another JAX; expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platform", "driver", "told"),
    [
        ("cuda", False, "1"),
        ("cuda:h200", False, "1"),
        ("cuda", True, None),
        ("tpu:v5e", False, None),
        ("cpu", False, None),
    ],
)
def test_a_gpu_that_is_only_described_needs_no_libraries_of_cuda(platform, driver, told, monkeypatch):
    """From JAX 0.11 on its plugin does not start without them, unless it is told, before JAX looks for plugins."""
    monkeypatch.setattr(targets, "_has_driver", lambda: driver)
    # Set first, so that it is gone again after the test.
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "0")
    monkeypatch.delenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
    Target.parse(platform)
    assert os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK") == told


def test_what_the_user_says_of_cudas_libraries_stays(monkeypatch):
    monkeypatch.setattr(targets, "_has_driver", lambda: False)
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "")
    Target("cuda")
    assert os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] == ""


@pytest.mark.parametrize("platform", ["metal", "tpu:h100", "cpu:", "cuda:v5e"])
def test_platforms_that_are_none_are_refused(platform):
    with pytest.raises(ValueError, match=f"platform='{platform}'; expected one of cpu, cuda, cuda:h100, "):
        Target.parse(platform)


def test_pages_are_not_made_of_lowered_programs(model, capsys):
    assert main(["dump", *model, "--show", "compiled", "--format", "html"]) == 2
    assert "format='html' with show='compiled'; expected 'text' or 'json'" in capsys.readouterr().err


def test_arguments_on_several_devices_are_refused():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    traced = hx.sparsify(lambda w, x: x @ w).trace(
        jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=split), jnp.ones((1, 8))
    )
    if any(placed is not None for placed in traced.call.placed):
        with pytest.raises(ValueError, match="expected arguments on one"):
            dump(traced, show="compiled")


def compiled_elsewhere(tmp_path, platform):
    """By a process of its own: a compiler that was started stays."""
    (tmp_path / "model.py").write_text(MODEL)
    command = [sys.executable, "-m", "hire_xform.cli", "dump", "model.py:approx", "--inputs", "model.py:inputs"]
    command += ["--force", "--show", "compiled", "--format", "json", "--platform", platform]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


def check_bytes(found, most):
    """The dense program reads its weights once, and up to ``most`` times where products of them are written down."""
    weights = LAYERS * 2 * D * M * 2
    assert weights <= found["dense"]["counts"]["read"] < most * weights
    assert found["sparse"]["counts"]["read"] < found["dense"]["counts"]["read"]
    assert not found["sparse"]["counts"]["endless"]


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_what_a_tpus_compiler_made_of_it(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip(why_missing("tpu-aot", ImportError("libtpu")))
    found = compiled_elsewhere(tmp_path, "tpu:v5e")
    assert (found["device"], found["profile"]) == ("TPU v5 lite", "v5e, modelled")
    assert found["dense"]["counts"]["cycles"] > 0
    assert "T(8,128)" in found["sparse"]["text"]
    check_bytes(found, 1.1)


@pytest.mark.slow
@pytest.mark.gpu_aot
def test_what_a_gpus_compiler_made_of_it(tmp_path):
    if not any(map(targets._is_installed, targets.PACKAGES["cuda"])):
        pytest.skip("needs the compiler for CUDA: make gpu")
    found = compiled_elsewhere(tmp_path, "cuda:h100")
    assert "H100" in found["device"]
    assert found["profile"] == "h100, modelled"
    check_bytes(found, 2)
