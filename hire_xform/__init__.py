"""HiRE for JAX: decode with fewer weight bytes, by a compiler pass, without edits to the model.

    import hire_xform as hx

    step = hx.sparsify(decode_step)
    logits, cache = step(params, cache, token)

Method: HiRE, arXiv 2402.09360.
"""

from hire_xform.api import Sparsified, sparsify
from hire_xform.calibrating.run import calibrate
from hire_xform.calibration.calibration import Calibration, SiteCalibration
from hire_xform.call.sharing import pack
from hire_xform.call.stages import Traced
from hire_xform.comparing.comparison import Comparison
from hire_xform.comparing.run import compare
from hire_xform.config import Config, Dense, Ffn, Rule, Vocab, approximate, lossless
from hire_xform.errors import HireWarning, PackedMismatchError, TracedWeightsError
from hire_xform.lowering.kernels import cpu as _cpu_kernels
from hire_xform.lowering.kernels import gpu as _gpu_kernels
from hire_xform.lowering.kernels import tpu as _tpu_kernels
from hire_xform.lowering.predict.low_rank import LowRank
from hire_xform.lowering.predict.predictors import Predictor
from hire_xform.lowering.predict.projected import Projected
from hire_xform.lowering.predict.quantized import Quantized
from hire_xform.lowering.predict.staged import Staged
from hire_xform.lowering.primitives.da_top_k import da_top_k
from hire_xform.lowering.primitives.kernels import backends, register_kernel
from hire_xform.lowering.prove.goals import Nucleus, TopSet
from hire_xform.mesh_plan import Device, MeshPlan, MeshRow, ModelShapes, plan_mesh
from hire_xform.passes.ir.axis_rules import register_axis_rule
from hire_xform.passes.kinds import SiteKind, register_site_kind
from hire_xform.passes.pack.packed import Packed
from hire_xform.passes.plan.decisions import Plan, Refusal, Site
from hire_xform.train.topk_ffn import TopkFfn, TracedTopk, topk_ffn

__version__ = "0.1.0"

_cpu_kernels.install()
_tpu_kernels.install()
_gpu_kernels.install()

__all__ = [
    "Calibration",
    "Comparison",
    "Config",
    "Dense",
    "Device",
    "Ffn",
    "HireWarning",
    "LowRank",
    "MeshPlan",
    "MeshRow",
    "ModelShapes",
    "Nucleus",
    "Packed",
    "PackedMismatchError",
    "Plan",
    "Predictor",
    "Projected",
    "Quantized",
    "Refusal",
    "Rule",
    "Site",
    "SiteCalibration",
    "SiteKind",
    "Sparsified",
    "Staged",
    "TopSet",
    "TopkFfn",
    "Traced",
    "TracedTopk",
    "TracedWeightsError",
    "Vocab",
    "approximate",
    "backends",
    "calibrate",
    "compare",
    "da_top_k",
    "lossless",
    "pack",
    "plan_mesh",
    "register_axis_rule",
    "register_kernel",
    "register_site_kind",
    "sparsify",
    "topk_ffn",
]
