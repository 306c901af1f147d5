"""Which profile plans are made for: one that is named, one that was measured here and kept, or one that is built in.

A profile is kept as a JSON file in the user's cache folder, in a file of its own for each key: the processor or device,
what runs on it, and the flags of XLA that matter. Whatever is wrong with a kept file, or with the folder, never stands
in the way of a program.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform as host
import re
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
from absl import logging

from hire_xform.errors import HireWarning
from hire_xform.files import write_whole
from hire_xform.lowering.kernels.cpu import library
from hire_xform.lowering.primitives.kernels import backends
from hire_xform.passes.plan.accelerators import of_device_kind
from hire_xform.passes.plan.machine import BUILT_IN, built_in_for, device_kind, instruction_set
from hire_xform.passes.plan.profile import Profile

# "off": what is built in. "auto": measure at the first plan, where nothing fits. The name of a built-in profile, or the
# path of a file: that one. Nothing: the one that is kept, or else what is built in.
VARIABLE = "HIRE_TUNE"
# Of the file; raised when what is measured changes.
FORMAT = 1


def profile_for(platform: str, elsewhere: str | None = None) -> Profile:
    """What plans for a platform ("cpu", "gpu", "tpu") are made for, as ``HIRE_TUNE`` has it.

    Args:
      platform: the platform.
      elsewhere: the kind of its device where that is not here: what was measured here is not its own.

    Raises:
      ValueError: ``HIRE_TUNE`` names no profile, or a file that holds none.
    """
    stated = os.environ.get(VARIABLE, "")
    built_in = built_in_for(platform) if elsewhere is None else of_device_kind(platform, elsewhere)
    if stated in ("", "auto"):
        if elsewhere is not None:
            return built_in
        if jax.process_count() > 1:
            # Processes that run one program have to plan it alike, and each has its own folder.
            return built_in
        return kept(platform) or (_measured_now(platform) if stated else None) or built_in
    fixed = None if stated == "off" else _named(stated)
    return fixed if fixed is not None and fixed.platform == platform else built_in


def source_of(platform: str) -> str:
    """Where the profile that plans are made for comes from, for reports."""
    profile, stated = profile_for(platform), os.environ.get(VARIABLE, "")
    if stated in ("", "auto"):
        return f"kept in {path_of(platform)}" if profile is kept(platform) else f"none is kept in {path_of(platform)}"
    return f"it is that of the file {stated}" if os.path.exists(stated) else "built in"


@functools.lru_cache
def _named(stated: str) -> Profile:
    if stated in BUILT_IN:
        return BUILT_IN[stated]
    names = f"off, auto, the path of a file that `hire-xform tune -o FILE` wrote, or one of {', '.join(BUILT_IN)}"
    if not os.path.exists(stated):
        raise ValueError(f"{VARIABLE}={stated!r}: expected {names}")
    try:
        return read(Path(stated))[0]
    except (OSError, ValueError) as error:
        raise ValueError(f"{VARIABLE}={stated!r}: {error}; expected {names}") from error


def kept(platform: str) -> Profile | None:
    """The profile that was measured on this machine and kept, if there is one and it can be read."""
    return _kept(platform, str(path_of(platform)), _digest(platform))


@functools.lru_cache
def _kept(platform: str, path: str, digest: str) -> Profile | None:
    """The same, looked for once in a process."""
    try:
        profile, key = read(Path(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(
            f"the profile of this machine in {path} is left aside: {error}. `hire-xform tune` makes it anew",
            HireWarning,
            stacklevel=2,
        )
        return None
    if key != key_of(platform) or profile.platform != platform:
        warnings.warn(
            f"the profile in {path} is of another machine, {key}, and is left aside. `hire-xform tune` makes it anew",
            HireWarning,
            stacklevel=2,
        )
        return None
    return profile


def _measured_now(platform: str) -> Profile | None:
    """The profile of this machine, measured and kept; None where a platform has no devices here, or measuring fails.

    Once in a process: what could not be kept is not measured again for each plan.
    """
    with _MEASURING:
        return _measured_once(platform, _digest(platform))


# Two at once would measure each other.
_MEASURING = threading.Lock()


@functools.lru_cache
def _measured_once(platform: str, digest: str) -> Profile | None:
    from hire_xform.tuning.measuring import measure  # rarely needed

    if not device_kind(platform):
        return None
    try:
        profile = measure(platform)
    except Exception as error:
        logging.warning("hire_xform: this machine can't be measured (%s); plans are cautious", error)
        return None
    where = keep(profile)
    logging.info("hire_xform: measured this machine (%s); %s", profile.name, where or "it could not be kept")
    return profile


def keep(profile: Profile, path: Path | None = None) -> Path | None:
    """Writes a profile of this machine to its file; None where the folder can't be written, which it warns of.

    Args:
      profile: measured here.
      path: another file, whose errors are raised.

    Raises:
      OSError: a path is given and can't be written.
    """
    content = {"format": FORMAT, "key": key_of(profile.platform), "profile": profile.to_dict()}
    text = (json.dumps(content, indent=1) + "\n").encode()
    if path is not None:
        write_whole(path, text)
        return path
    path = path_of(profile.platform)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        warnings.warn(
            f"the profile of this machine can't be kept in {path}: {error.strerror or error}. Set XDG_CACHE_HOME to a "
            f"folder that can be written, or keep it with `hire-xform tune -o FILE` and set {VARIABLE}=FILE",
            HireWarning,
            stacklevel=2,
        )
        return None
    _kept.cache_clear()
    return path


def read(path: Path) -> tuple[Profile, dict[str, Any]]:
    """The profile in a file, and what it was measured on.

    Raises:
      OSError: it can't be read.
      ValueError: it holds no profile; the message says what is wrong.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise ValueError(f"it has format {found!r}; expected {FORMAT}")
    if not isinstance(content.get("key"), dict):
        raise ValueError("it does not say of what machine it is: expected a table named key")
    return Profile.from_dict(content.get("profile")), content["key"]


