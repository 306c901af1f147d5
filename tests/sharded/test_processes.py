"""The decoder of ``examples/sharded_decoder.py`` in one process and in four; and when one of them dies."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}


def lines(text, name):
    return re.findall(rf"^{name} +(\[[\d, ]+\])$", text, re.MULTILINE)


def decoded(*arguments):
    command = [sys.executable, "sharded_decoder.py", "--tokens", "6", *arguments]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, timeout=500, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_four_processes_decode_what_one_does():
    alone = decoded()
    assert "1 processes, 4 devices" in alone
    assert re.search(r"2 sites rewritten", alone)
    assert len(lines(alone, "sparse")) == 1
    together = decoded("--processes", "4")
    assert "4 processes, 4 devices" in together
    for name in ("dense", "sparse"):
        assert lines(together, name) == lines(alone, name) * 4


# Process 1 dies after three sparse tokens; the others are then in the middle of a collective.
DYING = """
import functools, os, sys
import jax
import sharded_decoder as example
import hire_xform as hx

def generate(step, weights, mesh, count, original=example.generate):
    if isinstance(step, hx.Sparsified) and jax.process_index() == 1:
        original(step, weights, mesh, 3)
        os._exit(3)
    return original(step, weights, mesh, count)

# Ten seconds until a process that says nothing counts as dead, where JAX waits for a hundred.
jax.distributed.initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=10)
example.generate = generate
sys.exit(example.main())
"""


@pytest.mark.slow
def test_a_process_that_dies_gives_the_others_an_error_of_jax(tmp_path):
    sys.path.insert(0, str(EXAMPLES))
    try:
        import sharded_decoder as example
    finally:
        sys.path.remove(str(EXAMPLES))
    checkpoint = tmp_path / "model.safetensors"
    example.write_checkpoint(checkpoint)
    command = [sys.executable, "-c", DYING, "--processes", "2", "--port", str(example.free_port())]
    command += ["--tokens", "6", "--checkpoint", str(checkpoint)]
    told = [(tmp_path / f"{i}.txt").open("w+") for i in range(2)]
    children = [
        subprocess.Popen([*command, "--process", str(i)], cwd=EXAMPLES, stdout=out, stderr=out, env=ENVIRONMENT)
        for i, out in enumerate(told)
    ]
    end = time.monotonic() + 400
    try:
        codes = [child.wait(timeout=max(1, end - time.monotonic())) for child in children]
    finally:
        for child in children:
            child.kill()
    text = Path(told[0].name).read_text()
    assert codes[1] == 3, Path(told[1].name).read_text()[-3000:]
    assert codes[0] not in (0, 3)
    assert lines(text, "dense")
    assert not lines(text, "sparse")
    assert re.search("gloo|coordination|disconnected|heartbeat", text, re.IGNORECASE), text[-3000:]
