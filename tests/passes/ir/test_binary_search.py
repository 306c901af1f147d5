"""What is taken for a binary search, and what it is said to be, on the installed JAX."""

import functools

import jax
import jax.numpy as jnp

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.binary_search import SearchParts, search_parts


def searches(fun, *args):
    """What is found of the equations of a traced function, those of its calls as well."""
    queue, found = [jax.make_jaxpr(fun)(*args)], []
    while queue:
        for eqn in compat.close(queue.pop())[0].eqns:
            found += [(parts, len(eqn.invars)) for parts in [search_parts(eqn)] if parts is not None]
            queue += [jaxpr for _, jaxpr in compat.sub_jaxprs(eqn)]
    return found


def test_a_search_taken_apart():
    entries, several = jnp.ones((2, 7)), jnp.ones((2, 3))
    for right, side in enumerate(("left", "right")):
        fun = functools.partial(jnp.searchsorted, side=side)
        for batched, mapped, args in (
            (False, fun, (entries[0], several)),
            (False, fun, (entries[0], 1.0)),
            (True, jax.vmap(fun), (entries, several)),
            (True, jax.vmap(fun), (entries, several[:, 0])),
        ):
            ((parts, operands),) = searches(mapped, *args)
            assert parts == SearchParts(bool(right), batched, parts.result, parts.state)
            assert (parts.result, parts.state) in ((1, (0, 7)), (0, ()))
            assert operands == 2 + len(parts.state)


def test_what_is_no_search_or_another_one():
    def loop(x, v):
        return jax.lax.scan(lambda c, _: ((c[0] + 1, c[1] + (x[0] > v)), None), (0, 7), None, length=3)[0]

    for fun in (loop, functools.partial(jnp.searchsorted, method="sort")):
        assert searches(fun, jnp.ones(7), 1.0) == []
    assert searches(jnp.searchsorted, jnp.arange(7), 3) == []  # whole numbers
