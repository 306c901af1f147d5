"""Makes a loop over experts of a block of experts, so that what stands in it is an ordinary block.

That is done to the program before anything is decided: a scan over the experts' matrices where all of them are used, or
over the indices that a router gave, each of which takes a matrix out of the stack. What the loop's body reads of a
matrix is then found, decided and rewritten like any other block in a loop, and read in place.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_xform.passes.ir.axes import Atom
from hire_xform.passes.ir.equation_contexts import equation_context
from hire_xform.passes.ir.graph import Graph, Node, Operand
from hire_xform.passes.match.experts import Experts, ExpertWeight, Routed
from hire_xform.passes.match.own_choice import OfAll
from hire_xform.passes.match.region import replay
from hire_xform.passes.rewrite.action import Action, Context
from hire_xform.passes.rewrite.canonical import canonical_activation, canonical_side, product_key
from hire_xform.passes.rewrite.rewriter import Rewriter
from hire_xform.passes.weights.products import Product


def looped_over(graph: Graph, experts: Sequence[Experts]) -> Any:
    """The program with a loop over experts in the place of each of some blocks, as a closed jaxpr.

    Args:
      graph: the program.
      experts: the blocks.
    """
    # All that the program has is found again, what nothing reads as well.
    rewriter = Rewriter(graph, {one.match.node: LoopedExperts(one) for one in experts}, keeps_unused=True)
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in graph.top.inputs]
    return jax.make_jaxpr(lambda *operands: rewriter.evaluate(operands, lambda need: None))(*shapes)


@dataclass(frozen=True, eq=False, repr=False)
class LoopedExperts(Action):
    """A loop over experts in the place of the product that ends their block.

    Attributes:
      experts: the block.
    """

    experts: Experts

    @property
    def node(self) -> Node:
        """The contracting product."""
        return self.experts.match.node

    @property
    def key(self) -> Hashable:
        """Of the products, the region and what comes into it."""
        match = self.experts.match
        ups = tuple((product_key(up.product), up.layout) for up in match.region.ups)
        sides = tuple((side.value.shape, str(side.value.aval.dtype), side.layout) for side in match.region.sides)
        weights = tuple((w.atoms, w.routed and w.routed.layout) for w in self.experts.weights)
        return "experts", ups, sides, match.region.signature(), product_key(match.down), weights, self.experts.summed

    @property
    def operands(self) -> Sequence[Operand]:
        """Activations, side inputs, and the weights: gathered ones as stacks and indices."""
        region = self.experts.match.region
        found: list[Operand] = [*(up.product.x for up in region.ups), *(side.value for side in region.sides)]
        for weight in self.experts.weights:
            found += [weight.product.weight] if weight.routed is None else [weight.routed.stack, weight.routed.by]
        return found

    @property
    def nodes(self) -> Sequence[Node]:
        """All that it replaces."""
        return list(self.experts.nodes)

    def emit(self, context: Context) -> Sequence[Any]:
        """What all experts make, as the contracting product has it."""
        match, count = self.experts.match, self.experts.count
        region, tokens = match.region, match.tokens
        given: list[Any] = []
        for up in region.ups:
            x = canonical_activation(up.product, context.read(up.product.x), up.layout, tokens)
            given.append(x.reshape(count, tokens // count, -1))
        for side in region.sides:
            value = canonical_side(context.read(side.value), side.layout, tokens, match.units)
            if jnp.ndim(value) == 2 and value.shape[0] == tokens:
                given.append(value.reshape(count, -1, value.shape[1]))
            else:
                given.append(jnp.broadcast_to(value, (count, *jnp.shape(value))))
        stacks: list[Any] = []
        indices: list[Any] = []
        for weight in self.experts.weights:
            if weight.routed is None:
                stacks.append(None)
                indices.append(_each_matrix(weight, context.read(weight.product.weight)))
            else:
                stacks.append(context.read(weight.routed.stack))
                indices.append(_each_index(weight, weight.routed, context.read(weight.routed.by), count))

        def body(_: None, one: Any) -> tuple[None, Any]:
            own, of_weights = one
            pairs = zip(self.experts.weights, stacks, of_weights, strict=True)
            matrices = [entry if stack is None else _matrix(weight, stack, entry) for weight, stack, entry in pairs]
            return None, self._block(own, matrices)

        if count == 1:
            _, made = body(None, jax.tree.map(lambda value: value[0], (given, indices)))
            made = made[None]
        else:
            _, made = lax.scan(body, None, (given, indices))
        last = self.experts.weights[-1].routed
        if last is not None and last.ragged:  # rows of no expert
            there = jnp.arange(count) < jnp.sum(context.read(last.by))
            made = jnp.where(there[:, None, None], made, 0)
        return [self._as_product(made)]

    def _block(self, given: Sequence[Any], matrices: Sequence[Any]) -> Any:
        """The block of one expert, ``[T, d_out]``, as it would have been written."""
        match = self.experts.match
        region, ups = match.region, match.region.ups
        hiddens = [
            _product(up.product, x, matrix, up.product.out.aval.dtype)
            for up, x, matrix in zip(ups, given, matrices, strict=False)
        ]
        activation = replay(region, hiddens, given[len(ups) :], lambda v: v, jax.nn.relu, OfAll())
        dtype = match.down.out.aval.dtype
        if any(added for _, added in self.experts.summed):
            dtype = jnp.promote_types(dtype, jnp.float32)
        return _product(match.down, activation, matrices[-1], dtype)

    def _as_product(self, made: Any) -> Any:
        """``[E, T, d_out]`` as the contracting product's result."""
        down, summed = self.experts.match.down, self.experts.summed
        own = [down.x.shape[d] for d in down.x_free]
        wide = [down.weight.shape[d] for d in down.w_free]
        made = made.reshape(*(size for size, _ in summed), *own, *wide)
        made = made.sum([axis for axis, (_, added) in enumerate(summed) if added]).astype(down.out.aval.dtype)
        lead, first, last = len(down.x_batch), range(len(own)), range(len(own), len(own) + len(wide))
        free = (*last, *first) if down.weight_left else (*first, *last)
        return jnp.transpose(made, (*range(lead), *(lead + d for d in free)))


