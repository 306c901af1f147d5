"""What a program can be lowered for, as JAX names it."""

from __future__ import annotations

from collections.abc import Sequence

from hire_xform.lowering.primitives.kernels import PLATFORMS
from hire_xform.lowering.primitives.proved_for import lowered_for
from hire_xform.passes.plan.decisions import Plan
from hire_xform.passes.prove.certifiable import platforms_proved


def platforms_of(plan: Plan) -> tuple[str, ...]:
    """The platforms for which all certified sites of a plan are proved; all there are where none is certified."""
    certified = [d for d in plan.decisions if d.marks and d.settings.certify]
    proved = [lowered_for(platforms_proved(d.match, d.input_bits)) for d in certified]
    return tuple(platform for platform in PLATFORMS if all(platform in one for one in proved))


def checked_platforms(platforms: Sequence[str] | None) -> tuple[str, ...] | None:
    """Platforms to lower for, which JAX knows; what it says of others depends on which devices are here."""
    if not platforms:
        return None
    unknown = [name for name in platforms if name not in PLATFORMS]
    if isinstance(platforms, str) or unknown:
        raise ValueError(
            f"lower: lowering_platforms={platforms!r}; expected a sequence of {', '.join(PLATFORMS)}"
            + ("; NVIDIA's GPUs are cuda" if "gpu" in (*unknown, platforms) else "")
        )
    return tuple(platforms)
