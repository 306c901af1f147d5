"""The package as people have it: the tree as checked out, wheels of it and of an sdist, an editable installation."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from extras import why_missing

ROOT = Path(__file__).parents[1]
PACKAGES = ("hire_xform", "passes", "lowering")
# Each build is a process, and so is each import of everything.
pytestmark = pytest.mark.slow


def of_packages() -> dict[str, str]:
    """Files of the packages, each with its name in a wheel."""
    found = {}
    for package in PACKAGES:
        inside = "" if package == "hire_xform" else "hire_xform/"
        for folder, _, names in os.walk(ROOT / package):  # which does not follow links
            for name in names:
                if not name.endswith((".pyc", ".so")):
                    path = (Path(folder) / name).relative_to(ROOT).as_posix()
                    found[path] = inside + path
    return found


FILES = of_packages()


def test_the_files_that_matter_are_among_those_looked_for():
    assert {"hire_xform/py.typed", "hire_xform/templates/dump.html", "passes/ir/graph.py"} <= set(FILES)
    assert {path.split("/")[0] for path in FILES} == set(PACKAGES)


# Kernels are built to be counted, not to be fast.
QUICKLY = {**os.environ, "HIRE_BUILD_FLAGS": "-O0"}


def build(hook: str, tree: Path, into: Path, **variables: str) -> Path:
    """What a hook of the build backend (PEP 517) makes of a tree."""
    into.mkdir()
    program = f"import sys; sys.path.insert(0, '.'); import build_backend as backend; backend.{hook}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(into)],
        cwd=tree,
        env={**QUICKLY, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (made,) = into.iterdir()
    return made


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what a build reads of the tree, links as they are: builds write beside it."""
    version = metadata.version("setuptools")
    if int(version.split(".")[0]) < 77:
        pytest.skip(why_missing("test", ImportError(f"setuptools {version} is too old to build with")))
    copy = tmp_path_factory.mktemp("tree")
    unwanted = shutil.ignore_patterns("__pycache__")
    for package in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / package, copy / package, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "build_backend.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    return build("build_wheel", tree, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    return build("build_sdist", tree, tmp_path_factory.mktemp("sdist") / "dist")


def in_wheel(path: Path) -> list[str]:
    """What a wheel holds, but for the built library."""
    with zipfile.ZipFile(path) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name and not is_library(name))


def is_library(name: str) -> bool:
    """Built where there is a compiler."""
    start = "hire_xform/lowering/kernels/cpu/_native_"
    return name.startswith(start) and name.endswith(sysconfig.get_config_var("EXT_SUFFIX"))


def test_a_wheel_holds_every_file_of_the_packages_once_and_no_other(wheel):
    assert in_wheel(wheel) == sorted(FILES.values())


def test_a_wheel_holds_the_native_kernels_where_there_is_a_compiler_and_is_whole_without(wheel, tree, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        built = [name for name in archive.namelist() if is_library(name)]
    assert bool(built) == (shutil.which("c++") is not None)
    assert wheel.name.endswith("-any.whl") != bool(built)
    without = tmp_path / "without"
    shutil.copytree(tree, without, symlinks=True, ignore=shutil.ignore_patterns("build", "*.so"))
    made = build("build_wheel", without, tmp_path / "dist", HIRE_BUILD_KERNELS="0")
    assert made.name.endswith("-py3-none-any.whl")
    assert in_wheel(made) == in_wheel(wheel)


def test_a_compiler_that_fails_leaves_the_portable_forms(tree, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tree, broken, symlinks=True, ignore=shutil.ignore_patterns("build", "*.so"))
    made = build("build_wheel", broken, tmp_path / "dist", CXX="false", CC="false")
    with zipfile.ZipFile(made) as archive:
        assert not any(is_library(name) for name in archive.namelist())
    assert in_wheel(made) == sorted(FILES.values())


def test_an_sdist_holds_every_file_and_makes_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        archive.extractall(tmp_path, filter="data")
    assert set(FILES) <= names
    assert not [name for name in names if name.startswith("tests/")]
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    again = build("build_wheel", unpacked, tmp_path / "dist")
    assert in_wheel(again) == in_wheel(wheel)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert all(one.read(name) == other.read(name) for name in in_wheel(wheel))


# Imports every module there is, and prints where each comes from. Without ``site``, so that no other installation of
# the package has a say; the folder's own .pth files are read where it is one to be installed in.
PROGRAM = """
import importlib, os, site, sys
folder, installed, *modules = sys.argv[1:]
sys.path.insert(0, folder)
if installed == "site":
    site.addsitedir(folder)
for module in modules:
    print(os.path.realpath(importlib.import_module(module).__file__))
"""


def imported_from(folder: Path, installed: str = "path") -> list[Path]:
    """The file of every module, in the order of ``FILES``, where a folder is put before the installed packages."""
    modules = [name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in sources().values()]
    paths = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, str(folder), installed, *modules],
        cwd=folder.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


def sources() -> dict[str, str]:
    return {path: name for path, name in FILES.items() if path.endswith(".py")}


def test_the_tree_imports_as_it_is_checked_out():
    assert imported_from(ROOT) == [ROOT / path for path in sources()]


def test_an_unpacked_wheel_imports(wheel, tmp_path):
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    assert imported_from(folder) == [folder / name for name in sources().values()]


def test_an_editable_installation_imports_from_the_tree(tree, tmp_path):
    folder = tmp_path / "site"
    with zipfile.ZipFile(build("build_editable", tree, tmp_path / "dist")) as archive:
        archive.extractall(folder)
    assert imported_from(folder, "site") == [tree / path for path in sources()]
