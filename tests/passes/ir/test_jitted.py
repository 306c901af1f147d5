"""What ``jax.jit`` was told of a function is read off what it returned."""

import jax
import pytest
from jax.sharding import PartitionSpec, SingleDeviceSharding

from hire_xform.passes.ir.jitted import jitted


def fun(a, b, c, *, d=None, e=None):
    return a


STATED = {
    "nothing": {},
    "static": {"static_argnums": (0, 2), "static_argnames": ("a", "c")},
    "static by name": {"static_argnums": (1,), "static_argnames": ("b", "d")},
    "donated behind static ones": {
        "static_argnums": (0,),
        "static_argnames": ("a",),
        "donate_argnums": (1, 2),
        "donate_argnames": ("b", "c"),
    },
    "the rest": {"keep_unused": True, "compiler_options": {"xla_embed_ir_in_executable": True}},
}


@pytest.mark.parametrize("stated", STATED)
def test_options_are_those_that_were_stated(stated):
    assert jitted(jax.jit(fun, **STATED[stated])) == (fun, STATED[stated])


def test_positions_from_the_end_and_positions_alone():
    plain, options = jitted(jax.jit(fun, static_argnums=-1))
    assert plain is fun
    assert options["static_argnums"] == (2,)
    _, options = jitted(jax.jit(lambda *args: args, static_argnums=1, donate_argnums=(0, 2)))
    assert (options["static_argnums"], options["donate_argnums"]) == ((1,), (0, 2))


def test_what_is_inlined_stays_so():
    """A bool up to 0.10, an enumeration from 0.11."""
    _, options = jitted(jax.jit(fun, inline=True))
    assert set(options) == {"inline"}
    assert jitted(jax.jit(fun, **options)) == (fun, options)


def test_shardings_of_results_are_a_tree_of_them_and_none():
    here = SingleDeviceSharding(jax.devices()[0])
    assert jitted(jax.jit(fun, out_shardings=here))[1] == {"out_shardings": here}
    assert jitted(jax.jit(fun, out_shardings=(here, {"a": None})))[1] == {"out_shardings": (here, {"a": None})}


def test_what_is_not_jitted_or_states_where_its_arguments_are_is_left():
    here = SingleDeviceSharding(jax.devices()[0])
    assert jitted(fun) is None
    assert jitted(jax.jit(fun, in_shardings=here)) is None
    assert jitted(jax.vmap(fun)) is None
    assert jitted(PartitionSpec()) is None
