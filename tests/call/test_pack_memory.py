"""What packing leaves behind and takes on the way: after it there is ``Packed``, and on the way one matrix more."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE
from tied import inputs, make_weights, net

import hire_xform as hx
from hire_xform.passes.pack.packers import packer

D, M, L = 32, 4096, 4
PREDICTORS = [hx.Quantized(8), hx.Quantized(4), hx.LowRank(0.25, bits=8)]


def config(predictor=None, certify=False):
    ffn = hx.Ffn(active=0.25, predictor=predictor, certify=certify)
    return hx.Config(vocab=hx.Vocab(candidates=8, predictor=predictor, certify=certify), ffn=ffn, rules=FORCE)


def alive() -> dict[int, int]:
    """Bytes of each buffer that is alive; JAX 0.9 has a second array of one whose address was asked for."""
    gc.collect()
    return {a.unsafe_buffer_pointer(): a.nbytes for a in jax.live_arrays()}


@pytest.fixture
def new_packers():
    """No packer is compiled yet."""
    packer.cache_clear()


def argmax_net(params, x):
    return jnp.argmax(net(params, x), -1)


@pytest.mark.parametrize("certify", [False, True], ids=["approximate", "certified"])
@pytest.mark.parametrize("predictor", PREDICTORS, ids=str)
def test_after_the_first_pack_only_packed_is_alive(new_packers, predictor, certify):
    step, params = hx.sparsify(argmax_net, config=config(predictor, certify)), make_weights(m=M, d=D)
    traced = step.trace(params, inputs(d=D))
    before = alive()
    packed = traced.pack(params)
    made = {key: size for key, size in alive().items() if key not in before}
    leaves = {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in jax.tree.leaves(packed)}
    assert made == {key: size for key, size in leaves.items() if key not in before}
    assert len(made) > 3


def test_after_a_first_call_under_a_trace_only_packed_forms_are_alive(new_packers):
    step, params = hx.sparsify(argmax_net, config=config(certify=True)), make_weights(m=M, d=D)
    packed = step.trace(params, inputs(d=D)).pack(params)
    forms = sum(leaf.nbytes for leaf in jax.tree.leaves(packed) if all(leaf is not w for w in params.values()))
    packer.cache_clear()
    before = sum(alive().values())
    jax.make_jaxpr(lambda x: step(params, x))(inputs(d=D))
    assert sum(alive().values()) - before <= forms


def block(params, x):
    return x + jax.nn.relu(x @ params["w1"]) @ params["w2"]


def stacked(params, x):
    return jax.lax.scan(lambda x, w: (block(w, x), None), x, params)[0]


@pytest.mark.parametrize("layers", [None, L], ids=["one", "stack"])
@pytest.mark.parametrize("certify", [False, True], ids=["approximate", "certified"])
@pytest.mark.parametrize("predictor", PREDICTORS, ids=str)
def test_packing_takes_one_matrix_more_than_it_makes(monkeypatch, new_packers, predictor, certify, layers):
    """The compiler's own count, of each packer that runs. Blocks of rows are small here, as beside real matrices."""
    monkeypatch.setattr("hire_xform.lowering.xla.blocks._TOGETHER", 16 * D)
    compiled = []

    def noted(*key):
        pack = packer(*key)

        def run(*arrays):
            compiled.append((key, pack.lower(*arrays).compile().memory_analysis().temp_size_in_bytes))
            return pack(*arrays)

        return run

    monkeypatch.setattr("hire_xform.passes.pack.make.packer", noted)
    rng, lead = np.random.default_rng(0), () if layers is None else (layers,)
    shapes = {"w1": (D, M), "w2": (M, D)}
    params = {name: jnp.asarray(rng.normal(size=(*lead, *shape)), jnp.float32) for name, shape in shapes.items()}
    traced = hx.sparsify(block if layers is None else stacked, config=config(predictor, certify))
    traced = traced.trace(params, inputs(d=D))
    assert len(traced.plan.sites) == 1
    traced.pack(params)
    assert len(compiled) > 1
    small = 4 * (24 * D * D + 8 * M)  # square matrices of coordinates, blocks of rows, numbers of each row
    assert not [(key, taken) for key, taken in compiled if taken > 4 * D * M + small]
