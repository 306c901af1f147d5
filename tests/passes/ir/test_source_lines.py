"""The line of the user's program that is told of an equation."""

from types import SimpleNamespace

import jax
from jax.extend import source_info_util

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
