"""Products of data with a weight: every ``dot_general`` with exactly one weight operand, in one normal form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jax.extend.core import primitives as prims
from jax.lax import Precision

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.axis_rules import is_pointwise
from hire_xform.passes.ir.graph import Graph, Node, Operand, Value, used_nodes
from hire_xform.passes.weights.few_bits import stored_bytes, stored_parts
from hire_xform.passes.weights.origins import Origin
from hire_xform.passes.weights.provenance import Provenance
from hire_xform.passes.weights.recipe import Convert, Recipe, Reshape, Root, Slice, Stretch, Transpose


@dataclass(frozen=True, eq=False, repr=False)
class Product:
    """``x . W`` with the weight on either side.

    Attributes:
      node: the equation.
      x: the activation operand.
      weight: the weight operand.
      origin: where the weight comes from.
      weight_left: True when the weight is the left operand, so that its free dimensions lead the result's.
      x_contract, w_contract: contracted dimensions of the two operands, paired in order.
      x_batch, w_batch: batch dimensions of the two operands, paired in order; they lead the result's. The weight is one
        matrix for each of their entries.
      x_free, w_free: the other dimensions, in order.
    """

    node: Node
    x: Value
    weight: Value
    origin: Origin
    weight_left: bool
    x_contract: tuple[int, ...]
    w_contract: tuple[int, ...]
    x_free: tuple[int, ...]
    w_free: tuple[int, ...]
    x_batch: tuple[int, ...] = ()
    w_batch: tuple[int, ...] = ()

    @property
    def path(self) -> str:
        """The equation's path."""
        return self.node.path

    @property
    def out(self) -> Value:
        """The result."""
        return self.node.outputs[0]

    @cached_property
    def tokens(self) -> int:
        """Rows of the activation: the product of its free dimensions."""
        return math.prod(self.x.shape[d] for d in self.x_free)

    @cached_property
    def contracted(self) -> int:
        """Length of the contraction."""
        return math.prod(self.weight.shape[d] for d in self.w_contract)

    @cached_property
    def width(self) -> int:
        """Outputs per token: the product of the weight's free dimensions."""
        return math.prod(self.weight.shape[d] for d in self.w_free)

    @property
    def nbytes(self) -> int:
        """Bytes that the dense program reads of the weight in an execution, and of its packed rows: as it is stored.

        Where it is stored wider than it is used, as it is used: a loop around it may be left with the narrow copy.
        """
        return stored_bytes(self.origin, self.weight.shape)

    @property
    def read(self) -> dict[Root, int]:
        """The leaves that its weight is made of, and the bytes of each that a call of the dense program reads."""
        found: dict[Root, int] = {}
        for recipe, size in stored_parts(self.origin, self.weight.shape):
            found[recipe.root] = found.get(recipe.root, 0) + size * self.node.scope.iterations
        return found

    @property
    def stored(self) -> np.dtype:
        """dtype of its packed rows: the narrowest one known to have its values, or those that are scaled."""
        return np.dtype(self.origin.stored)

    @property
    def unrounded(self) -> bool:
        """True for a bfloat16 result that all its readers widen at once, which XLA then does not round.

        Of a product that is converted it makes one of the wider dtype (``xla_allow_excess_precision``, on by default).
        Where an operand has more than two dimensions a reshape comes between, and the rounding stays; so it does of
        float16. Seen on CPU, in JAX 0.10.2.
        """
        if self.out.aval.dtype.name != "bfloat16" or len(self.x.shape) > 2 or len(self.weight.shape) != 2:
            return False
        return not self.out.is_output and bool(self.out.consumers) and all(map(_widens, self.out.consumers))

    @property
    def out_x_dims(self) -> tuple[int, ...]:
        """Dimensions of the result that come from the activation."""
        lead = len(self.w_batch) + (len(self.w_free) if self.weight_left else 0)
        return tuple(range(lead, lead + len(self.x_free)))

    @property
    def out_w_dims(self) -> tuple[int, ...]:
        """Dimensions of the result that come from the weight."""
        lead = len(self.w_batch) + (0 if self.weight_left else len(self.x_free))
        return tuple(range(lead, lead + len(self.w_free)))

    def rows_free(self) -> Recipe:
        """The weight as ``[width, contracted]``: a row for each output."""
        return matrix(self.origin.recipe, self.weight.shape, self.w_free, self.w_contract)

    def rows_contracted(self, order: tuple[int, ...] | None = None) -> Recipe:
        """The weight as ``[contracted, width]``: a row for each input, pairs of contracted dimensions in ``order``."""
        lead = self.w_contract if order is None else tuple(self.w_contract[i] for i in order)
        return matrix(self.origin.recipe, self.weight.shape, lead, self.w_free)


def _widens(node: Node) -> bool:
    return node.primitive is prims.convert_element_type_p and node.outputs[0].aval.dtype.name in ("float32", "float64")


