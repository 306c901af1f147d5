"""The profiles that are built in, and which of them is that of a machine which nobody has measured.

Those of CPUs go by instruction set, with the native kernels and without: each is that of two machines that were
measured, and cautious. Those of GPUs and TPUs, in ``accelerators.py``, go by the kind of device, and are modelled.
"""

from __future__ import annotations

import functools
import os
import platform as host
import re
import subprocess

import jax

from hire_xform.lowering.kernels.cpu import library
from hire_xform.passes.plan.accelerators import ACCELERATORS, of_device_kind
from hire_xform.passes.plan.profile import FORMS, ROWS, SCORES, SPELLINGS, ByTokens, Profile, RowTimes

PLATFORMS = ("cpu", "gpu", "tpu")
# Bytes a second that a CPU's dense products in f32 read. Decisions hang on ratios to it, predicted times on itself.
CPU_MEMORY = 30e9
# Bytes of rows up to which an array that they are gathered into is the same at every call.
GATHERED = 8 << 20
# What a byte of rows costs that lie anywhere on a CPU, of those of a dense product; and of those beyond `GATHERED`,
# which XLA gathers into one array first: its pages are new at every call.
ROW, NEW_PAGES = 1.5, 8.0
# What a site on a CPU costs besides reading, as the bytes that a dense product reads in that time: once, for each row
# and token that is chosen from, and more where each is bounded.
FIXED_BYTES, CHOOSING, BOUNDING = 1 << 20, 64, 96


def _cpu(name: str, int8: float, int4: float, kernels: bool = False) -> Profile:
    """A CPU whose products of few bits read at these shares of the speed of dense ones in f32, whatever the tokens."""
    second = 1.0 / CPU_MEMORY

    def always(times: float) -> ByTokens:
        return ((1, times * second),)

    pages = ROW if kernels else NEW_PAGES
    points = (GATHERED, ROW * GATHERED * second), (2 * GATHERED, (ROW + pages) * GATHERED * second)
    shares = {"int8": int8, "int4": int4}
    return Profile(
        name=name,
        platform="cpu",
        source="built in",
        kernels=kernels,
        dense={form: {how: _dense_on_cpu(form, how) for how in SPELLINGS} for form in FORMS},
        scores={kind: always(1.0 / shares.get(kind.split()[0], 1.0)) for kind in SCORES},
        score_rows=((1, 0.0),),
        rows={step: RowTimes(points=points, each=0.0, further=0.0) for step in ROWS},
        fixed=FIXED_BYTES * second,
        choosing=CHOOSING * second,
        bounding=BOUNDING * second,
        picking=0.0,
    )


def _dense_on_cpu(form: str, spelling: str) -> ByTokens:
    """What XLA's CPU backend takes for a byte of dense weights.

    It reads those of f32 as they are. Those of 16 bits it reads as they are stored in two cases: of one token where
    rows are stored, and of several where rows are stored and the result is f32. All else it widens whole, at every
    call, which takes as long as f32 weights at least (six to sixty times as long, on two cores). Measured on JAX 0.10;
    where versions or spellings differ, the faster is counted on.
    """
    second = 1.0 / CPU_MEMORY
    if form == "f32":
        return ((1, second),)
    if form == "8 bits widened":
        return ((1, 4 * second),)
    one = second if spelling != "x @ w" else 2 * second
    several = second if spelling != "x @ w" and form == "16 bits to f32" else 2 * second
    return (1, one), (2, several), (3, several)


# One token, matrices of 64 to 512 MB, two cores: with VNNI XLA's products of 8 bits read 12 of 37 to 28 of 42 GB/s, and
# of 4 bits 9 to 11 of 42; with AVX2 alone 5 to 6 of 29 and 12 of 42 in 8, and 7 of 42 in 4. Other CPUs are taken for as
# slow. The native kernels read 29 to 31 of 37 GB/s in 8 bits and 30 to 32 in 4, and chosen rows at 20 to 30; somewhat
# less is counted on.
_CPUS = {
    "avx512_vnni": _cpu("AVX-512 VNNI", 0.5, 0.22),
    "avx2": _cpu("AVX2, no AVX-512 VNNI", 0.2, 0.1),
    "other": _cpu(f"{host.machine() or 'unknown'}, no AVX-512 VNNI", 0.2, 0.1),
    "native_avx512_vnni": _cpu("AVX-512 VNNI, native kernels", 0.7, 0.6, kernels=True),
    "native_avx2": _cpu("AVX2, native kernels", 0.6, 0.6, kernels=True),
}
_NATIVE = {"AVX-512 VNNI": "native_avx512_vnni", "AVX2": "native_avx2"}


BUILT_IN: dict[str, Profile] = {**_CPUS, **ACCELERATORS}


def built_in_for(platform: str) -> Profile:
    """The profile of a platform's devices here, as far as it is known without measuring."""
    if platform == "cpu":
        return BUILT_IN[_native() or instruction_set(os.environ.get("XLA_FLAGS", ""))]
    return of_device_kind(platform, device_kind(platform))


def device_kind(platform: str) -> str:
    """What JAX calls the kind of a platform's devices here; empty where there are none, as ahead of time."""
    try:
        return str(jax.devices(platform)[0].device_kind)
    except (RuntimeError, IndexError):
        return ""


def _native() -> str | None:
    """The name of the profile whose native kernels run here; None where none do, or none that are fast."""
    found = library.instruction_sets()
    return _NATIVE.get(found[0]) if found else None


@functools.lru_cache
def instruction_set(xla_flags: str) -> str:
    """What XLA's code for this CPU is of: "avx512_vnni", "avx2" or "other"."""
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
        if host.system() == "Linux":
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
                line = next((line for line in info if line.startswith("flags")), "")
            return frozenset(line.partition(":")[2].split())
        if host.system() == "Darwin" and host.machine() == "x86_64":
            asked = ["sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features"]
            told = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=False).stdout
            return frozenset(told.lower().replace("avx512vnni", "avx512_vnni").split())
    except (OSError, subprocess.SubprocessError):
        pass
    return frozenset()
