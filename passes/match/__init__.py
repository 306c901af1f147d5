"""Finds feed-forward blocks and vocabulary projections: ``Detection``, of matches and of rejections with a reason.

In: a graph with its products. Structure proposes, a numeric probe disposes. Knows no sizes, settings or platforms.
"""
