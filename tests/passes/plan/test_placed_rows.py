"""Where the rows of a weight lie, from where its leaf lies: one axis followed through the steps of a recipe."""

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from hire_xform.passes.plan.placement import in_parts, placed_rows
from hire_xform.passes.weights.recipe import Recipe, Reshape, Root, Slice, Stack, Transpose

P = PartitionSpec
MESH = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def rows(shape, spec, *steps):
    return placed_rows(NamedSharding(MESH, spec), shape, Recipe(Root("arg0", 0), steps))


@pytest.mark.parametrize(
    ("shape", "spec", "steps", "want"),
    [
        ((8, 16), P("model"), (), [("model",), ()]),
        ((8, 16), P(None, ("data", "model")), (Transpose((1, 0)),), [("data", "model"), ()]),
        ((3, 8, 16), P(None, None, "model"), (Stack(3), Transpose((1, 0))), [(), ("model",), ()]),
        (
            (8, 2, 16),
            P(None, None, "model"),
            (Slice((0, 1, 0), (8, 2, 16), (1, 1, 1)), Reshape((8, 16))),
            [(), ("model",)],
        ),
        ((8, 4, 16), P(None, "model"), (Reshape((8, 64)),), [(), ("model",)]),
        ((8, 64), P(None, "model"), (Reshape((8, 4, 16)),), [(), ("model",), ()]),
        ((8, 1, 16), P("model"), (Reshape((8, 16)),), [("model",), ()]),
        ((8, 16), P(), (Reshape((2, 4, 16)),), [(), (), ()]),
        ((0, 16), P(), (Reshape((0,)),), [()]),
    ],
)
def test_followed(shape, spec, steps, want):
    assert rows(shape, spec, *steps) == want


@pytest.mark.parametrize(
    ("shape", "spec", "steps", "words"),
    [
        ((8, 4, 16), P(None, None, "model"), (Reshape((8, 64)),), "mixes"),
        ((8, 64), P(None, "model"), (Reshape((8, 2, 32)),), "mixes"),
        ((8, 64), P(None, "model"), (Slice((0, 0), (8, 32), (1, 1)),), "cut from"),
    ],
)
def test_not_followed(shape, spec, steps, words):
    assert words in rows(shape, spec, *steps)


def test_parts_lie_as_the_rows_they_are_of():
    recipe = in_parts(Recipe(Root("arg0", 0)), 8, 16, 4)
    assert placed_rows(NamedSharding(MESH, P("model")), (8, 16), recipe) == [("model",), (), ()]
    assert jax.eval_shape(recipe.apply, jax.ShapeDtypeStruct((8, 16), "float32")).shape == (4, 2, 16)
