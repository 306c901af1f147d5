"""What is held of weights: which leaves and packed forms the rewritten programs of them read."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace

from hire_xform.passes.ir.graph import Node
from hire_xform.passes.plan.decisions import Decision, PackKey, Plan
from hire_xform.passes.plan.row_order import as_contiguous
from hire_xform.passes.rewrite.action import Action
from hire_xform.passes.rewrite.rewriter import Rewriter
from hire_xform.passes.weights.products import rounding_free
from hire_xform.passes.weights.recipe import Cyclic, Root


@dataclass(frozen=True)
class Holding:
    """What to hold of one argument's leaves: see ``PackLayout``; numbers are leaves of that argument."""

    kept: tuple[int, ...] = ()
    keys: tuple[PackKey, ...] = ()
    restored: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Reader:
    """A program, as far as it reads weights.

    Attributes:
      actions: what is done where, given which leaves, and which packed forms, are there.
      plan: what is rewritten.
      roots: for each of the program's operands, the root it is as a weight, or None.
      slots: the number of each weights argument among them, by the kind of its roots. Programs that share weights have
        the same number for them, wherever these are passed.
      rewriter: makes (or remembers) the rewriter of some actions.
    """

    actions: Callable[[Callable[[Root], bool], Callable[[PackKey], bool]], dict[Node, Action]]
    plan: Plan
    roots: Sequence[Root | None]
    slots: dict[str, int]
    rewriter: Callable[[dict[Node, Action]], Rewriter]

    def shared(self, root: Root) -> Root:
        """The root by the number of its argument; a closed-over array as it is."""
        return Root.of(self.slots[root.kind], root.index) if root.kind in self.slots else root

    def shared_key(self, key: PackKey) -> PackKey:
        """The key of the shared root."""
        return replace(key, recipe=key.recipe.from_roots(self.shared))

    def decisions(self, in_place: Container[Root]) -> list[Decision]:
        """The plan's decisions, with rows as contiguous blocks of the weights of these shared roots."""

        def settled(decision: Decision) -> Decision:
            moved = decision.cyclic and self.shared(decision.rows.recipe.root) in in_place
            return as_contiguous(decision) if moved else decision

        return [settled(decision) for decision in self.plan.decisions]

    def forms(self, in_place: Container[Root] = ()) -> list[PackKey]:
        """The packed forms that the decisions read, of shared roots."""
        return [self.shared_key(n.key) for d in self.decisions(in_place) for n in d.needs]

    def read(self, keys: Container[PackKey], absent: Container[Root]) -> set[Root]:
        """The shared roots that the rewritten program reads whole, with these packed forms and without these leaves."""
        found = self.actions(lambda root: self.shared(root) not in absent, lambda key: self.shared_key(key) in keys)
        needed = self.rewriter(found).needed_inputs()
        return {self.shared(r) for r, read in zip(self.roots, needed, strict=True) if r is not None and read}


def decide_holding(readers: Sequence[Reader]) -> dict[int, Holding]:
    """Which leaves and packed forms some rewritten programs of the same weights read, for each weights argument."""
    in_place = _read_in_place(readers) if len(readers) > 1 else set()
    keys = dict.fromkeys(key for reader in readers for key in reader.forms(in_place))
    rows = [k for k in keys if k.is_rows]
    as_it_is = {k.recipe.root for k in rows if k.recipe.is_leaf}
    laid_out = {k.recipe.root for k in rows if not k.recipe.is_leaf} - as_it_is
    backing = {k for k in rows if rounding_free(k.recipe)}
    backed = {k.recipe.root for k in backing}
    held: set[Root] = set()
    while True:
        needed = {root for reader in readers for root in reader.read(keys, laid_out - held)}
        # A leaf that has to be held is read wherever it is used, which may make more leaves read.
        more = (needed & laid_out) - held - backed
        if not more:
            break
        held |= more
    holdings: dict[int, Holding] = {}
    roots = dict.fromkeys(reader.shared(r) for reader in readers for r in reader.roots if r is not None)
    for slot in dict.fromkeys(root.argument for root in roots):
        assert isinstance(slot, int)
        mine = [k for k in keys if k.recipe.root.argument == slot and not k.is_leaf]
        backs: dict[Root, int] = {}
        for i, key in enumerate(mine):
            if key in backing:
                backs.setdefault(key.recipe.root, i)
        kept: list[int] = []
        restored: list[tuple[int, int]] = []
        for root in sorted((r for r in roots if r.argument == slot), key=lambda r: r.index):
            back = backs.get(root)
            if root in as_it_is or root in held or (root in needed and back is None):
                kept.append(root.index)
            elif back is not None:
                restored.append((root.index, back))
        holdings[slot] = Holding(tuple(kept), tuple(key.anywhere for key in mine), tuple(restored))
    return holdings


def _read_in_place(readers: Sequence[Reader]) -> set[Root]:
    """Weights whose rows one program would have distributed over devices in turn, and another reads where they are.

    They stay where they are, as within one program: to hold them in both ways would be to hold them twice.
    """
    keys = {key for reader in readers for key in reader.forms()}
    rows = [(k.recipe.root, any(isinstance(step, Cyclic) for step in k.recipe.steps)) for k in keys if k.is_rows]
    found = {root for root, cyclic in rows if not cyclic}
    cyclic = {root for root, cyclic in rows if cyclic}
    if cyclic:
        found |= {root for reader in readers for root in reader.read(keys, cyclic)}
    return found & cyclic
