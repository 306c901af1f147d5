"""Jaxpr in, jaxpr out.

In reading order: ``ir``, ``weights``, ``match``, ``prove``, ``plan``, ``pack``, ``rewrite``, ``measure``, ``kinds``;
each imports only those before it. Nothing here knows the kernels of a platform, files or the command line.
"""
