"""Wrong uses are refused with the argument, what came, and what was expected, before any array is touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_says, full_width

import hire_xform as hx

W = {"w1": np.ones((4, 16), np.float32), "w2": np.ones((16, 4), np.float32)}
X = np.ones((1, 4), np.float32)


def block(params, x):
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]


def other_block(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def sparse(fun=block, **options):
    return hx.sparsify(fun, config=full_width(), **options)


def packed(fun=block):
    return sparse(fun).trace(W, X).pack(W)


def pack(weights, *more):
    return sparse().trace(W, X).pack(weights, *more)


def struct(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def keyword_only(params, *, x):
    return block(params, x)


# (what is done, the error, patterns that the message has)
WRONG = {
    # sparsify
    "fun_is_no_function": (lambda: hx.sparsify(3), TypeError, ["fun=3", "callable"]),
    "fun_is_a_config": (lambda: hx.sparsify(hx.Config()), TypeError, ["fun=Config", "callable"]),
    "config_is_a_dict": (lambda: hx.sparsify(block, config={}), TypeError, ["config={}", "hx.Config"]),
    "config_is_ffn": (lambda: hx.sparsify(block, config=hx.Ffn()), TypeError, ["config=Ffn", "hx.Config"]),
    "config_in_a_decorator": (lambda: hx.sparsify(config=3)(block), TypeError, ["config=3", "hx.Config"]),
    "calibration": (lambda: hx.sparsify(block, calibration=3), TypeError, ["calibration=3", "expected"]),
    "unknown_option": (lambda: sparse(static_argnum=1), TypeError, ["static_argnum'", "jax.jit", "static_argnums"]),
    "in_shardings": (lambda: sparse(in_shardings=None), TypeError, ["in_shardings", "expected"]),
    "weights_out_of_range": (lambda: sparse(weights_argnums=2), ValueError, ["weights_argnums=2", "2 positional"]),
    "weights_negative": (lambda: sparse(weights_argnums=-1), ValueError, ["weights_argnums=-1", "from 0"]),
    "weights_a_name": (lambda: sparse(weights_argnums="params"), TypeError, ["weights_argnums='params'", "integer"]),
    "weights_a_bool": (lambda: sparse(weights_argnums=True), TypeError, ["weights_argnums=True", "integer"]),
    "weights_floats": (lambda: sparse(weights_argnums=(0.0,)), TypeError, [r"weights_argnums=\(0.0,\)", "integer"]),
    "weights_static": (
        lambda: sparse(static_argnums=0, weights_argnums=0),
        ValueError,
        ["0", "weights_argnums", "static_argnums"],
    ),
    "weights_static_name": (
        lambda: sparse(static_argnames="params", weights_argnames="params"),
        ValueError,
        ["weights_argnums", "static"],
    ),
    "weights_donated": (lambda: sparse(donate_argnums=0), ValueError, ["donate_argnums", "can't be donated"]),
    "weights_donated_name": (lambda: sparse(donate_argnames="params"), ValueError, ["donate", "can't be donated"]),
    "static_out_of_range": (lambda: sparse(static_argnums=7), ValueError, ["static_argnums=7", "2 positional"]),
    "static_unknown_name": (lambda: sparse(static_argnames="mode"), ValueError, ["'mode'", r"\['params', 'x'\]"]),
    "donate_unknown_name": (lambda: sparse(donate_argnames="kv"), ValueError, ["donate_argnames", "'kv'"]),
    "donate_a_name_as_number": (lambda: sparse(donate_argnums="x"), TypeError, ["donate_argnums='x'", "integer"]),
    # settings
    "ffn_active_zero": (lambda: hx.Ffn(active=0.0), ValueError, [r"Ffn\(active=0.0\)", "0 < active <= 1"]),
    "ffn_active_percent": (lambda: hx.Ffn(active=25), ValueError, [r"active=25", "fraction"]),
    "ffn_active_nan": (lambda: hx.Ffn(active=float("nan")), ValueError, ["active=nan", "fraction"]),
    "ffn_active_text": (lambda: hx.Ffn(active="half"), ValueError, ["active='half'", "fraction"]),
    "ffn_group_size": (lambda: hx.Ffn(group_size=0), ValueError, ["group_size=0", "at least 1"]),
    "ffn_group_float": (lambda: hx.Ffn(group_size=8.0), ValueError, ["group_size=8.0", "integer"]),
    "ffn_activations": (lambda: hx.Ffn(activations="all"), ValueError, ["activations='all'", "'zeroing' or 'any'"]),
    "ffn_predictor": (lambda: hx.Ffn(predictor=8), ValueError, ["predictor=8", "hx.Quantized"]),
    "ffn_predictor_class": (lambda: hx.Ffn(predictor=hx.Quantized), ValueError, ["predictor=", "hx.Quantized"]),
    "ffn_certify": (lambda: hx.Ffn(certify=1), ValueError, ["certify=1", "True or False"]),
    "ffn_max_tokens": (lambda: hx.Ffn(max_tokens=0), ValueError, ["max_tokens=0", "at least 1"]),
    "ffn_positional": (lambda: hx.Ffn(0.5), TypeError, ["positional"]),
    "vocab_candidates": (lambda: hx.Vocab(candidates=0), ValueError, [r"Vocab\(candidates=0\)", "at least 1"]),
    "vocab_candidates_bool": (lambda: hx.Vocab(candidates=True), ValueError, ["candidates=True", "integer"]),
    "vocab_fill": (lambda: hx.Vocab(fill="zero"), ValueError, ["fill='zero'", "'predicted' or '-inf'"]),
    "quantized_bits": (lambda: hx.Quantized(3), ValueError, ["bits=3", "8 or 4"]),
    "quantized_bool": (lambda: hx.Quantized(True), ValueError, ["bits=True", "8 or 4"]),
    "lowrank_zero": (lambda: hx.LowRank(0), ValueError, ["rank=0", "int >= 1"]),
    "lowrank_fraction": (lambda: hx.LowRank(1.5), ValueError, ["rank=1.5", "fraction"]),
    "lowrank_bits": (lambda: hx.LowRank(4, bits=5), ValueError, ["bits=5", "None, 8 or 4"]),
    "lowrank_text": (lambda: hx.LowRank("d/4"), ValueError, ["rank='d/4'", "int >= 1"]),
    "rule_no_path": (lambda: hx.Rule(""), ValueError, ["path_glob=''", "pattern"]),
    "rule_path_number": (lambda: hx.Rule(3), ValueError, ["path_glob=3", "pattern"]),
    "rule_skip_and_force": (lambda: hx.Rule("*", skip=True, force=True), ValueError, ["force=True", "skip=True"]),
    "rule_skip_number": (lambda: hx.Rule("*", skip=1), ValueError, ["skip=1", "True or False"]),
    "rule_ffn": (lambda: hx.Rule("*", ffn=0.5), ValueError, ["ffn=0.5", "hx.Ffn"]),
    "config_rules_one": (lambda: hx.Config(rules=hx.Rule("*")), ValueError, ["rules=Rule", "tuple"]),
    "config_rules_text": (lambda: hx.Config(rules=("*",)), ValueError, [r"rules='\*'", "hx.Rule"]),
    "config_vocab": (lambda: hx.Config(vocab=256), ValueError, ["vocab=256", "hx.Vocab"]),
    "config_ffn_swapped": (lambda: hx.Config(ffn=hx.Vocab()), ValueError, ["ffn=Vocab", "hx.Ffn"]),
    "config_frozen": (lambda: setattr(hx.Config(), "ffn", None), AttributeError, ["ffn"]),
    # pack
    "pack_nothing": (lambda: sparse().trace(W, X).pack(), TypeError, ["got 0", "expected 1"]),
    "pack_two": (lambda: pack(W, W), TypeError, ["got 2", "expected 1", "weights_argnums"]),
    "pack_other_structure": (lambda: pack([W["w1"], W["w2"]]), ValueError, ["structure", "got", "expected"]),
    "pack_missing_key": (lambda: pack({"w1": W["w1"]}), ValueError, ["structure", "w2"]),
    "pack_other_shape": (
        lambda: pack({**W, "w1": np.ones((4, 8), "f4")}),
        ValueError,
        ["w1", r"\[4, 8\]", r"\[4, 16\]"],
    ),
    "pack_other_dtype": (lambda: pack({**W, "w2": W["w2"].astype("f2")}), ValueError, ["w2", "float16", "float32"]),
    "pack_shapes": (lambda: pack(jax.tree.map(struct, W)), TypeError, ["w1", "ShapeDtypeStruct", "array"]),
    "pack_packed": (lambda: pack(packed()), TypeError, ["already Packed", "plain weights"]),
    "pack_a_function_leaf": (lambda: pack({**W, "w1": len}), TypeError, ["w1", "len", "expected an array"]),
    "pack_other_function": (
        lambda: sparse(lambda p, x: block(p[1], x)).trace((len, W), X).pack((sum, W)),
        TypeError,
        [r"\[0\]", "sum", "expected .*len", "as traced"],
    ),
    # calls
    "packed_as_data": (lambda: sparse()(W, packed()), TypeError, ["Packed", "weights_argnums"]),
    "packed_as_data_by_name": (lambda: sparse()(W, x=packed()), TypeError, ["'x'", "Packed", "weights_argnums"]),
    "packed_inside_a_tree": (lambda: sparse()({"w": packed()}, X), TypeError, ["Packed", "'w'", "in the place of"]),
    "packed_inside_data": (lambda: sparse()(W, [packed()]), TypeError, ["Packed", "inside argument 1", "place of"]),
    "packed_of_other_sizes": (
        lambda: sparse()(packed(), np.ones((1, 5), np.float32)),
        TypeError,
        ["dot_general|contracting|incompatible"],
    ),
    "packed_without_what_is_read": (
        lambda: sparse(other_block)(_stripped(), X),
        hx.PackedMismatchError,
        ["w1", "Packed weights do not hold", "pack with"],
    ),
    "unhashable_static": (lambda: sparse(static_argnums=1)(W, [1]), ValueError, ["static", "hashable", "list"]),
    "unhashable_leaf": (lambda: sparse()({**W, "note": {1}}, X), TypeError, ["note", "set", "array"]),
    "unhashable_leaf_traced": (lambda: sparse().trace({**W, "note": {1}}, X), TypeError, ["note", "set", "array"]),
    "a_leaf_that_stands_for_an_array": (
        lambda: sparse()({**W, "note": StandsForAnArray()}, X),
        TypeError,
        ["note", "StandsForAnArray", "value"],
    ),
    "a_string_where_an_array_belongs": (lambda: sparse()(W, "x"), TypeError, []),
    "too_few_arguments": (lambda: sparse()(W), TypeError, ["missing|required", "x"]),
    "weights_not_in_the_call": (
        lambda: sparse(lambda *args: block(*args), weights_argnums=3).trace(W, X).pack(W),
        TypeError,
        ["weights_argnums", "3", "no such argument"],
    ),
    "keyword_only_weights": (
        lambda: sparse(keyword_only, weights_argnums=1),
        ValueError,
        ["weights_argnums=1", "1 positional"],
    ),
    "traced_weights": (lambda: jax.jit(sparse())(W, X), hx.TracedWeightsError, ["params", "tracer", "pack"]),
}


class StandsForAnArray:
    def __jax_array__(self):
        return jnp.ones(3)


def _stripped():
    """Packed weights of a function that reads one of the two."""
    return sparse(lambda params, x: jnp.tanh(x @ params["w2"].T)).trace(W, X).pack(W)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_use_says_what_came_and_what_was_expected(name):
    assert_says(*WRONG[name])


def test_there_are_many():
    assert len(WRONG) >= 25


def test_an_error_of_the_function_itself_passes_through():
    class OwnError(Exception):
        pass

    def broken(params, x):
        raise OwnError("mine")

    with pytest.raises(OwnError, match="mine"):
        sparse(broken)(W, X)
    with pytest.raises(OwnError, match="mine"):
        sparse(broken).trace(W, X)


def test_a_failed_call_leaves_the_function_usable():
    step = sparse()
    with pytest.raises(TypeError):
        step(W, np.ones((1, 5), np.float32))
    np.testing.assert_allclose(step(W, X), block(W, X))


def test_weights_that_are_one_opaque_object_are_refused():
    class Model:
        weights = W

    with pytest.raises(TypeError, match=r"argument 0 is in weights_argnums=\(0,\), but JAX sees no arrays in a Model"):
        hx.sparsify(lambda model, x: block(model.weights, x))(Model(), X)
