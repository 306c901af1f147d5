"""A jaxpr as a graph of values with stable paths, and what single equations do to the axes and elements of arrays.

In: a closed jaxpr. Out: ``Graph``. ``compat`` is the one module that knows JAX versions. Knows nothing of weights.
"""
