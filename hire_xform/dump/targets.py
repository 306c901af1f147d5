"""Devices to compile for that need not be here: ``cpu``, ``cuda:h100``, ``tpu:v5e``, described to their compilers.

The compilers come with packages of their own, libtpu and JAX's plugin for CUDA, which need neither chip nor driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from hire_xform.dump.gpu_targets import GPUS
from hire_xform.passes.plan.placement import platform_named

# Chips of TPUs, as topologies of one.
TPUS = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v5p": "v5p:1x1x1"}
# The chips of a platform, the one first that is meant where none is said and none is here; and its compiler's packages.
CHIPS = {"cpu": (), "cuda": tuple(GPUS), "tpu": tuple(TPUS)}
PACKAGES = {
    "cuda": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"),
    "tpu": ("libtpu",),
}
INSTALL = {
    "cuda": "pip install 'hire-xform[gpu-aot]', or jax-cuda12-plugin or jax-cuda13-plugin, with its jax-cuda*-pjrt, in "
    "the version of jax",
    "tpu": "pip install 'hire-xform[tpu-aot]', or jax[tpu]",
}
# libtpu asks the machine which TPU it is part of, unless it is told.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
# JAX's plugin for CUDA looks for CUDA's libraries when it starts, and from 0.11 on does not start without them, unless
# this is set. Its compiler needs none.
UNCHECKED = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"


@dataclass(frozen=True)
class Target:
    """What to lower or compile for.

    Attributes:
      platform: "cpu", "cuda" or "tpu", as JAX lowers for it.
      chip: which one, such as "v5e"; None for a device of the platform that is here, or the first that is known.
    """

    platform: str
    chip: str | None = None

    def __post_init__(self) -> None:
        """Tells the plugin for CUDA that no GPU is meant, before JAX looks for plugins: it looks once."""
        if self.platform == "cuda" and not _has_driver():
            os.environ.setdefault(UNCHECKED, "1")

    @classmethod
    def parse(cls, text: str) -> Target:
        """From ``platform`` or ``platform:chip``.

        Raises:
          ValueError: there is no such platform, or no such chip of it is known.
        """
        platform, _, chip = text.partition(":")
        if platform not in CHIPS or (chip and chip not in CHIPS[platform]) or text.endswith(":"):
            known = [name for p, chips in CHIPS.items() for name in (p, *(f"{p}:{chip}" for chip in chips))]
            raise ValueError(f"platform={text!r}; expected one of {', '.join(known)}")
        return cls(platform, chip or None)

    @property
    def planned(self) -> str:
        """The platform as plans have it."""
        return platform_named(self.platform)

    @property
    def elsewhere(self) -> str | None:
        """What JAX calls its kind, or the like, for a profile; None for the CPU, and for a device that is here."""
        if self.platform == "cpu" or (self.chip is None and _here(self.platform) is not None):
            return None
        chip = self.chip or CHIPS[self.platform][0]
        return f"TPU {chip}" if self.platform == "tpu" else f"NVIDIA {chip.upper()}"

    def device(self) -> Any:
        """A device of it, here or described to its compiler.

        Raises:
          ValueError: there is no compiler for it, or it does not start; the message says what to install.
        """
        here = None if self.chip else _here(self.platform)
        if here is not None:
            return here
        chip = self.chip or CHIPS[self.platform][0]
        if not any(map(_is_installed, PACKAGES[self.platform])):
            raise ValueError(
                f"no compiler for {self.platform}:{chip} is here, and no such device; expected one of the packages "
                f"{', '.join(PACKAGES[self.platform])}: {INSTALL[self.platform]}"
            )
        try:
            return _described(self.platform, chip)
        except Exception as error:
            raise ValueError(
                f"the compiler for {self.platform}:{chip} can't be started: {error}; expected one that belongs to JAX "
                f"{jax.__version__}: {INSTALL[self.platform]}"
            ) from error

    def placed(self, tree: Any) -> Any:
        """Arrays and shapes as shapes on its device; all else as it is."""
        sharding = SingleDeviceSharding(self.device())

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) and not hasattr(leaf, "__array__"):
                return leaf
            aval = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
            weak_type = getattr(aval, "weak_type", False)
            return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak_type, sharding=sharding)

        return jax.tree.map(place, tree)


def _here(platform: str) -> Any:
    try:
        return jax.devices(platform)[0]
    except RuntimeError:
        return None


def _has_driver() -> bool:
    """Whether this machine can run programs on a GPU of NVIDIA's, so that JAX has to look whether it fits."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def _described(platform: str, chip: str) -> Any:
    """The same device each time: what is placed on two of one description can't be in one program."""
    if platform == "cuda":
        options: dict[str, Any] = {"target_config": GPUS[chip], "topology": "1x1x1"}
        return topologies.get_topology_desc(platform="cuda", topology_name=chip, **options).devices[0]
    with _told_of_no_tpu():
        options = {"chips_per_host_bounds": (1, 1, 1)}
        return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[chip], **options).devices[0]


@contextlib.contextmanager
def _told_of_no_tpu() -> Iterator[None]:
    added = [name for name in ALONE if name not in os.environ]
    os.environ.update({name: ALONE[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
