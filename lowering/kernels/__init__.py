"""Native versions of the steps that read memory, by platform: they take the place of what XLA makes of a step.

In: the registry of ``primitives``. A platform without kernels, a build without a
compiler and a JAX without Pallas run the portable form.
"""
