"""What predicts a product with every row of a matrix from little: the protocol, and what the other rooms call.

A :class:`Predictor` is a *spec*, what to keep, and packs a dictionary of arrays from the matrix once. Its scores read
only that dictionary:

    spec = Quantized(8)
    packed = pack_predictor(rows, spec)                  # rows [n, d]
    scores = predict_scores(x, packed, spec, n)          # x [T, d] -> f32 [T, n], close to x @ rows.T

Each predictor is one file of this package.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from hire_xform.lowering.primitives.scores import predicted_scores
from hire_xform.lowering.xla.promotion import usual_promotion

__all__ = [
    "Given",
    "PackedArrays",
    "Predictor",
    "pack_predictor",
    "packed_shapes",
    "predict_scores",
    "predict_scores_of_many",
    "predictor_bytes",
    "predictor_named",
]

# The share of the rows that is taken to be open after a stage, where it was not measured.
OPEN = 1 / 16
# The arrays of one packed predictor, by name.
PackedArrays = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Given:
    """What a predictor is packed with, besides the rows.

    Attributes:
      inputs: f32 ``[d, d]``, the mean of ``x x'`` over inputs ``x``, of any scale; None where nothing is known of them,
        or the predictor does not ask (``takes_inputs``).
      arrays: what the predictor holds (``Predictor.arrays``), of this matrix: without stack axes.
      numbers: int32 ``[n]``, which row of the whole matrix each row is: some may be left out, and others moved.
      shared: what predictors of the same rows and inputs that are packed at once have made; see :meth:`once`.
    """

    inputs: jax.Array | None
    arrays: PackedArrays
    numbers: jax.Array
    shared: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` makes of these rows and inputs alone: one time for all predictors that are packed at once."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]


class Predictor:
    """What predicts the products of a token with every row of a matrix: subclass it to bring your own.

    Two methods are enough, ``pack`` and ``scores``::

        class Signs(hx.Predictor):  # a bit would do
            def pack(self, rows, given):
                return {"signs": jnp.sign(rows).astype(jnp.int8), "size": jnp.mean(jnp.abs(rows), axis=1)}

            def scores(self, x, packed, n):
                return (x @ packed["signs"].T.astype(x.dtype)) * packed["size"]

        config = hx.Config(ffn=hx.Ffn(active=0.25, predictor=Signs()))

    Scores only have to rank rows as the products would: what is chosen by them is computed exactly. Of a block with a
    gate, each product is predicted for itself. With ``fill="predicted"`` a vocabulary's scores are its other logits, so
    there they have to be close, too.

    A predictor is part of what a program is compiled for, so it is hashable, and equal to one that packs and scores
    alike: a frozen dataclass of plain settings, or any object that is equal to itself alone, such as one that holds
    arrays. Those of a trained network, say, which is to score the units of one block, are its :attr:`arrays`.
    """

    # Whether it is packed with second moments of the inputs, where a calibration has them.
    takes_inputs: ClassVar[bool] = False
    # What of the inputs it can't do without, for messages, such as "principal directions"; empty where it can.
    needs_inputs: ClassVar[str] = ""
    # Whether it bounds what its scores may be off by (`pack_proof`, `bounds`), which certified sites are made of.
    proves: ClassVar[bool] = False
    # What a report says besides where its integer products are what makes a site slow; see `bits`.
    instead: ClassVar[str] = ""
    # Whether its integer products are of tokens in two limbs of 8 bits, as those of all certified sites are: of several
    # tokens these take longer.
    fine: ClassVar[bool] = False
    # How many axes of `arrays` are those of a stack of matrices: 1 for the layers of a scan.
    stack_axes: int = 0
    # Bits of its integer products; None where they are of floating point.
    bits: int | None = None
    # Of a proof's arrays those that are of the matrix as a whole, by name: all others have an entry for each row.
    whole: ClassVar[frozenset[str]] = frozenset()
    # The names of packed matrices, and of those of a proof, that it only gives to steps which read them where they lie
    # in a stack: as a `StackEntry` where the program's weights are stacked. All others come taken out of it.
    in_place: frozenset[str] = frozenset()

    @property
    def stages(self) -> tuple[Predictor, ...]:
        """The predictors whose bounds are asked for one after the other, as ``Staged`` has them; mostly itself."""
        return (self,)

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Of each stage after the first the share of the rows that was measured; None where none was."""
        return None

    @property
    def expected(self) -> tuple[float, ...]:
        """Of each stage the share of the rows that it is expected to read: of the first all, of others a guess."""
        return (1.0, *(self.shares or (OPEN for _ in self.stages[1:])))

    def measured(self, opened: Sequence[float]) -> Predictor:
        """Itself, with the share of the rows that was measured for each stage after the first."""
        return self

    def part(self, proof: PackedArrays, number: int) -> PackedArrays:
        """Of a proof's arrays those of one stage."""
        return proof

    @property
    def arrays(self) -> PackedArrays:
        """What it holds besides settings, by name, stack axes first; it is then of the weights of one site.

        Keep them where they may stay: as long as a step, or its ``Packed``.
        """
        return {}

    def pack(self, rows: jax.Array, given: Given) -> PackedArrays:
        """Makes of a matrix what its scores will read. It is traced, one matrix of a stack at a time.

        Args:
          rows: ``[n, d]``, floating.
          given: what else is known.

        Returns:
          Arrays by name.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a method pack(rows, given)")

    def scores(self, x: jax.Array, packed: PackedArrays, n: int) -> jax.Array:
        """The predicted ``x @ rows.T``.

        A token or a row that holds a NaN or an infinity should have NaN scores, and leave those of others alone: what
        is NaN is always chosen. The derivative with respect to ``x``, if the program has one, should be that of what is
        predicted, since rounding has none.

        Args:
          x: ``[T, d]``, floating.
          packed: from :meth:`pack`.
          n: rows of the matrix.

        Returns:
          ``[T, n]``, floating.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a method scores(x, packed, n)")

    def scores_of_many(self, x: jax.Array, packed: PackedArrays, n: int) -> jax.Array:
        """As :meth:`scores`, up to rounding, of hundreds of tokens, as a calibration has them.

        What is slow for them, however fast it is for one token, may be spelled otherwise here: integers unpacked, say.
        """
        return self.scores(x, packed, n)

    def shapes(self, n: int, d: int, dtype: jax.typing.DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """What :meth:`pack` makes of an ``[n, d]`` matrix of ``dtype``; by default it is asked."""
        return _shapes(self, self.pack, n, d, jnp.dtype(dtype))

    def bytes_read(self, n: int, d: int, dtype: jax.typing.DTypeLike) -> int:
        """Bytes one call of :meth:`scores` reads; by default of everything that is packed."""
        return sum(s.size * s.dtype.itemsize for s in self.shapes(n, d, dtype).values())

    def pack_proof(self, rows: jax.Array, given: Given) -> PackedArrays:
        """As :meth:`pack`, with what :meth:`bounds` reads; for predictors that prove."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method pack_proof(rows, given)")

    def bounds(self, x: jax.Array, proof: PackedArrays, input_bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Scores with proved bounds, for predictors that prove.

        Args:
          x: ``[T, d]``, f32 or 16 bits.
          proof: from :meth:`pack_proof`.
          input_bits: significant bits that the dense product keeps of its f32 inputs.

        Returns:
          ``scores``, ``upper`` and ``exact_error``, f32 ``[T, n]`` each, of ``ScoresWithBounds``: no dense product, in
          f32 and any order of summation, is above ``upper``, nor as far below ``scores``; two such of the same row and
          token are within ``exact_error``. NaN where nothing is known.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a method bounds(x, proof, input_bits)")

    def proof_shapes(self, n: int, d: int, dtype: jax.typing.DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """What :meth:`pack_proof` makes of an ``[n, d]`` matrix of ``dtype``; by default it is asked."""
        return _shapes(self, self.pack_proof, n, d, jnp.dtype(dtype))

    def given(
        self,
        caller: str,
        rows: jax.Array,
        covariance: jax.Array | None,
        arrays: PackedArrays | None = None,
        numbers: jax.Array | None = None,
        shared: dict[Hashable, Any] | None = None,
    ) -> Given:
        """What it is packed of these rows with; see :func:`pack_predictor`, which says what the arguments are."""
        if rows.ndim != 2 or 0 in rows.shape or not jnp.issubdtype(rows.dtype, jnp.floating):
            raise ValueError(
                f"{caller}: rows of shape {rows.shape} and dtype {rows.dtype}; expected a non-empty floating [n, d]"
            )
        if covariance is None and self.needs_inputs:
            raise ValueError(
                f"{caller}: {type(self).__name__} without a covariance; expected that of the inputs, [d, d]"
            )
        return Given(
            inputs=None if covariance is None else covariance.astype(jnp.float32),
            arrays=self.arrays if arrays is None else arrays,
            numbers=jnp.arange(rows.shape[0], dtype=jnp.int32) if numbers is None else numbers,
            shared={} if shared is None else shared,
        )

    def settings(self) -> dict[str, Any]:
        """What its constructor takes to make it again, plain values by name: what a saved calibration says of it.

        Raises:
          TypeError: it is no dataclass, and does not say.
        """
        if not dataclasses.is_dataclass(self):
            raise TypeError(f"{type(self).__name__} is no dataclass; expected a method settings()")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __repr__(self) -> str:
        """Its class, and the shapes of what it holds."""
        held = ", ".join(f"{name} {list(array.shape)}" for name, array in self.arrays.items())
        return f"{type(self).__name__}({held})"


# What the engine's signatures call it.
@functools.lru_cache(maxsize=512)
def _shapes(
    spec: Predictor, pack: Callable[[jax.Array, Given], PackedArrays], n: int, d: int, dtype: jnp.dtype
) -> dict[str, jax.ShapeDtypeStruct]:
    struct = jax.ShapeDtypeStruct
    inputs = struct((d, d), jnp.float32) if spec.takes_inputs else None
    arrays = {name: struct(a.shape[spec.stack_axes :], a.dtype) for name, a in spec.arrays.items()}
    with usual_promotion():
        made = jax.eval_shape(
            lambda rows, inputs, arrays, numbers: dict(pack(rows, Given(inputs, arrays, numbers))),
            *(struct((n, d), dtype), inputs, arrays, struct((n,), jnp.int32)),
        )
    return {name: struct(a.shape, a.dtype) for name, a in made.items()}


def packed_shapes(
    n: int, d: int, spec: Predictor, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of what :func:`pack_predictor` makes of an ``[n, d]`` matrix of ``dtype``."""
    return spec.shapes(n, d, dtype)


def predictor_bytes(n: int, d: int, spec: Predictor, dtype: jax.typing.DTypeLike = jnp.float32) -> int:
    """Bytes one call of :func:`predict_scores` reads of the packed predictor of an ``[n, d]`` matrix of ``dtype``."""
    return spec.bytes_read(n, d, dtype)


def pack_predictor(
    rows: jax.Array,
    spec: Predictor,
    covariance: jax.Array | None = None,
    arrays: PackedArrays | None = None,
    numbers: jax.Array | None = None,
    shared: dict[Hashable, Any] | None = None,
) -> dict[str, jax.Array]:
    """Makes the predictor of a matrix: read everything once, keep little.

    Args:
      rows: ``[n, d]``, floating; its rows are what a product is predicted for. `jax.vmap` packs a stack of them.
      spec: what to keep.
      covariance: ``[d, d]``, the mean of ``x x'`` over inputs, of any scale; None where nothing is known of them.
      arrays: what the predictor holds, of this matrix; None takes ``spec.arrays``.
      numbers: int32 ``[n]``, which rows of the whole matrix these are; None for all of them as they lie.
      shared: what was made of these rows and this covariance for other predictors, which this one adds to; see
        ``Given.once``.

    Returns:
      Arrays as in :func:`packed_shapes`.

    Raises:
      ValueError: ``rows`` is not a floating matrix with at least one row and column, or the covariance is missing.
      TypeError: ``spec`` is no predictor.
    """
    if not isinstance(spec, Predictor):
        raise TypeError(f"predictor {spec!r} is unknown; expected an hx.Predictor, such as Quantized(8)")
    return dict(spec.pack(rows, spec.given("pack_predictor", rows, covariance, arrays, numbers, shared)))


def predict_scores(x: jax.Array, packed: PackedArrays, spec: Predictor, n: int) -> jax.Array:
    """The predicted ``x @ rows.T``, from the packed predictor alone.

    Args:
      x: ``[T, d]``, floating.
      packed: from :func:`pack_predictor` with the same ``spec``.
      spec: what was kept.
      n: rows of the matrix.

    Returns:
      f32 ``[T, n]``. NaN for rows that held a NaN or an infinity, and for every row of a token that holds one.

    Raises:
      ValueError: the predictor gives scores of another shape.
    """
    return predicted_scores(x, packed, spec, n)


# Tokens from which their scores are those of many.
_MANY = 64


def predict_scores_of_many(x: jax.Array, packed: PackedArrays, spec: Predictor, n: int) -> jax.Array:
    """As :func:`predict_scores`, spelled for hundreds of tokens; of fewer it is that."""
    if x.shape[0] < _MANY:
        return predict_scores(x, packed, spec, n)
    return spec.scores_of_many(x, packed, n).astype(jnp.float32)


def predictor_named(name: str) -> type[Predictor] | None:
    """The predictor class of this name, the one that was defined last; None where there is none."""
    found, kinds = None, [Predictor]
    while kinds:
        kinds = [sub for kind in kinds for sub in kind.__subclasses__()]
        found = next((kind for kind in reversed(kinds) if kind.__name__ == name), found)
    return found
