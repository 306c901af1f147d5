"""Each invariant of graphs, detections and plans, broken by hand, is named; what passes make breaks none."""

import dataclasses

import jax
import jax.numpy as jnp
import models
import pytest
from checks import narrow
from jax import lax

import hire_xform as hx
from hire_xform.passes.ir.graph import Value, walk
from hire_xform.passes.ir.verify import InvariantError, verify_graph
from hire_xform.passes.match.verify import verify_detection
from hire_xform.passes.plan.slots import SiteForms
from hire_xform.passes.plan.verify import verify_plan

D, M, V, LAYERS = 8, 16, 32, 3


@jax.jit
def block(w, x):
    return x + jax.nn.relu(x @ w["up"]) @ w["down"]


def program(p, x):
    """A scan, a branch and a loop, with a jitted block in each; one product is refused."""
    x = lax.scan(lambda x, w: (block(w, x), x.sum()), x, p["layers"])[0]
    first = jax.tree.map(lambda w: w[0], p["layers"])
    x = lax.cond(x.sum() > 0, lambda x: block(first, x), lambda x: -x, x)
    x = lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, block(first, s[1])), (0, x))[1]
    return jnp.argmax((x + jnp.cumsum(x @ p["mix"], axis=-1)) @ p["head"], axis=-1)


def weights():
    shapes = {"mix": (D, D), "head": (D, V)}
    layers = {"up": (LAYERS, D, M), "down": (LAYERS, M, D)}
    return {**{k: jnp.ones(s) for k, s in shapes.items()}, "layers": {k: jnp.ones(s) for k, s in layers.items()}}


@pytest.fixture
def graph():
    return walk(jax.make_jaxpr(program)(weights(), jnp.ones((1, D))))


@pytest.fixture
def traced():
    return hx.sparsify(program, config=narrow()).trace(weights(), jnp.ones((1, D)))


def scope(graph, kind):
    return next(s for s in graph.scopes if s.kind == kind)


def node(graph, name, kind="top"):
    return next(n for n in scope(graph, kind).nodes if str(n.primitive) == name)


def call(graph, kind="scan"):
    return next(item for item in scope(graph, kind).root.items if hasattr(item, "items"))


def swap_order(graph):
    nodes = graph.top.nodes
    nodes[0], nodes[1] = nodes[1], nodes[0]


def swap_items(graph):
    items = call(graph).items
    items[0], items[1] = items[1], items[0]


def read_later(graph):
    """The first product of the loop's body reads what is made of it."""
    reader, made = node(graph, "dot_general", "scan"), node(graph, "add", "scan").outputs[0]
    number = next(i for i, o in enumerate(reader.inputs) if isinstance(o, Value) and o.shape == made.shape)
    reader.inputs[number].consumers.remove(reader)
    reader.inputs[number] = made
    made.consumers.append(reader)


def read_from_outside(graph):
    body = scope(graph, "scan")
    reader = next(n for n in body.nodes if any(o is body.inputs[0] for o in n.inputs))
    number = next(i for i, o in enumerate(reader.inputs) if o is body.inputs[0])
    reader.inputs[number] = body.node.inputs[0]


def rename(graph, kind, name):
    n = node(graph, name, kind)
    n.path = f"{n.frame.path}other"


def set_on(find, field, value):
    return lambda graph: setattr(find(graph), field, value(graph))


def dot(graph):
    return node(graph, "dot_general")


