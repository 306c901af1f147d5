"""Settings of the whole suite."""

import gc
import os
from collections.abc import Iterator
from importlib import metadata

import pytest

# The suite compiles many small programs and runs each once: let XLA's CPU backend compile quickly (up to three times as
# fast) rather than well. What is set outside comes last and wins; HIRE_TEST_OPTIMISED=1 leaves XLA as users have it.
_QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if metadata.version("jaxlib").startswith("0.10."):
    # Unknown to later versions, which end the process at a flag they don't know.
    _QUICK.append("--xla_cpu_use_fusion_emitters=false")
if os.environ.get("HIRE_TEST_OPTIMISED", "0") != "1":
    os.environ["XLA_FLAGS"] = " ".join([*_QUICK, os.environ.get("XLA_FLAGS", "")]).strip()
# Unless told otherwise: the TPU's compiler, which some tests have installed, would have JAX look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Plans hang on the CPU's instruction set: the same one wherever the suite runs.
os.environ["HIRE_CPU"] = "avx512_vnni"
# What passes make is verified, and nothing that they raise is handled silently: under 1 % of the suite's time.
os.environ.setdefault("HIRE_DEBUG", "1")


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_dropped() -> Iterator[None]:
    """Each program that XLA compiled for the CPU maps memory, of which a process may have 65,530 pieces on Linux.

    With those of the whole suite in one process, the compiler ends it.
    """
    yield
    import jax  # after its flags are set

    jax.clear_caches()
    gc.collect()


@pytest.fixture
def packs(monkeypatch) -> list:
    """The leaves that are packed, one entry for each packed form."""
    from hire_xform.call import packing  # after JAX's flags are set

    calls = []
    original = packing.pack_array

    def counted(key, leaf, rows=None):
        calls.append(leaf)
        return original(key, leaf, rows)

    monkeypatch.setattr(packing, "pack_array", counted)
    return calls
