"""What a site reads, and the seconds that its dense and its sparse form take by a machine's profile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hire_xform.passes.match.kinds import kind_of
from hire_xform.passes.match.matches import Match, Matrix
from hire_xform.passes.plan.forms import PackedPredictor
from hire_xform.passes.plan.profile import Profile, at
from hire_xform.passes.plan.settings import Settings
from hire_xform.passes.weights.products import Product, normal_form
from hire_xform.passes.weights.recipe import Transpose

# How often a size is taken, the bytes of its rows, and whether the dense form is run after all.
Taken = tuple[float, int, bool]
# A dense product of narrow weights that takes so many times as long as one of as many bytes in f32 widens them whole.
WIDENED = 1.9


def dense_seconds(match: Match, profile: Profile, tokens: int) -> float:
    """What the dense form takes in an execution, all its rows on one device."""
    return sum(_product_seconds(product, profile, tokens) for product in match.products)


def _product_seconds(product: Product, profile: Profile, tokens: int) -> float:
    form, spelling = dense_form(product), dense_spelling(product)
    size = product.nbytes
    if profile.platform == "cpu" and product.stored.itemsize == 1:
        # Entries of 4 bits take as long as those of 8: each is widened.
        size = max(size, math.prod(product.weight.shape))
    return size * at(profile.dense[form][spelling], tokens)


def dense_form(product: Product) -> str:
    """Which of a profile's ``FORMS`` a dense product is of."""
    used, made = np.dtype(product.weight.aval.dtype), np.dtype(product.out.aval.dtype)
    if product.stored.itemsize >= 4:
        return "f32"
    if product.stored.itemsize == 1:
        return "8 bits widened"
    if used != product.stored:
        return "16 bits widened"
    return "16 bits" if made == used else "16 bits to f32"


def dense_spelling(product: Product) -> str:
    """Which of a profile's ``SPELLINGS`` it is of: XLA's CPU backend runs some ten times as fast as others."""
    if any(isinstance(step, Transpose) for step in normal_form(product.rows_free().as_stored).steps):
        return "x @ w"
    dims, contracted = len(product.weight.shape), product.w_contract
    if contracted != tuple(range(dims - len(contracted), dims)):
        return "x @ w.T"
    return "w @ x" if product.weight_left else "x . rows"


def is_widened(match: Match, profile: Profile, tokens: int) -> bool:
    """Whether a product of weights that are stored narrowly takes as long as though they were widened first."""
    return any(
        p.stored.itemsize < 4
        and at(profile.dense[dense_form(p)][dense_spelling(p)], tokens) * profile.memory >= WIDENED
        for p in match.products
    )


