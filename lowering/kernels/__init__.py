"""Native versions of the steps that read memory, by platform: they take the place of what XLA makes of a step.

In: the registry of ``primitives``. A platform without kernels, and a build without a compiler, run the portable form.
"""
