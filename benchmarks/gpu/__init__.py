"""What a GPU makes of the library: ``python -m benchmarks.gpu`` checks every kernel, and times a model and its parts.

``__main__.py`` has the command line and the order of work, ``sizes.py`` how large things are, ``checks.py`` the kernels
against their portable forms, ``model.py`` and ``forms.py`` the model and what it is run as, ``lines.py`` a line of the
table for each of these, ``pool.py`` the threads that compile, ``timing.py`` clock and profiler, ``run.py`` the table.
"""
