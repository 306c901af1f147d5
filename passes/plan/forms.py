"""The packed forms of weights: objects that say how they are packed and what is read of them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from hire_xform.lowering.engine.certified_ffn import largest_norm
from hire_xform.lowering.predict.predictors import Predictor, pack_predictor, packed_shapes, predictor_bytes
from hire_xform.lowering.primitives.ranks import moments_bytes, pack_moments
from hire_xform.lowering.prove.moment_bounds import bounded_moments_bytes, pack_bounded_moments
from hire_xform.lowering.prove.proofs import pack_proof, proof_bytes, proof_reads, proof_shapes


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs of a product. Equal, and hashed, by content.

    Attributes:
      digest: of the covariance.
      covariance: mean of ``x x'`` over tokens, f32 ``[*stack, d, d]``.
    """

    digest: str
    covariance: Any = field(compare=False, repr=False, default=None)


@dataclass(frozen=True)
class Order:
    """An order of a block's units. Equal, and hashed, by content.

    Attributes:
      digest: of the order.
      units: int32 ``[*stack, m]``, for each place the unit.
      how: what to tell of it.
    """

    digest: str
    units: Any = field(compare=False, repr=False, default=None)
    how: str = field(compare=False, repr=False, default="")


# Stand in a form for whatever a packer is given: one compiled packer serves all inputs, and all orders.
_ANY_INPUTS, _ANY_ORDER = Inputs(""), Order("")


class Form(Hashable, Protocol):
    """How a weight is packed. Hashable; equal forms of equal weights are equal arrays.

    Attributes:
      of_rows: True where it is made of each matrix ``[n, d]`` of a stack; else of the leaf as a whole, if of anything.
    """

    of_rows: ClassVar[bool]

    @property
    def split(self) -> bool:
        """True where each device has its part of one array, as of rows; else each has one made of its own rows."""

    @property
    def given(self) -> tuple[tuple[Any, int], ...]:
        """The arrays that it is made with besides, each with how many of its axes are of one matrix."""

    @property
    def bare(self) -> Form:
        """The same without these arrays: equal where one packer serves."""

    @property
    def alike(self) -> Hashable | None:
        """Equal for forms of one weight that are packed at once, since they have work in common; None for none."""

    def pack(self, rows: Any, *given: Any) -> Any:
        """The array, or the dictionary of arrays, that is made of rows ``[n, d]`` (or of a leaf) and what is given."""

    def nbytes(self, n: int, d: int, dtype: Any) -> int:
        """Bytes that a call reads of it besides rows that are computed exactly.

        Args:
          n: rows of which it says something.
          d: columns.
          dtype: of the rows as they are used.
        """


@dataclass(frozen=True)
class _OfRows:
    """A form made of rows. ``order``: that in which they are packed; None for that they have."""

    order: Order | None = field(default=None, kw_only=True)

    of_rows: ClassVar[bool] = True
    split: ClassVar[bool] = False

    @property
    def alike(self) -> Hashable | None:
        """None."""
        return None

    @property
    def given(self) -> tuple[tuple[Any, int], ...]:
        """The order."""
        return () if self.order is None else ((self.order.units, 1),)

    @property
    def bare(self) -> Any:
        """The same in any order."""
        return self if self.order is None else replace(self, order=_ANY_ORDER)

    def pack(self, rows: Any, *given: Any) -> Any:
        """The rows in their order, and what is made of these."""
        if self.order is None:
            return self._made(rows, *given)
        order, *others = given
        order = self._packed(order)
        return self._made(rows[order], *others, order=order)

    def _packed(self, order: Any) -> Any:
        return order

    def __str__(self) -> str:
        """For reports."""
        return type(self).__name__.lower()

    def _made(self, rows: Any, *given: Any, order: Any = None) -> Any:
        raise NotImplementedError

    def nbytes(self, n: int, d: int, dtype: Any) -> int:
        """None that counts."""
        return 0


@dataclass(frozen=True)
class Rows(_OfRows):
    """The rows themselves, in the dtype they are stored in."""

    @property
    def split(self) -> bool:  # type: ignore[override]
        """Rows that lie as they lay."""
        return self.order is None

    def _made(self, rows: Any, *given: Any, order: Any = None) -> Any:
        return rows


ROWS = Rows()


