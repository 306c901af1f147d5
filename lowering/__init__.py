"""What is spliced into a program: predictors, selection, exact products of chosen rows, and the two subgraphs of them.

Nothing here knows the program it is spliced into. Everything is portable JAX: traceable, differentiable in the
activations, and usable under ``vmap``, ``scan``, ``jit`` and ``jax.export``.
"""

from hire_xform.lowering.certified import certified_logits
from hire_xform.lowering.certified_choice import ChoiceBlock, ChoiceOperands, Largest, certified_choice, groups_needed
from hire_xform.lowering.certified_ffn import CertifiedBlock, CertifiedOperands, certified_ffn, largest_norm, upper_gate
from hire_xform.lowering.cofiring import SKETCHED_FROM, cofiring
from hire_xform.lowering.cyclic import cyclic_ids, from_cyclic, return_candidates, to_cyclic
from hire_xform.lowering.da_top_k import da_top_k, da_top_k_p
from hire_xform.lowering.goals import Goal, Nucleus, TopSet, fewest_candidates
from hire_xform.lowering.intervals import Interval
from hire_xform.lowering.moment_bounds import UnitMoments, bounded_moments_bytes, pack_bounded_moments
from hire_xform.lowering.own_sparsity import (
    among_largest,
    kth_largest,
    moments,
    moments_bytes,
    over_groups,
    pack_moments,
)
from hire_xform.lowering.predictors import (
    LowRank,
    Packed,
    PredictorSpec,
    Projected,
    Quantized,
    pack_predictor,
    packed_shapes,
    predict_scores,
    predictor_bytes,
)
from hire_xform.lowering.promotion import usual_promotion
from hire_xform.lowering.proofs import Proof, pack_proof, proof_bytes, proof_shapes, scores_with_bounds
from hire_xform.lowering.proved_for import proved_for, proved_for_p
from hire_xform.lowering.readings import Reading, goal_of, openness
from hire_xform.lowering.record import record, record_p
from hire_xform.lowering.rows import combine_rows, select_rows_dot
from hire_xform.lowering.rungs import mark_rung, rung_p
from hire_xform.lowering.selection import Selection, choose, rungs, select
from hire_xform.lowering.statistics import (
    KL_SIZES,
    covariance,
    first_in_order,
    groups_wanted,
    open_units,
    proved_ranks,
    unit_ranks,
    unit_totals,
    vocab_ranks,
)
from hire_xform.lowering.subgraph import (
    UpProduct,
    ffn,
    ffn_bytes,
    group_scores,
    vocab_bytes,
    vocab_candidates,
    vocab_logits,
)
from hire_xform.lowering.top_groups import keep_top_groups

__all__ = [
    "KL_SIZES",
    "SKETCHED_FROM",
    "CertifiedBlock",
    "CertifiedOperands",
    "ChoiceBlock",
    "ChoiceOperands",
    "Goal",
    "Interval",
    "Largest",
    "LowRank",
    "Nucleus",
    "Packed",
    "PredictorSpec",
    "Projected",
    "Proof",
    "Quantized",
    "Reading",
    "Selection",
    "TopSet",
    "UnitMoments",
    "UpProduct",
    "among_largest",
    "bounded_moments_bytes",
    "certified_choice",
    "certified_ffn",
    "certified_logits",
    "choose",
    "cofiring",
    "combine_rows",
    "covariance",
    "cyclic_ids",
    "da_top_k",
    "da_top_k_p",
    "fewest_candidates",
    "ffn",
    "ffn_bytes",
    "first_in_order",
    "from_cyclic",
    "goal_of",
    "group_scores",
    "groups_needed",
    "groups_wanted",
    "keep_top_groups",
    "kth_largest",
    "largest_norm",
    "mark_rung",
    "moments",
    "moments_bytes",
    "open_units",
    "openness",
    "over_groups",
    "pack_bounded_moments",
    "pack_moments",
    "pack_predictor",
    "pack_proof",
    "packed_shapes",
    "predict_scores",
    "predictor_bytes",
    "proof_bytes",
    "proof_shapes",
    "proved_for",
    "proved_for_p",
    "proved_ranks",
    "record",
    "record_p",
    "return_candidates",
    "rung_p",
    "rungs",
    "scores_with_bounds",
    "select",
    "select_rows_dot",
    "to_cyclic",
    "unit_ranks",
    "unit_totals",
    "upper_gate",
    "usual_promotion",
    "vocab_bytes",
    "vocab_candidates",
    "vocab_logits",
    "vocab_ranks",
]
