"""Which values are weights, how each is computed from a leaf, and the products of data with them.

In: a graph and its operands that are weights. Out: ``Origin`` (a ``Recipe`` and stack indices), ``Product``,
``Lookup``. Knows nothing of blocks or vocabularies.
"""