def matrix(recipe: Recipe, shape: tuple[int, ...], lead: tuple[int, ...], rest: tuple[int, ...]) -> Recipe:
    """A recipe for the weight transposed to (lead, rest) and flattened to a matrix; steps that do nothing left out."""
    perm = (*lead, *rest)
    target = (math.prod(shape[d] for d in lead), math.prod(shape[d] for d in rest))
    if perm != tuple(range(len(shape))):
        recipe = recipe.then(Transpose(perm))
    if tuple(shape[d] for d in perm) != target:
        recipe = recipe.then(Reshape(target))
    return normal_form(recipe)


def normal_form(recipe: Recipe) -> Recipe:
    """The same recipe with neighbouring steps fused and identities dropped, so that equal weights compare equal."""
    return recipe.each(_normal_form)


def _normal_form(recipe: Recipe) -> Recipe:
    steps: list[Any] = []
    for step in recipe.steps:
        last = steps[-1] if steps else None
        if isinstance(step, Transpose) and isinstance(last, Transpose):
            steps.pop()
            step = Transpose(tuple(last.perm[p] for p in step.perm))
        elif isinstance(step, Reshape) and isinstance(last, Reshape):
            steps.pop()
        if isinstance(step, Transpose) and step.perm == tuple(range(len(step.perm))):
            continue
        steps.append(step)
    return Recipe(recipe.root, tuple(steps))


def widened_at_once(product: Product) -> np.dtype:
    """dtype in which a head computes a product: f32 where XLA leaves its rounding out, else its own.

    Readers in a call that the product is not in take what their types say.
    """
    frames = product.node.frame.ancestors()
    if product.unrounded and all(node.frame in frames for node in product.out.consumers):
        return np.dtype(np.float32)
    return np.dtype(product.out.aval.dtype)


def rounding_free(recipe: Recipe) -> bool:
    """True when the leaf can be had back from what the recipe makes: nothing is cut away and nothing rounded."""
    return not recipe.scalings and not any(isinstance(s, (Slice, Convert, Stretch)) for s in recipe.steps)


@dataclass(frozen=True, repr=False)
class Loose:
    """A product that is none with a weight in normal form, though it looks like one, or that nothing uses, and why.

    Attributes:
      node: the equation.
      reason: why.
      read: the weights that it is a product of, and the bytes of each that a call reads.
    """

    node: Node
    reason: str
    read: dict[Root, int]


def find_products(graph: Graph, provenance: Provenance) -> tuple[list[Product], list[Loose]]:
    """All weight products of the graph in program order, and look-alikes with the reason they are none."""
    products: list[Product] = []
    loose: list[Loose] = []
    used = used_nodes(graph)
    for node in graph.program_order():
        if node.primitive is prims.dot_general_p:
            found = _classify(node, provenance)
            if found is not None and node not in used:
                not_read = dict.fromkeys(provenance.read_by(node.inputs), 0)
                loose.append(Loose(node, "its output is not used, so that a compiler leaves it out", not_read))
            elif isinstance(found, Product):
                products.append(found)
            elif found is not None:
                loose.append(found)
        elif (other := _unlike_product(node, provenance)) is not None:
            if node in used:
                loose.append(other)
        elif node.primitive is prims.while_p:
            loose.extend(_in_condition(node, provenance))
        elif not node.children and not is_pointwise(node):
            loose.extend(_unentered(node, provenance))
    return products, loose


def _classify(node: Node, provenance: Provenance) -> Product | Loose | None:
    left, right = node.inputs
    origins = (_matrix_origin(left, provenance), _matrix_origin(right, provenance))
    if origins[0] is not None and origins[1] is not None:
        # A closed-over array outranks an argument: `sparsify(lambda x: x @ w)` marks x, its first argument, as weights.
        kinds = [o.recipe.root.kind for o in origins if o is not None]
        if kinds[0] == kinds[1]:
            reason = "both operands are weights; it does not depend on the data"
            return Loose(node, reason, provenance.read_by(node.inputs))
        weight_left = kinds[0] == "const"
    elif origins[0] is None and origins[1] is None:
        return _derived_weight(node, provenance)
    else:
        weight_left = origins[0] is not None
    origin = origins[0] if weight_left else origins[1]
    assert origin is not None
    x = right if weight_left else left
    return product_with(node, weight_left, origin) if isinstance(x, Value) else None


def product_with(node: Node, weight_left: bool, origin: Origin) -> Product:
    """A ``dot_general`` as a product with the weight that one of its operands is."""
    left, right = node.inputs
    (lc, rc), (lb, rb) = node.params["dimension_numbers"]
    weight, x = (left, right) if weight_left else (right, left)
    wc, xc, wb, xb = (lc, rc, lb, rb) if weight_left else (rc, lc, rb, lb)
    assert isinstance(weight, Value)
    assert isinstance(x, Value)
    return Product(
        node=node,
        x=x,
        weight=weight,
        origin=origin,
        weight_left=weight_left,
        x_contract=tuple(xc),
        w_contract=tuple(wc),
        x_free=tuple(d for d in range(len(x.shape)) if d not in xc and d not in xb),
        w_free=tuple(d for d in range(len(weight.shape)) if d not in wc and d not in wb),
        x_batch=tuple(xb),
        w_batch=tuple(wb),
    )


