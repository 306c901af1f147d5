"""The rooms of the tree: each imports only those before it, and a wheel has all of them."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package's rooms in reading order, the files of the package itself last or where they stand.
ORDER = {
    "lowering": ["xla", "primitives", "prove", "predict", "engine", "measure", "kernels"],
    "passes": ["ir", "weights", "match", "prove", "plan", "pack", "rewrite", "measure"],
}
PACKAGES = ["lowering", "passes", "hire_xform"]


def sources(package):
    inner = ROOT / package
    linked = [inner / other for other in PACKAGES]
    return [path for path in sorted(inner.rglob("*.py")) if not any(other in path.parents for other in linked)]


def imported(path):
    """The modules of this project that a file imports, those for type checkers apart, as parts of their names."""
    tree = ast.parse(path.read_text())
    hints = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {inner for hint in hints for inner in ast.walk(hint)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node not in skipped:
            parts = node.module.split(".")
            if parts[0] == "hire_xform":
                yield from ([*parts, name.name] for name in node.names) if len(parts) < 3 else [parts]


def test_packages_import_one_way():
    for number, package in enumerate(PACKAGES):
        for path in sources(package):
            for parts in imported(path):
                target = parts[1] if len(parts) > 1 and parts[1] in PACKAGES else "hire_xform"
                assert PACKAGES.index(target) <= number, f"{path.relative_to(ROOT)} imports {'.'.join(parts)}"


@pytest.mark.parametrize("package", sorted(ORDER))
def test_a_room_imports_only_rooms_before_it(package):
    order = ORDER[package]
    rooms = {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(order)
    met = 0
    for path in sources(package):
        room = path.relative_to(ROOT / package).parts[0]
        for parts in imported(path):
            if parts[1:2] == [package] and room in order:
                met += 1
                assert order.index(parts[2]) <= order.index(room), f"{path.relative_to(ROOT)} imports {'.'.join(parts)}"
    assert met > len(order)


def test_every_room_is_in_the_wheel_and_says_what_it_is():
    found = {"hire_xform.templates"}
    for package in PACKAGES:
        for path in sources(package):
            if path.name == "__init__.py":
                inside = path.parent.relative_to(ROOT).as_posix().replace("/", ".")
                found.add(inside if package == "hire_xform" else f"hire_xform.{inside}")
                assert ast.get_docstring(ast.parse(path.read_text()))
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(stated) == sorted(found)
