"""Plain weights that are tracers: shapes and jaxprs are had, a program that would pack at every call is not."""

import jax
import jax.numpy as jnp
import pytest
from tied import FULL, inputs, make_weights, net

import hire_xform as hx
from hire_xform.call.traced_weights import traced_weights_p


def structs(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def loss(step):
    return lambda params, x: jnp.sum(step(params, x) ** 2)


def test_eval_shape_with_plain_weights():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    for args in ((params, inputs()), structs((params, inputs(3)))):
        got, want = jax.eval_shape(step, *args), jax.eval_shape(net, *args)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
    got, want = (jax.eval_shape(jax.grad(loss(f)), params, inputs()) for f in (step, net))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), got) == jax.tree.map(lambda a: (a.shape, a.dtype), want)


def test_eval_shape_packs_nothing(packs):
    step, params = hx.sparsify(net, config=FULL), make_weights()
    jax.eval_shape(step, params, inputs())
    assert not packs


def marks(jaxpr):
    return [eqn.params["weight"] for eqn in jaxpr.eqns if eqn.primitive is traced_weights_p]


def test_make_jaxpr_shows_that_packing_stands_inside():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    jaxpr = jax.make_jaxpr(step)(params, inputs())
    assert sorted(set(marks(jaxpr))) == [f"params['{name}']" for name in ("embed", "w1", "w2")]
    packed = step.trace(params, inputs()).pack(params)
    assert not marks(jax.make_jaxpr(step)(packed, inputs()))
    assert not marks(jax.make_jaxpr(lambda x: step(params, x))(inputs()))


RUNS = {
    "jit": lambda step, p, x: jax.jit(step)(p, x),
    "lower": lambda step, p, x: jax.jit(step).lower(p, x),
    "export": lambda step, p, x: jax.export.export(jax.jit(step))(p, x),
    "vmap": lambda step, p, x: jax.vmap(step, in_axes=(0, None))(jax.tree.map(lambda a: a[None], p), x),
    "grad": lambda step, p, x: jax.grad(loss(step))(p, x),
    "jit of grad": lambda step, p, x: jax.jit(jax.grad(loss(step)))(p, x),
    "remat": lambda step, p, x: jax.checkpoint(step)(p, x),
    "scan": lambda step, p, x: jax.lax.scan(lambda c, w: (c, step(w, x)), 0, jax.tree.map(lambda a: a[None], p)),
    "the jaxpr": lambda step, p, x: jax.core.eval_jaxpr(
        (j := jax.make_jaxpr(step)(p, x)).jaxpr, j.consts, *jax.tree.leaves((p, x))
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_what_would_pack_at_every_call_is_refused(run):
    step, params = hx.sparsify(net, config=FULL), make_weights()
    with pytest.raises(hx.TracedWeightsError, match=r"params\['\w+'\] is a tracer.*Pack once outside"):
        run(step, params, inputs())


def test_after_shapes_were_had_the_step_runs():
    step, params = hx.sparsify(net, config=FULL), make_weights()
    jax.eval_shape(step, params, inputs())
    assert jnp.allclose(step(params, inputs()), net(params, inputs()), atol=1e-4)