def _matrix_origin(operand: Operand, provenance: Provenance) -> Origin | None:
    if not isinstance(operand, Value) or len(operand.shape) < 2:
        return None
    return provenance.origin(operand)


def _derived_weight(node: Node, provenance: Provenance) -> Loose | None:
    for operand in node.inputs:
        how = provenance.derived(operand)
        if how is not None and isinstance(operand, Value) and len(operand.shape) >= 2:
            reason = f"its weight is computed inside the program, by {how}"
            return Loose(node, reason, provenance.read_by([operand]))
        how = provenance.scaled_by_data(operand)
        if how is not None and isinstance(operand, Value) and len(operand.shape) >= 2:
            reason = f"its weight is scaled by what differs from call to call, by {how}"
            return Loose(node, reason, provenance.read_by([operand]))
    return None


def _unlike_product(node: Node, provenance: Provenance) -> Loose | None:
    """An equation that multiplies data by a matrix of weights, but is no product of two matrices."""
    if node.primitive in (prims.conv_general_dilated_p, compat.RAGGED_DOT):
        kernel = node.inputs[1]
        if _matrix_origin(kernel, provenance) is None and provenance.derived(kernel) is None:
            return None
        experts = "one product for each group of tokens, as experts have, which is not followed"
        reason = experts if node.primitive is compat.RAGGED_DOT else "a convolution, which is not followed"
        return Loose(node, reason, provenance.read_by([kernel]))
    return _summed_product(node, provenance) if node.primitive is prims.reduce_sum_p else None


def _summed_product(node: Node, provenance: Provenance) -> Loose | None:
    summed: Any = node.inputs[0]
    while _made_by(summed, prims.convert_element_type_p):
        summed = summed.node.inputs[0]
    if not _made_by(summed, prims.mul_p):
        return None
    axes = node.params["axes"]
    for weight, x in (summed.node.inputs, summed.node.inputs[::-1]):
        if not isinstance(x, Value) or provenance.origin(x) is not None or _matrix_origin(weight, provenance) is None:
            continue
        assert isinstance(weight, Value)
        lengths = [n for d, n in enumerate(weight.shape) if d not in axes]
        if x.shape and math.prod(lengths) > 1 and any(weight.shape[d] > 1 and x.shape[d] > 1 for d in axes):
            reason = "a product spelled as a sum of products, which is not followed; spell it with @ or einsum"
            return Loose(node, reason, provenance.read_by([weight]))
    return None


def _made_by(operand: Any, primitive: Any) -> bool:
    return isinstance(operand, Value) and operand.node is not None and operand.node.primitive is primitive


def _unentered(node: Node, provenance: Provenance) -> list[Loose]:
    """Equations with sub-jaxprs that are not entered, when a matrix of weights goes in."""
    if not _matrices(node, provenance) or not any(_has_products(j) for _, j in compat.sub_jaxprs(node.eqn)):
        return []
    reason = f"{node.primitive} is not entered; what is inside is left as it is"
    return [Loose(node, reason, provenance.read_by(_matrices(node, provenance)))]


def _in_condition(node: Node, provenance: Provenance) -> list[Loose]:
    """A while whose condition has products, when a matrix of weights goes in."""
    if not _matrices(node, provenance) or not _has_products(compat.while_parts(node.eqn).cond_jaxpr):
        return []
    # It has the first operands to itself, and sees the state besides.
    lead, body = compat.while_parts(node.eqn).cond_nconsts, compat.while_parts(node.eqn).body_nconsts
    seen = [*node.inputs[:lead], *node.inputs[lead + body :]]
    read = provenance.read_by(o for o in _matrices(node, provenance) if o in seen)
    return [Loose(node, "the condition of a while is not entered; what is inside is left as it is", read)]


def _matrices(node: Node, provenance: Provenance) -> list[Value]:
    """Of the operands of an equation the matrices of weights."""
    values = [o for o in node.inputs if isinstance(o, Value) and len(o.shape) >= 2]
    return [v for v in values if provenance.origin(v) or provenance.derived(v)]


def _has_products(jaxpr: Any) -> bool:
    inner, _ = compat.close(jaxpr)
    return any(
        eqn.primitive is prims.dot_general_p or any(_has_products(sub) for _, sub in compat.sub_jaxprs(eqn))
        for eqn in inner.eqns
    )


def precision_asked(products: Iterable[Product]) -> str | None:
    """The highest precision that some products ask for by name, as ``jax.default_matmul_precision`` takes it."""
    asked: list[Precision] = []
    for product in products:
        stated = product.node.params["precision"]
        asked += [p for p in (stated if isinstance(stated, (tuple, list)) else (stated,)) if isinstance(p, Precision)]
    return next((p.name.lower() for p in (Precision.HIGHEST, Precision.HIGH) if p in asked), None)
