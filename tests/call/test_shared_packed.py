"""One ``Packed`` for the programs of one model: blocks and head jitted apart, prefill and decode."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from checks import FORCE, assert_same, assert_says, full_width, kinds
from tied import D, M, V, inputs, make_weights

import hire_xform as hx

FULL = full_width()
# Flat leaves, as serving code holds them: w1, w2, an embedding, a head.
W1, W2, EMBED, HEAD = range(4)


def flat_weights(seed=0):
    made = make_weights(seed)
    return [made["w1"], made["w2"], make_weights(seed + 9)["embed"], made["embed"].T + 0]


def run_blocks(leaves, token):
    x = leaves[EMBED][token][None]
    return x + jax.nn.relu(x @ leaves[W1]) @ leaves[W2]


def run_head(leaves, x):
    return jnp.argmax(x @ leaves[HEAD], -1), x @ leaves[HEAD]


def tied_head(leaves, x):
    return jnp.argmax(x @ leaves[EMBED].T, -1), x @ leaves[EMBED].T


def reads_up(leaves, x):
    """Reads whole what the blocks hold as packed rows."""
    return x @ leaves[W1]


def traced_pair(head=run_head, config=FULL, swapped=False):
    """The steps of blocks and head, and their traces; ``config`` is the head's."""
    blocks = hx.sparsify(run_blocks, config=FULL)
    if swapped:
        apart = hx.sparsify(lambda x, leaves: head(leaves, x), config=config, weights_argnums=1)
    else:
        apart = hx.sparsify(head, config=config)
    leaves, x = flat_weights(), inputs()
    return blocks, apart, blocks.trace(leaves, 3), apart.trace(*((x, leaves) if swapped else (leaves, x)))


def whole(packed, size):
    return [a for a in packed.leaves if a.dtype == jnp.float32 and a.size == size]


@pytest.mark.parametrize("head", [run_head, tied_head], ids=["own head", "tied head"])
@pytest.mark.parametrize("swapped", [False, True], ids=["same position", "another position"])
def test_blocks_and_head_share_one_packed(head, swapped):
    blocks, apart, *traced = traced_pair(head, swapped=swapped)
    leaves = flat_weights()
    assert [kinds(t.plan)[:1] for t in traced] == [["ffn"], ["vocab"]]
    packed = hx.pack(leaves, traced)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = blocks(packed, 3)
        got = apart(x, packed) if swapped else apart(packed, x)
    assert_same(x, jax.jit(run_blocks)(leaves, 3))
    assert_same(got, jax.jit(head)(leaves, x))
    apart_bytes = sum(t.pack(leaves).nbytes for t in traced)
    assert packed.nbytes <= apart_bytes
    assert [len(whole(packed, size)) for size in (D * M, D * V)] == [2, 2 if head is run_head else 1]
    assert_same(jax.jit(blocks)(packed, 3), x)


def test_what_one_program_packs_another_reads_whole_and_it_is_held_once():
    blocks, apart, *traced = traced_pair(reads_up, hx.Config(vocab=None, ffn=None))
    leaves = flat_weights()
    assert not traced[1].plan.sites
    packed = hx.pack(leaves, traced)
    assert len(whole(packed, D * M)) == 2
    assert packed.nbytes < sum(t.pack(leaves).nbytes for t in traced)
    assert_same(apart(packed, inputs()), reads_up(leaves, inputs()))
    assert_same(blocks(packed, 3), run_blocks(leaves, 3))


def test_the_original_weights_may_be_deleted():
    blocks, apart, *traced = traced_pair()
    leaves = flat_weights()
    want = run_blocks(leaves, 3), run_head(leaves, inputs())
    packed = hx.pack(leaves, traced)
    for i, leaf in enumerate(leaves):
        if i not in packed.layout.kept:
            leaf.delete()
    assert leaves[W1].is_deleted()
    assert leaves[HEAD].is_deleted()
    assert_same((blocks(packed, 3), apart(packed, inputs())), want)


def test_one_program_is_packed_as_by_itself():
    _, _, traced, _ = traced_pair()
    leaves = flat_weights()
    one, other = hx.pack(leaves, traced), traced.pack(leaves)
    assert one.layout == other.layout
    assert_same(one.leaves, other.leaves, 0.0)


