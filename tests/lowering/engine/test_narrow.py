"""In a scan over layers nothing is written for the layers that are not read, whatever the dtype of the rows."""

import jax
import jax.numpy as jnp
import pytest
from collectives import arrays_written
from jax import lax

from hire_xform.lowering.engine.block import UpProduct
from hire_xform.lowering.engine.static_units import static_units
from hire_xform.lowering.predict.quantized import Quantized
from hire_xform.lowering.primitives.combine_rows import combine_rows
from hire_xform.lowering.primitives.select_rows import select_rows_dot

LAYERS, N, D, CHOSEN = 8, 64, 32, 16


def selected(x, rows, first, group):
    chosen = (first + jnp.argsort(x[0])[:CHOSEN]) // group
    return select_rows_dot(x, rows, chosen, group_size=group, preferred_element_type=jnp.float32)


def combined(x, rows, first, group):
    h, chosen = selected(x, rows, first, group), first // group + jnp.arange(CHOSEN)
    return combine_rows(h, rows, chosen, group_size=group, preferred_element_type=jnp.float32)


def one_row(x, rows, first, group):
    return select_rows_dot(x, rows, first[None] + jnp.argmax(x), preferred_element_type=jnp.float32)


def own_rows(x, rows, first, group):
    x = jnp.concatenate([x, -x])
    return select_rows_dot(x, rows, first + jnp.argsort(x)[:, :CHOSEN], preferred_element_type=jnp.float32)


def always(x, rows, first, group):
    up = UpProduct(x=x, rows=rows, first_row=first, packed=None, spec=Quantized(8), dtype=jnp.float32)
    return static_units([up], lambda h, part: jax.nn.relu(h[0]), rows, first, CHOSEN)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(
    ("read", "group"),
    [(selected, 1), (combined, 1), (selected, 8), (combined, 8), (one_row, 1), (own_rows, 1), (always, 1)],
)
def test_a_scan_writes_no_rows_of_all_its_layers(read, group, dtype):
    rows = jnp.ones((LAYERS * N, D), jnp.float32).astype(dtype)

    def layers(rows, x):
        def layer(x, number):
            return x + jnp.mean(read(x, rows, number * N, group)), None

        return lax.scan(layer, x, jnp.arange(LAYERS))[0]

    compiled = jax.jit(layers).lower(rows, jnp.ones((1, D))).compile()
    assert max(arrays_written(compiled)) <= max(CHOSEN * group, 1) * D * 4
    # Were it so of any program, this would say nothing.
    everything = jax.jit(lambda rows: rows.astype(jnp.float32) * 2).lower(rows).compile()
    assert max(arrays_written(everything)) == LAYERS * N * D * 4
