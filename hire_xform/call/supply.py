"""Where a rewritten program gets its weights from in one call: plain leaves, packed forms, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hire_xform.call.packing import pack_keys
from hire_xform.errors import PackedMismatchError
from hire_xform.passes.pack.make import unpack_rows
from hire_xform.passes.pack.packed import Packed
from hire_xform.passes.plan.decisions import Need, PackKey
from hire_xform.passes.weights.recipe import Root


@dataclass(eq=False, repr=False)
class Supply:
    """The weights of one call.

    Attributes:
      packed: ``Packed`` arguments by position, or by name where that has none.
      plain: plain weight leaves.
      forms: packed forms made outside: of plain leaves, and of closed-over arrays where known.
      const_keys: the forms of closed-over arrays that the program reads, which are made where they are not known.
      const: gives a closed-over array.
    """

    packed: Mapping[Any, Packed]
    plain: Mapping[Root, Any]
    forms: dict[PackKey, Any]
    const_keys: Sequence[PackKey]
    const: Callable[[Root], Any]

    def leaf(self, root: Root) -> Any:
        """The plain leaf of a root, or None."""
        held = self.packed.get(root.argument)
        return self.plain.get(root) if held is None else held.leaf(root.index)

    def has_leaf(self, root: Root) -> bool:
        """Whether the weight of a root is there as it is."""
        return root.kind == "const" or self.leaf(root) is not None

    def form(self, key: PackKey) -> Any:
        """The packed form of a key, or None."""
        held = self.packed.get(key.recipe.root.argument)
        if held is not None:
            return held.form(key)
        if key not in self.forms and key.recipe.root.kind == "const" and key in self.const_keys:
            self.forms.update(pack_keys(self.const_keys, self.const, False))
        return self.forms.get(key)

    def has_form(self, key: PackKey) -> bool:
        """Whether the packed form of a key is there, or can be made."""
        return self.form(key) is not None

    def restore(self, root: Root) -> Any:
        """The leaf of a root made from its packed rows, or None."""
        held = self.packed.get(root.argument)
        number = None if held is None else dict(held.layout.restored).get(root.index)
        if held is None or number is None:
            return None
        key, layout = held.layout.keys[number], held.layout
        return unpack_rows(key, layout.avals[root.index].shape, held.form(key), layout.placed[root.index])

    def whole(self, root: Root, name: Callable[[Root], str]) -> Any:
        """The leaf of a root, which the program reads: as it is, or made from its packed rows.

        Raises:
          PackedMismatchError: the ``Packed`` argument holds neither; ``name`` gives what the weight is called.
        """
        found = self.leaf(root)
        if found is None:
            found = self.restore(root)
        if found is None:
            raise PackedMismatchError(
                f"the Packed weights do not hold {name(root)}, which this call reads whole; pack with a trace of each "
                "program that they are for, this one too, hx.pack(weights, [traced, ...]), or pass the plain weights"
            )
        return found

    def read(self, need: Need) -> Any:
        """What is read for a need: its packed form, or the weight itself where the form is that."""
        found = self.form(need.key)
        if found is not None:
            return found
        root = need.key.recipe.root
        return self.const(root) if root.kind == "const" else self.leaf(root)
