"""Settings of the whole suite."""

import gc
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib import metadata

import pytest

# The suite compiles many small programs and runs each once: let XLA's CPU backend compile quickly (up to three times as
# fast) rather than well. What is set outside comes last and wins; HIRE_TEST_OPTIMISED=1 leaves XLA as users have it.
_QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
# One LLVM module a program: at these sizes each further one costs more than it saves.
_QUICK.append("--xla_cpu_parallel_codegen_split_count=1")
if metadata.version("jaxlib").startswith(("0.9.", "0.10.")):
    # Unknown to later versions, which end the process at a flag they don't know.
    _QUICK.append("--xla_cpu_use_fusion_emitters=false")
if os.environ.get("HIRE_TEST_OPTIMISED", "0") != "1":
    os.environ["XLA_FLAGS"] = " ".join([*_QUICK, os.environ.get("XLA_FLAGS", "")]).strip()
# What one process compiled it does not compile again, though programs are dropped after each module: a seventh of the
# suite's time. Each has a folder of its own, since JAX writes such files in place.
_COMPILED = tempfile.TemporaryDirectory(prefix="hire_xform-compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Unless told otherwise: the TPU's compiler, which some tests have installed, would have JAX look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Plans hang on what the machine takes for what: the same profile wherever the suite runs, whatever is kept there.
os.environ["HIRE_TUNE"] = "avx512_vnni"
# What passes make is verified, and nothing that they raise is handled silently: under 1 % of the suite's time.
os.environ.setdefault("HIRE_DEBUG", "1")


# Traces make many objects that live on and few cycles: those are looked for less often.
gc.set_threshold(10_000, 20, 20)


# Of a test: its place among the cases of its function.
_NUMBER = pytest.StashKey[int]()


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--other-jax",
        action="store_true",
        help="a further version of JAX: leave out what the marker any_jax says is the same on every one",
    )


def _every(why: str, every: int | None = None) -> int | None:
    """The arguments of ``any_jax``, so that a marker without a reason or with a slip of the pen is an error."""
    return every


def pytest_collection_modifyitems(config, items) -> None:
    """Leaves out, with ``--other-jax``, what ``any_jax`` marks; of ``every=n``, all but the first of every n cases."""
    seen: Counter[str] = Counter()
    kept, left_out = [], []
    for item in items:
        function = item.nodeid.split("[")[0]
        item.stash[_NUMBER] = number = seen[function]
        seen[function] += 1
        mark = item.get_closest_marker("any_jax")
        every = 1 if mark is None else _every(*mark.args, **mark.kwargs)
        (left_out if every is None or number % every else kept).append(item)
    if not config.getoption("--other-jax"):
        return
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_sessionfinish() -> None:
    """Not left to the interpreter's end, which a worker may not come to."""
    _COMPILED.cleanup()


@pytest.fixture
def evaluated(request) -> bool:
    """Whether a case compiles and runs what it finds: on a further version of JAX every third.

    What is found hangs on the jaxpr, which each version spells in its own way. What is spliced in then is the same
    subgraph, whatever the spelling was.
    """
    return not request.config.getoption("--other-jax") or request.node.stash[_NUMBER] % 3 == 0


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

    def counted(key, leaf, *others, rows=None):
        calls.append(leaf)
        return original(key, leaf, *others, rows=rows)

    monkeypatch.setattr(packing, "pack_array", counted)
    return calls


@pytest.fixture
def portable_forms(monkeypatch) -> None:
    """Steps in their portable forms, which no kernel takes the place of."""
    from hire_xform.lowering.primitives import kernels

    monkeypatch.setattr(kernels, "_kernels", {})
    monkeypatch.setattr(kernels, "_built_in", {})
    monkeypatch.setattr(kernels, "_missing", {})


@pytest.fixture
def untaught(monkeypatch) -> None:
    """What a test says of the axes of primitives is forgotten after it."""
    from hire_xform.passes.ir import axis_rules

    monkeypatch.setattr(axis_rules, "_RULES", axis_rules.registered())
