"""Every entry of the one version-dependent module holds on the installed JAX."""

import os
import subprocess
import sys

from hire_xform.passes import compat


def test_every_compat_entry_holds_on_this_jax():
    assert {"close", "call_jaxpr", "scan_parts", "while_parts", "bind"} <= set(compat.self_test())


def test_importing_the_library_leaves_jax_to_be_configured():
    """``jax.distributed.initialize`` and the number of CPU devices come before any array; imports come first of all."""
    code = "import hire_xform, jax; jax.config.update('jax_num_cpu_devices', 3); print(jax.device_count())"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "3", done.stderr[-2000:]


def test_a_closed_over_array_is_found_in_every_form():
    import jax
    import jax.numpy as jnp

    from hire_xform.passes.walk import walk

    weight = jnp.ones((3, 3))
    graph = walk(jax.make_jaxpr(jax.jit(lambda x: x @ weight))(weight))
    consts = [o.const for n in graph.top.nodes for o in n.inputs if getattr(o, "const", None) is not None]
    assert any(c is weight for c in consts)


def test_a_line_of_a_library_of_layers_is_told_as_the_line_that_uses_it():
    import jax

    library = {}
    code = "def dense(w, x):\n    return x @ w\n"
    exec(compile(code, "/home/me/.venv/lib/python3.11/site-packages/flax/linen/linear.py", "exec"), library)

    def model(w, x):
        return library["dense"](w, x)

    line = compat.source_line(jax.make_jaxpr(model)(jax.numpy.ones((2, 2)), jax.numpy.ones(2)).eqns[0])
    assert "test_compat.py" in line
    assert "model" in line