def path_of(platform: str) -> Path:
    """The file of this machine's profile."""
    return cache_folder() / f"{platform}-{_digest(platform)}.json"


def cache_folder() -> Path:
    """The folder of kept profiles: of the user's cache, as each system has it."""
    stated = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else "")
    if stated:
        return Path(stated) / "hire_xform"
    try:
        home = Path.home()
    except RuntimeError:
        home = Path(os.path.abspath(os.sep))  # a user without a home: nothing is kept there, and nothing found
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "hire_xform"


def key_of(platform: str) -> dict[str, Any]:
    """What a profile hangs on: the same key, the same times."""
    flags = os.environ.get("XLA_FLAGS", "")
    key: dict[str, Any] = {
        "platform": platform,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "xla_flags": sorted(flag for flag in flags.split() if _matters(flag, platform)),
    }
    if platform != "cpu":
        return {**key, "device": device_kind(platform), "kernels": _kernels("cuda" if platform == "gpu" else platform)}
    return {
        **key,
        "device": cpu_name(),
        "cores": usable_cores(),
        "instructions": instruction_set(flags),
        "kernels": _kernels("cpu"),
        "library": _library(),
    }


def _digest(platform: str) -> str:
    return hashlib.sha256(json.dumps(key_of(platform), sort_keys=True).encode()).hexdigest()[:16]


def _matters(flag: str, platform: str) -> bool:
    """Whether a flag of XLA may change how fast its code is: not where it only says what to write down."""
    name = flag.lstrip("-").split("=")[0]
    others = {"cpu": ("xla_gpu", "xla_tpu"), "gpu": ("xla_cpu", "xla_tpu"), "tpu": ("xla_cpu", "xla_gpu")}[platform]
    return name.startswith("xla") and not name.startswith(("xla_dump", "xla_force_host_platform", *others))


def _kernels(platform: str) -> dict[str, str]:
    """The steps that kernels run, and which."""
    named = {step: platforms[platform] for step, platforms in backends().items()}
    return {step: name for step, name in named.items() if not name.startswith("portable")}


@functools.cache
def _library() -> str:
    """The content of the native library, in short; empty where none is used."""
    loaded = library.load()
    if isinstance(loaded, str):
        return ""
    try:
        return hashlib.sha256(Path(loaded._name).read_bytes()).hexdigest()[:16]
    except OSError:
        return "unknown"


@functools.cache
def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        if host.system() == "Linux":
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
            found = {name: re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE) for name in _NAMED_BY}
            told = [
                f"{name} {match[1]}" if name != "model name" else match[1] for name, match in found.items() if match
            ]
            if told:
                return ", ".join(told)
    except OSError:
        pass
    return host.processor() or host.machine() or "unknown"


# Virtual machines often give no more than a maker's name.
_NAMED_BY = ("model name", "cpu family", "model")


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
