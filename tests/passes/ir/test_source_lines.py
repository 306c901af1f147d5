"""The line of the user's program that is told of an equation."""

import re
from types import SimpleNamespace

import jax
from jax.extend import source_info_util

import hire_xform as hx
from hire_xform.passes.ir.source_lines import UNKNOWN_SOURCE, source_line


def test_an_equation_without_a_traceback_has_no_line():
    eqn = jax.make_jaxpr(lambda x: x + 1)(1.0).eqns[0]
    assert "test_source_lines.py" in source_line(eqn)
    bare = SimpleNamespace(source_info=source_info_util.SourceInfo(None, eqn.source_info.name_stack))
    assert source_line(bare) == UNKNOWN_SOURCE


def test_a_line_of_a_library_of_layers_is_told_as_the_line_that_uses_it():
    library = {}
    code = "def dense(w, x):\n    return x @ w\n"
    exec(compile(code, "/home/me/.venv/lib/python3.11/site-packages/flax/linen/linear.py", "exec"), library)

    def model(w, x):
        return library["dense"](w, x)

    line = source_line(jax.make_jaxpr(model)(jax.numpy.ones((2, 2)), jax.numpy.ones(2)).eqns[0])
    assert "test_source_lines.py" in line
    assert "model" in line


def installed(package, code, name="call", **given):
    """A function of a file of an installed package."""
    library = dict(given)
    exec(compile(code, f"/home/me/.venv/lib/python3.12/site-packages/{package}", "exec"), library)
    return library[name]


def line_of(fun):
    return source_line(jax.make_jaxpr(fun)(jax.numpy.ones((2, 2)), jax.numpy.ones(2)).eqns[0])


def test_a_line_of_any_installed_package_is_told_as_the_line_that_uses_it():
    intercept = installed("qwix/_src/interception.py", "def call(w, x):\n    return x @ w\n")
    dense = installed("models/dense.py", "def call(w, x):\n    return inner(w, x)\n", inner=intercept)

    def model(w, x):
        return dense(w, x)

    line = line_of(model)
    assert "test_source_lines.py" in line
    assert "model" in line
    assert "qwix" not in line


def test_of_a_function_that_is_all_in_packages_two_of_their_lines_are_told():
    """The innermost, and that of another function that called it; lines of packages of layers are none."""
    einsum = installed("gemma/_layers.py", "def einsum(w, x):\n    return x @ w\n", "einsum")
    linear = installed("flax/linen/linear.py", "def call(w, x):\n    return inner(w, x)\n", inner=einsum)
    block = "def block(w, x):\n    x = x\n    return inner(w, x)\n"
    model = installed("gemma/_modules.py", block, "block", inner=linear)
    step = hx.sparsify(model)
    (refusal,) = step.trace(jax.numpy.ones((2, 2)), jax.numpy.ones(2)).plan.refusals
    told = r"gemma/_layers\.py:2:\d+ \(einsum\), called at gemma/_modules\.py:3:\d+ \(block\)"
    assert re.fullmatch(told, refusal.source)