BROKEN = {
    "top_first": (lambda g: g.scopes.reverse(), "first scope"),
    "scope_lost": (lambda g: g.scopes.pop(), "opened by one equation"),
    "child_lost": (lambda g: node(g, "scan").children.clear(), "opened by one equation"),
    "same_path": (set_on(dot, "path", lambda g: node(g, "scan").path), "no other equation has its path"),
    "program_order": (lambda g: g._ordered.pop(), "every equation once"),
    "body_last": (lambda g: g._ordered.reverse(), "before what opened it"),
    "iterations": (set_on(lambda g: scope(g, "scan"), "iterations", lambda g: 1), "times the length of a scan"),
    "scope_node": (set_on(lambda g: scope(g, "scan"), "node", lambda g: None), "said to be opened by it"),
    "top_node": (set_on(lambda g: g.top, "node", dot), "all scopes but the top one"),
    "root_inputs": (lambda g: g.top.root.inputs.pop(), "frame's inputs"),
    "order_of_scope": (swap_order, "those of its frames, in order"),
    "order_of_frame": (swap_items, "in order"),
    "numbered": (set_on(dot, "order", lambda g: 99), "count a scope's equations"),
    "input_made": (set_on(lambda g: g.top.inputs[0], "node", dot), "made by no equation"),
    "frame_scope": (set_on(call, "scope", lambda g: g.top), "of the scope around it"),
    "frame_parent": (set_on(call, "parent", lambda g: g.top.root), "parent"),
    "frame_kind": (set_on(call, "kind", lambda g: "custom"), "a call's kind"),
    "frame_input": (lambda g: call(g).inputs.pop(), "an operand for each"),
    "frame_output": (lambda g: call(g).outputs.pop(), "returns what its body does"),
    "frame_item": (lambda g: call(g).items.pop(), "an item for each"),
    "frame_path": (set_on(call, "path", lambda g: "elsewhere/"), "begins with that of the frame"),
    "node_frame": (set_on(dot, "frame", lambda g: call(g)), "frame is"),
    "primitive": (set_on(dot, "primitive", lambda g: node(g, "scan").primitive), "its primitive"),
    "operand_lost": (lambda g: dot(g).inputs.pop(), "an operand for each"),
    "result_lost": (lambda g: dot(g).outputs.pop(), "a result for each"),
    "used_before_made": (read_later, "made before it"),
    "other_scope": (read_from_outside, "of its own scope"),
    "consumer_lost": (lambda g: dot(g).inputs[0].consumers.remove(dot(g)), "among the consumers"),
    "consumer_twice": (lambda g: dot(g).inputs[0].consumers.append(dot(g)), "as often as it reads it"),
    "consumer_invented": (lambda g: g.top.inputs[0].consumers.append(dot(g)), "as often as it reads it"),
    "maker": (set_on(lambda g: dot(g).outputs[0], "node", lambda g: node(g, "scan")), "made by it"),
    "type": (set_on(lambda g: dot(g).outputs[0], "aval", lambda g: g.top.inputs[0].aval), "of its variable"),
    "output_unmarked": (set_on(lambda g: g.top.outputs[0], "is_output", lambda g: False), "marked as output"),
    "output_marked": (set_on(lambda g: dot(g).outputs[0], "is_output", lambda g: True), "marked as output"),
    "returned_unmade": (lambda g: g.top.outputs.__setitem__(0, scope(g, "scan").inputs[0]), "returns is made in it"),
    "child_kind": (set_on(lambda g: scope(g, "scan"), "kind", lambda g: "while"), "kind is that of the equation"),
    "child_inputs": (lambda g: scope(g, "while").inputs.pop(), "an input for each operand"),
    "outer": (set_on(lambda g: scope(g, "scan").inputs[-1], "outer", lambda g: g.top.inputs[-1]), "outer value"),
    "scanned": (set_on(lambda g: scope(g, "cond").inputs[0], "scanned", lambda g: True), "only a scan"),
    "split": (set_on(lambda g: scope(g, "scan").inputs[-1], "split", lambda g: ((0, 2, "x"),)), "only a shard_map"),
    "state": (
        set_on(lambda g: scope(g, "scan").inputs[0], "outer", lambda g: node(g, "scan").inputs[0]),
        "no iteration changes it",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_invariant_of_a_graph_is_named(graph, name):
    verify_graph(graph)
    change, words = BROKEN[name]
    change(graph)
    with pytest.raises(InvariantError, match=words):
        verify_graph(graph)


def test_the_error_has_the_path(graph):
    product = dot(graph)
    product.inputs[0].consumers.remove(product)
    with pytest.raises(InvariantError) as raised:
        verify_graph(graph)
    assert str(raised.value) == f"{product.path}: it is among the consumers of what it reads"


def ffn(detection):
    return next(m for m in detection.matches if hasattr(m, "region"))


def refuse_ups(detection):
    first = ffn(detection).products[0].node
    detection.rejections.insert(0, dataclasses.replace(detection.rejections[0], node=first))
    ffn(detection).region.exprs.clear()


UNTRUE = {
    "in_two_matches": (lambda d: d.matches.append(d.matches[0]), "one match at most"),
    "in_none": (lambda d: d.matches.pop(), "in one match or one rejection"),
    "refused_twice": (lambda d: d.rejections.append(d.rejections[0]), "refused once"),
    "refused_and_matched": (
        lambda d: d.rejections.append(dataclasses.replace(d.rejections[0], node=d.matches[0].node)),
        "not in both",
    ),
    "not_found": (lambda d: d.products.remove(d.matches[0].products[0]), "that were found"),
    "no_reason": (lambda d: d.rejections.__setitem__(0, dataclasses.replace(d.rejections[0], reason="")), "a reason"),
    "order": (lambda d: d.matches.reverse(), "in program order"),
    "order_of_program": (lambda d: d.order.popitem(), "order is the program's"),
    "units": (lambda d: setattr(ffn(d).region, "units", 3), "units are those it contracts"),
    "ups": (refuse_ups, "a product into its units"),
    "varies": (lambda d: ffn(d).region.varies.pop(), "whether it differs by unit"),
    "root": (lambda d: setattr(ffn(d).region, "root", 99), "root is one of its expressions"),
    "operands": (lambda d: ffn(d).region.exprs.reverse(), "operands come before it"),
    "applied": (lambda d: ffn(d).region.nodes.clear(), "those its expressions apply"),
    "own_end": (lambda d: ffn(d).region.nodes.add(ffn(d).node), "last product is not in its region"),
    "other_scope": (lambda d: ffn(d).region.nodes.add(d.matches[-1].node), "in one scope"),
}


@pytest.mark.parametrize("name", UNTRUE)
def test_a_broken_invariant_of_a_detection_is_named(traced, name):
    detection = traced._detection
    verify_detection(traced._graph, detection)
    change, words = UNTRUE[name]
    change(detection)
    with pytest.raises(InvariantError, match=words):
        verify_detection(traced._graph, detection)


def of_site(plan, **changes):
    decision = plan.decisions[0]
    site = dataclasses.replace(decision.site, **changes)
    decisions = (dataclasses.replace(decision, site=site), *plan.decisions[1:])
    return dataclasses.replace(plan, decisions=decisions, sites=tuple(d.site for d in decisions))


def without_needs(plan):
    decisions = (dataclasses.replace(plan.decisions[0], forms=SiteForms(())), *plan.decisions[1:])
    return dataclasses.replace(plan, decisions=decisions)


def unreasoned(plan):
    return dataclasses.replace(plan, refusals=tuple(dataclasses.replace(r, reason="") for r in plan.refusals))


FALSE = {
    "match_lost": (
        lambda p: dataclasses.replace(p, decisions=p.decisions[1:], sites=p.sites[1:]),
        "one site, or each of its products",
    ),
    "site_twice": (
        lambda p: dataclasses.replace(p, decisions=(*p.decisions, p.decisions[0]), sites=(*p.sites, p.sites[0])),
        "one site",
    ),
    "rejection_lost": (lambda p: dataclasses.replace(p, refusals=()), "a rejection is one refusal"),
    "refused_unfound": (
        lambda p: dataclasses.replace(p, refusals=(*p.refusals, hx.Refusal("nowhere", "", "no reason"))),
        "not found",
    ),
    "sites": (lambda p: dataclasses.replace(p, sites=p.sites[::-1]), "those that it decided on"),
    "path": (lambda p: of_site(p, path="elsewhere"), "the path of the equation"),
    "empty": (lambda p: of_site(p, computed=0), "computes rows"),
    "needs": (without_needs, "reads packed forms"),
    "reason": (unreasoned, "a refusal has a reason"),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_broken_invariant_of_a_plan_is_named(traced, name):
    verify_plan(traced._detection, traced.plan)
    change, words = FALSE[name]
    with pytest.raises(InvariantError, match=words):
        verify_plan(traced._detection, change(traced.plan))


MODELS = {
    "unrolled": (models.unrolled, models.list_params),
    "scanned": (models.scanned, models.stacked_params),
    "indexed": (models.indexed, models.stacked_params),
    "taken": (models.taken, models.stacked_params),
    "while_indexed": (models.while_indexed, models.stacked_params),
    "jit_scan_jit": (models.jit_scan_jit, models.stacked_params),
    "rematerialised": (models.rematerialised, models.stacked_params),
    "generate": (models.generate, models.list_params),
    "conditional": (models.conditional, models.list_params),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_pass_over_a_model_keeps_what_is_stated(monkeypatch, name):
    monkeypatch.setenv("HIRE_DEBUG", "1")
    step, params = MODELS[name]
    tokens = jnp.zeros((2,), jnp.int32)
    traced = hx.sparsify(step, config=narrow()).trace(params(), models.make_cache(2), tokens, jnp.zeros(()))
    assert traced.plan.sites
    verify_graph(traced._graph)
