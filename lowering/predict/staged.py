"""``Staged``: few bits of all rows first, then more of the rows that can still matter.

Each stage is a predictor that proves. The first one is of all rows. What is read of the logits then leaves most rows
out (``lowering/engine/narrowing.py``), and the next stage reads only those that are open: how many is known while the
program runs. So bits are spent where they decide. What is proved is what each stage proves for itself: of a row's
bounds the closer ones are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from hire_xform.lowering.predict.predictors import Given, PackedArrays, Predictor, predictor_named
from hire_xform.lowering.xla.in_line import in_line

__all__ = ["Staged"]


@dataclass(frozen=True, kw_only=True)
class Staged(Predictor):
    """Predictors that prove, one after the other: the first for all rows, each other for those that are still open.

    ``Staged((LowRank(0.5625, bits=4), Quantized(8)))`` reads few bits of all rows, and eight of the columns of those
    that these leave open. For certified vocabulary projections; where nothing is proved, the first one predicts.
    """

    # At least two predictors that prove.
    predictors: tuple[Predictor, ...] = field(kw_only=False)
    # Of each after the first the share of the rows that it is expected to read, as a calibration measured it: what
    # bytes and times are reckoned with. It changes nothing else.
    shares: tuple[float, ...] | None = field(default=None, compare=False, repr=False)

    proves = True

    def __post_init__(self) -> None:
        """Refuses what is no sequence of predictors that prove."""
        given = self.predictors
        stages = tuple(_made(stage) for stage in given) if isinstance(given, (tuple, list)) else ()
        if len(stages) < 2 or not all(isinstance(s, Predictor) and s.proves and len(s.stages) == 1 for s in stages):
            raise ValueError(
                f"Staged: predictors={given!r}; expected two or more predictors that prove, such as "
                "(LowRank(0.5625, bits=4), Quantized(8)), none of them in stages itself"
            )
        if any(stage.arrays for stage in stages):
            raise ValueError(f"Staged: predictors={given!r}; expected predictors that hold no arrays of their own")
        object.__setattr__(self, "predictors", stages)
        if self.shares is not None:
            shares = tuple(self.shares)
            if len(shares) != len(stages) - 1 or not all(0.0 <= share <= 1.0 for share in shares):
                raise ValueError(
                    f"Staged: shares={self.shares!r}; expected for each stage after the first a share of the rows, "
                    "from 0 to 1"
                )
            object.__setattr__(self, "shares", shares)

    @property
    def stages(self) -> tuple[Predictor, ...]:
        """The predictors, in their order."""
        return self.predictors

    @property
    def takes_inputs(self) -> bool:  # type: ignore[override]
        """Whether a stage is packed with second moments of the inputs."""
        return any(stage.takes_inputs for stage in self.stages)

    @property
    def needs_inputs(self) -> str:  # type: ignore[override]
        """What a stage can't do without."""
        return next((stage.needs_inputs for stage in self.stages if stage.needs_inputs), "")

    @property
    def in_place(self) -> frozenset[str]:  # type: ignore[override]
        """Those of the first stage, and of all stages under their numbers."""
        numbered = (f"{number}.{name}" for number, stage in enumerate(self.stages) for name in stage.in_place)
        return self.stages[0].in_place | frozenset(numbered)

    @property
    def fine(self) -> bool:  # type: ignore[override]
        """That of the first stage, which predicts where nothing is proved."""
        return self.stages[0].fine

    @property
    def bits(self) -> int | None:  # type: ignore[override]
        """Those of the first stage."""
        return self.stages[0].bits

    def measured(self, opened: Sequence[float]) -> Staged:
        """With the shares that were measured."""
        return dataclasses.replace(self, shares=tuple(min(1.0, float(share)) for share in opened))

    def part(self, proof: PackedArrays, number: int) -> PackedArrays:
        """The arrays of one stage's proof."""
        own = f"{number}."
        return {name.removeprefix(own): array for name, array in proof.items() if name.startswith(own)}

    def shapes(self, n: int, d: int, dtype: jax.typing.DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """Those of the first stage."""
        return self.stages[0].shapes(n, d, dtype)

    def pack(self, rows: jax.Array, given: Given) -> PackedArrays:
        """That of the first stage."""
        return self.stages[0].pack(rows, given)

    @in_line()
    def scores(self, x: jax.Array, packed: PackedArrays, n: int) -> jax.Array:
        """Those of the first stage."""
        return self.stages[0].scores(x, packed, n)

    def scores_of_many(self, x: jax.Array, packed: PackedArrays, n: int) -> jax.Array:
        """Those of the first stage."""
        return self.stages[0].scores_of_many(x, packed, n)

    def proof_shapes(self, n: int, d: int, dtype: jax.typing.DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """Those of all stages, each under its number."""
        return _numbered(stage.proof_shapes(n, d, dtype) for stage in self.stages)

    def pack_proof(self, rows: jax.Array, given: Given) -> PackedArrays:
        """Those of all stages, each under its number."""

        def own(stage: Predictor) -> Given:
            return given if stage.takes_inputs else dataclasses.replace(given, inputs=None)

        return _numbered(stage.pack_proof(rows, own(stage)) for stage in self.stages)

    @in_line()
    def bounds(self, x: jax.Array, proof: PackedArrays, input_bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The closest of all stages, of all rows: what is known at the end, of every row as if it were open."""
        scores, upper, exact_error = self.stages[0].bounds(x, self.part(proof, 0), input_bits)
        for number, stage in enumerate(self.stages[1:], 1):
            own, bound, error = stage.bounds(x, self.part(proof, number), input_bits)
            closer = bound - own <= upper - scores
            scores, upper = jnp.where(closer, own, scores), jnp.where(closer, bound, upper)
            exact_error = jnp.minimum(exact_error, error)
        return scores, upper, exact_error

    def settings(self) -> dict[str, Any]:
        """Each stage by the name of its class and its own settings."""
        told: dict[str, Any] = {"predictors": [{"predictor": type(s).__name__, **s.settings()} for s in self.stages]}
        return told if self.shares is None else {**told, "shares": list(self.shares)}


def _numbered(parts: Any) -> dict[str, Any]:
    return {f"{number}.{name}": value for number, part in enumerate(parts) for name, value in part.items()}


def _made(stage: Any) -> Any:
    """A predictor of what :meth:`Staged.settings` says of one; what it is none of as it is."""
    if not isinstance(stage, Mapping) or (kind := predictor_named(str(stage.get("predictor")))) is None:
        return stage
    return kind(**{name: value for name, value in stage.items() if name != "predictor"})
