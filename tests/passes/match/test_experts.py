"""Blocks of experts: which are found, that a loop over them is what they were, and why others stay dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, full_width, kinds, primitives_of
from jax import lax
from jax.extend.core import primitives as prims

import hire_xform as hx
from hire_xform.passes.ir.axes import Atom
from hire_xform.passes.ir.graph import walk
from hire_xform.passes.match.expert_axes import is_of_experts
from hire_xform.passes.match.experts import find_experts
from hire_xform.passes.plan.experts import dense_experts, with_reasons
from hire_xform.passes.rewrite.experts import looped_over
from hire_xform.passes.weights.products import find_products
from hire_xform.passes.weights.provenance import Provenance
from hire_xform.passes.weights.recipe import Root

E, D, M, T, K = 5, 12, 40, 3, 2
relu = jax.nn.relu


def weights():
    rng = np.random.default_rng(0)
    shapes = {"up": (E, D, M), "gate": (E, D, M), "down": (E, M, D), "bias": (E, M), "router": (D, E)}
    shapes |= {"rows": (E, M, D), "layers": (2, E, D, M), "outs": (2, E, M, D), "plain": (D, M)}
    return {name: jnp.asarray(rng.normal(size=s) / 3, jnp.float32) for name, s in shapes.items()}


def tokens(count=T):
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, D)), jnp.float32)


def routed(p, x):
    """Shares ``[T, K]`` and experts ``[T, K]``."""
    return lax.top_k(jax.nn.softmax(x @ p["router"]), K)


def best_one(p, x):
    index = jnp.argmax(x @ p["router"], axis=-1)
    u = relu(jnp.einsum("td,tdm->tm", x, p["up"][index]))
    return jnp.einsum("tm,tmd->td", u, p["down"][index])


def best_two(p, x, act=relu):
    shares, index = routed(p, x)
    u = act(jnp.einsum("td,tkdm->tkm", x, p["up"][index]))
    return jnp.einsum("tkm,tkmd,tk->td", u, p["down"][index], shares)


def best_two_gated(p, x):
    """The second product adds up the experts as well as their units; weights are cast once they are gathered."""
    shares, index = routed(p, x)
    gate = jnp.einsum("td,tkdm->tkm", x, jnp.take(p["gate"], index, axis=0).astype(jnp.bfloat16))
    u = relu(gate + p["bias"][index]) * jnp.einsum("td,tkdm->tkm", x, p["up"][index])
    return jnp.einsum("tkm,tkmd->td", u * shares[..., None], p["down"][index])


def rows_of_each(p, x):
    """Gathered matrices are transposed before they are multiplied."""
    index = jnp.argmax(x @ p["router"], axis=-1)
    u = jnp.square(relu(jnp.einsum("td,tdm->tm", x, jnp.swapaxes(p["rows"][index], 1, 2))))
    return jnp.einsum("tm,tmd->td", u, p["down"][index])


def every_one(p, x):
    u = relu(jnp.einsum("td,edm->etm", x, p["up"]) + p["bias"][:, None])
    return jnp.einsum("te,etd->td", jax.nn.softmax(x @ p["router"]), jnp.einsum("etm,emd->etd", u, p["down"]))


def tokens_first(p, x):
    u = relu(jnp.einsum("td,edm->tem", x, p["up"]))
    return jnp.einsum("te,ted->td", jax.nn.softmax(x @ p["router"]), jnp.einsum("tem,emd->ted", u, p["down"]))


def dispatched(p, x):
    """Each expert has its own tokens."""
    chosen = jnp.stack([x, x + 1, x - 1, 2 * x, -x])
    return jnp.einsum("etm,emd->etd", relu(jnp.einsum("etd,edm->etm", chosen, p["up"])), p["down"]).sum(0)


def over_experts(p, x):
    made = jax.vmap(lambda up, down: relu(x @ up) @ down)(p["up"], p["down"])
    return jnp.einsum("te,etd->td", jax.nn.softmax(x @ p["router"]), made)


def over_tokens(p, x):
    index = jnp.argmax(x @ p["router"], axis=-1)
    return jax.vmap(lambda x, i: jax.jit(lambda x, up, down: relu(x @ up) @ down)(x, p["up"][i], p["down"][i]))(
        x, index
    )


def layers(p, x):
    def layer(x, stacks):
        up, down = stacks
        index = jnp.argmax(x @ p["router"], axis=-1)
        u = relu(jnp.einsum("td,tdm->tm", x, up[index]))
        return jnp.tanh(x + jnp.einsum("tm,tmd->td", u, down[index])), None

    return lax.scan(layer, x, (p["layers"], p["outs"]))[0]


def ragged(p, x):
    """Rows are in order of their experts; the last row is of none, and zero."""
    _, index = routed(p, x)
    order = jnp.argsort(index.reshape(-1))
    rows = jnp.repeat(x, K, axis=0)[order]
    sizes = jnp.bincount(index.reshape(-1), length=E).at[index.max()].add(-1)
    u = relu(lax.ragged_dot(rows, p["gate"], sizes)) * lax.ragged_dot(rows, p["up"], sizes)
    return lax.ragged_dot(u, p["down"], sizes)[jnp.argsort(order)]


# With how many tokens each expert's block has.
BLOCKS = {
    best_one: 1,
    best_two: 1,
    best_two_gated: 1,
    rows_of_each: 1,
    every_one: T,
    tokens_first: T,
    dispatched: T,
    over_experts: T,
    over_tokens: 1,
    layers: 1,
    ragged: 1,
}


@pytest.mark.parametrize("fun", BLOCKS, ids=lambda fun: fun.__name__)
def test_experts_are_one_site_in_a_loop_and_full_width_is_dense(fun):
    p, x = weights(), tokens()
    step = hx.sparsify(fun, config=full_width())
    traced = step.trace(p, x)
    assert [(s.kind, s.units, s.tokens) for s in traced.plan.sites] == [("ffn", M, BLOCKS[fun])], traced.explain()
    assert traced.plan.sites[0].path.rpartition("/")[0].endswith("scan[0]")
    assert "test_experts" in traced.plan.sites[0].source
    want = jax.jit(fun)(p, x)
    assert_same(step(p, x), want, 4e-2 if fun is best_two_gated else 2e-5)
    # The experts' matrices are read where they lie: nothing gathers or moves them.
    matrices = {(D, M), (M, D)}
    moved = [shape for shape in shapes_of(traced.sparse_jaxpr.jaxpr) if len(shape) > 2 and shape[-2:] in matrices]
    stacks = {p[name].shape for name in ("down", "rows", "outs")} | {(1, M, D), (1, E, M, D)}
    assert set(moved) <= stacks, moved


def shapes_of(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (value.aval.shape for value in eqn.outvars)
        for param in eqn.params.values():
            for inner in param if isinstance(param, (tuple, list)) else (param,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes_of(inner)


def test_bytes_are_those_of_the_experts_that_are_read():
    p, x = weights(), tokens()
    sizes = {fun: hx.sparsify(fun, config=full_width()).trace(p, x).plan.dense_bytes for fun in (best_one, every_one)}
    assert sizes == {best_one: T * 2 * D * M * 4, every_one: E * 2 * D * M * 4}


def test_one_token_of_one_expert_needs_no_loop():
    p, x = weights(), tokens(1)
    traced = hx.sparsify(best_one, config=full_width()).trace(p, x)
    assert kinds(traced.plan) == ["ffn"]
    assert "/" not in traced.plan.sites[0].path
    assert prims.scan_p not in primitives_of(traced.laid_out)


def test_experts_are_proved_as_other_blocks_are():
    p, x = weights(), tokens()
    step = hx.sparsify(best_two, config=hx.Config(rules=(hx.Rule("*", force=True),)))
    traced = step.trace(p, x)
    assert traced.plan.sites[0].settings.certify
    assert_same(step(p, x), jax.jit(best_two)(p, x))


def test_each_expert_is_calibrated_by_itself():
    p = weights()
    batches = [(p, jnp.asarray(np.random.default_rng(s).normal(size=(24, D)), jnp.float32)) for s in range(2)]
    calibration = hx.calibrate(best_one, batches, progress=False)
    (site,) = calibration.sites.values()
    assert site.tokens.shape == (E,)
    assert site.tokens.sum() == 48
    step = hx.sparsify(best_one, calibration=calibration, config=hx.Config(rules=(hx.Rule("*", force=True),)))
    assert kinds(step.trace(*batches[0]).plan) == ["ffn"]


def test_derivatives_are_those_of_the_dense_function():
    p, x = weights(), tokens()
    step = hx.sparsify(best_two, config=full_width())
    packed = step.pack(p, x)
    dense = jax.grad(lambda x: jnp.sum(best_two(p, x) ** 2))(x)
    assert_same(jax.grad(lambda x: jnp.sum(step(packed, x) ** 2))(x), dense, 2e-4)


def program(fun, p, x):
    leaves, tree = jax.tree.flatten((p, x))
    jaxpr = jax.make_jaxpr(lambda *leaves: fun(*jax.tree.unflatten(tree, leaves)))(*leaves)
    graph = walk(jaxpr)
    provenance = Provenance(graph, [Root.of(0, i) if i < len(p) else None for i in range(len(leaves))])
    return graph, find_experts(graph, provenance, find_products(graph, provenance)[0])[0], leaves


@pytest.mark.parametrize("fun", [best_two_gated, every_one, over_tokens, ragged], ids=lambda fun: fun.__name__)
def test_the_program_with_a_loop_computes_the_same(fun):
    graph, found, leaves = program(fun, weights(), tokens())
    assert len(found) == 1
    looped = looped_over(graph, found)
    got = jax.core.eval_jaxpr(looped.jaxpr, looped.consts, *leaves)
    assert_same(got[0], fun(weights(), tokens()), 4e-2 if fun is best_two_gated else 2e-5)


def normalised(p, x):
    u = relu(jnp.einsum("td,edm->etm", x, p["up"]))
    u = u / (1 + jnp.sum(u, -1, keepdims=True))
    return jnp.einsum("etm,emd->etd", u, p["down"]).sum(0)


def returned(p, x):
    u = relu(jnp.einsum("td,edm->etm", x, p["up"]))
    return jnp.einsum("etm,emd->etd", u, p["down"]).sum(0), u


def linear(p, x):
    return jnp.einsum("etm,emd->etd", jnp.einsum("td,edm->etm", x, p["up"]), p["down"]).sum(0)


def other_experts(p, x):
    """The experts of the second product are not those of the first."""
    _, index = routed(p, x)
    u = relu(jnp.einsum("td,tkdm->tkm", x, p["up"][index]))
    return jnp.einsum("tkm,emd->tked", u, p["down"]).sum((1, 2))


STAYING = [
    (normalised, "no block of experts ends in it: an activation on the way to it is also read by reduce_sum"),
    (returned, "no block of experts ends in it: what it contracts is also returned"),
    (linear, "no block of experts ends in it: nothing nonlinear"),
    (other_experts, "its weight is computed inside the program, by gather"),
]


@pytest.mark.parametrize(("fun", "words"), STAYING, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_no_block_of_experts_stays_and_says_why(fun, words):
    p, x = weights(), tokens()
    assert not program(fun, p, x)[1]
    traced = hx.sparsify(fun, config=full_width()).trace(p, x)
    assert "ffn" not in kinds(traced.plan)
    assert any(words in refusal.reason for refusal in traced.plan.refusals), traced.explain()


def test_experts_that_pay_nothing_run_as_they_were_written():
    p, x = weights(), tokens()
    silu = lambda p, x: best_two(p, x, jax.nn.silu)  # noqa: E731
    traced = hx.sparsify(silu).trace(p, x)
    assert not traced.plan.sites
    assert str(traced.laid_out) == str(traced.jaxpr)
    reasons = [r.reason for r in traced.plan.refusals]
    assert any("nor is the block of one expert a site: its activation (logistic, mul)" in reason for reason in reasons)
    step = hx.sparsify(silu)
    assert_same(step(p, x), jax.jit(silu)(p, x), 0.0)


def test_many_tokens_with_experts_of_their_own_run_as_they_were_written():
    p, x = weights(), tokens(40)
    traced = hx.sparsify(best_two, config=full_width()).trace(p, x)
    assert not traced.plan.sites
    assert any("a call has 80 experts of tokens; expected 64" in refusal.reason for refusal in traced.plan.refusals)


def test_one_block_may_stay_beside_one_that_is_rewritten():
    def both(p, x):
        return every_one(p, jnp.tanh(best_two(p, x, jax.nn.silu)) + x)

    p, x = weights(), tokens()
    config = hx.Config(ffn=hx.Ffn(active=1.0, certify=False), vocab=None, rules=(hx.Rule("*", force=True),))
    step = hx.sparsify(both, config=config)
    traced = step.trace(p, x)
    assert kinds(traced.plan) == ["ffn"]
    assert primitives_of(traced.laid_out).count(prims.scan_p) == 1
    assert_same(step(p, x), jax.jit(both)(p, x))


def test_the_expert_leads_the_token_index():
    # Of five experts with three tokens each, the token index is three times the expert's number and the token's.
    assert [is_of_experts(atom, 3) for atom in (Atom("t", 3, 5), Atom("t", 1, 3), Atom("h", 40, 5))] == [
        True,
        False,
        False,
    ]


def test_reasons_are_told_by_source_line():
    p, x = weights(), tokens()
    _, found, _ = program(best_two, p, x)
    plan = hx.sparsify(lambda p, x: best_two(p, x, jax.nn.silu)).trace(p, x).plan
    assert list(dense_experts(found, plan, False)) == found
    line = plan.refusals[-1].source
    assert with_reasons(plan, {line: "so"}).refusals[-1].reason == f"{plan.refusals[-1].reason}; so"


def test_a_product_that_nothing_reads_is_told_of_beside_experts():
    def fun(p, x):
        _ = x @ p["plain"]
        return best_two(p, x)

    traced = hx.sparsify(fun, config=full_width()).trace(weights(), tokens())
    assert kinds(traced.plan) == ["ffn"]
    assert any("its output is not used" in refusal.reason for refusal in traced.plan.refusals), traced.explain()