@dataclass(frozen=True)
class Running:
    """A rewritten site on one device, as far as what it takes hangs on it.

    Attributes:
      match, settings: the site.
      profile: the machine's.
      tokens: of one execution.
      shared: whether they share the rows that are chosen.
      shards: over how many devices the site is.
      static: units that are always computed.
    """

    match: Match
    settings: Settings
    profile: Profile
    tokens: int
    shared: bool = True
    shards: int = 1
    static: int = 0

    @property
    def scored(self) -> int:
        """Rows that are chosen from."""
        return self.match.units // self.shards - self.static

    def seconds(self, predicted: int, taken: Sequence[Taken]) -> float:
        """What an execution takes.

        Args:
          predicted: bytes of the predictor, and of all that is read besides rows.
          taken: the sizes that may be taken.
        """
        profile = self.profile
        each = profile.choosing + (profile.bounding if self.settings.certify else 0.0)
        each = each if kind_of(self.match).chooses else 0.0
        time = profile.fixed + self.predictor_seconds(predicted) + self.tokens * self.scored * each
        for share, size, dense in taken:
            time += share * self.rows_seconds(size)
            if dense:
                time += share * dense_seconds(self.match, profile, self.tokens) / self.shards
        return time

    def predictor_seconds(self, predicted: int) -> float:
        """What the scores of all rows take; so many bytes are read for them, norms and scales too."""
        arrays = self.predictor_arrays()
        others = predicted - sum(nbytes for _, nbytes in arrays)
        time = max(0, others) / self.profile.memory
        time += sum(nbytes * at(self.profile.scores[kind], self.tokens) for kind, nbytes in arrays)
        return time + len(self._predictors()) * self.scored * at(self.profile.score_rows, self.tokens)

    def predictor_arrays(self) -> list[tuple[str, int]]:
        """The matrices of its predictors: which of a profile's ``SCORES`` their products are, and their bytes."""
        fine = " fine" if self.settings.certify or self.settings.spec.fine else ""
        few_bits = {np.dtype(np.int8): f"int8{fine}", np.dtype(np.uint8): f"int4{fine}"}
        found = []
        for matrix, predictor in self._predictors():
            for share, kept in predictor.reads(self.scored, matrix.columns, matrix.dtype):
                dtype = np.dtype(kept.dtype)
                if len(kept.shape) > 1:
                    wide = "16 bits" if dtype.itemsize == 2 else "f32"
                    found.append((few_bits.get(dtype, wide), math.ceil(share * kept.size * dtype.itemsize)))
        return found

    def _predictors(self) -> list[tuple[Matrix, PackedPredictor]]:
        products = kind_of(self.match).forms(self.match, self.settings).products
        held = zip(self.match.matrices, (forms.predictor for forms in products), strict=True)
        return [(matrix, predictor) for matrix, predictor in held if isinstance(predictor, PackedPredictor)]

    def rows_seconds(self, size: float) -> float:
        """What so many bytes of rows take that are computed exactly."""
        kind, matrices = kind_of(self.match), self.match.matrices
        row_bytes = [matrix.row_nbytes for matrix in matrices]
        count = size / sum(row_bytes)
        forms = kind.forms(self.match, self.settings)
        time, group = 0.0, self.settings.group_size
        for number, (matrix, nbytes) in enumerate(zip(matrices, row_bytes, strict=True)):
            step = "dot" if number < len(forms.up) else "sum"
            wide = "f32" if matrix.product.stored.itemsize >= 4 else "16 bits"
            sharing = self.tokens if self.shared else 1
            time += self.profile.rows[f"{step} {wide}"].seconds(count, nbytes, sharing, kind.gathers, group)
        # A proof multiplies the rows twice, by their values and by their magnitudes.
        time *= 2 if kind.gathers and self.settings.certify else 1
        return time + count * self.profile.picking

    def why_slower(self, excess: float, taken: Sequence[Taken]) -> str:
        """What a report says of why a site that reads less on a CPU would not be faster; empty where bytes say it.

        Args:
          excess: by how many seconds it is slower than the dense form, on one device.
          taken: as in :meth:`seconds`.
        """
        profile, spec = self.profile, self.settings.spec
        if profile.platform != "cpu":
            return ""
        few = [(kind, nbytes) for kind, nbytes in self.predictor_arrays() if kind.startswith("int")]
        narrow = sum(nbytes * (at(profile.scores[kind], self.tokens) - 1 / profile.memory) for kind, nbytes in few)
        if few and narrow > excess:
            kind = max(few, key=lambda one: one[1])[0]
            other = f"; {spec.instead}" if spec.instead else ""
            whose = "" if profile.kernels else "XLA's "
            return (
                f": on this CPU ({profile.name}) {whose}products of {kind[3]} bits run at {profile.speed(kind):.2g} of "
                f"the speed at which the dense product reads{other}"
            )
        rows = sum(share * size for share, size, _ in taken) / profile.memory
        more = sum(share * self.rows_seconds(size) for share, size, _ in taken) - rows
        if rows and narrow + more > excess:
            return f": rows chosen one by one cost {1.0 + more / rows:.0f} times what they cost in a dense product"
        return ""


def bytes_read(match: Match, settings: Settings, computed: int, shards: int = 1, static: int = 0) -> tuple[int, int]:
    """Bytes per execution on one device: of the predictor (and norms), and of the rows computed exactly.

    Args:
      match, settings: the site.
      computed: rows computed exactly, those that always are included.
      shards: over how many devices it is.
      static: units that are always computed.
    """
    n = match.units // shards - static
    held = zip(match.matrices, kind_of(match).forms(match, settings).products, strict=True)
    predicted = sum(form.nbytes(n, matrix.columns, matrix.dtype) for matrix, forms in held for form in forms)
    return predicted, computed * sum(matrix.row_nbytes for matrix in match.matrices)
