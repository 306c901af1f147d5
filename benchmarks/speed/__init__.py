"""The speed of one decode step and its parts, ours and everybody's: one harness, one table, one plot.

``python -m benchmarks.speed --help``, from the root of the checkout.

- ``cases``: the shapes, their weights and inputs, and the model, which every framework runs with its own products.
- ``peers``: one module for each that takes part.
- ``timing``: rounds of calls, medians and quartiles.
- ``noise``: how busy others kept the machine.
- ``worker``: a process of one framework. ``driver``: has them take turns.
- ``report``: table, Markdown, JSON, plot.
"""
