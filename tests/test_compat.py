"""Every entry of the one version-dependent module holds on the installed JAX."""

from hire_xform.passes import compat


def test_every_compat_entry_holds_on_this_jax():
    assert {"close", "call_jaxpr", "scan_parts", "while_parts", "bind"} <= set(compat.self_test())


def test_a_closed_over_array_is_found_in_every_form():
    import jax
    import jax.numpy as jnp

    from hire_xform.passes.walk import walk

    weight = jnp.ones((3, 3))
    graph = walk(jax.make_jaxpr(jax.jit(lambda x: x @ weight))(weight))
    consts = [o.const for n in graph.top.nodes for o in n.inputs if getattr(o, "const", None) is not None]
    assert any(c is weight for c in consts)
