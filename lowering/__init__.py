"""What is spliced into a program: predictors, selection, exact products of chosen rows, and the subgraphs of them.

In reading order: ``xla``, ``primitives``, ``prove``, ``predict``, ``engine``, ``measure``, ``kernels``; each imports
only those before it. Nothing here knows the program it is spliced into. Everything has a form in portable JAX, which is
traceable, differentiable in the activations, and usable under ``vmap``, ``scan``, ``jit`` and ``jax.export``.
"""
