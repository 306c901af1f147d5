"""A function as a program for arguments of given shapes, and the blocks and projections found in it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container, Iterator, Sequence
from functools import cached_property
from typing import Any

import jax

from hire_xform.call.calls import Abstract
from hire_xform.call.collector import collector_paused
from hire_xform.call.in_place import changed_weights, warn_if_lost, weight_leaves
from hire_xform.call.signature import Signature, unwrap_statics
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.debugging import debugging
from hire_xform.passes.ir.each_device import is_explicit
from hire_xform.passes.ir.graph import Graph, Node, Operand, walk
from hire_xform.passes.ir.verify import verify_graph
from hire_xform.passes.match.detect import detect
from hire_xform.passes.match.experts import Experts, find_experts
from hire_xform.passes.match.matches import Detection, Match, names_of
from hire_xform.passes.rewrite.experts import looped_over
from hire_xform.passes.weights.provenance import Provenance
from hire_xform.passes.weights.recipe import Root


class Program:
    """A traced function with its weights known and its matches found; nothing is decided yet.

    Attributes:
      jaxpr: the program.
      seconds: how long each stage took, in their order.
    """

    # Whether blocks of experts are looped over.
    loops_over_experts = True

    def __init__(self, signature: Signature, call: Abstract):
        """Traces and detects.

        Raises:
          Whatever the function raises when traced.
        """
        self.signature, self.call = signature, call
        shapes: list[Any] = []
        changed: dict[tuple[Any, ...], Any] = {}

        def flat(*leaves: Any) -> list[Any]:
            args, kwargs = unwrap_statics(*call.rebuild(leaves))
            out, tree = jax.tree.flatten(signature.fun(*args, **kwargs))
            shapes.append(tree)
            before = weight_leaves(signature, *call.rebuild(leaves))
            after: dict[tuple[Any, ...], Any] = {}
            # Trees may refuse to be flattened once used, as Equinox's State does.
            with contextlib.suppress(Exception):
                after = weight_leaves(signature, args, kwargs)
            changed.update(changed_weights(before, after, out))
            return [*out, *changed.values()]

        self.seconds: dict[str, float] = {}
        with collector_paused():
            with self.timed("trace"):
                self.jaxpr = jax.make_jaxpr(flat)(*[struct(a) for a in call.avals])
            self.out_tree = shapes[0]
            if changed:
                warn_if_lost(signature, self.jaxpr, call.roots, list(changed))
                self.jaxpr = compat.without_last_outputs(self.jaxpr, len(changed))
            self._experts: Sequence[Experts] = ()
            # By source line why products that nearly end a block of experts do not.
            self._no_experts: dict[str, str] = {}
            self._find_all()

    def _find_all(self, dense: Container[str] = ()) -> None:
        """Finds what there is, with a loop in the place of each block of experts but those that end at these paths."""
        self._find(self.jaxpr)
        with self.timed("matches"):
            found, reasons = self._of_experts()
            self._experts = [one for one in found if one.match.node.path not in dense]
            self._no_experts = {node.source: f"no block of experts ends in it: {why}" for node, why in reasons.items()}
            looped = looped_over(self._graph, self._experts) if self._experts else None
        if looped is not None:
            self._find(looped)

    @property
    def laid_out(self) -> Any:
        """The program that paths are of: the original, but for loops over experts."""
        return self._graph.jaxpr

    def _find(self, jaxpr: Any) -> None:
        """Lays a program out, and finds what there is."""
        with self.timed("graph"):
            self._graph: Graph = walk(jaxpr)
        if debugging():
            verify_graph(self._graph)
        with self.timed("weights"):
            self._provenance = Provenance(self._graph, self.call.roots)
        with self.timed("matches"):
            self._detection: Detection = detect(self._graph, self._provenance)

    def _of_experts(self) -> tuple[Sequence[Experts], dict[Node, str]]:
        """The blocks of experts that are looped over: none over several devices, each of which may have its own."""
        if not self.loops_over_experts:
            return [], {}
        found, reasons = find_experts(self._graph, self._provenance, self._detection.products)
        if not found and not reasons:
            return found, reasons
        given = zip(self.call.avals, self.call.placed, strict=True)
        placed = next((s for aval, at in given if (s := struct(aval, at).sharding) is not None), None)
        if placed is None:
            return found, reasons
        over = getattr(placed, "mesh", None)
        devices = placed if over is None else dict(over.shape)
        why = f"arguments are over devices, {devices}, each of which may have its own; expected all on one device"
        return [], {one.match.node: why for one in found}

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Notes how long a stage takes."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    @property
    def rule_paths(self) -> list[str]:
        """The paths that rules go by: of each block's last product, and of each vocabulary's."""
        return [match.node.path for match in self._detection.matches]

    @property
    def product_paths(self) -> list[str]:
        """The same where other products may be read compressed: the paths of all."""
        return [product.path for product in self._detection.products]

    def rule_texts(self, all_products: bool = False) -> list[str]:
        """What a rule's pattern is matched with: paths as above, of all products if so, and names of their weights."""
        if all_products:
            products = self._detection.products
            names = [self.name(root) for product in products for root in product.origin.recipe.roots]
            return [*self.product_paths, *names]
        return [*self.rule_paths, *(name for match in self._detection.matches for name in names_of(match, self.name))]

    @property
    def matches(self) -> Sequence[Match]:
        """The feed-forward blocks and vocabulary projections that were found, rewritten or not."""
        return self._detection.matches

    @property
    def results(self) -> Sequence[Operand]:
        """What it returns, leaf by leaf."""
        return self._graph.top.outputs

    @property
    def reads_in_while(self) -> bool:
        """Whether a weight is read in a while loop, whose iterations are not known: bytes are those of one."""
        nodes = [p.node for p in self._detection.products] + [r.node for r in self._detection.rejections]
        return any(scope.kind == "while" for node in nodes for scope in node.scope.chain())

    @cached_property
    def _names(self) -> dict[Root, str]:
        args, kwargs = self.call.rebuild(range(len(self.call.avals)))
        paths = jax.tree_util.tree_flatten_with_path((args, kwargs))[0]
        static = {position for position, _ in self.call.statics}
        arrays = [path for i, (path, _) in enumerate(paths) if i not in static]
        found: dict[Root, str] = {}
        for root, path in zip(self.call.roots, arrays, strict=True):
            if root is not None:
                found[root] = self.signature.name_of(path)
        return found

    def name(self, root: Root) -> str:
        """The name of a weight, for messages."""
        if root.kind == "const":
            const = self._provenance.consts[root.index]
            return f"closed-over {const.dtype}{list(const.shape)}"
        return self._names[root]


def struct(aval: Any, placed: Any = None) -> jax.ShapeDtypeStruct:
    """Shape and dtype, and where it is; without that, what its type says of it."""
    typed = getattr(aval, "sharding", None)
    if placed is None and typed is not None and not typed.mesh.empty and is_explicit(typed.mesh):
        placed = typed
    weak_type = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak_type, sharding=placed)
