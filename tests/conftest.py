"""Settings of the whole suite."""

import os
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


@pytest.fixture
def packs(monkeypatch) -> list:
    """The leaves that are packed, one entry for each packed form."""
    from hire_xform import packing  # after JAX's flags are set

    calls = []
    original = packing.pack_array

    def counted(key, leaf, rows=None):
        calls.append(leaf)
        return original(key, leaf, rows)

    monkeypatch.setattr(packing, "pack_array", counted)
    return calls
