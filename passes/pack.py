"""Compresses weights once: the packed forms that sites read, and ``Packed``, which stands where the weights stood."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from hire_xform.lowering import usual_promotion
from hire_xform.passes import compat
from hire_xform.passes.cyclic import as_contiguous
from hire_xform.passes.decisions import Decision, PackKey, Plan
from hire_xform.passes.detect import Detection
from hire_xform.passes.packers import as_blocks, bare_form, given_to, pack_placed, packed_spec, packer
from hire_xform.passes.products import rounding_free
from hire_xform.passes.provenance import Reshape, Root, Stack, Step, Transpose
from hire_xform.passes.recipe import Cyclic
from hire_xform.passes.rewrite import Rewriter
from hire_xform.passes.shards import placement_of
from hire_xform.passes.statics import value_key
from hire_xform.passes.surroundings import concretely
from hire_xform.passes.treatment import Treatment, treatments
from hire_xform.passes.walk import Node


def pack_array(key: PackKey, leaf: Any, rows: Any = None) -> Any:
    """One packed form: ``[*stack, n, d]`` rows, f32 ``[*stack, n]`` norms, or a predictor's dictionary of arrays.

    Of a leaf that is sharded along the rows, each device packs those it holds, and holds what it packed.

    Args:
      key: which form.
      leaf: the weight.
      rows: its packed rows of the same recipe, where these are there: laying them out again would take a copy.
    """
    sharding = placement_of(leaf) if not compat.is_tracer(leaf) else None
    if sharding is not None:
        return pack_placed(key, leaf, sharding)
    if rows is not None:
        stacks = tuple(step for step in key.recipe.steps if isinstance(step, Stack))
        key, leaf = replace(key, recipe=replace(key.recipe, steps=stacks)), rows
    # Under a trace around the call too: packed forms of concrete weights are remembered, so they must be concrete.
    with usual_promotion() if compat.is_tracer(leaf) else concretely():
        return packer(key.recipe.steps, bare_form(key.form))(leaf, *given_to(key.form))


def pack_shapes(key: PackKey, leaf: Any, sharding: Sharding | None = None) -> Any:
    """Shapes and dtypes of ``pack_array``'s result, and where it is, of a leaf that is there; computes nothing."""
    given = tuple((tuple(a.shape), np.dtype(a.dtype)) for a in given_to(key.form))
    made = _pack_shapes(key.recipe.steps, bare_form(key.form), ((tuple(leaf.shape), np.dtype(leaf.dtype)), *given))
    if sharding is None:
        return made
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, packed_spec(sharding, leaf.shape, key))
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), made)


@functools.lru_cache(maxsize=256)
def _pack_shapes(steps: tuple[Step, ...], form: Any, arrays: tuple[tuple[tuple[int, ...], Any], ...]) -> Any:
    return jax.eval_shape(packer(steps, form), *(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays))


def unpack_rows(key: PackKey, leaf_shape: Sequence[int], rows: Any, sharding: NamedSharding | None) -> Any:
    """The leaf again, from its packed rows, for recipes that are ``rounding_free``; ``sharding`` is where it was."""
    recipe = key.recipe
    if sharding is not None:
        recipe, rows = as_blocks(key, leaf_shape, rows, sharding)
    return _undo(recipe.steps, tuple(leaf_shape), rows)


def _undo(steps: Sequence[Step], shape: tuple[int, ...], rows: Any) -> Any:
    if not steps:
        return rows
    step, rest = steps[0], steps[1:]
    if isinstance(step, Stack):
        return jax.vmap(lambda r: _undo(rest, shape[1:], r))(rows)
    if isinstance(step, Transpose):
        before = _undo(rest, tuple(shape[p] for p in step.perm), rows)
        return jnp.transpose(before, [int(i) for i in np.argsort(step.perm)])
    if isinstance(step, Reshape):
        return _undo(rest, step.shape, rows).reshape(shape)
    if isinstance(step, Cyclic):
        return step.undo(_undo(rest, shape, rows))
    raise AssertionError(f"{step} can't be undone")


