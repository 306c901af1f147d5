"""What the TPU's own compiler makes of the kernels, ahead of time and without a TPU."""

import re
from functools import partial

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import arrays_written
from described_tpus import ENVIRONMENT, ONE, chips, compiled, on_one_chip, one_chip
from extras import why_missing
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import hire_xform as hx
from hire_xform.lowering.kernels.tpu import shapes
from hire_xform.lowering.primitives.chosen_block import chosen_block

pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow]

F32, BF16, INT8, UINT8, INT32 = jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint8, jnp.int32


@pytest.fixture(scope="module")
def found():
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        pytest.skip(why_missing("tpu-aot", error))
    return devices.outcomes(__name__, ENVIRONMENT)


def kernels():
    """Each kernel at sizes of a model of a billion parameters, or of many tokens: a function, and what it takes."""
    from hire_xform.lowering.kernels.tpu import open_rows, rows, scores, top_k

    for tokens, dtype, given, group, n, count in (
        (1, BF16, BF16, 8, 8192, 65),
        (16, BF16, F32, 1, 128256, 251),
        (2, F32, F32, 1, 8192, 200),
        (1, F32, F32, 8, 8192, 64),
    ):
        d = 2048
        matrix, index = ((n, d), dtype), ((count,), INT32)
        select = partial(rows.select_rows_dot, group=group, magnitudes=tokens == 2)
        yield select, ((tokens, d), given), matrix, index
        yield partial(rows.combine_rows, group=group), ((tokens, count * group), given), matrix, index
    for tokens, dtype, given, group, count in ((1, BF16, BF16, 8, 65), (16, BF16, F32, 1, 251), (2, F32, F32, 8, 64)):
        operands = ((tokens, 2048), given), *[((8192, 2048), dtype)] * 3, ((count,), INT32)
        yield partial(gated, group=group), *operands
    matrix, index = ((8192, 2048), INT8), ((65,), INT32)
    of_rows, of_columns = ((8192, 1), BF16), ((2, 2048), BF16)
    yield lambda *a: rows.select_rows_dot(*a[:3], 8, False, a[3]), ((2, 2048), BF16), matrix, index, of_rows
    yield lambda *a: rows.combine_rows(*a[:3], 8, a[3]), ((2, 65 * 8), BF16), matrix, index, of_columns
    yield lambda *a: rows.select_rows_dot(*a[:3], 1, False, a[3]), ((1, 2048), F32), matrix, index, of_rows
    for tokens, d, n, bits in ((1, 512, 128256, 8), (16, 2048, 8192, 4), (3, 2048, 512, 8), (1, 256, 200, 4)):
        q = ((n, d * bits // 8), INT8 if bits == 8 else UINT8)
        yield partial(scores.quantized_scores, bits=bits), ((tokens, d), F32), q, ((n,), F32)
        yield partial(scores.fine_scores, bits=bits), ((tokens, d), F32), q, ((n,), F32)
    for tokens, d, r, n in ((1, 2048, 512, 128256), (16, 4096, 1024, 8192)):
        factors = [each for of in ((r, d), (n, r)) for each in ((of, INT8), (of[:1], F32))]
        yield scores.scores_in_two, ((tokens, d), F32), *factors
    for n, k, shards in ((1024, 64, 1), (128256, 256, 1), (2**19, 1024, 1), (262144, 512, 4)):
        yield partial(top_k.top_k, k=k, shards=shards), ((1, n), F32)
    for n in (1000, 2**19):
        yield open_rows.open_rows, ((n,), F32)


def gated(x, gate, up, down, index, *, group):
    """What chosen units of a block with a gate make."""

    def activation(hiddens):
        return jax.nn.silu(hiddens[0]) * hiddens[1]

    settings = {"group_size": group, "dtypes": [x.dtype] * 2, "out_dtype": F32}
    return chosen_block([x, x], [gate, up], down, index, [0, 0, 0], activation, **settings)


def check_every_kernel_on_every_chip():
    for kind in ONE:
        # All of them for one chip, and of the others each at some of the sizes.
        for fun, *operands in list(kernels())[:: 1 if kind == "v5e" else 3]:
            placed = [jax.ShapeDtypeStruct(*operand, sharding=one_chip(kind)) for operand in operands]
            program = compiled(jax.jit(fun).trace(*placed).lower(), kind)
            assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1, fun
            # Whatever the matrix is, nothing as large is made of it.
            assert program.memory_analysis().temp_size_in_bytes < 2**20


def check_what_is_held_fits_where_it_is_served():
    """At the largest sizes that are served the compiler finds room in VMEM."""
    from hire_xform.lowering.kernels.tpu import rows

    d, tokens = max(d for d in range(128, 2**15, 128) if served(16, d)), 16
    placed = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=one_chip())
        for shape, dtype in (((tokens, d), F32), ((1024, d), F32), ((256,), INT32))
    ]
    compiled(jax.jit(partial(rows.select_rows_dot, group=1, magnitudes=False)).trace(*placed).lower())