def _product(product: Product, x: Any, matrix: Any, dtype: Any) -> Any:
    params = product.node.params
    asked = params["preferred_element_type"]
    with equation_context(product.node.eqn):
        found = lax.dot_general(
            x,
            matrix,
            (((1,), (0,)), ((), ())),
            precision=params["precision"],
            preferred_element_type=asked if asked is None else jnp.promote_types(asked, dtype),
        )
        return found if found.dtype == dtype else found.astype(dtype)


def _in_order(atoms: Sequence[Atom], spaces: str) -> list[int]:
    return sorted(range(len(atoms)), key=lambda i: (spaces.index(atoms[i].space), -atoms[i].stride))


def _spaces_of(weight: ExpertWeight) -> str:
    """The order of axes that its matrices are multiplied in: what is contracted comes first."""
    units_contracted = any(a.space == "h" for d in weight.product.w_contract for a in weight.atoms[d])
    return "thc" if units_contracted else "tch"


def _sorted(value: Any, atoms: Sequence[Atom], spaces: str) -> Any:
    """An array of these digits with those of each space put together: ``[E, rows, columns]``, or without experts."""
    order = _in_order(atoms, spaces)
    split = value.reshape([a.size for a in atoms])
    moved = jnp.transpose(split, order) if order != sorted(order) else split
    sizes = [1] * len(spaces)
    for atom in atoms:
        sizes[spaces.index(atom.space)] *= atom.size
    return moved.reshape(sizes)


def _each_matrix(weight: ExpertWeight, value: Any) -> Any:
    return _sorted(value, [a for atoms in weight.atoms for a in atoms], _spaces_of(weight))


def _atoms_of(weight: ExpertWeight, routed: Routed, dim: int) -> tuple[Atom, ...]:
    """Of a dimension of what is gathered."""
    return tuple(a for atom in routed.layout[dim].atoms for a in weight.atoms[int(atom.space)])


def _each_index(weight: ExpertWeight, routed: Routed, index: Any, count: int) -> Any:
    """The indices of a gather as ``[E, n]``, experts in order; of a ragged product the expert of each row."""
    if routed.ragged:
        index = jnp.searchsorted(jnp.cumsum(index), jnp.arange(count), side="right").astype(jnp.int32)[:, None]
    atoms = [a for d in routed.batch_dims for a in _atoms_of(weight, routed, d)]
    last = Atom("c", 1, index.shape[-1])
    return _sorted(index, [*atoms, last], "tc")


def _matrix(weight: ExpertWeight, stack: Any, index: Any) -> Any:
    """The one matrix that an index takes."""
    routed = weight.routed
    assert routed is not None
    params = routed.taken_by.params
    with equation_context(routed.taken_by.eqn):
        if routed.ragged:
            value = lax.dynamic_index_in_dim(stack, jnp.minimum(index[0], stack.shape[0] - 1), 0, keepdims=False)
        else:
            numbers, kept = params["dimension_numbers"], tuple(range(len(routed.matrix_dims)))
            one = lax.GatherDimensionNumbers(kept, numbers.collapsed_slice_dims, numbers.start_index_map)
            how = {"mode": params["mode"], "fill_value": params["fill_value"]}
            value = lax.gather(stack, index, one, params["slice_sizes"], **how)
        for dtype in routed.dtypes:
            value = value.astype(dtype)
        atoms = [a for d in routed.matrix_dims for a in _atoms_of(weight, routed, d)]
        return _sorted(value, atoms, _spaces_of(weight)[1:])