@dataclass(frozen=True, eq=False)
class PackLayout:
    """What a ``Packed`` holds, and what stood in its place. Static: two layouts are the same when all fields are.

    Attributes:
      treedef: structure of the original argument.
      avals: abstract values of the original array leaves, in order.
      static: the other leaves: (position, value).
      kept: which array leaves it still holds.
      keys: the packed forms it holds, of leaves of any argument: weights may stand elsewhere in another function.
      restored: leaves that are made from packed rows when read dense: (leaf, number of the key).
      placed: where the original array leaves were, of those over several devices.
      token_axes: mesh axes that data came in sharded over.
    """

    treedef: Any
    avals: tuple[Any, ...]
    static: tuple[tuple[int, Any], ...]
    kept: tuple[int, ...]
    keys: tuple[PackKey, ...]
    restored: tuple[tuple[int, int], ...]
    placed: tuple[Any, ...] = ()
    token_axes: tuple[str, ...] = ()
    _hash: int = field(default=0, repr=False)
    _numbers: dict[PackKey, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Hashes once: a layout is part of every call's tree structure."""
        object.__setattr__(self, "_hash", hash((self.treedef, self.kept, self.keys)))
        object.__setattr__(self, "_numbers", {key: i for i, key in enumerate(self.keys)})

    def number_of(self, key: PackKey) -> int | None:
        """Where a key stands in ``keys``."""
        return self._numbers.get(key)

    def _fields(self) -> tuple[Any, ...]:
        static = tuple((position, value_key(value)) for position, value in self.static)
        held = self.kept, self.keys, self.restored, self.placed, self.token_axes
        return self.treedef, self.avals, static, *held

    def __eq__(self, other: object) -> bool:
        """Equal when everything it describes is."""
        return self is other or (isinstance(other, PackLayout) and self._fields() == other._fields())

    def __hash__(self) -> int:
        """The hash made at construction."""
        return self._hash


class PackedToken:
    """Stands for a ``Packed`` in a flattened call: one static leaf that is equal where the layouts are."""

    __slots__ = ("layout",)

    def __init__(self, layout: PackLayout):
        """For a layout."""
        self.layout = layout

    def __eq__(self, other: object) -> bool:
        """Equal when the layouts are."""
        return isinstance(other, PackedToken) and self.layout == other.layout

    def __hash__(self) -> int:
        """The layout's hash."""
        return hash(self.layout)


@jax.tree_util.register_pytree_with_keys_class
class Packed:
    """Weights in the layout decoding wants: stands where the plain weights stood, which may then be dropped.

    A pytree of arrays: pass it through ``jit``, shard it, save its leaves. It holds each matrix once.
    """

    def __init__(self, kept: Sequence[Any], forms: Sequence[Any], layout: PackLayout):
        """Not for direct use: ``step.trace(...).pack(weights)`` makes one."""
        self._kept = list(kept)
        self._forms = list(forms)
        self._layout = layout
        self._leaves: list[Any] | None = None

    @property
    def leaves(self) -> list[Any]:
        """All its arrays, as ``jax.tree.leaves`` gives them; made once, since a ``Packed`` never changes."""
        if self._leaves is None:
            self._leaves = jax.tree.leaves((self._kept, self._forms))
        return self._leaves

    @property
    def layout(self) -> PackLayout:
        """What it holds."""
        return self._layout

    def leaf(self, index: int) -> Any:
        """Original array leaf ``index`` if it is held as it was; else None."""
        return self._kept[self._layout.kept.index(index)] if index in self._layout.kept else None

    def form(self, key: PackKey) -> Any:
        """The packed form of a key, of whichever argument; None if it is not held."""
        number = self._layout.number_of(key.anywhere)
        return self._forms[number] if number is not None else None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays it holds."""
        # NumPy has no dtype for random keys; they know their own size.
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in self.leaves)

    def __repr__(self) -> str:
        """A one-line summary."""
        held = f"{len(self._kept)} plain leaves, {len(self._forms)} packed forms"
        return f"Packed({held}, {self.nbytes / 1e6:.1f} MB)"

    def tree_flatten_with_keys(self) -> tuple[Any, PackLayout]:
        """Children with keys, and the layout."""
        key = jax.tree_util.DictKey
        return ((key("kept"), self._kept), (key("forms"), self._forms)), self._layout

    def tree_flatten(self) -> tuple[Any, PackLayout]:
        """Children and the layout."""
        return (self._kept, self._forms), self._layout

    @classmethod
    def tree_unflatten(cls, layout: PackLayout, children: Any) -> Packed:
        """Inverse of flattening."""
        packed = object.__new__(cls)
        packed._kept, packed._forms = children
        packed._layout = layout
        packed._leaves = None
        return packed


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
      detection: what was found in the program.
      plan: what is rewritten.
      roots: for each of the program's operands, the root it is as a weight, or None.
      slots: the number of each weights argument among them, by the kind of its roots. Programs that share weights have
        the same number for them, wherever these are passed.
      rewriter: makes (or remembers) the rewriter of some treatments.
    """

    detection: Detection
    plan: Plan
    roots: Sequence[Root | None]
    slots: dict[str, int]
    rewriter: Callable[[dict[Node, Treatment]], Rewriter]

    def shared(self, root: Root) -> Root:
        """The root by the number of its argument; a closed-over array as it is."""
        return Root.of(self.slots[root.kind], root.index) if root.kind in self.slots else root

    def shared_key(self, key: PackKey) -> PackKey:
        """The key of the shared root."""
        return replace(key, recipe=replace(key.recipe, root=self.shared(key.recipe.root)))

    def decisions(self, in_place: Container[Root]) -> list[Decision]:
        """The plan's decisions, with rows as contiguous blocks of the weights of these shared roots."""

        def settled(decision: Decision) -> Decision:
            moved = decision.cyclic and self.shared(decision.needs[0].key.recipe.root) in in_place
            return as_contiguous(decision) if moved else decision

        return [settled(decision) for decision in self.plan.decisions]

    def forms(self, in_place: Container[Root] = ()) -> list[PackKey]:
        """The packed forms that the decisions read, of shared roots."""
        return [self.shared_key(n.key) for d in self.decisions(in_place) for n in d.needs]

    def read(self, keys: Container[PackKey], absent: Container[Root]) -> set[Root]:
        """The shared roots that the rewritten program reads whole, with these packed forms and without these leaves."""
        found = treatments(
            self.detection,
            self.plan,
            lambda root: self.shared(root) not in absent,
            lambda key: self.shared_key(key) in keys,
        )
        needed = self.rewriter(found).needed_inputs()
        return {self.shared(r) for r, read in zip(self.roots, needed, strict=True) if r is not None and read}


def decide_holding(readers: Sequence[Reader]) -> dict[int, Holding]:
    """Which leaves and packed forms some rewritten programs of the same weights read, for each weights argument."""
    in_place = _read_in_place(readers) if len(readers) > 1 else set()
    keys = dict.fromkeys(key for reader in readers for key in reader.forms(in_place))
    rows = [k for k in keys if k.form == "rows"]
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
        mine = [k for k in keys if k.recipe.root.argument == slot and not (k.form == "rows" and k.recipe.is_leaf)]
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
    rows = [(k.recipe.root, any(isinstance(step, Cyclic) for step in k.recipe.steps)) for k in keys if k.form == "rows"]
    found = {root for root, cyclic in rows if not cyclic}
    cyclic = {root for root, cyclic in rows if cyclic}
    if cyclic:
        found |= {root for reader in readers for root in reader.read(keys, cyclic)}
    return found & cyclic


def packing_bytes(keys: Iterable[PackKey], leaf_of: Callable[[Root], Any]) -> int:
    """Bytes read while packing, for progress."""
    return sum(math.prod(leaf_of(k.recipe.root).shape) * np.dtype(leaf_of(k.recipe.root).dtype).itemsize for k in keys)
