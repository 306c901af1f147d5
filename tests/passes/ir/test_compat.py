"""Every entry of the one version-dependent module holds on the installed JAX."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.graph import walk

WEIGHT = jnp.ones((3, 3))


def first(fun, *args):
    """The first equation of a traced function."""
    return jax.make_jaxpr(fun)(*args).eqns[0]


def mapped():
    """A ``shard_map`` of one device, whose body marks its second input as varying."""
    mesh = jax.sharding.AbstractMesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = P("d"), P()
    return first(jax.shard_map(lambda x, y: x + y, mesh=mesh, in_specs=specs, out_specs=P("d")), WEIGHT, WEIGHT)


def test_every_entry_is_tested_here():
    """What another module uses of compat stands in this file."""
    entry, here = re.compile(r"\bcompat\.([A-Za-z_]\w*)"), Path(__file__)
    rooms = [here.parents[3] / room for room in ("hire_xform", "passes", "lowering", "tests")]
    files = [path for room in rooms for path in room.rglob("*.py") if path != here]
    named = {name for path in files for name in entry.findall(path.read_text())}
    assert {"close", "scan_parts", "RESHARD"} <= named
    assert named <= set(entry.findall(here.read_text()))


def test_outside_of_traces_arrays_are_arrays_and_what_is_traced_keeps_no_constants():
    made = []

    def traced(x):
        with compat.outside_of_traces():
            made.append(WEIGHT + 1.0)
            made.append(jax.make_jaxpr(lambda y: y + jnp.full((3, 3), 2.0))(WEIGHT))
        return x

    jax.make_jaxpr(traced)(WEIGHT)
    assert not compat.is_tracer(made[0])
    assert not made[1].consts


def test_types_are_those_of_traced_programs():
    closed = jax.make_jaxpr(lambda x: jax.jit(jnp.sin)(x) + 1.0)(WEIGHT)
    call, added = closed.eqns
    assert isinstance(closed, compat.ClosedJaxpr)
    assert isinstance(closed.jaxpr, compat.Jaxpr)
    assert isinstance(call, compat.Eqn)
    assert isinstance(call.outvars[0], compat.Var)
    assert isinstance(added.invars[1], compat.Literal)
    assert all(isinstance(a, compat.Atom) for a in added.invars)
    assert compat.is_jaxpr(closed)
    assert compat.is_jaxpr(closed.jaxpr)
    assert not compat.is_jaxpr(call)


def test_close_finds_a_constant_of_an_inner_program():
    outer, consts = compat.close(jax.make_jaxpr(jax.jit(lambda x: x @ WEIGHT))(WEIGHT))
    inner, inner_consts = compat.close(compat.call_jaxpr(outer.eqns[0]))
    literals = [a.val for e in inner.eqns for a in e.invars if isinstance(a, compat.Literal)]
    assert any(c is WEIGHT for c in (*consts, *inner_consts, *literals))


def test_calls_are_known_and_hold_one_program():
    calls = {
        "jit": first(jax.jit(jnp.sin), WEIGHT),
        "remat": first(jax.checkpoint(jnp.sin), WEIGHT),
        "custom": first(jax.nn.relu, WEIGHT),
    }
    for kind, eqn in calls.items():
        assert compat.CALL_PRIMITIVES[eqn.primitive] == kind
        assert len(compat.close(compat.call_jaxpr(eqn))[0].invars) == 1
        assert len(compat.sub_jaxprs(eqn)) == 1
    branches = jax.make_jaxpr(lambda p, x: jax.lax.cond(p, jnp.sin, jnp.cos, x))(True, WEIGHT).eqns[-1]
    assert [name for name, _ in compat.sub_jaxprs(branches)] == ["branches[0]", "branches[1]"]
    with pytest.raises(AssertionError, match="was expected to hold one jaxpr, holds 2"):
        compat.call_jaxpr(jax.make_jaxpr(lambda x: jax.lax.while_loop(jnp.any, jnp.sin, x))(WEIGHT).eqns[-1])


def test_what_a_nested_jit_states():
    plain = first(jax.jit(jnp.sin), WEIGHT)
    assert compat.jit_shardings(plain) == ((None,), (None,))
    assert not compat.jit_is_inlined(plain)
    # Up to 0.10 such a call is gone when it has been traced.
    inlined = first(jax.jit(jnp.sin, inline=True), WEIGHT)
    assert str(inlined.primitive) == "sin" or compat.jit_is_inlined(inlined)
    again = first(jax.jit(jnp.sin, inline=compat.jit_inlining(plain)), WEIGHT)
    assert compat.jit_inlining(again) == compat.jit_inlining(plain)
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stated = first(jax.jit(jnp.sin, in_shardings=there), WEIGHT)
    assert [s is None for s in compat.jit_shardings(stated)[0]] == [False]
    assert compat.is_unspecified(None)
    assert not compat.is_unspecified(there)


def test_the_operands_of_a_scan():
    def scanned(w, x):
        return jax.lax.scan(lambda c, v: (c @ v @ WEIGHT, c), x, w, reverse=True, unroll=2)

    eqn = jax.make_jaxpr(scanned)(jnp.ones((4, 3, 3)), WEIGHT).eqns[-1]
    parts = compat.scan_parts(eqn)
    assert (parts.num_carry, parts.length, parts.reverse, parts.unroll) == (1, 4, True, 2)
    assert parts.num_consts + parts.num_carry + 1 == len(eqn.invars)
    assert len(compat.close(parts.jaxpr)[0].invars) == len(eqn.invars)


def test_the_operands_of_a_while():
    looped = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda s: s.sum() < 1, lambda s: s + x, x))(WEIGHT)
    parts = compat.while_parts(looped.eqns[-1])
    assert isinstance(parts, compat.WhileParts)
    assert (parts.cond_nconsts, parts.body_nconsts) == (0, 1)
    assert [len(compat.close(j)[0].invars) for j in (parts.cond_jaxpr, parts.body_jaxpr)] == [1, 2]


def test_primitives_by_name():
    found = compat.primitives_named("exp no_such_primitive")
    assert found == {compat.public_primitive("exp_p")} == {first(jnp.exp, WEIGHT).primitive}


def test_primitives_without_public_names():
    sizes, groups = jnp.array([2], jnp.int32), jnp.ones((1, 3, 4))
    assert first(jax.lax.optimization_barrier, WEIGHT).primitive is compat.OPTIMIZATION_BARRIER
    assert first(lambda x: jax.lax.split(x, (1, 2)), WEIGHT).primitive is compat.SPLIT
    assert first(jax.lax.ragged_dot, jnp.ones((2, 3)), groups, sizes).primitive is compat.RAGGED_DOT
    stacked = {e.primitive for e in jax.make_jaxpr(lambda x: jnp.stack([x, x]))(WEIGHT).eqns}
    assert (compat.STACK in stacked) or (compat.STACK is None)
    unstacked = {e.primitive for e in jax.make_jaxpr(jnp.unstack)(WEIGHT).eqns}
    assert (compat.UNSTACK in unstacked) or (compat.UNSTACK is None)
    assert [str(p) for p in (compat.SPLIT, compat.RESHARD)] == ["split", "reshard"]
    assert compat.public_primitive("dot_general_p") is jax.lax.dot_general_p
    assert compat.public_primitive("there_is_no_such_p") is None


def test_a_shard_map_taken_apart():
    eqn = mapped()
    assert eqn.primitive is compat.SHARD_MAP
    parts = compat.shard_map_parts(eqn)
    assert isinstance(parts, compat.ShardMapParts)
    assert (parts.in_specs, parts.out_specs) == ((P("d"), P()), (P("d"),))
    assert (parts.axis_names, parts.check_vma) == ({"d"}, True)
    assert (parts.split(0), parts.split(1)) == (((0, 1, "d"),), ())
    marks = [e for e in compat.close(parts.jaxpr)[0].eqns if e.primitive is compat.PVARY]
    assert [tuple(e.params["axes"]) for e in marks] == [("d",)]
    assert compat.vary(WEIGHT, ("d",)) is WEIGHT


def test_what_varies_already_is_not_marked_again():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def marked(split, whole):
        return [compat.vary(compat.vary(x, ("d",)), ("d",)) for x in (split, whole)]

    eqn = first(jax.shard_map(marked, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d")), WEIGHT, WEIGHT)
    assert [e.primitive for e in compat.close(compat.call_jaxpr(eqn))[0].eqns] == [compat.PVARY]


def test_an_equation_bound_again():
    added = first(lambda x: x + 1, 1.0)
    assert float(compat.bind(added, [1.0, 2.0])[0]) == 3.0
    parts = first(lambda x: jax.lax.split(x, (1, 2)), WEIGHT)
    assert [p.shape for p in compat.bind(parts, [WEIGHT])] == [(1, 3), (2, 3)]


def test_a_program_called_without_being_traced_again():
    added = jax.make_jaxpr(lambda x, y: (x + y, x + WEIGHT))(WEIGHT, WEIGHT)
    inner, consts = compat.close(added)
    whole = compat.replaced(added, constvars=[], invars=[*inner.constvars, *inner.invars])
    assert not compat.close(whole)[1]
    assert compat.close(compat.replaced(added, outvars=inner.outvars[:1]))[1] is not None

    def caller(*given):
        return compat.bind_call(compat.plain_call(), whole, "called", given)

    (call,) = jax.make_jaxpr(caller)(*consts, WEIGHT, WEIGHT).eqns
    assert (call.params["name"], compat.call_jaxpr(call)) == ("called", whole)
    stated = jax.make_jaxpr(jax.jit(lambda *given: (given[0], given[1])))(*consts, WEIGHT, WEIGHT).eqns[0].params
    assert {name: value for name, value in call.params.items() if name not in ("jaxpr", "name")} == {
        name: value for name, value in stated.items() if name not in ("jaxpr", "name")
    }
    first, _ = jax.jit(jax.vmap(caller, in_axes=(*[None] * len(consts), 0, 0)))(*consts, WEIGHT[None], WEIGHT[None])
    assert float(first[0, 0, 0]) == 2.0


def test_a_program_without_its_last_results():
    fewer = compat.without_last_outputs(jax.make_jaxpr(lambda x: (x + 1, x, x))(WEIGHT), 2)
    assert (len(fewer.jaxpr.outvars), len(fewer.out_avals)) == (1, 1)


def test_the_compiler_knows_how_to_hold_less():
    options = compat.few_temporaries()
    assert options

    def wide(x):  # four large sorted arrays, each of which is summed up
        return [jnp.sort(i * x, axis=1)[:, :9].sum(0) for i in range(1, 5)]

    def temporaries(**options):
        return jax.jit(wide, **options).lower(jnp.ones((256, 256))).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(compiler_options=options) < 0.5 * temporaries()


def test_settings_that_a_trace_hangs_on():
    before = compat.trace_settings()
    assert before == compat.trace_settings()
    with jax.default_matmul_precision("highest"):
        assert compat.trace_settings() != before
    assert compat.default_device() is None
    with jax.default_device(jax.devices()[0]):
        assert compat.default_device() == jax.devices()[0]
    seen = []
    jax.make_jaxpr(lambda x: seen.append(compat.is_tracer(x)) or x)(WEIGHT)
    assert seen == [True]
    assert not compat.is_tracer(WEIGHT)


def test_importing_the_library_leaves_jax_to_be_configured():
    """``jax.distributed.initialize`` and the number of CPU devices come before any array; imports come first of all."""
    code = "import hire_xform, jax; jax.config.update('jax_num_cpu_devices', 3); print(jax.device_count())"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "3", done.stderr[-2000:]


def test_a_closed_over_array_is_found_in_every_form():
    weight = jnp.ones((3, 3))
    graph = walk(jax.make_jaxpr(jax.jit(lambda x: x @ weight))(weight))
    consts = [o.const for n in graph.top.nodes for o in n.inputs if getattr(o, "const", None) is not None]
    assert any(c is weight for c in consts)
