"""Which derivative a site has where it meets a custom_jvp or custom_vjp: the one stated there, or its body's."""

from __future__ import annotations

from hire_xform.passes.ir.graph import Frame, Node
from hire_xform.passes.ir.source_lines import source_line
from hire_xform.passes.match.matches import Match


def derivative_of(match: Match) -> str:
    """What to tell of a site's derivative; empty where no custom derivative is in or around it.

    One around all of it stays a call, whose rule JAX takes. One that only part of it stands in can't: the part is
    replayed on chosen units, and what is differentiated is the replay. Of JAX's own ReLU that is the same.
    """
    nodes: list[Node] = [product.node for product in match.products]
    nodes += sorted(match.nodes.difference(nodes), key=lambda n: n.path)
    around = set.intersection(*(set(node.frame.ancestors()) for node in nodes))
    found: dict[str, None] = {}
    for node in nodes:
        for frame in node.frame.ancestors():
            if frame.kind != "custom" or _is_relu(frame):
                continue
            call = f"{frame.eqn.primitive.name.removesuffix('_call')} at {source_line(frame.eqn)}"
            if frame in around:
                found[f"the one that the {call} around it states, which reads the weights as the dense form does"] = (
                    None
                )
            else:
                found[f"that of the body of the {call}, not the one it states"] = None
    return "; ".join(found)


def _is_relu(frame: Frame) -> bool:
    """True for the call that ``jax.nn.relu`` is: a custom_jvp of a jitted function of that name."""
    body = frame.items[0] if len(frame.items) == 1 else None
    return isinstance(body, Frame) and body.kind == "jit" and body.eqn.params.get("name") == "relu"
