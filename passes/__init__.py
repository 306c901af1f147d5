"""Jaxpr in, jaxpr out: walk, provenance, detect, plan, pack, rewrite.

Nothing here knows how a platform runs a kernel; what is spliced in comes from ``hire_xform.lowering``.
"""
