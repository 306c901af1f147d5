"""The example scripts run as a user runs them, and say what they should."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

# Script -> (the package it needs, the extra that installs it, sites it must report).
SCRIPTS = {
    "plain_jax.py": ("jax", "test", 2),
    "flax_linen.py": ("flax", "flax", 2),
    "flax_nnx.py": ("flax", "flax", 3),
    "equinox_decoder.py": ("equinox", "equinox", 3),
    "haiku_decoder.py": ("haiku", "haiku", 2),
    "keras_decoder.py": ("keras", "keras", 3),
    "transformers_opt.py": ("transformers", "transformers", 3),
}


def test_every_script_is_run_or_named_here():
    written = {path.name for path in EXAMPLES.glob("*.py")}
    assert set(SCRIPTS) <= written
    # Three train for an hour, with what two others hold; one is run by tests/sharded/test_processes.py. The demo is run
    # by tests/command_line/test_cli.py, and others look inside programs with its helper; the chat, by
    # tests/end_to_end/test_smollm2.py.
    training = {"train_tiny_lm.py", "finetune_tiny_lm.py", "tiny_lm_training.py", "library_corpus.py"}
    training |= {"train_relu_squared.py"}
    others = training | {"sharded_decoder.py", "demo.py", "observe.py", "chat.py"}
    assert written - set(SCRIPTS) <= others


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_rewrites_its_model_and_agrees_with_it(script):
    package, extra, sites = SCRIPTS[script]
    # As a user runs it: with XLA as it is, not as the suite sets it.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(EXAMPLES / script)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    missing = re.search(rf"^(ImportError|ModuleNotFoundError): .*'{package}.*", ran.stderr, re.MULTILINE)
    if missing and os.environ.get("HIRE_REQUIRE_EXTRAS", "0") != "1":
        pytest.skip(f"{script} needs pip install 'hire-xform[{extra}]': {missing[0]}")
    assert ran.returncode == 0, ran.stderr
    assert re.search(rf"^{sites} sites rewritten for cpu", ran.stdout, re.MULTILINE), ran.stdout
    assert len(re.findall(r"^  vocab  ", ran.stdout, re.MULTILINE)) == 1, ran.stdout
    agreed, steps = map(int, re.search(r"^(\d+) of (\d+) greedy tokens agree", ran.stdout, re.MULTILINE).groups())
    assert agreed >= 0.9 * steps, ran.stdout
