"""What a program makes of all logits of a token, but for its tokens: numbers that are seen, and what they decide.

A *number* is a float that has no entry for each of the vocabulary, and goes on to be seen: the log-probability of a
chosen token, in whatever spelling, a sum of some, or those of a few. A *decision* is a truth value or a whole number
that hangs on such floats: whether a drafted token is accepted, say. Draws and arg maxes are readers already; see
``readers.py``.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from jax.extend.core import primitives as prims

from hire_xform.passes.ir.graph import Node, Value
from hire_xform.passes.match.output_axis import Fate
from hire_xform.passes.match.readers import Reader
from hire_xform.passes.prove.orders import LOCATE, ORDERS
from hire_xform.passes.prove.searches import is_search
from hire_xform.passes.weights.origins import shape_of
from hire_xform.passes.weights.products import Product

_MAX_LOOKED = 1024
# Entries are few where so many times as many are no more than the vocabulary.
_FEW = 4


def numbers_of(product: Product, fate: Fate, decided: Collection[Node | None]) -> list[Reader]:
    """The numbers and decisions behind a product in its own scope, each where it is made.

    Args:
      product: whose output is logits.
      fate: what becomes of their axis.
      decided: equations whose results are proved, and are not looked at.
    """
    found: list[Reader] = []
    # Of what the logits reach through floats, whether it has no entry for each of the vocabulary, or of much of it.
    bare = {product.out: False}
    queue = [product.out]
    while queue and len(bare) < _MAX_LOOKED:
        value = queue.pop(0)
        seen = value.is_output
        for node in value.consumers:
            if not _is_plain(node, product):
                seen = True
                if node.children and node.scope is product.node.scope:
                    found += [r for r in _decided_in(node) if r.value not in bare]
                    bare |= dict.fromkeys(node.outputs, True)
                continue
            if node in decided or node.primitive in LOCATE:
                continue
            for made in node.outputs:
                if made in bare or not (made.consumers or made.is_output):
                    continue
                bare[made] = _is_bare(made, product, fate, bare)
                if made.aval.dtype.kind in "fV" or not bare[made]:
                    queue.append(made)
                elif node.primitive not in ORDERS:
                    found.append(Reader("decision", node, made, frozenset()))
        if seen and bare[value] and value.node is not None:
            found.append(Reader("number", value.node, value, frozenset()))
    return found


def _is_bare(value: Value, product: Product, fate: Fate, known: dict[Value, bool]) -> bool:
    """Whether a value has no entry for each of the vocabulary, or of much of it, given what is known before it."""
    node = value.node
    assert node is not None
    before = [known[o] for o in node.inputs if isinstance(o, Value) and o in known]
    held = math.prod(value.shape[d] for d in fate.axes.get(value, ()))
    picks = node.primitive is prims.gather_p and math.prod(node.params["slice_sizes"]) == 1
    return all(before) or _FEW * held <= product.width or (picks and held <= math.prod(shape_of(node.inputs[0])[:-1]))


def _decided_in(node: Node) -> list[Reader]:
    """The truth values and whole numbers that leave a loop or a branch, as far as something takes them."""
    made = (o for o in node.outputs if o.aval.dtype.kind in "iub" and (o.consumers or o.is_output))
    return [Reader("decision", node, o, frozenset()) for o in made]


def _is_plain(node: Node, product: Product) -> bool:
    """Whether an equation is one of the logits' own scope, whose results may be followed."""
    here = node.scope is product.node.scope and not node.eqn.effects and (not node.children or is_search(node))
    return here and node.primitive is not prims.dot_general_p
