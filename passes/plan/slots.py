"""Named slots for the packed forms of a site, and for what stands for them: needs, views.

Packed forms of one program have an order, that of the slots here: rows, predictor, largest norm, norms, moments of each
product; then what is of no product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

import jax

from hire_xform.lowering.primitives.stored_rows import Operation, StoredRows

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stored(Generic[T]):
    """Of rows that are stored in few bits the packed forms, or what stands for them: it stands where rows do.

    Attributes:
      values: of the rows as they are stored.
      others: of what they are scaled by, as small as it is.
      operations: what makes the rows of them.
    """

    values: Any
    others: tuple[T, ...]
    operations: tuple[Operation, ...] = field(metadata={"static": True})

    @property
    def key(self) -> Any:
        """The key of a need."""
        return self.values.key

    @property
    def arrays(self) -> Any:
        """The stored values of a view."""
        return self.values.arrays

    @property
    def index(self) -> tuple[Any, ...]:
        """The stack indices of a view."""
        return tuple(self.values.index)

    def filled(self, value: Any) -> Any:
        """As of a view of rows."""
        return self.values.filled(value)

    def whole(self) -> StoredRows:
        """As of a view of rows."""
        return self._together(lambda view: view.whole())

    def rows(self) -> tuple[StoredRows, Any]:
        """As of a view of rows."""
        return self._together(lambda view: view.rows()[0]), self.values.rows()[1]

    def _together(self, taken: Callable[[Any], Any]) -> StoredRows:
        one_row = tuple(view.arrays.shape[len(view.index)] == 1 for view in self.others)  # type: ignore[attr-defined]
        return StoredRows(taken(self.values), tuple(map(taken, self.others)), self.operations, one_row)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProductForms(Generic[T]):
    """Of one product of a site its packed forms, or what stands for them (needs, views), by name.

    Attributes:
      rows: its rows, ``[n, d]``, or a ``Stored`` of those that are scaled; None of a product of which none are computed
        exactly.
      predictor: of a product that is scored; where the site is certified with its bounds.
      largest: a bound of the norms of its rows.
      norms: the norms of its rows.
      moments: those of which sums over all units are made; where the site is certified with their bounds.
    """

    rows: Any = None
    predictor: T | None = None
    largest: T | None = None
    norms: T | None = None
    moments: T | None = None

    def __iter__(self) -> Iterator[T]:
        """Those that are there, in their order."""
        return (one for one in (getattr(self, f.name) for f in fields(self)) if one is not None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SiteForms(Generic[T]):
    """Of one site its packed forms, or what stands for them (needs, views), by name.

    Attributes:
      up: of each product whose rows are chosen from: those into the hidden units, or a vocabulary's one.
      down: of the product that contracts the units; None of a vocabulary.
      order: the order that units are packed in, where it is not their own.
      level: the number of the size of each layer that has its own.
      leaves: the leaves of all products as they are, for a fallback that is the program's own.
      beside: of further products that contract the units.
    """

    up: tuple[ProductForms[T], ...]
    down: ProductForms[T] | None = None
    order: T | None = None
    level: T | None = None
    leaves: tuple[T, ...] = ()
    beside: tuple[ProductForms[T], ...] = ()

    @property
    def head(self) -> ProductForms[T]:
        """Those of a site's one product."""
        (one,) = self.up
        return one

    @property
    def products(self) -> tuple[ProductForms[T], ...]:
        """Those of all products, the contracting ones last."""
        return self.up if self.down is None else (*self.up, self.down, *self.beside)