def test_programs_with_several_weights_arguments_share_a_tuple():
    def two(body, x, *, head):
        return jax.nn.relu(x @ body[W1]) @ body[W2], jnp.argmax(x @ head, -1)

    def three(x, head, body):
        return jnp.argmax(x @ head, -1), x @ body[W1]

    leaves = flat_weights()
    body, head = leaves[:2], leaves[HEAD]
    first = hx.sparsify(two, config=FULL, weights_argnums=0, weights_argnames="head")
    second = hx.sparsify(three, config=FULL, weights_argnums=(2, 1))
    traced = [first.trace(body, inputs(), head=head), second.trace(inputs(), head, body)]
    one, other = hx.pack((body, head), traced)
    assert_same(first(one, inputs(), head=other), two(body, inputs(), head=head))
    assert_same(second(inputs(), other, one), three(inputs(), head, body))
    with pytest.raises(TypeError, match=r"weights is a list; expected the tuple of the 2 arguments in weights_argnums"):
        hx.pack([body, head], traced)


def test_a_packed_of_one_program_says_what_to_do_in_another():
    _, apart, *traced = traced_pair()
    leaves = flat_weights()
    with pytest.raises(hx.PackedMismatchError, match=r"do not hold leaves\[3\].*hx.pack\(weights, \[traced, ...\]\)"):
        apart(traced[0].pack(leaves), inputs())


def test_a_site_that_runs_dense_for_want_of_its_packed_form_is_told_once():
    _, apart, *traced = traced_pair(tied_head)
    leaves = flat_weights()
    packed = traced[0].pack(leaves)  # holds the embedding, which the blocks look tokens up in
    with pytest.warns(hx.HireWarning, match=r"dot_general.* dense.*hx.pack\(weights, \[traced, ...\]\)") as told:
        results = [apart(packed, inputs(seed=seed)) for seed in range(3)]
    assert len(told) == 1
    for seed, result in enumerate(results):
        assert_same(result, tied_head(leaves, inputs(seed=seed)))


def test_prefill_and_decode_of_other_settings_share():
    few = hx.Config(vocab=hx.Vocab(candidates=V, max_tokens=4), rules=FORCE)
    other = hx.Config(vocab=hx.Vocab(candidates=V, predictor=hx.Quantized(4), max_tokens=4), rules=FORCE)
    steps = [hx.sparsify(run_head, config=config) for config in (few, other)]
    leaves = flat_weights()
    traced = [step.trace(leaves, inputs()) for step in steps]
    packed = hx.pack(leaves, [*traced, steps[0].trace(leaves, inputs(9))])
    assert len(whole(packed, D * V)) == 1
    for step in steps:
        for tokens in (1, 9):
            assert_same(step(packed, inputs(tokens)), run_head(leaves, inputs(tokens)))


def step_of(**shapes):
    leaves = flat_weights()
    for i, shape in shapes.items():
        leaves[int(i[1:])] = jnp.ones(shape)
    return hx.sparsify(run_head, config=FULL).trace(leaves, inputs())


WRONG = {
    "no_list": (lambda: hx.pack(flat_weights(), 3), TypeError, ["traced=3", "list", "step.trace"]),
    "nothing": (lambda: hx.pack(flat_weights(), []), TypeError, [r"traced=\[\]", "step.trace"]),
    "a_step": (
        lambda: hx.pack(flat_weights(), [step_of(), hx.sparsify(run_head)]),
        TypeError,
        [r"traced\[1\] is a Sparsified", "Traced"],
    ),
    "other_shapes": (
        lambda: hx.pack(flat_weights(), [step_of(), step_of(_1=(8, D))]),
        ValueError,
        [r"traced\[1\]", r"leaves\[1\]", r"\[8, 16\]", r"\[48, 16\]", "same weights"],
    ),
    "other_structure": (
        lambda: hx.pack(
            flat_weights(), [step_of(), hx.sparsify(run_head, config=FULL).trace(tuple(flat_weights()), inputs())]
        ),
        ValueError,
        [r"traced\[1\]", "another structure", "got", "expected"],
    ),
    "other_setting": (
        lambda: hx.pack(
            flat_weights(),
            [hx.sparsify(run_head).trace([*flat_weights(), s], inputs()) for s in ("gelu", "relu")],
        ),
        ValueError,
        [r"traced\[1\]", "'relu'", "'gelu'"],
    ),
    "other_count": (
        lambda: hx.pack(
            flat_weights(), [step_of(), hx.sparsify(run_head, weights_argnums=()).trace(flat_weights(), inputs())]
        ),
        ValueError,
        [r"weights_argnums=\(\)", r"weights_argnums=\(0,\)", "as many"],
    ),
    "other_weights": (lambda: hx.pack(flat_weights()[:3], step_of()), ValueError, ["structure"]),
    "packed": (lambda: hx.pack(step_of().pack(flat_weights()), step_of()), TypeError, ["already Packed"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_use_says_what_came_and_what_was_expected(name):
    assert_says(*WRONG[name])
