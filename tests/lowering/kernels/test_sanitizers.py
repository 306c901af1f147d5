"""The native kernels on random shapes, built with sanitizers: of addresses and undefined behaviour, and of threads."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "lowering" / "kernels" / "cpu"
ROUNDS = 150


COMPILER = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: the native kernels are not built here, either")
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_random_shapes(sanitizer, tmp_path):
    program = tmp_path / "fuzz"
    command = [COMPILER, "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    command += ["-ffp-contract=off", "-pthread", f"-I{SOURCES}", str(HERE / "fuzz.cc")]
    command += [str(SOURCES / f"kernels_{name}.cc") for name in ("portable", "avx2", "avx512")]
    subprocess.run([*command, "-o", str(program)], check=True)
    run = [str(program), "7", str(ROUNDS)]
    done = subprocess.run(run, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        # Older thread sanitizers can't place their own memory where the system puts programs at random.
        done = subprocess.run(["setarch", "--addr-no-randomize", *run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{ROUNDS} rounds on portable" in done.stdout
