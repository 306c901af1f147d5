"""What the CPU at hand does fast: how products of narrow numbers compare with reading, by instruction set and kernels.

A stand-in for measuring: the figures are those of two machines, and say by how much a product of 8 bits falls short of
the speed at which a dense one in f32 reads its weights. What is planned here for a CPU elsewhere is planned for this.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from dataclasses import dataclass

from hire_xform.lowering.kernels.cpu import library

# Names an instruction set, a key of `MACHINES`, whatever the machine has: for tests, and to plan for another CPU.
VARIABLE = "HIRE_CPU"


@dataclass(frozen=True)
class Machine:
    """A CPU, by its instruction set, with the native kernels or without.

    Attributes:
      name: for reports.
      int8: bytes of 8-bit entries that a product reads in the time a dense product in f32 reads one byte.
      int4: the same of 4-bit entries, two to a byte, which are taken apart first.
      row: what a byte of a row that is read out of order costs, of those of a dense product.
      gathered: the same where more rows are read than a few megabytes, which XLA gathers into one array first: its
        pages are new at every call.
      whose: whose products these are, for reports.
    """

    name: str
    int8: float
    int4: float
    row: float = 1.5
    gathered: float = 8.0
    whose: str = "XLA's "


# Measured with one token on matrices of 64 to 512 MB, two cores: with VNNI 12 of 37 to 28 of 42 GB/s in 8 bits, and 9
# to 11 of 42 in 4; with AVX2 alone 5 to 6 of 29 and 12 of 42 in 8, and 7 of 42 in 4. Others are taken for as slow. The
# native kernels read 29 to 31 of 37 GB/s in 8 bits and 30 to 32 in 4, and chosen rows at 20 to 30; somewhat less is
# counted on.
MACHINES = {
    "avx512_vnni": Machine("AVX-512 VNNI", 0.5, 0.22),
    "avx2": Machine("AVX2, no AVX-512 VNNI", 0.2, 0.1),
    "other": Machine(f"{platform.machine() or 'unknown'}, no AVX-512 VNNI", 0.2, 0.1),
    "native_avx512_vnni": Machine("AVX-512 VNNI, native kernels", 0.7, 0.6, gathered=1.5, whose=""),
    "native_avx2": Machine("AVX2, native kernels", 0.6, 0.6, gathered=1.5, whose=""),
}
_NATIVE = {"AVX-512 VNNI": "native_avx512_vnni", "AVX2": "native_avx2"}


def machine_here() -> Machine:
    """The CPU of this process: that of ``HIRE_CPU``, or else what it says of itself and ``XLA_FLAGS`` leave of it.

    Raises:
      ValueError: ``HIRE_CPU`` names no instruction set that is known.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return MACHINES[_native() or _detected(os.environ.get("XLA_FLAGS", ""))]
    if named not in MACHINES:
        raise ValueError(f"{VARIABLE}={named!r}: expected one of {', '.join(MACHINES)}, or nothing to look")
    return MACHINES[named]


def _native() -> str | None:
    """The key of the machine whose native kernels run here; None where none do, or none that are fast."""
    found = library.instruction_sets()
    return _NATIVE.get(found[0]) if found else None


@functools.lru_cache
def _detected(xla_flags: str) -> str:
    flags = _cpu_flags()
    most = re.findall(r"--xla_cpu_max_isa=(\w+)", xla_flags)
    # AVX512_VNNI and all after it (AVX512_BF16, AMX, ...) have it; of the names before it only these are short of it.
    allowed = not most or most[-1].upper() not in ("SSE4_2", "AVX", "AVX2", "AVX512")
    if "avx512_vnni" in flags and allowed:
        return "avx512_vnni"
    return "avx2" if "avx2" in flags else "other"


def _cpu_flags() -> frozenset[str]:
    """Names of the CPU's instruction sets, as Linux spells them; none where they can't be read."""
    try:
        if platform.system() == "Linux":
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
                line = next((line for line in info if line.startswith("flags")), "")
            return frozenset(line.partition(":")[2].split())
        if platform.system() == "Darwin" and platform.machine() == "x86_64":
            asked = ["sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features"]
            told = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=False).stdout
            return frozenset(told.lower().replace("avx512vnni", "avx512_vnni").split())
    except (OSError, subprocess.SubprocessError):
        pass
    return frozenset()