@dataclass(frozen=True)
class PackedPredictor(_OfRows):
    """A predictor of the rows.

    Attributes:
      spec: the predictor.
      proves: whether bounds of how far off it can be are packed as well.
      inputs: what it is fitted to; None where it takes no inputs, or none are known.
      static: rows that are always computed, the first in the order: it has no entry for them.
    """

    spec: Predictor
    proves: bool = False
    inputs: Inputs | None = None
    static: int = 0

    @property
    def given(self) -> tuple[tuple[Any, int], ...]:
        """The order, the covariance, and what the predictor itself holds."""
        fitted = () if self.inputs is None else ((self.inputs.covariance, 2),)
        held = self.spec.arrays.values()
        return (*super().given, *fitted, *((array, array.ndim - self.spec.stack_axes) for array in held))

    @property
    def bare(self) -> Any:
        """The same for any order and any inputs."""
        bare = super().bare
        return bare if self.inputs is None else replace(bare, inputs=_ANY_INPUTS)

    @property
    def alike(self) -> Hashable | None:
        """Those that are fitted to the same inputs, of the same rows."""
        alone = self.inputs is None or self.proves or self.spec.arrays
        return None if alone else (self.inputs, self.order, self.static)

    def _packed(self, order: Any) -> Any:
        return order[self.static :]

    def _made(self, rows: Any, *given: Any, order: Any = None) -> Any:
        covariance, held = (None, given) if self.inputs is None else (given[0], given[1:])
        arrays = dict(zip(self.spec.arrays, held, strict=True)) if held else None
        return (pack_proof if self.proves else pack_predictor)(rows, self.spec, covariance, arrays, order)

    def packed_beside(self, shared: dict[Hashable, Any], rows: Any, *given: Any) -> Any:
        """As ``pack``, of one that is ``alike`` others, with what these have made of the rows and inputs."""
        order, covariance = given if self.order is not None else (None, *given)
        if order is not None:
            order = self._packed(order)
            rows = rows[order]
        return pack_predictor(rows, self.spec, covariance, None, order, shared)

    def __str__(self) -> str:
        """For reports."""
        return f"{self.spec} with bounds" if self.proves else str(self.spec)

    def shapes(self, n: int, d: int, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Its arrays of an ``[n, d]`` matrix."""
        return (proof_shapes if self.proves else packed_shapes)(n, d, self.spec, dtype)

    def reads(self, n: int, d: int, dtype: Any) -> list[tuple[float, jax.ShapeDtypeStruct]]:
        """Its arrays, and the share of its rows that a call is expected to read of each."""
        if self.proves:
            return proof_reads(n, d, self.spec, dtype)
        return [(1.0, array) for array in packed_shapes(n, d, self.spec, dtype).values()]

    def nbytes(self, n: int, d: int, dtype: Any) -> int:
        """What its scores, or its bounds, read."""
        return (proof_bytes if self.proves else predictor_bytes)(n, d, self.spec, dtype)


@dataclass(frozen=True)
class Together:
    """Predictors that are ``alike``, packed at once: what they have in common is made one time."""

    forms: tuple[PackedPredictor, ...]

    of_rows: ClassVar[bool] = True
    split: ClassVar[bool] = False
    alike: ClassVar[None] = None

    @property
    def given(self) -> tuple[tuple[Any, int], ...]:
        """What each is given."""
        return self.forms[0].given

    @property
    def bare(self) -> Any:
        """The same for any order and any inputs."""
        return Together(tuple(form.bare for form in self.forms))

    def pack(self, rows: Any, *given: Any) -> Any:
        """The arrays of each."""
        shared: dict[Hashable, Any] = {}
        return tuple(form.packed_beside(shared, rows, *given) for form in self.forms)

    def nbytes(self, n: int, d: int, dtype: Any) -> int:
        """Of all."""
        return sum(form.nbytes(n, d, dtype) for form in self.forms)


@dataclass(frozen=True)
class LargestNorm(_OfRows):
    """A bound of the norms of all rows: one number."""

    def _made(self, rows: Any, *given: Any, order: Any = None) -> Any:
        return largest_norm(rows)


@dataclass(frozen=True)
class Norms(_OfRows):
    """The norm of each row, f32 ``[n]``."""

    def _made(self, rows: Any, *given: Any, order: Any = None) -> Any:
        return jnp.sqrt(jnp.sum(jnp.square(rows.astype(jnp.float32)), axis=-1))

    def nbytes(self, n: int, d: int, dtype: Any) -> int:
        """Of all rows."""
        return 4 * n


@dataclass(frozen=True)
class Moments(_OfRows):
    """Moments of the rows, of which the mean and the variance of all products are made; ``bounded``: with bounds."""

    bounded: bool = False

    def _made(self, rows: Any, *given: Any, order: Any = None) -> Any:
        return (pack_bounded_moments if self.bounded else pack_moments)(rows)

    def nbytes(self, n: int, d: int, dtype: Any) -> int:
        """All of them."""
        return (bounded_moments_bytes if self.bounded else moments_bytes)(d)


@dataclass(frozen=True)
class Whole:
    """A form that is made of no rows. Subclasses say of what."""

    of_rows: ClassVar[bool] = False
    split: ClassVar[bool] = False
    alike: ClassVar[None] = None
    given: ClassVar[tuple[tuple[Any, int], ...]] = ()

    @property
    def bare(self) -> Any:
        """Itself."""
        return self

    def pack(self, leaf: Any, *given: Any) -> Any:
        """The leaf."""
        return leaf

    def nbytes(self, n: int, d: int, dtype: Any) -> int:
        """None that counts."""
        return 0


@dataclass(frozen=True)
class Leaf(Whole):
    """The leaf as it is, whatever the recipe makes of it."""


@dataclass(frozen=True)
class UnitOrder(Whole):
    """The order of a block's units itself, int32 ``[*stack, m]``."""

    order: Order

    @property
    def given(self) -> tuple[tuple[Any, int], ...]:  # type: ignore[override]
        """The order."""
        return ((self.order.units, 1),)

    @property
    def bare(self) -> Any:
        """Any order."""
        return UnitOrder(_ANY_ORDER)

    def pack(self, leaf: Any, *given: Any) -> Any:
        """The order."""
        return given[0]
