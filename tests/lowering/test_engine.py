"""The engine with a configuration of its own: a ReLU layer whose predictor is the product itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_xform.lowering.engine.engine import Operands, Steps, proved_or_dense, without
from hire_xform.lowering.engine.selection import entries, rungs
from hire_xform.lowering.primitives.select_rows import select_rows_dot
from hire_xform.lowering.xla.devices import ONE, Devices

N, D = 12, 5


@dataclasses.dataclass(frozen=True)
class Relu:
    """Proved where no other product is above zero; ``met`` collects the shapes of what is computed."""

    sizes: tuple[int, ...] = (2, 5)
    one_by_one: bool = False
    early: bool = False
    met: list = dataclasses.field(default_factory=list)

    def steps(self, o):
        (x,), (rows,) = o.xs, o.rows
        scores = x @ rows.T
        selections = rungs(x.shape[0], N, self.sizes)

        def compute(index):
            self.met.append(index.shape)
            return select_rows_dot(x, rows, index)

        def result(index, made):
            empty = jnp.zeros_like(scores)
            return empty.at[entries(index, empty)].set(jax.nn.relu(made))

        needed = jnp.max(jnp.sum(scores > 0, axis=1))
        rung = sum(jnp.where(needed > s.size, 1, 0) for s in selections)
        steps = Steps(
            scores=scores,
            compute=compute,
            result=result,
            proved=lambda index, made: jnp.all(without(scores, index) <= 0),
            rung=rung if self.early else None,
        )
        return steps, selections

    def dense(self, o):
        return jax.nn.relu(o.xs[0] @ o.rows[0].T)

    def fallback(self, o):
        return self.dense(o) if o.leaves is None else jax.nn.relu(o.xs[0] @ o.leaves)

    def tangent(self, out, change):
        return change


def operands(x, rows, leaves=None):
    return Operands(xs=[x], sides=[], rows=[rows], first_rows=[jnp.int32(0)], proofs=[None], leaves=leaves)


def layer(positive):
    """Rows of which a token of ones has so many products above zero."""
    rows = np.abs(np.random.default_rng(positive).normal(size=(N, D))).astype(np.float32)
    rows[np.random.default_rng(1).permutation(N)[positive:]] *= -1
    return jnp.ones((1, D)), jnp.asarray(rows)


def run(site, x, rows, leaves=None):
    return proved_or_dense(site, operands(x, rows, leaves))


@pytest.mark.parametrize("early", [False, True])
def test_the_first_selection_that_is_proved_is_taken_and_no_row_is_read_twice(early):
    for positive, want in ((0, 0), (2, 0), (3, 1), (5, 1), (6, 2)):
        site = Relu(early=early)
        x, rows = layer(positive)
        out, rung = run(site, x, rows)
        assert int(rung) == want
        np.testing.assert_allclose(out, site.dense(operands(x, rows)), rtol=1e-6)
        assert site.met == ([(2,), (5,)] if early else [(2,), (3,)])


def test_what_is_not_proved_is_the_programs_own_form_where_its_weights_are_there():
    x, rows = layer(6)
    out, rung = run(Relu(), x, rows, leaves=2.0 * rows.T)
    assert int(rung) == 2
    np.testing.assert_allclose(out, 2.0 * jax.nn.relu(x @ rows.T), rtol=1e-6)


def test_tokens_of_a_batch_are_taken_together_unless_they_cannot_be():
    x, rows = layer(2)
    batch = jnp.stack([x, -x])  # the second has ten products above zero
    dense = jax.nn.relu(batch @ rows.T)
    for one_by_one, want in ((False, [2, 2]), (True, [0, 2])):
        batched = jax.vmap(lambda x, one=one_by_one: run(Relu(one_by_one=one), x, rows))
        out, rung = jax.jit(batched)(batch)
        assert rung.tolist() == want
        np.testing.assert_allclose(out, dense, rtol=1e-6)
        # Weights that are the same for all examples are not spread over them.
        assert f"f32[2,{N},{D}]" not in str(jax.make_jaxpr(batched)(batch))
    out, rung = jax.vmap(lambda x, rows: run(Relu(), x, rows))(batch, jnp.stack([rows, -rows]))
    assert rung.tolist() == [0, 0]  # each with its own weights, and so by itself
    np.testing.assert_allclose(out[1], dense[0], rtol=1e-6)


def test_the_derivative_is_that_of_the_dense_form():
    x, rows = layer(4)
    given, change = (x, rows), (jnp.full_like(x, 0.5), jnp.cos(rows))
    _, got = jax.jvp(lambda x, rows: run(Relu(), x, rows)[0], given, change)
    _, want = jax.jvp(lambda x, rows: jax.nn.relu(x @ rows.T), given, change)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_one_device_is_the_identity_and_several_are_collectives():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3)), jnp.float32)
    places = jnp.arange(3)
    for same in (ONE.largest(values), ONE.total(values), ONE.gathered(values, 1)):
        assert same is values
    assert (ONE.ids(places, 3, cyclic=False) == places).all()
    assert (ONE.ids(places, 3, cyclic=True) == places).all()
    devices = Devices(("devices",), 4)

    def each(own):
        several = devices.largest(own), devices.total(own), devices.gathered(own, 1)
        return *several, devices.ids(places, 3, cyclic=False), devices.ids(places, 3, cyclic=True)

    largest, total, gathered, blocks, cyclic = jax.vmap(each, axis_name="devices")(values)
    np.testing.assert_array_equal(largest, np.broadcast_to(values.max(0), values.shape))
    np.testing.assert_allclose(total, np.broadcast_to(values.sum(0), values.shape), rtol=1e-6)
    np.testing.assert_array_equal(gathered[0], np.concatenate(list(values), axis=1))
    assert sorted(blocks.ravel().tolist()) == blocks.ravel().tolist() == list(range(12))
    assert cyclic.T.ravel().tolist() == list(range(12))