def served(tokens, d):
    shape = jax.ShapeDtypeStruct
    return shapes.rows_served(shape((tokens, d), F32), shape((1024, d), F32), shape((256,), INT32), group_size=1)


def called(program):
    """The kernels of a program, by name, how often each stands in it."""
    names = re.findall(r"%(hire_\w+?)[.\d]* = .*custom_call_target=\"tpu_custom_call\"", program.as_text())
    return {name: names.count(name) for name in sorted(set(names))}


def model(w, x):
    x = x + jax.nn.relu(x @ w["up"]) @ w["down"]
    return jnp.argmax(x @ w["head"], axis=-1)


CONFIG = hx.Config(
    ffn=hx.Ffn(active=1 / 16, group_size=8, predictor=hx.LowRank(0.25, bits=8)),
    vocab=hx.Vocab(candidates=128, predictor=hx.Quantized(4)),
    rules=(hx.Rule("*", force=True),),
)
D, M, VOCAB = 512, 4096, 32768


def traced():
    w = on_one_chip(up=(D, M), down=(M, D), head=(D, VOCAB))
    return hx.sparsify(model, config=CONFIG).trace(w, on_one_chip(x=(1, D))["x"])


def check_a_block_and_a_head_are_run_by_kernels():
    program = compiled(traced().lower())
    assert called(program) == {
        "hire_chosen_block": 1,
        "hire_quantized_scores": 1,
        "hire_scores_in_two": 1,
        "hire_select_rows_dot": 1,
        "hire_top_k": 2,
    }
    # No scores in HBM, nor anything else but what comes out.
    assert max(arrays_written(program, in_vmem=False)) < 4 * M // 8


def check_a_loop_over_layers_in_int8_copies_no_matrix():
    layers = 2

    def matrix(name, *shape):
        return on_one_chip(dtype=INT8, **{name: (layers, *shape)}) | on_one_chip(
            **{f"{name} scale": (layers, 1, shape[1])}
        )

    def step(w, x):
        def layer(x, own):
            up, down = (own[name].astype(BF16) * own[f"{name} scale"] for name in ("up", "down"))
            return x + jax.nn.relu(x @ up) @ down, None

        return jax.lax.scan(layer, x, w)[0]

    w = matrix("up", D, M) | matrix("down", M, D)
    config = hx.Config(ffn=CONFIG.ffn, rules=CONFIG.rules)
    program = compiled(hx.sparsify(step, config=config).trace(w, on_one_chip(x=(1, D))["x"]).lower())
    assert called(program)["hire_combine_rows"] == called(program)["hire_select_rows_dot"] == 1
    assert max(arrays_written(program, in_vmem=False)) < 2**20


def check_each_of_four_chips_runs_them_on_its_part():
    mesh = Mesh(np.array(chips()), ("model",), axis_types=(AxisType.Auto,))

    def on(*shape, spec):
        return jax.ShapeDtypeStruct(shape, BF16, sharding=NamedSharding(mesh, spec))

    columns = PartitionSpec(None, "model")
    w = {
        "up": on(D, M, spec=columns),
        "down": on(M, D, spec=PartitionSpec("model", None)),
        "head": on(D, VOCAB, spec=columns),
    }
    program = compiled(hx.sparsify(model, config=CONFIG).trace(w, on(1, D, spec=PartitionSpec())).lower())
    assert sum(called(program).values()) == 6


def check_a_program_for_several_platforms_has_them_for_one():
    text = traced().lower(lowering_platforms=("cpu", "tpu")).as_text()
    assert text.count("tpu_custom_call") == 6
    assert "stablehlo.case" in text


def check_a_program_that_is_written_down_has_them_too():
    step = hx.sparsify(model, config=CONFIG)
    w = {"up": jnp.zeros((D, M), BF16), "down": jnp.zeros((M, D), BF16), "head": jnp.zeros((D, 1024), BF16)}
    x = jnp.ones((1, D), BF16)
    packed = step.trace(w, x).pack(w)
    sent = export.export(jax.jit(step), platforms=("cpu", "tpu"))(packed, x)
    assert sent.platforms == ("cpu", "tpu")
    assert sent.mlir_module().count("tpu_custom_call") == 6


@pytest.mark.parametrize("name", devices.checks(__name__))
def test_on_a_described_tpu(found, name):
    assert not found[name], found[name]
