"""The rooms of the tree: each imports only those before it, and a wheel has all of them."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package's rooms in reading order, the files of the package itself last or where they stand.
ORDER = {
    "lowering": ["xla", "primitives", "prove", "predict", "engine", "measure", "kernels"],
    "passes": ["ir", "weights", "match", "prove", "plan", "pack", "rewrite", "measure", "kinds"],
}
PACKAGES = ["lowering", "passes", "hire_xform"]

# Modules that no unit test of their room imports, and where else they are tested by themselves.
TESTED_ELSEWHERE = {
    "lowering.engine.cyclic_rows": "tests/sharded/test_cyclic.py",
    "passes.plan.profile": "tests/tuning/test_keeping.py",
}
# Those that only whole programs test. The list may get shorter.
TESTED_BY_PROGRAMS = {
    "passes.kinds.dense",
    "passes.kinds.ffn_blocks",
    "passes.kinds.ffn_measured",
    "passes.kinds.readings",
    "passes.kinds.top_groups",
    "passes.prove.edges",
    "passes.prove.orders",
    "passes.prove.pick_rules",
    "passes.prove.whole_chains",
    "passes.prove.whole_rules",
    "passes.prove.whole_tracing",
    "passes.prove.write_rules",
    "passes.weights.few_bits",
}


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


def modules(package):
    """Names of a package's modules, those that say what a room is apart."""
    for path in sources(package):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


def names_in(path):
    """The modules of this project that a test imports, by itself or by a helper of the suite."""
    found = {".".join(parts[1:]) for parts in imported(path)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from hire_xform.passes.ir import compat` names a module, too.
            found |= {f"{node.module}.{name.name}".removeprefix("hire_xform.") for name in node.names}
            helper = ROOT / "tests" / f"{node.module}.py"
            found |= names_in(helper) if helper.exists() else set()
    return found


def test_every_module_has_a_unit_test_of_its_room():
    tests = [path for package in ORDER for path in sorted((ROOT / "tests" / package).rglob("*.py"))]
    tested = set().union(*map(names_in, tests))
    known = {name for package in ORDER for name in modules(package)}
    without = known - tested - set(TESTED_ELSEWHERE) - TESTED_BY_PROGRAMS
    assert not without, f"add a test that calls them to tests/passes or tests/lowering: {sorted(without)}"
    listed = set(TESTED_ELSEWHERE) | TESTED_BY_PROGRAMS
    assert not listed & tested, "these have one: take them off the list"
    assert listed <= known
    for name, test in TESTED_ELSEWHERE.items():
        assert name in names_in(ROOT / test)
