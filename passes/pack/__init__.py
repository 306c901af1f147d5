"""Compresses weights once: the packed forms that sites read, and ``Packed``, which stands where the weights stood.

In: ``PackKey`` and leaves. Out: arrays. Knows nothing of programs.
"""
