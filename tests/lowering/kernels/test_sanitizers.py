"""The native loops on random shapes: with sanitizers of addresses, undefined behaviour and threads, and on ARM."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "lowering" / "kernels" / "cpu"
ROUNDS = 150

# Each of the loops is empty on another processor than its own.
FUZZ = ["-ffp-contract=off", "-pthread", f"-I{SOURCES}", str(HERE / "fuzz.cc")]
FUZZ += [str(path) for path in sorted(SOURCES.glob("kernels_*.cc"))]
COMPILER = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


# Each access is checked as it is written, and nothing that is undefined is optimised away before: that takes a third of
# the time to compile. With the sanitizer of threads the program runs longer than it compiles.
SANITIZERS = {"address,undefined": "-O0", "thread": "-O1"}


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: the native kernels are not built here, either")
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_random_shapes(sanitizer, tmp_path):
    program = tmp_path / "fuzz"
    options = [SANITIZERS[sanitizer], f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    # Of what is told of a failure, lines are enough, and types are not written down.
    command = [COMPILER, "-std=c++17", "-g1", *options]
    subprocess.run([*command, *FUZZ, "-o", str(program)], check=True)
    run = [str(program), "7", str(ROUNDS)]
    done = subprocess.run(run, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        # Older thread sanitizers can't place their own memory where the system puts programs at random.
        done = subprocess.run(["setarch", "--addr-no-randomize", *run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{ROUNDS} rounds on portable" in done.stdout


CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")


@pytest.mark.skipif(
    CROSS is None or EMULATOR is None, reason="no compiler and emulator for ARM (g++-aarch64-linux-gnu, qemu-user)"
)
@pytest.mark.slow
def test_random_shapes_on_an_emulated_arm(tmp_path):
    program = str(tmp_path / "fuzz")
    subprocess.run([CROSS, "-std=c++17", "-O2", "-Wall", "-Werror", "-static", *FUZZ, "-o", program], check=True)
    done = subprocess.run([EMULATOR, "-cpu", "max", program, "7", str(ROUNDS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{ROUNDS} rounds on portable, NEON with dot products" in done.stdout
