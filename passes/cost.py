"""What a site reads, and what it costs besides reading."""

from __future__ import annotations

from typing import Any

import numpy as np

from hire_xform.lowering import (
    bounded_moments_bytes,
    ffn_bytes,
    moments_bytes,
    predictor_bytes,
    proof_bytes,
    vocab_bytes,
)
from hire_xform.passes.detect import FfnMatch, VocabMatch
from hire_xform.passes.forms import Proving, down_forms, up_forms
from hire_xform.passes.settings import Ffn, Vocab

# A row read out of order costs this many times what it costs in a streamed product. Measured by
# `benchmarks/kernels.py` on a CPU; accelerators read rows of a kilobyte or more about as fast as anything else.
ROW_COST = {"cpu": 1.5}
# What predicting and selecting costs besides reading, as the bytes a dense product would read in that time.
FIXED_BYTES = {"cpu": 1 << 20, "gpu": 4 << 20, "tpu": 4 << 20}


# Where a product that widens its weight has the whole of it widened first, at every call: the dense form then costs as
# much as one of wide weights at least (six times as much, bfloat16 to f32 on two cores). Others widen as they multiply.
WIDENS_FIRST = frozenset({"cpu"})


def dense_cost(match: VocabMatch | FfnMatch, platform: str) -> int:
    """What the dense form costs in an execution, as bytes read."""
    first = platform in WIDENS_FIRST
    return sum(p.widened_nbytes if first else p.nbytes for p in match.products)


def bytes_read(
    match: VocabMatch | FfnMatch,
    settings: Vocab | Ffn,
    count: int,
    tokens: int,
    computed: int,
    shards: int = 1,
    static: int = 0,
) -> tuple[int, int]:
    """Bytes per execution on one device: of the predictor (and norms), and of the rows computed exactly.

    Args:
      match, settings: the site.
      count: rows, or groups of units, that each token may have of those predicted.
      tokens: of one execution.
      computed: rows computed exactly, those that always are included.
      shards: over how many devices it is.
      static: units that are always computed.
    """
    spec = settings.spec
    if isinstance(match, VocabMatch):
        product = match.product
        dtype = product.weight.aval.dtype
        total = vocab_bytes(tokens, product.width // shards, product.contracted, dtype, spec, candidates=count)
        predicted = total - computed * product.contracted * np.dtype(dtype).itemsize
        predicted += _proof_bytes(settings, product.width // shards, product.contracted, dtype)
        return predicted, computed * product.contracted * product.stored.itemsize
    assert isinstance(settings, Ffn)
    region, down = match.region, match.down
    forms = up_forms(region, settings)
    ups = [
        (up.product.contracted, up.product.weight.aval.dtype, spec if spec in read or Proving(spec) in read else None)
        for up, read in zip(region.ups, forms, strict=True)
    ]
    total = ffn_bytes(
        tokens,
        match.units // shards,
        ups,
        down.width,
        down.weight.aval.dtype,
        active=count,
        group_size=settings.group_size,
        norms="norms" in down_forms(region, settings),
        static=static,
    )
    total += sum(moments_bytes(up[0]) for up, read in zip(ups, forms, strict=True) if "moments" in read)
    total += sum(bounded_moments_bytes(up[0]) for up, read in zip(ups, forms, strict=True) if "bounded_moments" in read)
    total += sum(
        _proof_bytes(settings, match.units // shards, d, dtype) for d, dtype, predicted in ups if predicted is not None
    )
    rows = sum(d * np.dtype(dtype).itemsize for d, dtype, _ in ups)
    rows += down.width * np.dtype(down.weight.aval.dtype).itemsize
    stored = sum(up.product.contracted * up.product.stored.itemsize for up in region.ups)
    return total - computed * rows, computed * (stored + down.width * down.stored.itemsize)


def _proof_bytes(settings: Vocab | Ffn, n: int, d: int, dtype: Any) -> int:
    """What a proof reads more than its predictor alone; nothing where none is asked for."""
    if not settings.certify:
        return 0
    return proof_bytes(n, d, settings.spec, dtype) - predictor_bytes(n, d, settings.spec, dtype)
